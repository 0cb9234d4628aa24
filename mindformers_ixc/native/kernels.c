/* Fused float32 kernels for inference on the CPU, called by MindSpore's `ops.Custom` (aot).
 *
 * MindSpore's launch of a kernel takes about 20 microseconds when the caches are cold, and every kernel reads and writes
 * its tensors; each function here takes the place of three to fifteen. They are written for the compiler to vectorise.
 * The largest are shared out among a team of threads (team.h). What decoding takes besides is in decode.c.
 *
 * Shapes are written with the letters of `mindformers_ixc.models`; of a linear F are the input's features and O the
 * output's. operation.h says what a function is given and returns.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "heads.h"
#include "operation.h"
#include "team.h"
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

/* Work on the rows of x (N, F), to y (N, F); what else a function takes of them is its own affair. */
typedef struct Rows {
    void (*run)(const struct Rows *job, int64_t begin, int64_t count);
    const float *x, *other, *weight, *bias;
    float *y, number;
    int64_t rows, width, step;
} Rows;

static void rows_part(const void *job, int64_t part) {
    const Rows *all = job;
    const int64_t begin = part * all->step, rest = all->rows - begin;
    all->run(all, begin, rest < all->step ? rest : all->step);
}

/* Does it in parts of some 32768 numbers. */
static int share_rows(Rows job, const int *ndims, int64_t **shapes) {
    job.rows = rows_of(ndims, shapes, 0), job.width = width_of(ndims, shapes, 0);
    job.step = MIN_SHARED / 4 / job.width + 1;
    team_share(rows_part, &job, (job.rows + job.step - 1) / job.step);
    return DONE;
}

static void rms_norm_part(const Rows *job, int64_t begin, int64_t count) {
    const int64_t at = begin * job->width;
    rms_norm_rows(job->x + at, job->weight, job->number, job->y + at, count, job->width);
}

/* x (N, F), weight (F), eps (1) -> y (N, F) */
KERNEL(rms_norm) {
    UNUSED;
    return share_rows((Rows){.run = rms_norm_part, .x = params[0], .weight = params[1],
                             .number = *(const float *)params[2], .y = params[3]}, ndims, shapes);
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

static void layer_norm_part(const Rows *job, int64_t begin, int64_t count) {
    const int64_t at = begin * job->width;
    layer_norm_rows(job->x + at, job->weight, job->bias, job->number, job->y + at, count, job->width);
}

/* x (N, F), weight (F), bias (F), eps (1) -> y (N, F) */
KERNEL(layer_norm) {
    UNUSED;
    return share_rows((Rows){.run = layer_norm_part, .x = params[0], .weight = params[1], .bias = params[2],
                             .number = *(const float *)params[3], .y = params[4]}, ndims, shapes);
}

/* x / (1 + exp(-slope * x)); the exponent is kept where exp() is finite, since -ffast-math knows no infinity */
static inline float gated(float x, float slope) {
    const float exponent = -slope * x;
    return x / (1.0f + expf(exponent < 80.0f ? exponent : 80.0f));
}

VECTORISED static void swiglu_values(const float *gate, const float *x, float *y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] = gated(gate[i], 1.0f) * x[i];
}

static void swiglu_part(const Rows *job, int64_t begin, int64_t count) {
    const int64_t at = begin * job->width;
    swiglu_values(job->x + at, job->other + at, job->y + at, count * job->width);
}

/* gate (N, F), x (N, F) -> silu(gate) * x (N, F) */
KERNEL(swiglu) {
    UNUSED;
    return share_rows((Rows){.run = swiglu_part, .x = params[0], .other = params[1], .y = params[2]}, ndims, shapes);
}

VECTORISED static void quick_gelu_rows(const float *x, const float *bias, float *y, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r, x += width, y += width)
        for (int64_t i = 0; i < width; ++i) y[i] = gated(x[i] + bias[i], 1.702f);
}

static void quick_gelu_part(const Rows *job, int64_t begin, int64_t count) {
    const int64_t at = begin * job->width;
    quick_gelu_rows(job->x + at, job->bias, job->y + at, count, job->width);
}

/* x (N, F), bias (F) -> quick GELU of x + bias (N, F) */
KERNEL(bias_quick_gelu) {
    UNUSED;
    return share_rows((Rows){.run = quick_gelu_part, .x = params[0], .bias = params[1], .y = params[2]}, ndims, shapes);
}

VECTORISED static void bias_residual_rows(const float *x, const float *bias, const float *residual, float *y,
                                          int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r, x += width, residual += width, y += width)
        for (int64_t i = 0; i < width; ++i) y[i] = x[i] + bias[i] + residual[i];
}

