/* Products of many rows with weights of 4, 8 and 16 bits (quantised.c): the weight is widened to float32, some rows at a
 * time, into a buffer that stays in the second-level cache, and multiplied by all positions.
 */
#include "products.h"
#include "stored.h"

/* Blocks of `many_rows`: weights of a tile, positions of a tile (two vectors), width of a block, rows of a weight and
 * positions at a time. A block of weights takes 192 KB, its sums 400 KB, a panel of positions 16 KB. */
#define TILE 6
#define LANES 16
#define DEPTH 256
#define TALL 192
#define WIDE 512

#if HAS_AVX2_FORM
/* 128 weights of four bits in float32. The products with the zero are exact, as the differences' are. */
AVX2 static void wide_group(const uint8_t *w, float scale, float zero, float *to) {
    const __m256i low = _mm256_set1_epi16(15);
    const __m256 factor = _mm256_set1_ps(scale), away = _mm256_set1_ps(scale * zero);
    for (int half = 0; half < 2; ++half) {
        __m256i word = _mm256_loadu_si256((const __m256i *)(w + 32 * half));
        for (int part = 0; part < 4; ++part, to += 16) {
            const __m256i n = _mm256_and_si256(word, low);
            const __m256i first = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(n));
            const __m256i second = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(n, 1));
            _mm256_storeu_ps(to, _mm256_fmsub_ps(_mm256_cvtepi32_ps(first), factor, away));
            _mm256_storeu_ps(to + 8, _mm256_fmsub_ps(_mm256_cvtepi32_ps(second), factor, away));
            word = _mm256_srli_epi16(word, 4);
        }
    }
}
#endif

VECTORISED static void plain_group(const uint8_t *w, float scale, float zero, float *to) {
    for (int half = 0; half < 2; ++half, w += 32, to += 64)
        for (int part = 0; part < 4; ++part)
            for (int j = 0; j < 16; ++j) to[16 * part + j] = ((float)(word_at(w, j) >> 4 * part & 15) - zero) * scale;
}

static void widen_groups(const Weight *weight, int64_t o, int64_t begin, int64_t end, float *to) {
    const int64_t groups = weight->in / GROUP;
    const uint8_t *w = weight->data + o * weight->row_bytes;
    const int wide = has_avx2();
    for (int64_t g = begin; g < end; ++g, to += GROUP) {
        const float scale = of_f16(word_at(weight->scales, o * groups + g));
        const float zero = (float)weight->zeros[o * groups + g];
#if HAS_AVX2_FORM
        if (wide) {
            wide_group(w + g * GROUP / 2, scale, zero, to);
            continue;
        }
#endif
        plain_group(w + g * GROUP / 2, scale, zero, to);
    }
    (void)wide;
}

/* Weights begin .. begin + count of row o that are not of four bits, as float32. */
VECTORISED static void widen_others(const Weight *weight, int64_t o, int64_t begin, int64_t count, float *to) {
    const uint8_t *w = weight->data + o * weight->row_bytes;
    if (weight->form == INT8) {
        const float scale = ((const float *)weight->scales)[o];
        const int8_t *at = (const int8_t *)w + begin;
        for (int64_t i = 0; i < count; ++i) to[i] = (float)at[i] * scale;
    } else if (weight->form == BF16) {
        for (int64_t i = 0; i < count; ++i) to[i] = of_bf16(word_at(w, begin + i));
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = of_f16(word_at(w, begin + i));
    }
}

void widen(const Weight *weight, int64_t o, int64_t begin, int64_t count, float *to) {
    if (weight->form == INT4)
        widen_groups(weight, o, begin / GROUP, (begin + count) / GROUP, to);
    else
        widen_others(weight, o, begin, count, to);
}

typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));

/* sums (TILE, LANES), rows `apart`, += weights (TILE, depth), rows DEPTH apart, times a panel (depth, LANES). */
VECTORISED static void multiply_tile(const float *weights, const float *panel, float *sums, int64_t apart,
                                     int64_t depth) {
    Vector s[TILE][2];
    for (int i = 0; i < TILE; ++i)
        for (int half = 0; half < 2; ++half) s[i][half] = *(const Vector *)(sums + i * apart + 8 * half);
    for (int64_t k = 0; k < depth; ++k, panel += LANES) {
        const Vector low = *(const Vector *)panel, high = *(const Vector *)(panel + 8);
        for (int i = 0; i < TILE; ++i) {
            const float w = weights[i * DEPTH + k];
            s[i][0] += w * low;
            s[i][1] += w * high;
        }
    }
    for (int i = 0; i < TILE; ++i)
        for (int half = 0; half < 2; ++half) *(Vector *)(sums + i * apart + 8 * half) = s[i][half];
}

/* x (N, F) as panels (F, LANES) of positions, the last filled up with zeros; the panels begin .. end. */
VECTORISED static void lay_panels(const float *x, float *panels, int64_t rows, int64_t in, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
        for (int64_t r = 0; r < LANES; ++r) {
            float *to = panels + p * in * LANES + r;
            const float *from = x + (p * LANES + r) * in;
            if (p * LANES + r < rows)
                for (int64_t k = 0; k < in; ++k) to[k * LANES] = from[k];
            else
                for (int64_t k = 0; k < in; ++k) to[k * LANES] = 0.0f;
        }
}

