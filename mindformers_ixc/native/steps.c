/* Norms and gates for training on the CPU, with their gradients; see products.c.
 *
 * Sums over positions go over fixed parts, in order, so that the number of threads changes nothing.
 */
#include "products.h"

/* Positions whose gradients of a weight are summed by themselves. */
#define PART_ROWS 256

/* ---- Norms ---- */

VECTORISED static void rms_rows(const float *x, const float *weight, float eps, float *y, float *scales, int64_t begin,
                                int64_t end, int64_t width) {
    for (int64_t r = begin; r < end; ++r) {
        const float *from = x + r * width;
        float *to = y + r * width, squares = 0.0f;
        for (int64_t i = 0; i < width; ++i) squares += from[i] * from[i];
        const float scale = scales[r] = 1.0f / sqrtf(squares / (float)width + eps);
        for (int64_t i = 0; i < width; ++i) to[i] = from[i] * scale * weight[i];
    }
}

/* x (N, F), weight (F), eps (1) -> y (N, F), scales (N) */
KERNEL(train_rms_norm) {
    UNUSED;
    const int64_t rows = shapes[0][0], width = shapes[0][1];
    const int threads = threads_for(4.0 * (double)(rows * width));
    TAKE_THREADS(threads);
    SHARED(threads, rows, 16, begin, end)
        rms_rows(params[0], params[1], *(const float *)params[2], params[3], params[4], begin, end, width);
    GIVE_THREADS(threads);
    return DONE;
}

VECTORISED static void rms_back_rows(const float *x, const float *weight, const float *scales, const float *dy,
                                     float *dx, float *dw, int64_t begin, int64_t end, int64_t width) {
    memset(dw, 0, sizeof(float) * (size_t)width);
    for (int64_t r = begin; r < end; ++r) {
        const float *from = x + r * width, *part = dy + r * width;
        float *to = dx + r * width, sum = 0.0f;
        const float scale = scales[r];
        for (int64_t i = 0; i < width; ++i) {
            sum += part[i] * weight[i] * from[i];
            dw[i] += part[i] * from[i] * scale;
        }
        const float share = sum * scale * scale * scale / (float)width;
        for (int64_t i = 0; i < width; ++i) to[i] = part[i] * weight[i] * scale - from[i] * share;
    }
}

VECTORISED static void add_parts(const float *parts, float *y, int64_t count, int64_t width) {
    memset(y, 0, sizeof(float) * (size_t)width);
    for (int64_t p = 0; p < count; ++p, parts += width)
        for (int64_t i = 0; i < width; ++i) y[i] += parts[i];
}

/* x (N, F), weight (F), scales (N), dy (N, F) -> dx (N, F), dweight (F) */
KERNEL(train_rms_norm_back) {
    UNUSED;
    const int64_t rows = shapes[0][0], width = shapes[0][1], count_parts = (rows + PART_ROWS - 1) / PART_ROWS;
    const int threads = threads_for(8.0 * (double)(rows * width));
    float *parts = malloc(sizeof(float) * (size_t)(count_parts * width));
    if (!parts) return NO_MEMORY;
    TAKE_THREADS(threads);
    SHARED(threads, count_parts, 1, begin, end)
        for (int64_t p = begin; p < end; ++p)
            rms_back_rows(params[0], params[1], params[2], params[3], params[4], parts + p * width, p * PART_ROWS,
                          p + 1 < count_parts ? (p + 1) * PART_ROWS : rows, width);
    add_parts(parts, params[5], count_parts, width);
    GIVE_THREADS(threads);
    free(parts);
    return DONE;
}

