/* Products with weights of 4, 8 and 16 bits, for inference on the CPU, called by MindSpore's `ops.Custom` (aot).
 *
 * A step of decoding reads every weight once, so what a weight takes in memory is what a step costs: a row of the weight
 * is multiplied as it is read (`few_rows`). Numbers of 4 and 8 bits meet activations of 16 bits, one scale a group of
 * 128, because products of whole numbers go through twice as many at once; that rounds an activation by 2^-16 of its
 * group's largest. What a prompt does is in widened.c.
 *
 * Weights come as they lie in the file, which is mapped; nothing is copied. F are the input's features, O the output's,
 * G = F / 128 groups. Forms of a weight:
 *   int4   (O, F/2) bytes, scales float16 (O, G), zeros bytes (O, G): w = (q - zero) * scale. 64 weights are 16 words of
 *          16 bits (little-endian): word j holds the weights j, 16+j, 32+j and 48+j from its lowest four bits on.
 *   int8   (O, F) signed bytes, scales float32 (O): w = q * scale
 *   bf16, f16   (O, F)
 */
#include "products.h"
#include "stored.h"
#include "team.h"

/* Positions up to which a weight is multiplied as it is read; from the next on widening it once is faster. */
#define FEW 8
/* Rows that share one pass over a row of the weight. */
#define ABREAST 4
/* Bytes of a weight that are one part of a product: threads take the next part when they are free. */
#define PART_BYTES 65536
/* How far ahead, in bytes, a weight is fetched from memory, for the processor does not look across pages: into the second
 * level of its cache, since the first one has too little room for what is on its way. */
#define AHEAD 8192
#define FETCH(address) __builtin_prefetch(address, 0, 2)

/* Activations as whole numbers: values (N, F), and of each group its scale and the sum of its values, scaled. */
typedef struct {
    int16_t *values;
    float *scales, *sums;
    int64_t groups;
} Rounded;

VECTORISED static void round_rows(const float *x, const Rounded *to, int64_t rows, int64_t in) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t g = 0; g < to->groups; ++g) {
            const int64_t begin = g * GROUP, count = in - begin < GROUP ? in - begin : GROUP;
            const float *from = x + r * in + begin;
            int16_t *values = to->values + r * in + begin;
            uint32_t most = 0; /* bits of sizes, in the order of sizes; what is no number is above them */
            for (int64_t i = 0; i < count; ++i) {
                uint32_t bits;
                memcpy(&bits, from + i, sizeof bits);
                most = (bits & 0x7fffffff) > most ? bits & 0x7fffffff : most;
            }
            const float highest = of_bits(most), scale = highest / 32767.0f;
            const float inverse = most > 0 && most < 0x7f800000 ? 32767.0f / highest : 0.0f;
            int32_t sum = 0;
            for (int64_t i = 0; i < count; ++i) {
                const float scaled = from[i] * inverse;
                const int32_t value = (int32_t)(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
                values[i] = (int16_t)value;
                sum += value;
            }
            to->scales[r * to->groups + g] = scale;
            to->sums[r * to->groups + g] = (float)sum * scale;
        }
}

/* What a group's whole-number product counts: its weights' scale times its activations'. Returns the part of the sum
 * that the zeros take away. */
VECTORISED static float group_factors(const uint8_t *scales, const uint8_t *zeros, const float *x_scales,
                                      const float *x_sums, float *factors, int64_t groups) {
    float away = 0.0f;
    for (int64_t g = 0; g < groups; ++g) {
        const float scale = of_f16(word_at(scales, g));
        factors[g] = scale * x_scales[g];
        away += scale * (float)zeros[g] * x_sums[g];
    }
    return away;
}

VECTORISED static float plain_int4(const uint8_t *w, const int16_t *x, const float *factors, int64_t groups) {
    float total = 0.0f;
    for (int64_t g = 0; g < groups; ++g) {
        int32_t sum = 0;
        for (int half = 0; half < 2; ++half, w += 32, x += 64)
            for (int j = 0; j < 16; ++j) {
                const uint16_t word = word_at(w, j);
                sum += (word & 15) * x[j] + (word >> 4 & 15) * x[16 + j] + (word >> 8 & 15) * x[32 + j] +
                       (word >> 12) * x[48 + j];
            }
        total += (float)sum * factors[g];
    }
    return total;
}

