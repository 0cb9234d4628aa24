/* The signature that MindSpore calls a kernel by, and what a kernel asks of its parameters. */
#ifndef MINDFORMERS_IXC_KERNELS_H
#define MINDFORMERS_IXC_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { DONE = 0, NO_MEMORY = 1, BAD_PLACE = 2 };    /* BAD_PLACE: outside the cache, or more queries than keys */

#define KERNEL(name) \
    int name(int count, void **params, int *ndims, int64_t **shapes, const char **dtypes, void *stream, void *extra)
#define UNUSED (void)count, (void)ndims, (void)dtypes, (void)stream, (void)extra

/* Rows and width of parameter i, all axes but the last taken together. */
static inline int64_t rows_of(int *ndims, int64_t **shapes, int i) {
    int64_t rows = 1;
    for (int axis = 0; axis + 1 < ndims[i]; ++axis) rows *= shapes[i][axis];
    return rows;
}

static inline int64_t width_of(int *ndims, int64_t **shapes, int i) { return shapes[i][ndims[i] - 1]; }

/* exp(x) of what is at most 80; below -80 that of -80, for vectorised exp() is slow where its result is all but 0. */
static inline float exp_of(float x) { return expf(x > -80.0f ? x : -80.0f); }

#endif
