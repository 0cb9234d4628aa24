/* What the functions share that MindSpore's `ops.Custom` (aot) calls.
 *
 * Each has MindSpore's signature; `params` holds the inputs, then the outputs. What it returns is DONE or one of the
 * errors after it, which MindSpore raises with the number. */
#ifndef MINDFORMERS_IXC_OPERATION_H
#define MINDFORMERS_IXC_OPERATION_H

#include <stdint.h>

/* Elements of a weight from which on it pays to share the work among threads. */
#define MIN_SHARED 131072

/* BAD_PLACE: outside a cache or table, or more queries than keys; BAD_SHAPE: inputs that do not belong together */
enum { DONE = 0, NO_MEMORY = 1, BAD_PLACE = 2, BAD_SHAPE = 3 };

#define KERNEL(name) \
    int name(int count, void **params, int *ndims, int64_t **shapes, const char **dtypes, void *stream, void *extra)
#define UNUSED (void)count, (void)ndims, (void)dtypes, (void)stream, (void)extra

/* Rows and width of parameter i, all axes but the last taken together. */
static inline int64_t rows_of(const int *ndims, int64_t **shapes, int i) {
    int64_t rows = 1;
    for (int axis = 0; axis + 1 < ndims[i]; ++axis) rows *= shapes[i][axis];
    return rows;
}

static inline int64_t width_of(const int *ndims, int64_t **shapes, int i) { return shapes[i][ndims[i] - 1]; }

/* Numbers of parameter i. */
static inline int64_t numbers_of(const int *ndims, int64_t **shapes, int i) {
    int64_t numbers = 1;
    for (int axis = 0; axis < ndims[i]; ++axis) numbers *= shapes[i][axis];
    return numbers;
}

#endif