#if HAS_AVX2_FORM
/* Rows and columns of 8 x 8 numbers change places; rows are `step` and `apart` behind one another. */
AVX2 static void turn_square(const float *from, int64_t step, float *to, int64_t apart) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * step);
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
            a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to + i * apart, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * apart, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}
#endif

VECTORISED static void plain_columns(const float *sums, int64_t apart, float *y, int64_t rows, int64_t out,
                                     int64_t tall) {
    for (int64_t low = 0; low < rows; low += 16)
        for (int64_t o = 0; o < tall; ++o)
            for (int64_t n = low; n < low + 16 && n < rows; ++n) y[n * out + o] = sums[o * apart + n];
}

/* Sums of a block, rows `apart`, to columns of y (N, O). */
static void write_columns(const float *sums, int64_t apart, float *y, int64_t rows, int64_t out, int64_t tall) {
    int64_t squares = 0, high = 0;
#if HAS_AVX2_FORM
    if (has_avx2()) {
        squares = rows / 8 * 8, high = tall / 8 * 8;
        for (int64_t n = 0; n < squares; n += 8)
            for (int64_t o = 0; o < high; o += 8) turn_square(sums + o * apart + n, apart, y + n * out + o, out);
    }
#endif
    plain_columns(sums + high * apart, apart, y + high, squares, out, tall - high);
    plain_columns(sums + squares, apart, y + squares * out, rows - squares, out, tall);
}

/* Rows begin .. begin + tall of a weight times all panels; `block` and `sums` are a thread's own. */
static void multiply_block(const Weight *weight, const float *panels, int64_t count, int64_t begin, int64_t tall,
                           float *block, float *sums, int64_t apart) {
    const int64_t in = weight->in, tiles = (tall + TILE - 1) / TILE;
    memset(sums, 0, sizeof(float) * (size_t)(tiles * TILE * apart));
    for (int64_t k = 0; k < in; k += DEPTH) {
        const int64_t depth = in - k < DEPTH ? in - k : DEPTH;
        for (int64_t o = 0; o < tall; ++o) widen(weight, begin + o, k, depth, block + o * DEPTH);
        for (int64_t p = 0; p < count; ++p)
            for (int64_t t = 0; t < tiles; ++t)
                multiply_tile(block + t * TILE * DEPTH, panels + (p * in + k) * LANES,
                              sums + t * TILE * apart + p * LANES, apart, depth);
    }
}

/* A product of many rows, up to WIDE of them at once: first their panels are laid, then blocks of the weight go over
 * them. `failed` is set by whoever lacks memory. */
typedef struct {
    const float *x;
    const Weight *weight;
    float *panels, *y;
    int64_t rows, count, step;
    int *failed;
} Many;

static void panel_part(const Many *job, int64_t part) {
    lay_panels(job->x, job->panels, job->rows, job->weight->in, part, part + 1);
}

static void block_part(const Many *job, int64_t part) {
    const int64_t out = job->weight->out, begin = part * job->step, apart = job->count * LANES + 16;
    const int64_t tall = out - begin < job->step ? out - begin : job->step;
    float *block = malloc(sizeof(float) * (size_t)(TALL * (DEPTH + apart)));
    if (block == NULL) {
        __atomic_store_n(job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    /* rows of the last tile that are not there */
    memset(block + tall * DEPTH, 0, sizeof(float) * (size_t)((TALL - tall < TILE ? TALL - tall : TILE) * DEPTH));
    multiply_block(job->weight, job->panels, job->count, begin, tall, block, block + TALL * DEPTH, apart);
    write_columns(block + TALL * DEPTH, apart, job->y + begin, job->rows, out, tall);
    free(block);
}

int many_rows(const float *x, const Weight *weight, float *y, int64_t rows) {
    const int64_t in = weight->in, out = weight->out, wide = rows < WIDE ? rows : WIDE;
    const int threads = rows * in * out < 8 * MIN_SHARED ? 1 : omp_get_max_threads();
    /* a narrow weight in as many blocks as there are threads, so that none waits for a larger one */
    const int64_t each = ((out + threads - 1) / threads + TILE - 1) / TILE * TILE, step = each < TALL ? each : TALL;
    const int64_t blocks = (out + step - 1) / step;
    float *panels = malloc(sizeof(float) * (size_t)((wide + LANES - 1) / LANES * LANES * in));
    if (panels == NULL) return NO_MEMORY;
    int failed = 0;
    TAKE_THREADS(threads);
    for (int64_t first = 0; first < rows; first += wide) {
        const int64_t now = rows - first < wide ? rows - first : wide;
        const Many job = {x + first * in, weight, panels, y + first * out, now, (now + LANES - 1) / LANES, step, &failed};
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(static)
            for (int64_t p = 0; p < job.count; ++p) panel_part(&job, p);
#pragma omp for schedule(dynamic, 1)
            for (int64_t b = 0; b < blocks; ++b) block_part(&job, b);
        }
    }
    GIVE_THREADS(threads);
    free(panels);
    return failed ? NO_MEMORY : DONE;
}