VECTORISED static void layer_rows(const float *x, const float *weight, const float *bias, float eps, float *y,
                                  float *means, float *scales, int64_t begin, int64_t end, int64_t width) {
    for (int64_t r = begin; r < end; ++r) {
        const float *from = x + r * width;
        float *to = y + r * width, sum = 0.0f, squares = 0.0f;
        for (int64_t i = 0; i < width; ++i) sum += from[i];
        const float mean = means[r] = sum / (float)width;
        for (int64_t i = 0; i < width; ++i) squares += (from[i] - mean) * (from[i] - mean);
        const float scale = scales[r] = 1.0f / sqrtf(squares / (float)width + eps);
        for (int64_t i = 0; i < width; ++i) to[i] = (from[i] - mean) * scale * weight[i] + bias[i];
    }
}

/* x (N, F), weight (F), bias (F), eps (1) -> y (N, F), means (N), scales (N) */
KERNEL(train_layer_norm) {
    UNUSED;
    const int64_t rows = shapes[0][0], width = shapes[0][1];
    const int threads = threads_for(8.0 * (double)(rows * width));
    TAKE_THREADS(threads);
    SHARED(threads, rows, 16, begin, end)
        layer_rows(params[0], params[1], params[2], *(const float *)params[3], params[4], params[5], params[6], begin,
                   end, width);
    GIVE_THREADS(threads);
    return DONE;
}

VECTORISED static void layer_back_rows(const float *x, const float *weight, const float *means, const float *scales,
                                       const float *dy, float *dx, float *dw, float *db, int64_t begin, int64_t end,
                                       int64_t width) {
    memset(dw, 0, sizeof(float) * (size_t)width);
    memset(db, 0, sizeof(float) * (size_t)width);
    for (int64_t r = begin; r < end; ++r) {
        const float *from = x + r * width, *part = dy + r * width;
        float *to = dx + r * width, sum = 0.0f, product = 0.0f;
        const float scale = scales[r], mean = means[r];
        for (int64_t i = 0; i < width; ++i) {
            const float normal = (from[i] - mean) * scale;
            sum += part[i] * weight[i];
            product += part[i] * weight[i] * normal;
            dw[i] += part[i] * normal;
            db[i] += part[i];
        }
        sum /= (float)width, product /= (float)width;
        for (int64_t i = 0; i < width; ++i)
            to[i] = scale * (part[i] * weight[i] - sum - (from[i] - mean) * scale * product);
    }
}

/* x (N, F), weight (F), means (N), scales (N), dy (N, F) -> dx (N, F), dweight (F), dbias (F) */
KERNEL(train_layer_norm_back) {
    UNUSED;
    const int64_t rows = shapes[0][0], width = shapes[0][1], count_parts = (rows + PART_ROWS - 1) / PART_ROWS;
    const int threads = threads_for(16.0 * (double)(rows * width));
    float *parts = malloc(sizeof(float) * (size_t)(2 * count_parts * width)), *biases = parts + count_parts * width;
    if (!parts) return NO_MEMORY;
    TAKE_THREADS(threads);
    SHARED(threads, count_parts, 1, begin, end)
        for (int64_t p = begin; p < end; ++p)
            layer_back_rows(params[0], params[1], params[2], params[3], params[4], params[5], parts + p * width,
                            biases + p * width, p * PART_ROWS, p + 1 < count_parts ? (p + 1) * PART_ROWS : rows, width);
    add_parts(parts, params[6], count_parts, width);
    add_parts(biases, params[7], count_parts, width);
    GIVE_THREADS(threads);
    free(parts);
    return DONE;
}

/* ---- Gates ---- */

/* exp(-x); the exponent is kept where exp() is finite, since -ffast-math knows no infinity */
static inline float exp_minus(float x) { return exp_of(x > -80.0f ? -x : 80.0f); }

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_minus(x)); }

VECTORISED static void silu_values(const float *gate, const float *x, float *y, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) y[i] = gate[i] * sigmoid(gate[i]) * x[i];
}