static void bias_residual_part(const Rows *job, int64_t begin, int64_t count) {
    const int64_t at = begin * job->width;
    bias_residual_rows(job->x + at, job->bias, job->other + at, job->y + at, count, job->width);
}

/* x (N, F), bias (F), residual (N, F) -> x + bias + residual (N, F) */
KERNEL(bias_residual) {
    UNUSED;
    return share_rows((Rows){.run = bias_residual_part, .x = params[0], .bias = params[1], .other = params[2],
                             .y = params[3]}, ndims, shapes);
}

/* What `bias_heads` does of one head of one tile. */
typedef struct {
    const float *x, *bias;
    float scale, *y;
    int64_t heads, length, size;
} Split;

VECTORISED static void split_part(const void *job, int64_t head) {
    const Split *s = job;
    const int64_t row = head / s->heads, own = head % s->heads, size = s->size;
    float *y = s->y + head * s->length * size;
    for (int64_t l = 0; l < s->length; ++l, y += size) {
        const float *from = s->x + ((row * s->length + l) * s->heads + own) * size;
        for (int64_t i = 0; i < size; ++i) y[i] = (from[i] + s->bias[own * size + i]) * s->scale;
    }
}

/* x (B*L, H*d), bias (H*d), scale (1) -> (x + bias) * scale as heads (B, H, L, d) */
KERNEL(bias_heads) {
    UNUSED;
    const int64_t *out = shapes[3];
    const Split split = {.x = params[0], .bias = params[1], .scale = *(const float *)params[2], .y = params[3],
                         .heads = out[1], .length = out[2], .size = out[3]};
    team_share(split_part, &split, out[0] * out[1]);
    return DONE;
}

