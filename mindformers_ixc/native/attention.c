/* Attention for training on the CPU, with its gradients; see products.c.
 *
 * No scores are kept: of each query stays the logarithm of the sum of its exponentials, from which the gradients make
 * them again, a block at a time.
 */
#include "products.h"

/* Queries that attend at once; their scores stay in the cache. */
#define QUERIES 128

/* Queries, keys and values of one head: rows of `size` numbers, each a step behind the one before. */
typedef struct {
    const float *query, *key, *value;
    int64_t query_step, key_step, value_step, length, size;
    const int64_t *starts; /* the first key each query sees, up to itself; NULL: all see all */
    float scale;
} head_t;

/* The keys that queries begin .. end see, at most: the first, and the end in `stop`. */
static int64_t keys_of(const head_t *h, int64_t begin, int64_t end, int64_t *stop) {
    *stop = h->starts ? end : h->length;
    return h->starts ? h->starts[begin] : 0;
}

/* Softmax of the scores of queries begin .. end over keys from `first`, in place, and the logarithms of their sums. */
VECTORISED static void softmax_rows(float *scores, float *lse, const head_t *h, int64_t begin, int64_t end,
                                    int64_t first, int64_t keys) {
    for (int64_t q = begin; q < end; ++q, scores += keys) {
        const int64_t from = h->starts ? h->starts[q] - first : 0, to = h->starts ? q + 1 - first : keys;
        float highest = scores[from], sum = 0.0f;
        for (int64_t i = from; i < to; ++i) highest = scores[i] > highest ? scores[i] : highest;
        for (int64_t i = from; i < to; ++i) {
            scores[i] = exp_of(scores[i] - highest);
            sum += scores[i];
        }
        const float share = 1.0f / sum;
        for (int64_t i = 0; i < from; ++i) scores[i] = 0.0f;
        for (int64_t i = from; i < to; ++i) scores[i] *= share;
        for (int64_t i = to; i < keys; ++i) scores[i] = 0.0f;
        lse[q] = highest + logf(sum);
    }
}

/* y = softmax(scale * q k^T) v of one head; scratch holds QUERIES * length numbers. */
static void attend(const head_t *h, float *y, int64_t y_step, float *lse, float *scratch) {
    for (int64_t begin = 0; begin < h->length; begin += QUERIES) {
        const int64_t end = begin + QUERIES < h->length ? begin + QUERIES : h->length;
        int64_t stop;
        const int64_t first = keys_of(h, begin, end, &stop), keys = stop - first;
        multiply('N', 'T', end - begin, keys, h->size, h->scale, h->query + begin * h->query_step, h->query_step,
                 h->key + first * h->key_step, h->key_step, 0.0f, scratch, keys);
        softmax_rows(scratch, lse, h, begin, end, first, keys);
        multiply('N', 'N', end - begin, h->size, keys, 1.0f, scratch, keys, h->value + first * h->value_step, h->value_step, 0.0f,
                 y + begin * y_step, y_step);
    }
}

/* Scores become weights, and the gradient of weights that of scores. */
VECTORISED static void back_rows(float *scores, float *gradient, const float *lse, const float *rest, const head_t *h,
                                 int64_t begin, int64_t end, int64_t first, int64_t keys) {
    for (int64_t q = begin; q < end; ++q, scores += keys, gradient += keys) {
        const int64_t from = h->starts ? h->starts[q] - first : 0, to = h->starts ? q + 1 - first : keys;
        const float sum = lse[q], mean = rest[q - begin];
        for (int64_t i = 0; i < from; ++i) scores[i] = gradient[i] = 0.0f;
        for (int64_t i = from; i < to; ++i) {
            scores[i] = exp_of(scores[i] - sum);
            gradient[i] = scores[i] * (gradient[i] - mean);
        }
        for (int64_t i = to; i < keys; ++i) scores[i] = gradient[i] = 0.0f;
    }
}

VECTORISED static float dot(const float *x, const float *y, int64_t count) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) sum += x[i] * y[i];
    return sum;
}

