/* Products and attention of many positions, for inference on the CPU, called by MindSpore's `ops.Custom` (aot) as
 * operation.h says.
 *
 * The products are those of the oneDNN that MindSpore brings (`use_product` in products.c): one thread multiplies one
 * block. Blocks are shared out among a team of threads (team.h), more of them than there are threads, so that one beside
 * a busy neighbour does fewer and nobody waits for it.
 */
#include "heads.h"
#include "products.h"
#include "team.h"

/* Positions and rows of a weight that are one part of a product, at most and at least. */
#define TALL 256
#define LOW 64

/* Queries that attend at once; their scores stay in the cache. */
#define QUERIES 128

/* Parts a thread, where the work gives so many. */
#define PARTS 4

/* ---- Linears ---- */

/* x (N, F) times weight (O, F); with a pair also side (N, r) times second (O, r) where `factor` (N) is not 0. */
typedef struct {
    const float *x, *weight, *first, *second, *factor;
    float *y, *side;
    int64_t rows, in, out, rank, high, wide; /* a part has `high` positions and `wide` rows of the weight */
} Product;

static int64_t count_of(int64_t all, int64_t step) { return (all + step - 1) / step; }

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static void product_part(const void *job, int64_t part) {
    const Product *p = job;
    const int64_t across = count_of(p->out, p->wide), begin = part / across * p->high, from = part % across * p->wide;
    const int64_t end = smaller(begin + p->high, p->rows), wide = smaller(p->wide, p->out - from);
    multiply('N', 'T', end - begin, wide, p->in, 1.0f, p->x + begin * p->in, p->in, p->weight + from * p->in, p->in, 0.0f,
             p->y + begin * p->out + from, p->out);
    int64_t stop;
    if (p->second)
        for (int64_t at = next_run(p->factor, begin, end, &stop); at < stop; at = next_run(p->factor, stop, end, &stop))
            multiply('N', 'T', stop - at, wide, p->rank, 1.0f, p->side + at * p->rank, p->rank,
                     p->second + from * p->rank, p->rank, 1.0f, p->y + at * p->out + from, p->out);
}

/* side = factor * x first^T of some positions */
static void side_part(const void *job, int64_t part) {
    const Product *p = job;
    const int64_t begin = part * p->high, end = smaller(begin + p->high, p->rows);
    int64_t stop;
    for (int64_t at = next_run(p->factor, begin, end, &stop); at < stop; at = next_run(p->factor, stop, end, &stop)) {
        multiply('N', 'T', stop - at, p->rank, p->in, 1.0f, p->x + at * p->in, p->in, p->first, p->in, 0.0f,
                 p->side + at * p->rank, p->rank);
        for (int64_t r = at; r < stop; ++r)
            for (int64_t i = 0; i < p->rank; ++i) p->side[r * p->rank + i] *= p->factor[r];
    }
}

static void share_product(Product p) {
    const int64_t wanted = PARTS * omp_get_max_threads();
    p.high = smaller(p.rows, TALL), p.wide = smaller(p.out, TALL);
    while (count_of(p.rows, p.high) * count_of(p.out, p.wide) < wanted && (p.high > LOW || p.wide > LOW)) {
        int64_t *larger = p.wide >= p.high ? &p.wide : &p.high;
        *larger = (*larger / 2 + 15) / 16 * 16;
    }
    if (p.second) team_share(side_part, &p, count_of(p.rows, p.high));
    team_share(product_part, &p, count_of(p.rows, p.high) * count_of(p.out, p.wide));
}

/* x (N, F), weight (O, F) -> x weight^T (N, O) */
KERNEL(linear_many) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    share_product((Product){.x = params[0], .weight = params[1], .y = params[2], .rows = shapes[0][0],
                            .in = shapes[0][1], .out = shapes[1][0]});
    return DONE;
}

