/* Fused float32 kernels for inference on the CPU, called by MindSpore's `ops.Custom` (aot).
 *
 * A step of decoding reads every weight once and does little else, so MindSpore's launch of a kernel (about 20
 * microseconds when the caches are cold) is what costs beside the products. Each function here takes the place of
 * three to fifteen kernels. They are written for the compiler to vectorise. Only the largest have threads
 * (OpenMP, so OMP_NUM_THREADS counts).
 *
 * Shapes are written with the letters of `mindformers_ixc.models`; of a linear F are the input's features and O the
 * output's. operation.h says what a function is given and returns.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "operation.h"
#include "vectorised.h"

VECTORISED static void rms_norm_rows(const float *x, const float *weight, float eps, float *y, int64_t rows,
                                     int64_t width) {
    for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
        float squares = 0.0f;
        for (int64_t i = 0; i < width; ++i) squares += x[i] * x[i];
        const float scale = 1.0f / sqrtf(squares / (float)width + eps);
        for (int64_t i = 0; i < width; ++i) y[i] = x[i] * scale * weight[i];
    }
}

/* x (N, F), weight (F), eps (1) -> y (N, F) */
KERNEL(rms_norm) {
    UNUSED;
    rms_norm_rows(params[0], params[1], *(const float *)params[2], params[3], rows_of(ndims, shapes, 0),
                  width_of(ndims, shapes, 0));
    return DONE;
}

VECTORISED static void layer_norm_rows(const float *x, const float *weight, const float *bias, float eps, float *y,
                                       int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
        float sum = 0.0f, squares = 0.0f;
        for (int64_t i = 0; i < width; ++i) sum += x[i];
        const float mean = sum / (float)width;
        for (int64_t i = 0; i < width; ++i) squares += (x[i] - mean) * (x[i] - mean);
        const float scale = 1.0f / sqrtf(squares / (float)width + eps);
        for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
    }
}

/* x (N, F), weight (F), bias (F), eps (1) -> y (N, F) */
KERNEL(layer_norm) {
    UNUSED;
    layer_norm_rows(params[0], params[1], params[2], *(const float *)params[3], params[4], rows_of(ndims, shapes, 0),
                    width_of(ndims, shapes, 0));
    return DONE;
}

/* x / (1 + exp(-slope * x)); the exponent is kept where exp() is finite, since -ffast-math knows no infinity */
static inline float gated(float x, float slope) {
    const float exponent = -slope * x;
    return x / (1.0f + expf(exponent < 80.0f ? exponent : 80.0f));
}

VECTORISED static void swiglu_values(const float *gate, const float *x, float *y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] = gated(gate[i], 1.0f) * x[i];
}

/* gate (N, F), x (N, F) -> silu(gate) * x (N, F) */
KERNEL(swiglu) {
    UNUSED;
    swiglu_values(params[0], params[1], params[2],
                  rows_of(ndims, shapes, 0) * width_of(ndims, shapes, 0));
    return DONE;
}

VECTORISED static void quick_gelu_rows(const float *x, const float *bias, float *y, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r, x += width, y += width)
        for (int64_t i = 0; i < width; ++i) y[i] = gated(x[i] + bias[i], 1.702f);
}

/* x (N, F), bias (F) -> quick GELU of x + bias (N, F) */
KERNEL(bias_quick_gelu) {
    UNUSED;
    quick_gelu_rows(params[0], params[1], params[2], rows_of(ndims, shapes, 0), width_of(ndims, shapes, 0));
    return DONE;
}

VECTORISED static void bias_residual_rows(const float *x, const float *bias, const float *residual, float *y,
                                          int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r, x += width, residual += width, y += width)
        for (int64_t i = 0; i < width; ++i) y[i] = x[i] + bias[i] + residual[i];
}