/* Gradients of one head: dq is written, dk and dv are added to; scratch holds 2 * QUERIES * length numbers. */
static void attend_back(const head_t *h, const float *y, const float *dy, int64_t y_step, const float *lse, float *dq,
                        int64_t dq_step, float *dk, int64_t dk_step, float *dv, int64_t dv_step, float *scratch) {
    float rest[QUERIES];
    for (int64_t begin = 0; begin < h->length; begin += QUERIES) {
        const int64_t end = begin + QUERIES < h->length ? begin + QUERIES : h->length, rows = end - begin;
        int64_t stop;
        const int64_t first = keys_of(h, begin, end, &stop), keys = stop - first;
        float *scores = scratch, *gradient = scratch + QUERIES * h->length;
        const float *query = h->query + begin * h->query_step, *part = dy + begin * y_step;
        for (int64_t r = 0; r < rows; ++r) rest[r] = dot(y + (begin + r) * y_step, part + r * y_step, h->size);
        multiply('N', 'T', rows, keys, h->size, h->scale, query, h->query_step, h->key + first * h->key_step, h->key_step, 0.0f,
                 scores, keys);
        multiply('N', 'T', rows, keys, h->size, 1.0f, part, y_step, h->value + first * h->value_step, h->value_step, 0.0f, gradient,
                 keys);
        back_rows(scores, gradient, lse, rest, h, begin, end, first, keys);
        multiply('N', 'N', rows, h->size, keys, h->scale, gradient, keys, h->key + first * h->key_step, h->key_step, 0.0f,
                 dq + begin * dq_step, dq_step);
        multiply('T', 'N', keys, h->size, rows, h->scale, gradient, keys, query, h->query_step, 1.0f,
                 dk + first * dk_step, dk_step);
        multiply('T', 'N', keys, h->size, rows, 1.0f, scores, keys, part, y_step, 1.0f, dv + first * dv_step, dv_step);
    }
}

/* ---- The tower ---- */

/* Head `number` of all tiles' heads: q, k and v (N*L, H*d) as they leave their linears. */
static head_t tile_head(void **params, const int64_t *shape, int64_t number, int64_t width, int64_t *at) {
    const int64_t heads = shape[1], length = shape[2], size = width / heads;
    *at = number / heads * length * width + number % heads * size;
    const head_t head = {(const float *)params[0] + *at, (const float *)params[1] + *at, (const float *)params[2] + *at,
                         width, width, width, length, size, NULL, 1.0f / sqrtf((float)size)};
    return head;
}

/* q, k, v (N*L, H*d) -> y (N*L, H*d), lse (N, H, L) */
KERNEL(tile_attention) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    const int64_t width = shapes[0][1], *shape = shapes[4], heads = shape[0] * shape[1], length = shape[2];
    float *y = params[3], *lse = params[4];
    const int threads = threads_for(4.0 * (double)(length * shapes[0][0]) * (double)width);
    int result = DONE;
    TAKE_THREADS(threads);
    SHARED(threads, heads, 1, begin, end) {
        float *scratch = malloc(sizeof(float) * (size_t)(QUERIES * length));
        if (!scratch) {
            result = NO_MEMORY;
            continue;
        }
        for (int64_t number = begin; number < end; ++number) {
            int64_t at;
            const head_t head = tile_head(params, shape, number, width, &at);
            attend(&head, y + at, width, lse + number * length, scratch);
        }
        free(scratch);
    }
    GIVE_THREADS(threads);
    return result;
}

/* q, k, v, y (N*L, H*d), lse (N, H, L), dy (N*L, H*d) -> dq, dk, dv */
KERNEL(tile_attention_back) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    const int64_t rows = shapes[0][0], width = shapes[0][1], *shape = shapes[4];
    const int64_t heads = shape[0] * shape[1], length = shape[2];
    const float *y = params[3], *lse = params[4], *dy = params[5];
    float *dq = params[6], *dk = params[7], *dv = params[8];
    const int threads = threads_for(10.0 * (double)(length * rows) * (double)width);
    int result = DONE;
    TAKE_THREADS(threads);
    memset(dk, 0, sizeof(float) * (size_t)(rows * width));
    memset(dv, 0, sizeof(float) * (size_t)(rows * width));
    SHARED(threads, heads, 1, begin, end) {
        float *scratch = malloc(sizeof(float) * (size_t)(2 * QUERIES * length));
        if (!scratch) {
            result = NO_MEMORY;
            continue;
        }
        for (int64_t number = begin; number < end; ++number) {
            int64_t at;
            const head_t head = tile_head(params, shape, number, width, &at);
            attend_back(&head, y + at, dy + at, width, lse + number * length, dq + at, width, dk + at, width, dv + at,
                        width, scratch);
        }
        free(scratch);
    }
    GIVE_THREADS(threads);
    return result;
}