/* gate, x (N, F) -> silu(gate) * x (N, F) */
KERNEL(train_swiglu) {
    UNUSED;
    const int64_t numbers = shapes[0][0] * shapes[0][1];
    const int threads = threads_for(20.0 * (double)numbers);
    TAKE_THREADS(threads);
    SHARED(threads, numbers, 1024, begin, end) silu_values(params[0], params[1], params[2], begin, end);
    GIVE_THREADS(threads);
    return DONE;
}

VECTORISED static void silu_back_values(const float *gate, const float *x, const float *dy, float *d_gate, float *dx,
                                        int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const float e = exp_minus(gate[i]), open = 1.0f / (1.0f + e), part = dy[i] * open;
        d_gate[i] = part * x[i] * (1.0f + gate[i] * (e * open)); /* e * open is 1 - open, whose digits are lost */
        dx[i] = part * gate[i];
    }
}

/* gate, x, dy (N, F) -> dgate, dx (N, F) */
KERNEL(train_swiglu_back) {
    UNUSED;
    const int64_t numbers = shapes[0][0] * shapes[0][1];
    const int threads = threads_for(30.0 * (double)numbers);
    TAKE_THREADS(threads);
    SHARED(threads, numbers, 1024, begin, end)
        silu_back_values(params[0], params[1], params[2], params[3], params[4], begin, end);
    GIVE_THREADS(threads);
    return DONE;
}

VECTORISED static void quick_gelu_values(const float *x, float *y, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) y[i] = x[i] * sigmoid(1.702f * x[i]);
}

/* x (N, F) -> x * sigmoid(1.702 x) (N, F) */
KERNEL(train_quick_gelu) {
    UNUSED;
    const int64_t numbers = shapes[0][0] * shapes[0][1];
    const int threads = threads_for(20.0 * (double)numbers);
    TAKE_THREADS(threads);
    SHARED(threads, numbers, 1024, begin, end) quick_gelu_values(params[0], params[1], begin, end);
    GIVE_THREADS(threads);
    return DONE;
}

VECTORISED static void quick_gelu_back_values(const float *x, const float *dy, float *dx, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const float e = exp_minus(1.702f * x[i]), open = 1.0f / (1.0f + e);
        dx[i] = dy[i] * open * (1.0f + 1.702f * x[i] * (e * open));
    }
}

/* x, dy (N, F) -> dx (N, F) */
KERNEL(train_quick_gelu_back) {
    UNUSED;
    const int64_t numbers = shapes[0][0] * shapes[0][1];
    const int threads = threads_for(30.0 * (double)numbers);
    TAKE_THREADS(threads);
    SHARED(threads, numbers, 1024, begin, end)
        quick_gelu_back_values(params[0], params[1], params[2], begin, end);
    GIVE_THREADS(threads);
    return DONE;
}

/* dy (N, O) -> its sum over positions (O), the gradient of a bias */
VECTORISED static void sum_rows(const float *dy, float *y, int64_t begin, int64_t end, int64_t width) {
    memset(y, 0, sizeof(float) * (size_t)width);
    for (int64_t r = begin; r < end; ++r)
        for (int64_t i = 0; i < width; ++i) y[i] += dy[r * width + i];
}

KERNEL(bias_gradient) {
    UNUSED;
    const int64_t rows = shapes[0][0], width = shapes[0][1], count_parts = (rows + PART_ROWS - 1) / PART_ROWS;
    const int threads = threads_for(2.0 * (double)(rows * width));
    float *parts = malloc(sizeof(float) * (size_t)(count_parts * width));
    if (!parts) return NO_MEMORY;
    TAKE_THREADS(threads);
    SHARED(threads, count_parts, 1, begin, end)
        for (int64_t p = begin; p < end; ++p)
            sum_rows(params[0], parts + p * width, p * PART_ROWS, p + 1 < count_parts ? (p + 1) * PART_ROWS : rows,
                     width);
    add_parts(parts, params[1], count_parts, width);
    GIVE_THREADS(threads);
    free(parts);
    return DONE;
}