/* x (N, F), bias (F), residual (N, F) -> x + bias + residual (N, F) */
KERNEL(bias_residual) {
    UNUSED;
    bias_residual_rows(params[0], params[1], params[2], params[3], rows_of(ndims, shapes, 0),
                       width_of(ndims, shapes, 0));
    return DONE;
}

/* Sums of one row of a weight kept side by side, so that they need not wait for each other. */
#define LANES 64

/* How far ahead of the sums, in elements, a weight is fetched from memory: the processor does not look across pages. */
#define AHEAD 2048

/* Rows begin .. end of a weight times each of the inputs. The weight is read once, from its first row to its last. */
VECTORISED static void linear_rows(const float *x, const float *weight, float *y, int64_t rows, int64_t in, int64_t out,
                                   int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
        const float *w = weight + o * in;
        for (int64_t r = 0; r < rows; ++r) {
            const float *v = x + r * in;
            float lanes[LANES] = {0}, sum = 0.0f;
            int64_t i = 0;
            for (; i + LANES <= in; i += LANES) {
                if (r == 0)
                    for (int64_t j = 0; j < LANES; j += 16) __builtin_prefetch(w + i + AHEAD + j);
                for (int64_t j = 0; j < LANES; ++j) lanes[j] += v[i + j] * w[i + j];
            }
            for (; i < in; ++i) sum += v[i] * w[i];
            for (int64_t j = 0; j < LANES; ++j) sum += lanes[j];
            y[r * out + o] = sum;
        }
    }
}

/* x (N, F) for a small N, weight (O, F) -> x weight^T (N, O). MindSpore's product repacks the weight at every call, which
 * takes longer than the product itself when N is small. */
KERNEL(linear) {
    UNUSED;
    const float *x = params[0], *weight = params[1];
    float *y = params[2];
    const int64_t rows = shapes[0][0], in = shapes[0][1], out = shapes[1][0];
    const int threads = in * out < MIN_SHARED ? 1 : omp_get_max_threads();
    if (threads == 1) {
        linear_rows(x, weight, y, rows, in, out, 0, out);
        return DONE;
    }
    const int64_t share = (out + 4 * threads - 1) / (4 * threads) * 4;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; ++part) {
        const int64_t begin = part * share, end = begin + share < out ? begin + share : out;
        if (begin < end) linear_rows(x, weight, y, rows, in, out, begin, end);
    }
    return DONE;
}

VECTORISED static void bias_heads_values(const float *x, const float *bias, float scale, float *y, int64_t batch,
                                         int64_t heads, int64_t length, int64_t size) {
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t l = 0; l < length; ++l, y += size) {
                const float *from = x + (b * length + l) * heads * size + h * size;
                for (int64_t i = 0; i < size; ++i) y[i] = (from[i] + bias[h * size + i]) * scale;
            }
}

/* x (B*L, H*d), bias (H*d), scale (1) -> (x + bias) * scale as heads (B, H, L, d) */
KERNEL(bias_heads) {
    UNUSED;
    const int64_t *out = shapes[3];
    bias_heads_values(params[0], params[1], *(const float *)params[2], params[3], out[0], out[1], out[2], out[3]);
    return DONE;
}

/* Rotates `rows` vectors by tables of the same shape, whose sine is negative in its first half. */
VECTORISED static void rotate(const float *x, const float *cos, const float *sin, float *y, int64_t rows,
                              int64_t size) {
    const int64_t half = size / 2;
    for (int64_t r = 0; r < rows; ++r, x += size, cos += size, sin += size, y += size) {
        for (int64_t i = 0; i < half; ++i) y[i] = x[i] * cos[i] + x[i + half] * sin[i];
        for (int64_t i = half; i < size; ++i) y[i] = x[i] * cos[i] + x[i - half] * sin[i];
    }
}

