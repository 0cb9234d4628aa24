/* Marks a function to be compiled for several kinds of processor, the best of which is chosen when it is loaded. */
#ifndef MINDFORMERS_IXC_VECTORISED_H
#define MINDFORMERS_IXC_VECTORISED_H

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(NO_AVX512) /* to measure without it */
#define VECTORISED __attribute__((target_clones("avx2,fma", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define VECTORISED
#endif

#endif