/* x (N, F), weight (O, F), A (r, F), B (O, r), factor (N, 1) -> x weight^T + (factor * x A^T) B^T (N, O); positions whose
 * factor is 0 take no part in the pair. */
KERNEL(linear_many_pair) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    const int64_t rows = shapes[0][0], rank = shapes[2][0];
    float *side = malloc(sizeof(float) * (size_t)(rows * rank));
    if (side == NULL) return NO_MEMORY;
    share_product((Product){.x = params[0], .weight = params[1], .first = params[2], .second = params[3],
                            .factor = params[4], .y = params[5], .side = side, .rows = rows, .in = shapes[0][1],
                            .out = shapes[1][0], .rank = rank});
    free(side);
    return DONE;
}

/* ---- Attention ---- */

/* Queries (B, H, L, d), scaled, over keys and values (B, H / G, S, d), to y (B*L, H*d). The queries are the last L of the
 * S positions, each of which sees those up to itself, or `causal` is not set and all see all. */
typedef struct {
    const float *queries, *keys, *values;
    float *y;
    int64_t heads, groups, length, seen, size, chunks;
    int causal, *failed;
} Attention;

/* Softmax over the first `seen` keys of the first row, one more of each row below, if `more`; 0 behind them. */
VECTORISED static void softmax_rows(float *scores, int64_t rows, int64_t keys, int64_t seen, int more) {
    for (int64_t r = 0; r < rows; ++r, scores += keys, seen += more) {
        float highest = scores[0], sum = 0.0f;
        for (int64_t i = 1; i < seen; ++i) highest = scores[i] > highest ? scores[i] : highest;
        for (int64_t i = 0; i < seen; ++i) {
            scores[i] = exp_of(scores[i] - highest);
            sum += scores[i];
        }
        const float share = 1.0f / sum;
        for (int64_t i = 0; i < seen; ++i) scores[i] *= share;
        for (int64_t i = seen; i < keys; ++i) scores[i] = 0.0f;
    }
}

static void attention_part(const void *job, int64_t part) {
    const Attention *a = job;
    const int64_t unit = part / a->chunks, row = unit / a->heads, head = unit % a->heads, size = a->size;
    /* the longest first: what is left for the end is short */
    const int64_t begin = (a->chunks - 1 - part % a->chunks) * QUERIES, end = smaller(begin + QUERIES, a->length);
    const int64_t before = a->seen - a->length, keys = a->causal ? before + end : a->seen;
    const int64_t entry = (unit / a->groups) * a->seen * size, width = a->heads * size;
    float *scores = team_room(QUERIES * a->seen), *y = a->y + (row * a->length + begin) * width + head * size;
    if (scores == NULL) {
        *a->failed = 1;
        return;
    }
    multiply('N', 'T', end - begin, keys, size, 1.0f, a->queries + (unit * a->length + begin) * size, size,
             a->keys + entry, size, 0.0f, scores, keys);
    softmax_rows(scores, end - begin, keys, a->causal ? before + begin + 1 : keys, a->causal);
    multiply('N', 'N', end - begin, size, keys, 1.0f, scores, keys, a->values + entry, size, 0.0f, y, width);
}

static int attention_many(void **params, int *ndims, int64_t **shapes, int causal) {
    if (!multiply) return NO_PRODUCT;
    const int64_t *query = shapes[0], *key = shapes[1], groups = ndims[0] == 5 ? query[2] : 1;
    const int64_t length = query[ndims[0] - 2], heads = query[1] * groups;
    if (length > key[2] && causal) return BAD_PLACE;
    int failed = 0;
    const Attention attention = {.queries = params[0], .keys = params[1], .values = params[2], .y = params[3],
                                 .heads = heads, .groups = groups, .length = length, .seen = key[2], .size = key[3],
                                 .chunks = count_of(length, QUERIES), .causal = causal, .failed = &failed};
    team_share(attention_part, &attention, query[0] * heads * attention.chunks);
    return failed ? NO_MEMORY : DONE;
}