VECTORISED static float plain_int8(const int8_t *w, const int16_t *x, const float *factors, int64_t in) {
    float total = 0.0f;
    for (int64_t begin = 0; begin < in; begin += GROUP, ++factors) {
        const int64_t end = begin + GROUP < in ? begin + GROUP : in;
        int32_t sum = 0;
        for (int64_t i = begin; i < end; ++i) sum += (int32_t)w[i] * x[i];
        total += (float)sum * *factors;
    }
    return total;
}

/* Sums kept side by side, so that they need not wait for each other. */
#define SUMS 32

VECTORISED static float plain_bf16(const uint8_t *w, const float *x, int64_t in) {
    float lanes[SUMS] = {0}, sum = 0.0f;
    int64_t i = 0;
    for (; i + SUMS <= in; i += SUMS) {
        FETCH(w + 2 * i + AHEAD);
        for (int64_t j = 0; j < SUMS; ++j) lanes[j] += x[i + j] * of_bf16(word_at(w, i + j));
    }
    for (; i < in; ++i) sum += x[i] * of_bf16(word_at(w, i));
    for (int64_t j = 0; j < SUMS; ++j) sum += lanes[j];
    return sum;
}

VECTORISED static float plain_f16(const uint8_t *w, const float *x, int64_t in) {
    float lanes[SUMS] = {0}, sum = 0.0f;
    uint16_t most[SUMS] = {0};
    int64_t i = 0;
    for (; i + SUMS <= in; i += SUMS) {
        FETCH(w + 2 * i + AHEAD);
        for (int64_t j = 0; j < SUMS; ++j) lanes[j] += x[i + j] * of_finite_f16(word_at(w, i + j));
        for (int64_t j = 0; j < SUMS; ++j) {
            const uint16_t size = word_at(w, i + j) & 0x7fff;
            most[j] = size > most[j] ? size : most[j];
        }
    }
    for (; i < in; ++i) sum += x[i] * of_f16(word_at(w, i));
    for (int64_t j = 0; j < SUMS; ++j) sum += most[j] < F16_INFINITE ? lanes[j] : of_bits(0x7fc00000);
    return sum;
}

#if HAS_AVX2_FORM
#define INLINE static inline __attribute__((always_inline)) AVX2

INLINE float sum_of(__m256 v) {
    __m128 low = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    low = _mm_add_ps(low, _mm_movehl_ps(low, low));
    return _mm_cvtss_f32(_mm_add_ss(low, _mm_movehdup_ps(low)));
}

/* As `group_factors`. */
AVX2 static float wide_factors(const uint8_t *scales, const uint8_t *zeros, const float *x_scales, const float *x_sums,
                               float *factors, int64_t groups) {
    __m256 away = _mm256_setzero_ps();
    int64_t g = 0;
    for (; g + 8 <= groups; g += 8) {
        const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + 2 * g)));
        const __m256 zero = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(zeros + g))));
        _mm256_storeu_ps(factors + g, _mm256_mul_ps(scale, _mm256_loadu_ps(x_scales + g)));
        away = _mm256_fmadd_ps(_mm256_mul_ps(scale, zero), _mm256_loadu_ps(x_sums + g), away);
    }
    float rest = sum_of(away);
    for (; g < groups; ++g) {
        const float scale = of_f16(word_at(scales, g));
        factors[g] = scale * x_scales[g];
        rest += scale * (float)zeros[g] * x_sums[g];
    }
    return rest;
}

/* Sum of the products of 64 four-bit weights, unpacked to n[4], with 64 activations. */
INLINE __m256i words(const __m256i *n, const int16_t *x) {
    const __m256i *at = (const __m256i *)x;
    const __m256i a = _mm256_madd_epi16(n[0], _mm256_loadu_si256(at));
    const __m256i b = _mm256_madd_epi16(n[1], _mm256_loadu_si256(at + 1));
    const __m256i c = _mm256_madd_epi16(n[2], _mm256_loadu_si256(at + 2));
    const __m256i d = _mm256_madd_epi16(n[3], _mm256_loadu_si256(at + 3));
    return _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
}