/* Softmax of the scores of queries from position `at` on over the keys that each may see, 0 behind them. */
VECTORISED static void seen_softmax(const float *scores, float *y, int64_t queries, int64_t keys, int64_t at) {
    for (int64_t r = 0; r < queries; ++r, scores += keys, y += keys) {
        const int64_t wanted = at + r + 1, seen = wanted < keys ? wanted : keys;
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

/* Rows of scores that are one part of the work: those of one head. */
typedef struct {
    const float *scores;
    float *y;
    const int32_t *places;
    int64_t queries, keys, heads;
} Softmax;

static void causal_softmax_part(const void *job, int64_t part) {
    const Softmax *s = job;
    const int64_t begin = part * s->queries * s->keys;
    seen_softmax(s->scores + begin, s->y + begin, s->queries, s->keys, s->keys - s->queries);
}

/* scores (..., c, S) of the last c of S positions -> softmax over those each may see, 0 elsewhere, same shape */
KERNEL(causal_softmax) {
    UNUSED;
    const int64_t queries = shapes[0][ndims[0] - 2], keys = width_of(ndims, shapes, 0);
    if (queries > keys) return BAD_PLACE;
    const Softmax softmax = {.scores = params[0], .y = params[1], .queries = queries, .keys = keys};
    team_share(causal_softmax_part, &softmax, rows_of(ndims, shapes, 0) / queries);
    return DONE;
}

/* Rotates by tables (d), both halves alike. */
static inline void turn(const float *x, const float *cos, const float *sin, float factor, float *y, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; ++i) y[i] = (x[i] * cos[i] - x[i + half] * sin[i]) * factor;
    for (int64_t i = half; i < size; ++i) y[i] = (x[i] * cos[i] + x[i - half] * sin[i]) * factor;
}

/* One key/value head of one row: what `extend_heads` does. */
VECTORISED static void extend_part(const void *job, int64_t head) {
    const Heads *a = job;
    const int64_t row = head / a->heads, size = a->size, at = a->places[2 * row], real = a->places[2 * row + 1];
    float key[size];
    for (int64_t r = 0; r < a->length; ++r) {
        const int64_t position = row * a->length + r;
        const float *from = a->qkv + (position * a->heads + head % a->heads) * (a->groups + 2) * size;
        const float *cos = a->cos + position * size, *sin = a->sin + position * size;
        for (int64_t g = 0; g < a->groups; ++g)
            turn(from + g * size, cos, sin, a->scale, a->queries + ((head * a->groups + g) * a->length + r) * size,
                 size);
        if (r >= real) continue;
        turn(from + a->groups * size, cos, sin, 1.0f, key, size);
        put(a->cache_keys, (head * a->positions + at + r) * size, key, size);
        put(a->cache_values, (head * a->positions + at + r) * size, from + (a->groups + 1) * size, size);
    }
}

int take_apart(const Heads *heads) {
    for (int64_t row = 0; row < heads->batch; ++row) {
        const int64_t at = heads->places[2 * row], real = heads->places[2 * row + 1];
        if (at < 0 || real < 0 || real > heads->length || at + real > heads->positions) return 0;
    }
    team_share(extend_part, heads, heads->batch * heads->heads);
    return 1;
}

/* Splits the consolidated product of more positions a row into rotated, scaled queries, and puts rotated keys and
 * values behind those in the cache.
 *
 * qkv (B*R, KV * (G+2) * d), cos and sin (B, R, 1, 1, d), places (B, 2) int32: a row's first new position and how many
 * of its R are real, scale (1), keys and values (B*KV, S, d), both written in place -> queries (B, KV, G, R, d) */
KERNEL(extend_heads) {
    UNUSED;
    const int64_t *shape = shapes[7];
    const Heads heads = {.qkv = params[0], .cos = params[1], .sin = params[2], .places = params[3],
                         .scale = *(const float *)params[4], .cache_keys = cache_of(params, dtypes, 5),
                         .cache_values = cache_of(params, dtypes, 6), .queries = params[7], .batch = shape[0],
                         .heads = shape[1], .groups = shape[2], .length = shape[3], .size = shape[4],
                         .positions = shapes[5][1]};
    return take_apart(&heads) ? DONE : BAD_PLACE;
}

static void extend_softmax_part(const void *job, int64_t head) {
    const Softmax *s = job;
    const int64_t begin = head * s->queries * s->keys;
    seen_softmax(s->scores + begin, s->y + begin, s->queries, s->keys, s->places[2 * (head / s->heads)]);
}

/* scores (B, KV, G, R, S) of a whole cache, places as in `extend_heads` -> softmax over those each may see, 0
 * elsewhere, same shape */
KERNEL(extend_softmax) {
    UNUSED;
    const int64_t *shape = shapes[0];
    const Softmax softmax = {.scores = params[0], .y = params[2], .places = params[1], .queries = shape[3],
                             .keys = shape[4], .heads = shape[1] * shape[2]};
    team_share(extend_softmax_part, &softmax, shape[0] * shape[1] * shape[2]);
    return DONE;
}

/* One key/value head of one row: what `prefill_heads` does. */
VECTORISED static void prefill_part(const void *job, int64_t head) {
    const Heads *a = job;
    const int64_t row = head / a->heads, size = a->size, length = a->length;
    for (int64_t l = 0; l < length; ++l) {
        const int64_t position = row * length + l;
        const float *from = a->qkv + (position * a->heads + head % a->heads) * (a->groups + 2) * size;
        const float *cos = a->cos + position * size, *sin = a->sin + position * size;
        for (int64_t g = 0; g < a->groups; ++g)
            turn(from + g * size, cos, sin, a->scale, a->queries + ((head * a->groups + g) * length + l) * size, size);
        float *key = a->keys + (head * length + l) * size, *value = a->values + (head * length + l) * size;
        turn(from + a->groups * size, cos, sin, 1.0f, key, size);
        memcpy(value, from + (a->groups + 1) * size, sizeof(float) * (size_t)size);
        as_held(a->cache_keys, key, size);
        as_held(a->cache_values, value, size);
        const int64_t to = (head * a->positions + l) * size;
        if (a->real[position]) {
            put(a->cache_keys, to, key, size);
            put(a->cache_values, to, value, size);
        } else {
            clear(a->cache_keys, to, size);
            clear(a->cache_values, to, size);
        }
    }
    const int64_t rest = (head * a->positions + length) * size, count = (a->positions - length) * size;
    clear(a->cache_keys, rest, count);
    clear(a->cache_values, rest, count);
}

/* Splits a prompt's consolidated product into rotated, scaled queries and rotated keys and values, by heads, and fills
 * the cache with keys and values, zeros behind each prompt's end. Keys and values are what the cache holds of them, so
 * that a prompt whose beginning comes from a cache is computed with the same numbers.
 *
 * qkv (B*L, KV * (G+2) * d), cos and sin (B, L, 1, 1, d), real (B, 1, L, 1) int32, scale (1), keys and values
 * (B*KV, S, d), both written in place -> queries (B, KV, G, L, d), keys and values (B, KV, L, d) */
KERNEL(prefill_heads) {
    UNUSED;
    const int64_t *shape = shapes[7];
    if (shapes[5][1] < shape[3]) return BAD_PLACE; /* a prompt longer than its cache */
    const Heads heads = {.qkv = params[0], .cos = params[1], .sin = params[2], .real = params[3],
                         .scale = *(const float *)params[4], .cache_keys = cache_of(params, dtypes, 5),
                         .cache_values = cache_of(params, dtypes, 6), .queries = params[7], .keys = params[8],
                         .values = params[9], .batch = shape[0], .heads = shape[1], .groups = shape[2],
                         .length = shape[3], .size = shape[4], .positions = shapes[5][1]};
    team_share(prefill_part, &heads, shape[0] * shape[1]);
    return DONE;
}