/* softmax(q K^T) V of one key/value head: q (G, d), keys and values (L, d), scratch (G, L), y (G, d) */
VECTORISED static void attend(const float *q, const float *keys, const float *values, float *scratch, float *y,
                              int64_t groups, int64_t length, int64_t size) {
    for (int64_t n = 0; n < length; ++n)
        for (int64_t g = 0; g < groups; ++g) {
            float dot = 0.0f;
            for (int64_t i = 0; i < size; ++i) dot += q[g * size + i] * keys[n * size + i];
            scratch[g * length + n] = dot;
        }
    for (int64_t g = 0; g < groups; ++g) {
        float *weights = scratch + g * length, highest = weights[0], sum = 0.0f;
        for (int64_t n = 1; n < length; ++n) highest = weights[n] > highest ? weights[n] : highest;
        for (int64_t n = 0; n < length; ++n) {
            weights[n] = expf(weights[n] - highest);
            sum += weights[n];
        }
        for (int64_t n = 0; n < length; ++n) weights[n] /= sum;
        for (int64_t i = 0; i < size; ++i) y[g * size + i] = 0.0f;
    }
    for (int64_t n = 0; n < length; ++n)
        for (int64_t g = 0; g < groups; ++g) {
            const float weight = scratch[g * length + n];
            for (int64_t i = 0; i < size; ++i) y[g * size + i] += weight * values[n * size + i];
        }
}

VECTORISED static void causal_softmax_rows(const float *scores, float *y, int64_t rows, int64_t queries, int64_t keys) {
    for (int64_t r = 0; r < rows; ++r, scores += keys, y += keys) {
        const int64_t seen = keys - queries + r % queries + 1;
        float highest = scores[0], sum = 0.0f;
        for (int64_t i = 1; i < seen; ++i) highest = scores[i] > highest ? scores[i] : highest;
        for (int64_t i = 0; i < seen; ++i) {
            y[i] = expf(scores[i] - highest);
            sum += y[i];
        }
        const float scale = 1.0f / sum;
        for (int64_t i = 0; i < seen; ++i) y[i] *= scale;
        for (int64_t i = seen; i < keys; ++i) y[i] = 0.0f;
    }
}

/* scores (..., c, S) of the last c of S positions -> softmax over those each may see, 0 elsewhere, same shape */
KERNEL(causal_softmax) {
    UNUSED;
    const int64_t queries = shapes[0][ndims[0] - 2], keys = width_of(ndims, shapes, 0);
    if (queries > keys) return BAD_PLACE;
    const int64_t rows = rows_of(ndims, shapes, 0);
    const float *scores = params[0];
    float *y = params[1];
    const int threads = rows * keys < MIN_SHARED ? 1 : omp_get_max_threads();
    const int64_t share = (rows / queries + threads - 1) / threads * queries;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; ++part) {
        const int64_t begin = part * share, end = begin + share < rows ? begin + share : rows;
        if (begin < end) causal_softmax_rows(scores + begin * keys, y + begin * keys, end - begin, queries, keys);
    }
    return DONE;
}

/* Rotation, append to the cache and attention of one token a row.
 *
 * qkv (B, KV * (G+2) * d), cos and sin (B, 1, G+2, d), where (B*KV, 2) int32, keys and values (B*KV, S, d), both
 * written in place -> y (B, KV * G * d). */
