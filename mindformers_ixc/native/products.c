/* Linears and Partial LoRA for training on the CPU, with their gradients, called by MindSpore's `ops.Custom` (aot) as
 * operation.h says.
 *
 * The products are those of the oneDNN that MindSpore brings (`use_product`): one thread multiplies one slab, and the
 * slabs are shared out here, so that whatever goes with a product is done while its result is in the cache.
 */
#include "products.h"

product_t multiply;
pthread_mutex_t threads_are_free = PTHREAD_MUTEX_INITIALIZER;

/* Tells where the product is; kernels that need it return NO_PRODUCT before. */
void use_product(void *function) { multiply = (product_t)function; }

/* ---- Linears ---- */

/* x (N, F), weight (O, F), maybe bias (O) -> x weight^T + bias (N, O) */
KERNEL(train_linear) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    const int has_bias = count == 4;
    const float *x = params[0], *weight = params[1], *bias = params[2];
    float *y = params[count - 1];
    const int64_t rows = shapes[0][0], in = shapes[0][1], out = shapes[1][0];
    const int threads = threads_for(2.0 * (double)rows * (double)in * (double)out);
    TAKE_THREADS(threads);
    SHARED(threads, rows, 16, begin, end) {
        if (has_bias)
            for (int64_t r = begin; r < end; ++r) memcpy(y + r * out, bias, sizeof(float) * (size_t)out);
        multiply('N', 'T', end - begin, out, in, 1.0f, x + begin * in, in, weight, in, has_bias ? 1.0f : 0.0f,
                 y + begin * out, out);
    }
    GIVE_THREADS(threads);
    return DONE;
}

ALSO_NAMED(train_linear_bias, train_linear)

/* dy (N, O), weight (O, F) -> dy weight (N, F) */
KERNEL(times_weight) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    const float *dy = params[0], *weight = params[1];
    float *dx = params[2];
    const int64_t rows = shapes[0][0], out = shapes[0][1], in = shapes[1][1];
    const int threads = threads_for(2.0 * (double)rows * (double)in * (double)out);
    TAKE_THREADS(threads);
    SHARED(threads, rows, 16, begin, end)
        multiply('N', 'N', end - begin, in, out, 1.0f, dy + begin * out, out, weight, in, 0.0f, dx + begin * in, in);
    GIVE_THREADS(threads);
    return DONE;
}

/* dy (N, O), x (N, F) -> dy^T x (O, F) */
KERNEL(weight_gradient) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    const float *dy = params[0], *x = params[1];
    float *dw = params[2];
    const int64_t rows = shapes[0][0], out = shapes[0][1], in = shapes[1][1];
    const int threads = threads_for(2.0 * (double)rows * (double)in * (double)out);
    TAKE_THREADS(threads);
    if (out >= in) {
        SHARED(threads, out, 16, begin, end)
            multiply('T', 'N', end - begin, in, rows, 1.0f, dy + begin, out, x, in, 0.0f, dw + begin * in, in);
    } else {
        SHARED(threads, in, 16, begin, end)
            multiply('T', 'N', out, end - begin, rows, 1.0f, dy, out, x + begin, in, 0.0f, dw + begin, in);
    }
    GIVE_THREADS(threads);
    return DONE;
}

/* ---- Partial LoRA ---- */

/* Dropout of the pair's input: SeededDropout of models/dropout.py, whose integers wrap around. */
typedef struct {
    const int32_t *noise, *columns; /* (N), (F); NULL without dropout */
    uint32_t first, second;
    int32_t limit;
    float kept;
} dropout_t;

/* The dropout from `params`: noise (N, 1), columns (1, F), numbers (3) int32: two multipliers and the limit, kept (1).
 * Without dropout there is one input less of each. */