/* One row of the weight times `rows` (a constant) rows of activations that lie `in` apart, factors `groups` apart. */
INLINE void wide_int4(const uint8_t *w, const int16_t *x, const float *factors, int64_t groups, int64_t in, float *y,
                      const int rows) {
    const __m256i low = _mm256_set1_epi16(15);
    __m256 sums[ABREAST];
    for (int r = 0; r < rows; ++r) sums[r] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, w += 64) {
        __m256i n[8];
        FETCH(w + AHEAD);
        for (int half = 0; half < 2; ++half) {
            const __m256i word = _mm256_loadu_si256((const __m256i *)(w + 32 * half));
            n[4 * half] = _mm256_and_si256(word, low);
            n[4 * half + 1] = _mm256_and_si256(_mm256_srli_epi16(word, 4), low);
            n[4 * half + 2] = _mm256_and_si256(_mm256_srli_epi16(word, 8), low);
            n[4 * half + 3] = _mm256_srli_epi16(word, 12);
        }
        for (int r = 0; r < rows; ++r) {
            const int16_t *at = x + r * in + g * GROUP;
            const __m256i sum = _mm256_add_epi32(words(n, at), words(n + 4, at + 64));
            sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_broadcast_ss(factors + r * groups + g), sums[r]);
        }
    }
    for (int r = 0; r < rows; ++r) y[r] = sum_of(sums[r]);
}

/* The same of whole groups of eight-bit weights. */
INLINE void wide_int8(const int8_t *w, const int16_t *x, const float *factors, int64_t whole, int64_t groups, int64_t in,
                      float *y, const int rows) {
    __m256 sums[ABREAST];
    for (int r = 0; r < rows; ++r) sums[r] = _mm256_setzero_ps();
    for (int64_t g = 0; g < whole; ++g, w += GROUP) {
        __m256i sum[ABREAST];
        for (int r = 0; r < rows; ++r) sum[r] = _mm256_setzero_si256();
        FETCH(w + AHEAD);
        FETCH(w + AHEAD + 64);
        for (int i = 0; i < GROUP; i += 16) {
            const __m256i n = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + i)));
            for (int r = 0; r < rows; ++r) {
                const __m256i a = _mm256_loadu_si256((const __m256i *)(x + r * in + g * GROUP + i));
                sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(n, a));
            }
        }
        for (int r = 0; r < rows; ++r)
            sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r]), _mm256_broadcast_ss(factors + r * groups + g),
                                      sums[r]);
    }
    for (int r = 0; r < rows; ++r) y[r] = sum_of(sums[r]);
}

/* `rows` as a constant, so that the sums stay in registers. */
AVX2 static void avx2_int4(const uint8_t *w, const int16_t *x, const float *factors, int64_t groups, int64_t in,
                           float *y, int rows) {
    switch (rows) {
        case 1: wide_int4(w, x, factors, groups, in, y, 1); break;
        case 2: wide_int4(w, x, factors, groups, in, y, 2); break;
        case 3: wide_int4(w, x, factors, groups, in, y, 3); break;
        default: wide_int4(w, x, factors, groups, in, y, 4);
    }
}

AVX2 static void avx2_int8(const int8_t *w, const int16_t *x, const float *factors, int64_t whole, int64_t groups,
                           int64_t in, float *y, int rows) {
    switch (rows) {
        case 1: wide_int8(w, x, factors, whole, groups, in, y, 1); break;
        case 2: wide_int8(w, x, factors, whole, groups, in, y, 2); break;
        case 3: wide_int8(w, x, factors, whole, groups, in, y, 3); break;
        default: wide_int8(w, x, factors, whole, groups, in, y, 4);
    }
}
#endif

/* Set by `plain_form` to compare the forms. */
static int only_plain = 0;

void plain_form(int wanted) { only_plain = wanted; }

int has_avx2(void) {
#if HAS_AVX2_FORM
    return !only_plain && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#else
    return 0;
#endif
}

/* Shares a job out among the threads, one at a time: MindSpore starts kernels that do not wait for each other together,
 * and on as many cores two take no less time beside each other than one after the other. */