KERNEL(decode_attention) {
    UNUSED;
    const float *qkv = params[0], *cos = params[1], *sin = params[2];
    const int32_t *where = params[3];
    float *keys = params[4], *values = params[5], *y = params[6];
    const int64_t batch = shapes[1][0], rotated = shapes[1][2], size = shapes[1][3], groups = rotated - 2;
    const int64_t entries = shapes[4][0], positions = shapes[4][1], heads = entries / batch;
    int64_t seen = 0;
    for (int64_t e = 0; e < entries; ++e) {
        if (where[2 * e] != e || where[2 * e + 1] < 0 || where[2 * e + 1] >= positions) return BAD_PLACE;
        seen += where[2 * e + 1];
    }
    const int threads = seen * size < 8 * MIN_SHARED ? 1 : omp_get_max_threads();
    const int64_t own = rotated * size + groups * positions;
    float *scratch = malloc(sizeof(float) * (size_t)(threads * own));
    if (scratch == NULL) return NO_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t e = 0; e < entries; ++e) {
        const int64_t row = e / heads, at = where[2 * e + 1];
        float *turned = scratch + omp_get_thread_num() * own;
        rotate(qkv + e * rotated * size, cos + row * rotated * size, sin + row * rotated * size, turned, rotated,
               size);
        float *head_keys = keys + e * positions * size, *head_values = values + e * positions * size;
        for (int64_t i = 0; i < size; ++i) {
            head_keys[at * size + i] = turned[groups * size + i];
            head_values[at * size + i] = turned[(groups + 1) * size + i];
        }
        attend(turned, head_keys, head_values, turned + rotated * size, y + e * groups * size, groups, at + 1, size);
    }
    free(scratch);
    return DONE;
}

/* Whether a row's new positions, places (B, 2) of the first one and how many are real, are not all inside its cache. */
static int outside(const int32_t *places, int64_t row, int64_t rows, int64_t positions) {
    const int64_t at = places[2 * row], real = places[2 * row + 1];
    return at < 0 || real < 0 || real > rows || at + real > positions;
}

/* The work of `extend_attention` for one key/value head of one row; `turned` has room for (G+2, d) and (G, S). */
VECTORISED static void extend_entry(const float *qkv, const float *cos, const float *sin, float *keys, float *values,
                                    float *turned, float *y, int64_t at, int64_t real, int64_t rows,
                                    const int64_t *shape, int64_t heads) {
    const int64_t rotated = shape[2], size = shape[3], groups = rotated - 2;
    float *scratch = turned + rotated * size;
    for (int64_t r = 0; r < rows; ++r, qkv += heads * rotated * size, cos += rotated * size, sin += rotated * size,
                 y += heads * groups * size) {
        if (r >= real) {
            memset(y, 0, sizeof(float) * (size_t)(groups * size));
            continue;
        }
        rotate(qkv, cos, sin, turned, rotated, size);
        memcpy(keys + (at + r) * size, turned + groups * size, sizeof(float) * (size_t)size);
        memcpy(values + (at + r) * size, turned + (groups + 1) * size, sizeof(float) * (size_t)size);
        attend(turned, keys, values, scratch, y, groups, at + r + 1, size);
    }
}

/* `decode_attention` of a few more tokens a row, each of which sees those before it; to each token it does the same, so
 * that several at once have the bits that they have one after the other.
 *
 * qkv (B*R, KV * (G+2) * d), cos and sin (B, R, G+2, d), places (B, 2) int32: a row's first new position and how many
 * of its R are real, keys and values (B*KV, S, d), both written in place -> y (B*R, KV * G * d) */
KERNEL(extend_attention) {
    UNUSED;
    const float *qkv = params[0], *cos = params[1], *sin = params[2];
    const int32_t *places = params[3];
    float *keys = params[4], *values = params[5], *y = params[6];
    const int64_t *shape = shapes[1];
    const int64_t batch = shape[0], rows = shape[1], rotated = shape[2], size = shape[3], groups = rotated - 2;
    const int64_t entries = shapes[4][0], positions = shapes[4][1], heads = entries / batch;
    for (int64_t row = 0; row < batch; ++row)
        if (outside(places, row, rows, positions)) return BAD_PLACE;
    const int most = entries * rows * groups * positions * size < 128 * MIN_SHARED ? 1 : omp_get_max_threads();
    const int threads = most < entries ? most : (int)entries;
    const int64_t own = rotated * size + groups * positions;
    float *free_memory = malloc(sizeof(float) * (size_t)(own * threads));
    if (free_memory == NULL) return NO_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; ++part)
        for (int64_t e = part; e < entries; e += threads) {
            const int64_t row = e / heads, head = e % heads, first = row * rows;
            extend_entry(qkv + (first * heads + head) * rotated * size, cos + first * rotated * size,
                         sin + first * rotated * size, keys + e * positions * size, values + e * positions * size,
                         free_memory + part * own, y + (first * heads + head) * groups * size, places[2 * row],
                         places[2 * row + 1], rows, shape, heads);
        }
    free(free_memory);
    return DONE;
}