/* queries (B, KV, G, L, d), scaled, keys and values (B, KV, S, d) of a prompt that ends with them
 * -> softmax(q k^T) v (B*L, KV*G*d), of the keys that each may see */
KERNEL(prompt_attention) {
    UNUSED;
    return attention_many(params, ndims, shapes, 1);
}

/* queries (N, H, L, d), scaled, keys and values (N, H, L, d) -> softmax(q k^T) v (N*L, H*d) */
KERNEL(whole_attention) {
    UNUSED;
    return attention_many(params, ndims, shapes, 0);
}

/* ---- More positions over a cache ---- */

/* Queries of R more positions of each row (B, KV, G, R, d) over what a cache holds, to y (B*R, KV*G*d). */
typedef struct {
    const Heads *heads;
    float *y;
    int64_t chunks;
    int *failed;
} Extension;

static void extension_part(const void *job, int64_t part) {
    const Extension *e = job;
    const Heads *a = e->heads;
    const int64_t unit = part / e->chunks, entry = unit / a->groups, row = entry / a->heads, size = a->size;
    const int64_t begin = part % e->chunks * QUERIES, end = smaller(begin + QUERIES, a->length);
    const int64_t at = a->places[2 * row], last = smaller(end, a->places[2 * row + 1]), keys = at + last;
    const int64_t width = a->heads * a->groups * size;
    float *y = e->y + (row * a->length + begin) * width + unit % (a->heads * a->groups) * size;
    /* what is not real is zero */
    for (int64_t r = last > begin ? last : begin; r < end; ++r)
        memset(y + (r - begin) * width, 0, sizeof(float) * (size_t)size);
    if (last <= begin) return;
    float *scores = team_room(QUERIES * a->positions + a->positions * size), *wide = scores + QUERIES * a->positions;
    if (scores == NULL) {
        *e->failed = 1;
        return;
    }
    multiply('N', 'T', last - begin, keys, size, 1.0f, a->queries + (unit * a->length + begin) * size, size,
             widened(a->cache_keys, entry * a->positions * size, keys * size, wide), size, 0.0f, scores, keys);
    softmax_rows(scores, last - begin, keys, at + begin + 1, 1);
    multiply('N', 'N', last - begin, size, keys, 1.0f, scores, keys,
             widened(a->cache_values, entry * a->positions * size, keys * size, wide), size, 0.0f, y, width);
}

/* Rotation, append to the cache and attention of many more positions a row, each of which sees those before it.
 *
 * qkv (B*R, KV * (G+2) * d), cos and sin (B, R, 1, 1, d), places (B, 2) int32: a row's first new position and how many
 * of its R are real, scale (1), keys and values (B*KV, S, d), both written in place -> y (B*R, KV*G*d) */
KERNEL(extend_many) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    const int64_t *tables = shapes[1], *held = shapes[5], batch = tables[0], length = tables[1], size = tables[4];
    const int64_t heads = held[0] / batch, groups = shapes[7][1] / (heads * size);
    float *queries = malloc(sizeof(float) * (size_t)(batch * length * heads * groups * size));
    if (queries == NULL) return NO_MEMORY;
    const Heads all = {.qkv = params[0], .cos = params[1], .sin = params[2], .places = params[3],
                       .scale = *(const float *)params[4], .cache_keys = cache_of(params, dtypes, 5),
                       .cache_values = cache_of(params, dtypes, 6), .queries = queries, .batch = batch, .heads = heads,
                       .groups = groups, .length = length, .size = size, .positions = held[1]};
    int failed = 0;
    const Extension extension = {&all, params[7], count_of(length, QUERIES), &failed};
    const int inside = take_apart(&all);
    if (inside) team_share(extension_part, &extension, batch * heads * groups * extension.chunks);
    free(queries);
    return !inside ? BAD_PLACE : failed ? NO_MEMORY : DONE;
}
