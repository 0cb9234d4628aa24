/* Decoder layers over one or a few more tokens a row, for inference on the CPU, called by MindSpore's `ops.Custom` (aot)
 * as operation.h says.
 *
 * A step of decoding reads every weight once and does little else, so all else must not be seen: a layer is one
 * kernel (`decode_layer`), which shares its products and its attention out among a team of threads (team.h). To each
 * token the same sums are formed in the same order, however many there are at once and whoever forms them: tokens that
 * are verified together have the bits that they have one after the other.
 *
 * A cache holds float32 or bfloat16 numbers; those of bfloat16 are widened as they are read. Shapes are written with
 * the letters of `mindformers_ixc.models`.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cache.h"
#include "operation.h"
#include "team.h"
#include "vectorised.h"

/* Numbers of a vector, and vectors of sums of one product kept side by side, so that they need not wait for each other.
 * The order in which a sum is formed depends on nothing but its length. */
#define LANES 8
#define ABREAST 2

/* Rows of x that share one pass over a row of a weight, at most. */
#define TOGETHER 4

/* How far ahead of the sums, in bytes, a weight is fetched from memory: the processor does not look across pages. */
#define AHEAD 8192

/* Bytes of a weight that are one part of a product, and positions of a cache that are widened at a time. */
#define PART_BYTES 131072
#define TILE 64

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline __attribute__((always_inline)) float sum_of(Lanes v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* `rows` (a constant) rows of x (.., F) times one row of a weight, to y, `apart` numbers from each other; `fetch` (a
 * constant) if the row comes from memory. */
static inline __attribute__((always_inline)) void dots(const float *x, const float *w, int64_t in, float *y,
                                                       int64_t apart, const int rows, const int fetch) {
    const int64_t step = ABREAST * LANES;
    Lanes sums[TOGETHER][ABREAST];
    for (int r = 0; r < rows; ++r)
        for (int j = 0; j < ABREAST; ++j) sums[r][j] = (Lanes){0};
    int64_t i = 0;
    for (; i + step <= in; i += step)
        for (int j = 0; j < ABREAST; ++j) {
            if (fetch && j % 2 == 0) __builtin_prefetch((const char *)(w + i + j * LANES) + AHEAD);
            const Lanes weight = *(const Lanes *)(w + i + j * LANES);
            for (int r = 0; r < rows; ++r) sums[r][j] += *(const Lanes *)(x + r * in + i + j * LANES) * weight;
        }
    for (; i + LANES <= in; i += LANES)
        for (int r = 0; r < rows; ++r) sums[r][0] += *(const Lanes *)(x + r * in + i) * *(const Lanes *)(w + i);
    for (int r = 0; r < rows; ++r) {
        float sum = sum_of(sums[r][0] + sums[r][1]);
        for (int64_t k = i; k < in; ++k) sum += x[r * in + k] * w[k];
        y[r * apart] = sum;
    }
}

/* The same of any number of rows. */
static inline __attribute__((always_inline)) void all_dots(const float *x, const float *w, int64_t in, float *y,
                                                           int64_t apart, int64_t rows, const int fetch) {
    int64_t r = 0;
    for (; r + TOGETHER <= rows; r += TOGETHER) dots(x + r * in, w, in, y + r * apart, apart, TOGETHER, fetch);
    for (; r + 2 <= rows; r += 2) dots(x + r * in, w, in, y + r * apart, apart, 2, fetch);
    if (r < rows) dots(x + r * in, w, in, y + r * apart, apart, 1, fetch);
}

/* Rows begin .. end of a weight (O, F) times rows of x (N, F), to y (N, O). The weight is read once. */
VECTORISED static void times_rows(const float *x, const float *weight, float *y, int64_t rows, int64_t in, int64_t out,
                                  int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) all_dots(x, weight + o * in, in, y + o, out, rows, 1);
}

/* ---- Products ---- */

enum { PLAIN, ADDED, GATED };

/* x (N, F) times a weight (O, F), and what is made of it: y (N, O) as it is, added to `other`, or times the gate
 * silu(x gate^T). Parts have `step` rows of the weight. */
typedef struct {
    const float *x, *weight, *gate, *other;
    float *y, *room; /* of the gate (N, O) */
    int64_t rows, in, out, step;
    int what;
} Product;

/* The exponent is kept where exp() is finite, since -ffast-math knows no infinity. */
VECTORISED static void finish_rows(const Product *p, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < p->rows; ++r) {
        float *y = p->y + r * p->out;
        if (p->what == ADDED)
            for (int64_t o = begin; o < end; ++o) y[o] += p->other[r * p->out + o];
        else
            for (int64_t o = begin; o < end; ++o) {
                const float x = p->room[r * p->out + o];
                y[o] *= x / (1.0f + expf(x > -80.0f ? -x : 80.0f));
            }
    }
}