/* The work of `extend_heads`; `shape` is that of the queries, `positions` the cache's S. */
VECTORISED static void extend_values(const float *qkv, const float *cos, const float *sin, const int32_t *places,
                                     float scale, float *keys, float *values, float *queries, const int64_t *shape,
                                     int64_t positions) {
    const int64_t batch = shape[0], heads = shape[1], groups = shape[2], rows = shape[3], size = shape[4];
    const int64_t half = size / 2;
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t head = b * heads + h, at = places[2 * b] + r;
                const float *from = qkv + ((b * rows + r) * heads + h) * (groups + 2) * size;
                const float *c = cos + (b * rows + r) * size, *s = sin + (b * rows + r) * size;
                const int real = r < places[2 * b + 1];
                for (int64_t g = 0; g < groups + real; ++g) {
                    float *to = g < groups ? queries + ((head * groups + g) * rows + r) * size
                                           : keys + (head * positions + at) * size;
                    const float factor = g < groups ? scale : 1.0f, *x = from + g * size;
                    for (int64_t i = 0; i < half; ++i) to[i] = (x[i] * c[i] - x[i + half] * s[i]) * factor;
                    for (int64_t i = half; i < size; ++i) to[i] = (x[i] * c[i] + x[i - half] * s[i]) * factor;
                }
                if (real)
                    memcpy(values + (head * positions + at) * size, from + (groups + 1) * size,
                           sizeof(float) * (size_t)size);
            }
}

/* Splits the consolidated product of more positions a row into rotated, scaled queries, and puts rotated keys and
 * values behind those in the cache.
 *
 * qkv (B*R, KV * (G+2) * d), cos and sin (B, R, 1, 1, d), places as in `extend_attention`, scale (1), keys and values
 * (B*KV, S, d), both written in place -> queries (B, KV, G, R, d) */
KERNEL(extend_heads) {
    UNUSED;
    const int64_t *shape = shapes[7];
    for (int64_t row = 0; row < shape[0]; ++row)
        if (outside(params[3], row, shape[3], shapes[5][1])) return BAD_PLACE;
    extend_values(params[0], params[1], params[2], params[3], *(const float *)params[4], params[5], params[6],
                  params[7], shape, shapes[5][1]);
    return DONE;
}

VECTORISED static void seen_softmax_rows(const float *scores, float *y, int64_t rows, int64_t queries, int64_t keys,
                                         int64_t at) {
    for (int64_t r = 0; r < rows; ++r, scores += keys, y += keys) {
        const int64_t wanted = at + r % queries + 1, seen = wanted < keys ? wanted : keys;
        float highest = scores[0], sum = 0.0f;
        for (int64_t i = 1; i < seen; ++i) highest = scores[i] > highest ? scores[i] : highest;
        for (int64_t i = 0; i < seen; ++i) {
            y[i] = expf(scores[i] - highest);
            sum += y[i];
        }
        const float scale = 1.0f / sum;
        for (int64_t i = 0; i < seen; ++i) y[i] *= scale;
        memset(y + seen, 0, sizeof(float) * (size_t)(keys - seen));
    }
}

/* scores (B, KV, G, R, S) of a whole cache, places as in `extend_attention` -> softmax over those each may see, 0
 * elsewhere, same shape */