static void take_turns(part_t run, const void *job, int64_t parts) {
    const int threads = parts > 1 ? omp_get_max_threads() : 1;
    TAKE_THREADS(threads);
    team_share_long(run, job, parts);
    GIVE_THREADS(threads);
}

/* Row o of a weight times up to ABREAST rows of rounded activations, from row `r` on; y as (N, O). */
static void whole_numbers(const Weight *weight, const Rounded *x, int64_t o, int64_t r, int rows, int wide,
                          float *scratch, float *y) {
    const int64_t in = weight->in, groups = x->groups;
    const uint8_t *w = weight->data + o * weight->row_bytes;
    const int16_t *values = x->values + r * in;
    float sums[ABREAST] = {0}, away[ABREAST] = {0}, scale = 1.0f;
    const float *factors = x->scales + r * groups;
    if (weight->form == INT4) {
        const uint8_t *scales = (const uint8_t *)weight->scales + 2 * o * groups, *zeros = weight->zeros + o * groups;
        FETCH(scales + AHEAD / 4);
        FETCH(zeros + AHEAD / 8);
        for (int i = 0; i < rows; ++i) {
            const float *x_scales = factors + i * groups, *x_sums = x->sums + (r + i) * groups;
#if HAS_AVX2_FORM
            away[i] = wide ? wide_factors(scales, zeros, x_scales, x_sums, scratch + i * groups, groups)
                           : group_factors(scales, zeros, x_scales, x_sums, scratch + i * groups, groups);
#else
            away[i] = group_factors(scales, zeros, x_scales, x_sums, scratch + i * groups, groups);
#endif
        }
        factors = scratch;
    } else {
        scale = ((const float *)weight->scales)[o];
    }
#if HAS_AVX2_FORM
    if (wide && weight->form == INT4) {
        avx2_int4(w, values, factors, groups, in, sums, rows);
    } else if (wide) {
        const int64_t whole = in / GROUP, begin = whole * GROUP;
        avx2_int8((const int8_t *)w, values, factors, whole, groups, in, sums, rows);
        for (int i = 0; i < rows && begin < in; ++i)
            sums[i] += plain_int8((const int8_t *)w + begin, values + i * in + begin, factors + i * groups + whole,
                                  in - begin);
    } else
#endif
        for (int i = 0; i < rows; ++i)
            sums[i] = weight->form == INT4
                          ? plain_int4(w, values + i * in, factors + i * groups, groups)
                          : plain_int8((const int8_t *)w, values + i * in, factors + i * groups, in);
    (void)wide;
    for (int i = 0; i < rows; ++i) y[(r + i) * weight->out + o] = sums[i] * scale - away[i];
}

/* Rows begin .. end of a weight times few rows of x. */
static void share_of_few(const float *x, const Rounded *rounded, const Weight *weight, int64_t rows, float *scratch,
                         float *y, int64_t begin, int64_t end) {
    const int wide = has_avx2();
    for (int64_t o = begin; o < end; ++o) {
        const uint8_t *w = weight->data + o * weight->row_bytes;
        if (weight->form == INT4 || weight->form == INT8)
            for (int64_t r = 0; r < rows; r += ABREAST)
                whole_numbers(weight, rounded, o, r, rows - r < ABREAST ? (int)(rows - r) : ABREAST, wide, scratch, y);
        else
            for (int64_t r = 0; r < rows; ++r)
                y[r * weight->out + o] = weight->form == BF16 ? plain_bf16(w, x + r * weight->in, weight->in)
                                                              : plain_f16(w, x + r * weight->in, weight->in);
    }
}

/* A product of few rows, shared out by rows of the weight. */
typedef struct {
    const float *x;
    const Rounded *rounded;
    const Weight *weight;
    float *y;
    int64_t rows, share;
} Few;

static void few_part(const void *argument, int64_t part) {
    const Few *job = argument;
    const int64_t begin = part * job->share, out = job->weight->out;
    float factors[ABREAST * (job->rounded->groups + 1)];
    share_of_few(job->x, job->rounded, job->weight, job->rows, factors, job->y, begin,
                 begin + job->share < out ? begin + job->share : out);
}