static void product_part(const void *job, int64_t part) {
    const Product *p = job;
    const int64_t begin = part * p->step, end = begin + p->step < p->out ? begin + p->step : p->out;
    if (p->what == GATED) times_rows(p->x, p->gate, p->room, p->rows, p->in, p->out, begin, end);
    times_rows(p->x, p->weight, p->y, p->rows, p->in, p->out, begin, end);
    if (p->what != PLAIN) finish_rows(p, begin, end);
}

static void share_product(Product product) {
    const int64_t bytes = product.in * (int64_t)sizeof(float), rows = (PART_BYTES / bytes + 15) / 16 * 16;
    const int64_t least = product.in * product.out < MIN_SHARED ? product.out : 16; /* vectors of `finish_rows` */
    product.step = rows > least ? rows : least;
    team_share(product_part, &product, (product.out + product.step - 1) / product.step);
}

/* x (N, F) for a small N, weight (O, F) -> x weight^T (N, O). MindSpore's product repacks the weight at every call, which
 * takes longer than the product itself when N is small. */
KERNEL(linear) {
    UNUSED;
    share_product((Product){.x = params[0], .weight = params[1], .y = params[2], .rows = shapes[0][0], .in = shapes[0][1],
                       .out = shapes[1][0], .what = PLAIN});
    return DONE;
}

/* ---- Attention ---- */

/* R more tokens of each of B rows: where the first one of a row goes, and how many are real. */
typedef struct {
    const float *qkv, *cos, *sin; /* (B*R, KV * (G+2) * d), (B, R, G+2, d) */
    const int32_t *at, *real;     /* of a row, `apart` numbers from those of the next one; without `real` all are */
    Cache keys, values;           /* (B*KV, S, d) */
    float *y;                     /* (B*R, KV * G * d) */
    float *turned, *scratch;      /* (B*R, KV, G+2, d); for each entry (G, S) and two tiles */
    int64_t batch, rows, heads, groups, size, positions, apart;
} Attention;

static int64_t first_of(const Attention *a, int64_t row) { return a->at[row * a->apart]; }

static int64_t real_of(const Attention *a, int64_t row) { return a->real ? a->real[row * a->apart] : a->rows; }

/* Whether a row's new positions are not all inside its cache, or its heads' not the same (places of `decode_attention`
 * name every entry). */