/* ---- The decoder ---- */

/* What the attention of one key/value head works with. `heads` is KV, `groups` G, `width` that of a position in qkv. */
typedef struct {
    int64_t batch, heads, groups, length, size, width;
    const float *cos, *sin;                                              /* of the sample */
    float *queries, *keys, *d_queries, *d_keys, *scratch;                /* turned, and their gradients */
    int64_t *starts;
} decoder_t;

/* Sizes from qkv (B*L, KV * (G+2) * d), cos (B or 1, L, 1, 1, d) and lse (B, KV, G, L). */
static decoder_t decoder_of(const int64_t *qkv, const int64_t *cos, const int64_t *lse) {
    decoder_t s = {lse[0], lse[1], lse[2], lse[3], cos[4], qkv[1], NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL};
    return s;
}

/* Room for one head; 0 if there is none. */
static int has_room(decoder_t *s) {
    const int64_t rows = s->length * s->size;
    s->queries = malloc(sizeof(float) * (size_t)(4 * rows + 2 * QUERIES * s->length));
    s->starts = malloc(sizeof(int64_t) * (size_t)s->length);
    if (!s->queries || !s->starts) return 0;
    s->keys = s->queries + rows, s->d_queries = s->keys + rows, s->d_keys = s->d_queries + rows;
    s->scratch = s->d_keys + rows;
    return 1;
}

static void leave_room(decoder_t *s) {
    free(s->queries);
    free(s->starts);
}

/* The first position of each position's segment, from the ends of segments (S); a position sees its segment only. */
static void find_starts(const int32_t *ends, int64_t segments, int64_t length, int64_t *starts) {
    for (int64_t l = 0, at = 0, start = 0; l < length; ++l) {
        for (; at < segments && ends[at] <= l; ++at) start = ends[at];
        starts[l] = start;
    }
}

/* Rotates a head of each position by its angles, or back: from rows `from_step` apart to rows `to_step` apart. */
VECTORISED static void turn(const float *from, int64_t from_step, float *to, int64_t to_step, const decoder_t *s) {
    const int64_t half = s->size / 2;
    for (int64_t l = 0; l < s->length; ++l, from += from_step, to += to_step) {
        const float *c = s->cos + l * s->size, *t = s->sin + l * s->size;
        for (int64_t i = 0; i < half; ++i) {
            to[i] = from[i] * c[i] - from[i + half] * t[i];
            to[i + half] = from[i + half] * c[i + half] + from[i] * t[i + half];
        }
    }
}

VECTORISED static void turn_back(const float *from, int64_t from_step, float *to, int64_t to_step,
                                 const decoder_t *s) {
    const int64_t half = s->size / 2;
    for (int64_t l = 0; l < s->length; ++l, from += from_step, to += to_step) {
        const float *c = s->cos + l * s->size, *t = s->sin + l * s->size;
        for (int64_t i = 0; i < half; ++i) {
            to[i] = from[i] * c[i] + from[i + half] * t[i + half];
            to[i + half] = from[i + half] * c[i + half] - from[i] * t[i];
        }
    }
}

/* Goes to a key/value head of a sample: its keys are turned and its segments found. What is returned is where the
 * head's queries begin in qkv. */
static int64_t enter(decoder_t *s, void **params, int64_t **shapes, int64_t unit) {
    const int64_t b = unit / s->heads, rows = shapes[1][0] == 1 ? 0 : b * s->length * s->size;
    const int64_t segments = shapes[3][1];
    s->cos = (const float *)params[1] + rows, s->sin = (const float *)params[2] + rows;
    find_starts((const int32_t *)params[3] + (shapes[3][0] == 1 ? 0 : b * segments), segments, s->length, s->starts);
    const int64_t at = b * s->length * s->width + unit % s->heads * (s->groups + 2) * s->size;
    turn((const float *)params[0] + at + s->groups * s->size, s->width, s->keys, s->size, s);
    return at;
}