static int few_rows(const float *x, const Weight *weight, float *y, int64_t rows) {
    const int64_t in = weight->in, out = weight->out, groups = (in + GROUP - 1) / GROUP;
    Rounded rounded = {0};
    if (weight->form == INT4 || weight->form == INT8) {
        /* scales and sums, then values */
        rounded.scales = malloc(sizeof(float) * (size_t)(2 * groups * rows) + sizeof(int16_t) * (size_t)(rows * in));
        if (rounded.scales == NULL) return NO_MEMORY;
        rounded.groups = groups;
        rounded.sums = rounded.scales + groups * rows;
        rounded.values = (int16_t *)(rounded.sums + groups * rows);
        round_rows(x, &rounded, rows, in);
    }
    const int64_t share = in * out < MIN_SHARED ? out : (PART_BYTES / weight->row_bytes + 1 + 15) / 16 * 16;
    const Few job = {x, &rounded, weight, y, rows, share};
    take_turns(few_part, &job, (out + share - 1) / share);
    free(rounded.scales);
    return DONE;
}

static int product(const float *x, const Weight *weight, float *y, int64_t rows) {
    return rows <= FEW ? few_rows(x, weight, y, rows) : many_rows(x, weight, y, rows);
}

/* x (N, F), weight (O, F/2), scales float16 (O, G), zeros (O, G) -> y (N, O) */
KERNEL(linear_int4) {
    UNUSED;
    const int64_t in = shapes[0][1], out = shapes[1][0], groups = in / GROUP;
    if (in % GROUP || shapes[1][1] * 2 != in || shapes[2][0] != out || shapes[2][1] != groups || shapes[3][0] != out ||
        shapes[3][1] != groups)
        return BAD_SHAPE;
    const Weight weight = {INT4, params[1], params[2], params[3], in, out, in / 2};
    return product(params[0], &weight, params[4], shapes[0][0]);
}

/* x (N, F), weight (O, F), scales float32 (O) -> y (N, O) */
KERNEL(linear_int8) {
    UNUSED;
    const int64_t in = shapes[0][1], out = shapes[1][0];
    if (shapes[1][1] != in || shapes[2][0] != out) return BAD_SHAPE;
    const Weight weight = {INT8, params[1], params[2], NULL, in, out, in};
    return product(params[0], &weight, params[3], shapes[0][0]);
}

static int linear_16(int form, void **params, int64_t **shapes) {
    const int64_t in = shapes[0][1], out = shapes[1][0];
    if (shapes[1][1] != in) return BAD_SHAPE;
    const Weight weight = {form, params[1], NULL, NULL, in, out, 2 * in};
    return product(params[0], &weight, params[2], shapes[0][0]);
}

/* x (N, F), weight (O, F) -> y (N, O) */
KERNEL(linear_bf16) {
    UNUSED;
    return linear_16(BF16, params, shapes);
}

KERNEL(linear_f16) {
    UNUSED;
    return linear_16(F16, params, shapes);
}

/* ids int32, any shape, rows of a weight (V, D) -> (ids, D) */
static int rows_by_id(const Weight *weight, const int32_t *ids, float *y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || ids[i] >= weight->out) return BAD_PLACE;
        widen(weight, ids[i], 0, weight->in, y + i * weight->in);
    }
    return DONE;
}

KERNEL(embedding_int8) {
    UNUSED;
    if (shapes[2][0] != shapes[1][0]) return BAD_SHAPE;
    const Weight weight = {INT8, params[1], params[2], NULL, shapes[1][1], shapes[1][0], shapes[1][1]};
    return rows_by_id(&weight, params[0], params[3], numbers_of(ndims, shapes, 0));
}

KERNEL(embedding_bf16) {
    UNUSED;
    const Weight weight = {BF16, params[1], NULL, NULL, shapes[1][1], shapes[1][0], 2 * shapes[1][1]};
    return rows_by_id(&weight, params[0], params[2], numbers_of(ndims, shapes, 0));
}

KERNEL(embedding_f16) {
    UNUSED;
    const Weight weight = {F16, params[1], NULL, NULL, shapes[1][1], shapes[1][0], 2 * shapes[1][1]};
    return rows_by_id(&weight, params[0], params[2], numbers_of(ndims, shapes, 0));
}