static dropout_t dropout_of(void **params, int there) {
    dropout_t dropout = {NULL, NULL, 0, 0, 0, 1.0f};
    if (there) {
        const int32_t *numbers = params[2];
        dropout.noise = params[0], dropout.columns = params[1];
        dropout.first = (uint32_t)numbers[0], dropout.second = (uint32_t)numbers[1], dropout.limit = numbers[2];
        dropout.kept = *(const float *)params[3];
    }
    return dropout;
}

/* to = from, dropped, added to what is there if `adds`; columns begin .. end of one position. */
VECTORISED static void drop(const float *from, float *to, int64_t begin, int64_t end, int32_t noise, dropout_t dropout,
                            int adds) {
    for (int64_t i = begin; i < end; ++i) {
        uint32_t bits = (uint32_t)(noise ^ dropout.columns[i]) * dropout.first;
        bits = (bits ^ (uint32_t)((int32_t)bits >> 15)) * dropout.second;
        const float value = (int32_t)bits >= dropout.limit ? from[i - begin] * dropout.kept : 0.0f;
        to[i - begin] = adds ? to[i - begin] + value : value;
    }
}

/* Positions of a run that are dropped into a buffer at once. */
#define AT_ONCE 256

VECTORISED static void scale_rows(float *x, const float *factor, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; ++i) x[r * width + i] *= factor[r];
}

/* x (N, F), weight (O, F), A (r, F), B (O, r), factor (N, 1), maybe the dropout -> y (N, O), side (N, r):
 * side = factor * dropout(x) A^T, y = x weight^T + side B^T; positions whose factor is 0 take no part in the pair. */
KERNEL(partial_lora) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    const float *x = params[0], *weight = params[1], *first = params[2], *second = params[3], *factor = params[4];
    const dropout_t dropout = dropout_of(params + 5, count == 11);
    float *y = params[count - 2], *side = params[count - 1];
    const int64_t rows = shapes[0][0], in = shapes[0][1], out = shapes[1][0], rank = shapes[2][0];
    const int threads = threads_for(2.0 * (double)rows * (double)in * (double)out);
    int result = DONE;
    TAKE_THREADS(threads);
    SHARED(threads, rows, 16, begin, end) {
        float *dropped = dropout.noise ? malloc(sizeof(float) * (size_t)(AT_ONCE * in)) : NULL;
        if (dropout.noise && !dropped) {
            result = NO_MEMORY;
            continue;
        }
        multiply('N', 'T', end - begin, out, in, 1.0f, x + begin * in, in, weight, in, 0.0f, y + begin * out, out);
        memset(side + begin * rank, 0, sizeof(float) * (size_t)((end - begin) * rank));
        int64_t stop;
        for (int64_t at = next_run(factor, begin, end, &stop); at < stop; at = next_run(factor, stop, end, &stop)) {
            if (stop - at > AT_ONCE) stop = at + AT_ONCE;
            const float *from = x + at * in;
            if (dropped) {
                for (int64_t r = at; r < stop; ++r)
                    drop(x + r * in, dropped + (r - at) * in, 0, in, dropout.noise[r], dropout, 0);
                from = dropped;
            }
            multiply('N', 'T', stop - at, rank, in, 1.0f, from, in, first, in, 0.0f, side + at * rank, rank);
            scale_rows(side + at * rank, factor + at, stop - at, rank);
            multiply('N', 'T', stop - at, out, rank, 1.0f, side + at * rank, rank, second, rank, 1.0f, y + at * out,
                     out);
        }
        free(dropped);
    }
    GIVE_THREADS(threads);
    return result;
}

ALSO_NAMED(partial_lora_dropped, partial_lora)

/* dy (N, O), weight, A, B, factor, maybe the dropout -> dx (N, F), dside (N, r):
 * dside = factor * dy B, dx = dy weight + dropout(dside A). */