static int is_outside(const Attention *a) {
    for (int64_t e = 0; a->real == NULL && e < a->batch * a->heads; ++e)
        if (a->at[2 * e - 1] != e || a->at[2 * e] != first_of(a, e / a->heads)) return 1;
    for (int64_t row = 0; row < a->batch; ++row) {
        const int64_t at = first_of(a, row), real = real_of(a, row);
        if (at < 0 || real < 0 || real > a->rows || at + real > a->positions) return 1;
    }
    return 0;
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

/* Turns all new tokens and adds their keys and values to the cache. */
static void append(const Attention *a) {
    const int64_t rotated = a->groups + 2, size = a->size;
    for (int64_t n = 0; n < a->batch * a->rows; ++n) {
        const int64_t row = n / a->rows, r = n % a->rows;
        if (r >= real_of(a, row)) continue;
        for (int64_t head = 0; head < a->heads; ++head) {
            const int64_t entry = row * a->heads + head, to = (entry * a->positions + first_of(a, row) + r) * size;
            float *turned = a->turned + (n * a->heads + head) * rotated * size;
            rotate(a->qkv + (n * a->heads + head) * rotated * size, a->cos + n * rotated * size,
                   a->sin + n * rotated * size, turned, rotated, size);
            put(a->keys, to, turned + a->groups * size, size);
            put(a->values, to, turned + (a->groups + 1) * size, size);
        }
    }
}

VECTORISED static void score_tile(const float *q, const float *keys, float *scores, int64_t groups, int64_t length,
                                  int64_t count, int64_t size) {
    for (int64_t n = 0; n < count; ++n) all_dots(q, keys + n * size, size, scores + n, length, groups, 0);
}

VECTORISED static void add_tile(const float *weights, const float *values, float *y, int64_t groups, int64_t length,
                                int64_t count, int64_t size) {
    for (int64_t n = 0; n < count; ++n)
        for (int64_t g = 0; g < groups; ++g) {
            const float weight = weights[g * length + n];
            for (int64_t i = 0; i < size; ++i) y[g * size + i] += weight * values[n * size + i];
        }
}

VECTORISED static void softmax_rows(float *weights, int64_t rows, int64_t length) {
    for (int64_t r = 0; r < rows; ++r, weights += length) {
        float highest = weights[0], sum = 0.0f;
        for (int64_t n = 1; n < length; ++n) highest = weights[n] > highest ? weights[n] : highest;
        for (int64_t n = 0; n < length; ++n) {
            weights[n] = expf(weights[n] - highest);
            sum += weights[n];
        }
        for (int64_t n = 0; n < length; ++n) weights[n] /= sum;
    }
}

static int64_t scratch_of(const Attention *a) { return a->groups * a->positions + TILE * a->size; }

/* softmax(q K^T) V of an entry's new tokens, one after the other. */
static void attention_part(const void *job, int64_t entry) {
    const Attention *a = job;
    const int64_t row = entry / a->heads, head = entry % a->heads, groups = a->groups, size = a->size;
    const int64_t begin = entry * a->positions * size;
    float *weights = a->scratch + entry * scratch_of(a), *tile = weights + groups * a->positions;
    for (int64_t r = 0; r < a->rows; ++r) {
        const int64_t token = (row * a->rows + r) * a->heads + head, length = first_of(a, row) + r + 1;
        const float *q = a->turned + token * (groups + 2) * size;
        float *y = a->y + token * groups * size;
        memset(y, 0, sizeof(float) * (size_t)(groups * size));
        if (r >= real_of(a, row)) continue;
        for (int64_t n = 0; n < length; n += TILE) {
            const int64_t count = length - n < TILE ? length - n : TILE;
            score_tile(q, widened(a->keys, begin + n * size, count * size, tile), weights + n, groups, length, count,
                       size);
        }
        softmax_rows(weights, groups, length);
        for (int64_t n = 0; n < length; n += TILE) {
            const int64_t count = length - n < TILE ? length - n : TILE;
            add_tile(weights + n, widened(a->values, begin + n * size, count * size, tile), y, groups, length, count,
                     size);
        }
    }
}

static int64_t attention_room(const Attention *a) {
    return a->batch * (a->rows * a->heads * (a->groups + 2) * a->size + a->heads * scratch_of(a));
}

/* Does it all, in memory of `attention_room`. */
static void attend(Attention *a, float *room) {
    a->turned = room;
    a->scratch = room + a->batch * a->rows * a->heads * (a->groups + 2) * a->size;
    append(a);
    int64_t seen = 0;
    for (int64_t row = 0; row < a->batch; ++row) seen += (first_of(a, row) + real_of(a, row)) * a->rows;
    if (seen * a->heads * a->size >= MIN_SHARED / 4)
        team_share(attention_part, a, a->batch * a->heads);
    else
        for (int64_t entry = 0; entry < a->batch * a->heads; ++entry) attention_part(a, entry);
}

/* Of tables (B, R, G+2, d), places and caches, the first of them parameter `first`. `decodes`: the places are those of
 * `decode_attention`. */
static Attention attention_of(void **params, int64_t **shapes, const char **dtypes, int first, int decodes) {
    const int64_t *tables = shapes[first], *held = shapes[first + 3];
    const int32_t *places = params[first + 2];
    const int64_t heads = held[0] / tables[0];
    return (Attention){.cos = params[first], .sin = params[first + 1], .at = places + decodes,
                       .real = decodes ? NULL : places + 1, .apart = decodes ? 2 * heads : 2,
                       .keys = cache_of(params, dtypes, first + 3), .values = cache_of(params, dtypes, first + 4),
                       .batch = tables[0], .rows = tables[1], .groups = tables[2] - 2, .size = tables[3],
                       .heads = heads, .positions = held[1]};
}

static int attention_alone(void **params, int64_t **shapes, const char **dtypes, int decodes) {
    Attention attention = attention_of(params, shapes, dtypes, 1, decodes);
    attention.qkv = params[0], attention.y = params[6];
    if (is_outside(&attention)) return BAD_PLACE;
    float *room = team_room(attention_room(&attention));
    if (room == NULL) return NO_MEMORY;
    attend(&attention, room);
    return DONE;
}

/* Rotation, append to the cache and attention of one token a row.
 *
 * qkv (B, KV * (G+2) * d), cos and sin (B, 1, G+2, d), where (B*KV, 2) int32: each entry and its new position, keys and
 * values (B*KV, S, d), both written in place -> y (B, KV * G * d). */
KERNEL(decode_attention) {
    UNUSED;
    return attention_alone(params, shapes, dtypes, 1);
}

/* The same of a few more tokens a row, each of which sees those before it.
 *
 * qkv (B*R, KV * (G+2) * d), cos and sin (B, R, G+2, d), places (B, 2) int32: a row's first new position and how many
 * of its R are real, keys and values (B*KV, S, d), both written in place -> y (B*R, KV * G * d) */
KERNEL(extend_attention) {
    UNUSED;
    return attention_alone(params, shapes, dtypes, 0);
}

/* keys and values (N, ..), source (N) int32 -> 0 (1): entry i of both becomes entry source[i]. */
KERNEL(reorder_cache) {
    UNUSED;
    const int32_t *source = params[2];
    const int64_t entries = shapes[0][0];
    size_t size = cache_of(params, dtypes, 0).is_half ? 2 : 4;
    for (int axis = 1; axis < ndims[0]; ++axis) size *= (size_t)shapes[0][axis];
    for (int64_t e = 0; e < entries; ++e)
        if (source[e] < 0 || source[e] >= entries) return BAD_PLACE;
    char *before = malloc(size * (size_t)entries);
    if (before == NULL) return NO_MEMORY;
    for (int half = 0; half < 2; ++half) {
        char *held = params[half];
        memcpy(before, held, size * (size_t)entries);
        for (int64_t e = 0; e < entries; ++e)
            if (source[e] != e) memcpy(held + (size_t)e * size, before + (size_t)source[e] * size, size);
    }
    free(before);
    *(float *)params[3] = 0.0f;
    return DONE;
}

/* ---- Layers ---- */

VECTORISED static void norm_rows(const float *x, const float *weight, float eps, float *y, int64_t rows,
                                 int64_t width) {
    for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
        float squares;
        dots(x, x, width, &squares, 0, 1, 0);
        const float scale = 1.0f / sqrtf(squares / (float)width + eps);
        for (int64_t i = 0; i < width; ++i) y[i] = x[i] * scale * weight[i];
    }
}