KERNEL(extend_softmax) {
    UNUSED;
    const int64_t batch = shapes[0][0], heads = shapes[0][1] * shapes[0][2], queries = shapes[0][3];
    const int64_t keys = shapes[0][4], each = queries * keys;
    const int32_t *places = params[1];
    const float *scores = params[0];
    float *y = params[2];
#pragma omp parallel for schedule(static) if (batch * heads * each >= MIN_SHARED)
    for (int64_t head = 0; head < batch * heads; ++head)
        seen_softmax_rows(scores + head * each, y + head * each, queries, queries, keys, places[2 * (head / heads)]);
    return DONE;
}

/* keys or values (N, S, d) of a whole cache, and what must have been computed before -> their first s positions
 * (N, s, d). MindSpore's own operation may read the cache before another kernel has written it. */
KERNEL(first_positions) {
    UNUSED;
    const int64_t entries = shapes[2][0], seen = shapes[2][1] * shapes[2][2], whole = shapes[0][1] * shapes[0][2];
    if (seen > whole) return BAD_PLACE;
    const float *cache = params[0];
    float *y = params[2];
    for (int64_t e = 0; e < entries; ++e) memcpy(y + e * seen, cache + e * whole, sizeof(float) * (size_t)seen);
    return DONE;
}

/* The work of `prefill_heads`; `shape` is that of the queries, `positions` the cache's S. */
VECTORISED static void prefill_values(const float *qkv, const float *cos, const float *sin, const int32_t *real,
                                      float scale, float *cache_keys, float *cache_values, float *queries,
                                      float *keys, float *values, const int64_t *shape, int64_t positions) {
    const int64_t batch = shape[0], heads = shape[1], groups = shape[2], length = shape[3], size = shape[4];
    const int64_t half = size / 2;
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t head = b * heads + h;
            for (int64_t l = 0; l < length; ++l) {
                const float *from = qkv + ((b * length + l) * heads + h) * (groups + 2) * size;
                const float *c = cos + (b * length + l) * size, *s = sin + (b * length + l) * size;
                const float kept = (float)real[b * length + l];
                for (int64_t g = 0; g <= groups; ++g, from += size) {
                    float *to = g < groups ? queries + ((head * groups + g) * length + l) * size
                                           : keys + (head * length + l) * size;
                    const float factor = g < groups ? scale : 1.0f;
                    for (int64_t i = 0; i < half; ++i) to[i] = (from[i] * c[i] - from[i + half] * s[i]) * factor;
                    for (int64_t i = half; i < size; ++i) to[i] = (from[i] * c[i] + from[i - half] * s[i]) * factor;
                }
                const float *key = keys + (head * length + l) * size;
                float *value = values + (head * length + l) * size;
                float *to_keys = cache_keys + (head * positions + l) * size;
                float *to_values = cache_values + (head * positions + l) * size;
                for (int64_t i = 0; i < size; ++i) {
                    value[i] = from[i];
                    to_keys[i] = key[i] * kept;
                    to_values[i] = from[i] * kept;
                }
            }
            const int64_t rest = (head * positions + length) * size, count = (positions - length) * size;
            memset(cache_keys + rest, 0, sizeof(float) * (size_t)count);
            memset(cache_values + rest, 0, sizeof(float) * (size_t)count);
        }
}

/* Splits a prompt's consolidated product into rotated, scaled queries and rotated keys and values, by heads, and fills
 * the cache with keys and values, zeros behind each prompt's end.
 *
 * qkv (B*L, KV * (G+2) * d), cos and sin (B, L, 1, 1, d), real (B, 1, L, 1) int32, scale (1), keys and values
 * (B*KV, S, d), both written in place -> queries (B, KV, G, L, d), keys and values (B, KV, L, d) */
KERNEL(prefill_heads) {
    UNUSED;
    if (shapes[5][1] < shapes[7][3]) return BAD_PLACE; /* a prompt longer than its cache */
    prefill_values(params[0], params[1], params[2], params[3], *(const float *)params[4], params[5], params[6],
                   params[7], params[8], params[9], shapes[7], shapes[5][1]);
    return DONE;
}
