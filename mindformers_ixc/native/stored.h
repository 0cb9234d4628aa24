/* Weights as they are stored, and what both ways of multiplying by them share; quantised.c says what their forms are. */
#ifndef MINDFORMERS_IXC_STORED_H
#define MINDFORMERS_IXC_STORED_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define HAS_AVX2_FORM 1
#else
#define HAS_AVX2_FORM 0
#endif

/* Weights of four bits that have a scale and a zero together. */
#define GROUP 128

enum { INT4, INT8, BF16, F16 };

typedef struct {
    int form;
    const uint8_t *data;
    const void *scales;
    const uint8_t *zeros;
    int64_t in, out, row_bytes;
} Weight;

static inline float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float of_bf16(uint16_t half) { return of_bits((uint32_t)half << 16); }

/* Moved up by 13 bits, its sign by 16, a float16 is a float32 whose exponent is 112 too small; so are its smallest
 * numbers, which have none. */
static inline float of_finite_f16(uint16_t half) {
    return of_bits(((uint32_t)(int16_t)half << 13) & 0x8fffe000) * 0x1p112f;
}

/* The size of a float16, as bits, from which on it is no finite number. */
#define F16_INFINITE 0x7c00

/* The same of any float16: what is no finite number stays none. */
static inline float of_f16(uint16_t half) {
    const float value = of_finite_f16(half);
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return of_bits(bits | ((half & 0x7fff) >= F16_INFINITE ? 0x7f800000 : 0));
}

static inline uint16_t word_at(const uint8_t *bytes, int64_t i) {
    uint16_t word;
    memcpy(&word, bytes + 2 * i, sizeof word);
    return word;
}

/* Whether the processor has what the forms marked AVX2 need, and they are not switched off. */
int has_avx2(void) __attribute__((visibility("hidden")));

/* Weights begin .. begin + count of row o as float32; of four bits whole groups. */
void widen(const Weight *weight, int64_t o, int64_t begin, int64_t count, float *to) __attribute__((visibility("hidden")));

/* x (N, F) times the weight, y (N, O), for many rows; what KERNELs return. */
int many_rows(const float *x, const Weight *weight, float *y, int64_t rows) __attribute__((visibility("hidden")));

#endif