/* One query head of it, turned. */
static head_t query_head(decoder_t *s, const float *head, int64_t group) {
    turn(head + group * s->size, s->width, s->queries, s->size, s);
    const head_t one = {s->queries, s->keys, head + (s->groups + 1) * s->size, s->size, s->size, s->width, s->length,
                        s->size, s->starts, 1.0f / sqrtf((float)s->size)};
    return one;
}

/* qkv (B*L, KV * (G+2) * d), cos and sin (B or 1, L, 1, 1, d), ends (B or 1, S) int32, where segments end ->
 * y (B*L, KV * G * d), lse (B, KV, G, L): rotary embedding, then causal attention within segments. */
KERNEL(causal_attention) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    const decoder_t sizes = decoder_of(shapes[0], shapes[1], shapes[5]);
    const int64_t units = sizes.batch * sizes.heads, out = sizes.heads * sizes.groups * sizes.size;
    const float *qkv = params[0];
    float *y = params[4], *lse = params[5];
    const int threads = threads_for(2.0 * (double)(sizes.length * shapes[0][0]) * (double)out);
    int result = DONE;
    TAKE_THREADS(threads);
    SHARED(threads, units, 1, begin, end) {
        decoder_t s = sizes;
        const int there = has_room(&s);
        if (!there) result = NO_MEMORY;
        for (int64_t unit = begin; there && unit < end; ++unit) {
            const int64_t at = enter(&s, params, shapes, unit);
            for (int64_t g = 0; g < s.groups; ++g) {
                const head_t head = query_head(&s, qkv + at, g);
                attend(&head, y + unit / s.heads * s.length * out + (unit % s.heads * s.groups + g) * s.size, out,
                       lse + (unit * s.groups + g) * s.length, s.scratch);
            }
        }
        leave_room(&s);
    }
    GIVE_THREADS(threads);
    return result;
}

/* The gradient of one key/value head of `causal_attention`, into its place in dqkv. */
static void back_through(decoder_t *s, void **params, int64_t **shapes, int64_t unit) {
    const int64_t at = enter(s, params, shapes, unit), out = s->heads * s->groups * s->size;
    float *dqkv = (float *)params[7] + at, *d_values = dqkv + (s->groups + 1) * s->size;
    memset(s->d_keys, 0, sizeof(float) * (size_t)(s->length * s->size));
    for (int64_t l = 0; l < s->length; ++l) memset(d_values + l * s->width, 0, sizeof(float) * (size_t)s->size);
    for (int64_t g = 0; g < s->groups; ++g) {
        const head_t head = query_head(s, (const float *)params[0] + at, g);
        const int64_t from = unit / s->heads * s->length * out + (unit % s->heads * s->groups + g) * s->size;
        attend_back(&head, (const float *)params[4] + from, (const float *)params[6] + from, out,
                    (const float *)params[5] + (unit * s->groups + g) * s->length, s->d_queries, s->size, s->d_keys,
                    s->size, d_values, s->width, s->scratch);
        turn_back(s->d_queries, s->size, dqkv + g * s->size, s->width, s);
    }
    turn_back(s->d_keys, s->size, dqkv + s->groups * s->size, s->width, s);
}

/* qkv, cos, sin, ends, y, lse, dy (B*L, KV * G * d) -> dqkv (B*L, KV * (G+2) * d) */
KERNEL(causal_attention_back) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    const decoder_t sizes = decoder_of(shapes[0], shapes[1], shapes[5]);
    const int64_t units = sizes.batch * sizes.heads;
    const int threads = threads_for(5.0 * (double)(sizes.length * shapes[0][0]) * (double)shapes[6][1]);
    int result = DONE;
    TAKE_THREADS(threads);
    SHARED(threads, units, 1, begin, end) {
        decoder_t s = sizes;
        const int there = has_room(&s);
        if (!there) result = NO_MEMORY;
        for (int64_t unit = begin; there && unit < end; ++unit) back_through(&s, params, shapes, unit);
        leave_room(&s);
    }
    GIVE_THREADS(threads);
    return result;
}