static int layer(void **params, int64_t **shapes, const char **dtypes, int decodes) {
    const float *x = params[0], eps = *(const float *)params[3];
    const int64_t rows = shapes[0][0], width = shapes[0][1], own = shapes[4][0], inner = shapes[11][0];
    Attention attention = attention_of(params, shapes, dtypes, 5, decodes);
    const int64_t heads = attention.heads * attention.groups * attention.size;
    if (rows != attention.batch * attention.rows || shapes[4][1] != width || shapes[10][1] != heads ||
        own != attention.heads * (attention.groups + 2) * attention.size || shapes[13][1] != inner)
        return BAD_SHAPE;
    if (is_outside(&attention)) return BAD_PLACE;
    float *normed = team_room(rows * (2 * width + own + heads + 2 * inner) + attention_room(&attention));
    if (normed == NULL) return NO_MEMORY;
    float *middle = normed + rows * width, *qkv = middle + rows * width, *seen = qkv + rows * own;
    float *gated = seen + rows * heads, *room = gated + rows * inner, *y = params[14];
    norm_rows(x, params[1], eps, normed, rows, width);
    share_product((Product){.x = normed, .weight = params[4], .y = qkv, .rows = rows, .in = width, .out = own});
    attention.qkv = qkv, attention.y = seen;
    attend(&attention, room + rows * inner);
    share_product((Product){.x = seen, .weight = params[10], .other = x, .y = middle, .rows = rows, .in = heads,
                       .out = width, .what = ADDED});
    norm_rows(middle, params[2], eps, normed, rows, width);
    share_product((Product){.x = normed, .weight = params[12], .gate = params[11], .y = gated, .room = room, .rows = rows,
                       .in = width, .out = inner, .what = GATED});
    share_product((Product){.x = gated, .weight = params[13], .other = middle, .y = y, .rows = rows, .in = inner,
                       .out = width, .what = ADDED});
    return DONE;
}

/* A whole decoder layer over one more token a row.
 *
 * x (B, D), weights of the norms before attention and feed-forward (D), eps (1), wqkv (KV * (G+2) * d, D), cos, sin,
 * where, keys, values as in `decode_attention`, wo (D, KV * G * d), w1 and w3 (I, D), w2 (D, I) -> y (B, D) */
KERNEL(decode_layer) {
    UNUSED;
    return layer(params, shapes, dtypes, 1);
}

/* The same over a few more tokens a row: x (B*R, D), tables and places as in `extend_attention` */
KERNEL(extend_layer) {
    UNUSED;
    return layer(params, shapes, dtypes, 0);
}