KERNEL(partial_lora_back) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    const float *dy = params[0], *weight = params[1], *first = params[2], *second = params[3], *factor = params[4];
    const dropout_t dropout = dropout_of(params + 5, count == 11);
    float *dx = params[count - 2], *dside = params[count - 1];
    const int64_t rows = shapes[0][0], out = shapes[0][1], in = shapes[1][1], rank = shapes[2][0];
    const int threads = threads_for(2.0 * (double)rows * (double)in * (double)out);
    int result = DONE;
    TAKE_THREADS(threads);
    SHARED(threads, rows, 16, begin, end) {
        float *part = dropout.noise ? malloc(sizeof(float) * (size_t)(AT_ONCE * in)) : NULL;
        if (dropout.noise && !part) {
            result = NO_MEMORY;
            continue;
        }
        multiply('N', 'N', end - begin, in, out, 1.0f, dy + begin * out, out, weight, in, 0.0f, dx + begin * in, in);
        memset(dside + begin * rank, 0, sizeof(float) * (size_t)((end - begin) * rank));
        int64_t stop;
        for (int64_t at = next_run(factor, begin, end, &stop); at < stop; at = next_run(factor, stop, end, &stop)) {
            if (stop - at > AT_ONCE) stop = at + AT_ONCE;
            multiply('N', 'N', stop - at, rank, out, 1.0f, dy + at * out, out, second, rank, 0.0f, dside + at * rank,
                     rank);
            scale_rows(dside + at * rank, factor + at, stop - at, rank);
            multiply('N', 'N', stop - at, in, rank, 1.0f, dside + at * rank, rank, first, in, part ? 0.0f : 1.0f,
                     part ? part : dx + at * in, in);
            for (int64_t r = at; part && r < stop; ++r)
                drop(part + (r - at) * in, dx + r * in, 0, in, dropout.noise[r], dropout, 1);
        }
        free(part);
    }
    GIVE_THREADS(threads);
    return result;
}

/* u (N, P), v (N, Q), factor (N, 1), maybe the dropout of v -> u^T dropout(v) (P, Q), of positions whose factor is not
 * 0: the gradients of a pair's two sides. */
KERNEL(pair_gradient) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    const float *u = params[0], *v = params[1], *factor = params[2];
    const dropout_t dropout = dropout_of(params + 3, count == 8);
    float *y = params[count - 1];
    const int64_t rows = shapes[0][0], high = shapes[0][1], wide = shapes[1][1];
    const int by_columns = wide >= high || dropout.noise;
    const int threads = threads_for(2.0 * (double)rows * (double)high * (double)wide);
    int result = DONE;
    TAKE_THREADS(threads);
    memset(y, 0, sizeof(float) * (size_t)(high * wide));
    SHARED(threads, by_columns ? wide : high, 16, begin, end) {
        float *dropped = dropout.noise ? malloc(sizeof(float) * (size_t)(AT_ONCE * (end - begin))) : NULL;
        if (dropout.noise && !dropped) {
            result = NO_MEMORY;
            continue;
        }
        int64_t stop;
        for (int64_t at = next_run(factor, 0, rows, &stop); at < stop; at = next_run(factor, stop, rows, &stop)) {
            if (!by_columns) {
                multiply('T', 'N', end - begin, wide, stop - at, 1.0f, u + at * high + begin, high, v + at * wide, wide,
                         1.0f, y + begin * wide, wide);
                continue;
            }
            const float *from = v + at * wide + begin;
            int64_t step = wide;
            if (dropped) {
                if (stop - at > AT_ONCE) stop = at + AT_ONCE;
                for (int64_t r = at; r < stop; ++r)
                    drop(v + r * wide + begin, dropped + (r - at) * (end - begin), begin, end, dropout.noise[r],
                         dropout, 0);
                from = dropped, step = end - begin;
            }
            multiply('T', 'N', high, end - begin, stop - at, 1.0f, u + at * high, high, from, step, 1.0f, y + begin,
                     wide);
        }
        free(dropped);
    }
    GIVE_THREADS(threads);
    return result;
}
