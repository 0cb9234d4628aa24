/* What kernels share that multiply by oneDNN's product or by OpenMP's threads: all of training's, and those of many
 * positions. */
#ifndef MINDFORMERS_IXC_PRODUCTS_H
#define MINDFORMERS_IXC_PRODUCTS_H

#include <math.h>
#include <omp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "operation.h"
#include "vectorised.h"

/* C (m, n) = alpha * op(A) op(B) + beta * C, rows behind one another; the signature of oneDNN's dnnl_sgemm. */
typedef int (*product_t)(char, char, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t,
                         float, float *, int64_t);

extern product_t multiply __attribute__((visibility("hidden")));

/* A kernel under another name: MindSpore keeps one gradient for each name, whatever the inputs are. */
#define ALSO_NAMED(name, kernel) \
    KERNEL(name) { return kernel(count, params, ndims, shapes, dtypes, stream, extra); }

/* What a kernel returns that needs it before `use_product` was called, beside the errors of operation.h. */
#define NO_PRODUCT 10

/* One kernel at a time has the threads: MindSpore starts kernels that do not wait for each other at the same time. */
extern pthread_mutex_t threads_are_free __attribute__((visibility("hidden")));

/* Operations from which on it pays to share a kernel's work among threads. */
#define MIN_OPERATIONS 1000000

static inline int threads_for(double operations) { return operations < MIN_OPERATIONS ? 1 : omp_get_max_threads(); }

#define TAKE_THREADS(threads) if ((threads) > 1) pthread_mutex_lock(&threads_are_free)
#define GIVE_THREADS(threads) if ((threads) > 1) pthread_mutex_unlock(&threads_are_free)

/* Where part `number` of `parts` of `count` things begins, in whole groups; the next part's begin is its end. */
static inline int64_t begin_of(int64_t count, int64_t group, int parts, int number) {
    const int64_t begin = (count + group - 1) / group * number / parts * group;
    return begin < count ? begin : count;
}

/* For each part of `count` things, in a thread of its own: begin, end. */
#define SHARED(threads, count, group, begin, end) \
    _Pragma("omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)") \
    for (int part = 0; part < (threads); ++part) \
        for (int64_t begin = begin_of(count, group, threads, part), end = begin_of(count, group, threads, part + 1); \
             begin < end; begin = end)

/* The next run of positions in begin .. end whose factor is not 0: its begin, and its end in `stop`. */
static inline int64_t next_run(const float *factor, int64_t begin, int64_t end, int64_t *stop) {
    while (begin < end && factor[begin] == 0.0f) ++begin;
    *stop = begin;
    while (*stop < end && factor[*stop] != 0.0f) ++*stop;
    return begin;
}

/* exp(x) of what is at most 80; below -80 that of -80, for vectorised exp() is slow where its result is all but 0. */
static inline float exp_of(float x) { return expf(x > -80.0f ? x : -80.0f); }

#endif
