/* Fused float32 kernels for inference on the CPU, called by MindSpore's `ops.Custom` (aot).
 *
 * A step of decoding reads every weight once and does little else, so MindSpore's launch of a kernel (about 20
 * microseconds when the caches are cold) is what costs beside the products. Each function here takes the place of
 * three to fifteen kernels. They are written for the compiler to vectorise. Only the largest have threads
 * (OpenMP, so OMP_NUM_THREADS counts).
 *
 * Every function has MindSpore's signature; `params` holds the inputs, then the outputs. 0 is success.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define VECTORISED
#endif

/* Elements of a weight from which on it pays to share the work among threads. */
#define MIN_SHARED 131072

#define KERNEL(name) \
    int name(int count, void **params, int *ndims, int64_t **shapes, const char **dtypes, void *stream, void *extra)
#define UNUSED (void)count, (void)ndims, (void)dtypes, (void)stream, (void)extra

/* Rows and width of parameter i, all axes but the last taken together. */
static int64_t rows_of(int *ndims, int64_t **shapes, int i) {
    int64_t rows = 1;
    for (int axis = 0; axis + 1 < ndims[i]; ++axis) rows *= shapes[i][axis];
    return rows;
}

static int64_t width_of(int *ndims, int64_t **shapes, int i) { return shapes[i][ndims[i] - 1]; }

VECTORISED static void rms_norm_rows(const float *x, const float *weight, float eps, float *y, int64_t rows,
                                     int64_t width) {
    for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
        float squares = 0.0f;
        for (int64_t i = 0; i < width; ++i) squares += x[i] * x[i];
        const float scale = 1.0f / sqrtf(squares / (float)width + eps);
        for (int64_t i = 0; i < width; ++i) y[i] = x[i] * scale * weight[i];
    }
}

/* x (N, C), weight (C), eps (1) -> y (N, C) */
KERNEL(rms_norm) {
    UNUSED;
    rms_norm_rows(params[0], params[1], *(const float *)params[2], params[3], rows_of(ndims, shapes, 0),
                  width_of(ndims, shapes, 0));
    return 0;
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

/* x (N, C), weight (C), bias (C), eps (1) -> y (N, C) */
KERNEL(layer_norm) {
    UNUSED;
    layer_norm_rows(params[0], params[1], params[2], *(const float *)params[3], params[4], rows_of(ndims, shapes, 0),
                    width_of(ndims, shapes, 0));
    return 0;
}

/* x / (1 + exp(-slope * x)); the exponent is kept where exp() is finite, since -ffast-math knows no infinity */
static inline float gated(float x, float slope) {
    const float exponent = -slope * x;
    return x / (1.0f + expf(exponent < 80.0f ? exponent : 80.0f));
}

VECTORISED static void swiglu_values(const float *gate, const float *x, float *y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] = gated(gate[i], 1.0f) * x[i];
}

/* gate (N, C), x (N, C) -> silu(gate) * x (N, C) */
KERNEL(swiglu) {
    UNUSED;
    swiglu_values(params[0], params[1], params[2],
                  rows_of(ndims, shapes, 0) * width_of(ndims, shapes, 0));
    return 0;
}

VECTORISED static void quick_gelu_rows(const float *x, const float *bias, float *y, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r, x += width, y += width)
        for (int64_t i = 0; i < width; ++i) y[i] = gated(x[i] + bias[i], 1.702f);
}

/* x (N, C), bias (C) -> quick GELU of x + bias (N, C) */
KERNEL(bias_quick_gelu) {
    UNUSED;
    quick_gelu_rows(params[0], params[1], params[2], rows_of(ndims, shapes, 0), width_of(ndims, shapes, 0));
    return 0;
}

VECTORISED static void bias_residual_rows(const float *x, const float *bias, const float *residual, float *y,
                                          int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r, x += width, residual += width, y += width)
        for (int64_t i = 0; i < width; ++i) y[i] = x[i] + bias[i] + residual[i];
}

/* x (N, C), bias (C), residual (N, C) -> x + bias + residual (N, C) */
KERNEL(bias_residual) {
    UNUSED;
    bias_residual_rows(params[0], params[1], params[2], params[3], rows_of(ndims, shapes, 0),
                       width_of(ndims, shapes, 0));
    return 0;
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

/* x (N, C) for a small N, weight (O, C) -> x weight^T (N, O). MindSpore's product repacks the weight at every call, which
 * takes longer than the product itself when N is small. */
KERNEL(linear) {
    UNUSED;
    const float *x = params[0], *weight = params[1];
    float *y = params[2];
    const int64_t rows = shapes[0][0], in = shapes[0][1], out = shapes[1][0];
    const int threads = in * out < MIN_SHARED ? 1 : omp_get_max_threads();
    if (threads == 1) {
        linear_rows(x, weight, y, rows, in, out, 0, out);
        return 0;
    }
    const int64_t share = (out + 4 * threads - 1) / (4 * threads) * 4;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; ++part) {
        const int64_t begin = part * share, end = begin + share < out ? begin + share : out;
        if (begin < end) linear_rows(x, weight, y, rows, in, out, begin, end);
    }
    return 0;
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

/* softmax(q K^T) V of one key/value head: q (G, d), keys and values (n, d), scratch (G, n), y (G, d) */
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
    if (queries > keys) return 2;
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
    return 0;
}

/* Rotation, append to the cache and attention of one token a row.
 *
 * qkv (B, KV * (G+2) * d), cos and sin (B, 1, G+2, d), where (B*KV, 2) int32, keys and values (B*KV, S, d), both
 * written in place -> y (B, KV * G * d). A place outside the cache or a failed allocation is an error. */
KERNEL(decode_attention) {
    UNUSED;
    const float *qkv = params[0], *cos = params[1], *sin = params[2];
    const int32_t *where = params[3];
    float *keys = params[4], *values = params[5], *y = params[6];
    const int64_t batch = shapes[1][0], rotated = shapes[1][2], size = shapes[1][3], groups = rotated - 2;
    const int64_t entries = shapes[4][0], positions = shapes[4][1], heads = entries / batch;
    float *turned = malloc(sizeof(float) * (size_t)(rotated * size + groups * positions));
    if (turned == NULL) return 1;
    for (int64_t e = 0; e < entries; ++e) {
        const int64_t row = e / heads, at = where[2 * e + 1];
        if (where[2 * e] != e || at < 0 || at >= positions) {
            free(turned);
            return 2;
        }
        rotate(qkv + e * rotated * size, cos + row * rotated * size, sin + row * rotated * size, turned, rotated,
               size);
        float *head_keys = keys + e * positions * size, *head_values = values + e * positions * size;
        for (int64_t i = 0; i < size; ++i) {
            head_keys[at * size + i] = turned[groups * size + i];
            head_values[at * size + i] = turned[(groups + 1) * size + i];
        }
        attend(turned, head_keys, head_values, turned + rotated * size, y + e * groups * size, groups, at + 1, size);
    }
    free(turned);
    return 0;
}

/* Splits a prompt's consolidated product into rotated, scaled queries and rotated keys and values, by heads, and fills
 * the cache with keys and values, zeros behind each prompt's end.
 *
 * qkv (B*L, KV * (G+2) * d), cos and sin (B, L, 1, 1, d), real (B, 1, L, 1) int32, scale (1), keys and values
 * (B*KV, S, d), both written in place -> queries (B, KV, G, L, d), keys and values (B, KV, L, d) */
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

KERNEL(prefill_heads) {
    UNUSED;
    if (shapes[5][1] < shapes[7][3]) return 2; /* a prompt longer than its cache */
    prefill_values(params[0], params[1], params[2], params[3], *(const float *)params[4], params[5], params[6],
                   params[7], params[8], params[9], shapes[7], shapes[5][1]);
    return 0;
}

/* ---- Pictures, called from Python through ctypes (`mindformers_ixc.native.images`). ---- */

/* Fixed-point weights of a resampled axis: for output i, `count[i]` inputs from `first[i]` on, `width` weights apart.
 * The numbers are those of Pillow's bilinear filter, so that pixels come out equal to the last bit: a triangle as wide
 * as the scale, normalised in double precision, rounded to 22 binary digits. */
#define DIGITS 22

static int bilinear_weights(int in, int out, int **first, int **count, int **weights) {
    const double scale = (double)in / out, stretch = scale < 1.0 ? 1.0 : scale;
    const int width = (int)ceil(stretch) * 2 + 1;
    *first = malloc(out * sizeof(int));
    *count = malloc(out * sizeof(int));
    *weights = calloc((size_t)out * width, sizeof(int));
    double *taps = malloc(width * sizeof(double));
    if (!*first || !*count || !*weights || !taps) return 0;
    for (int i = 0; i < out; ++i) {
        const double centre = (i + 0.5) * scale;
        int low = (int)(centre - stretch + 0.5), high = (int)(centre + stretch + 0.5);
        if (low < 0) low = 0;
        if (high > in) high = in;
        double total = 0.0;
        for (int j = 0; j < high - low; ++j) {
            const double distance = fabs((j + low - centre + 0.5) * (1.0 / stretch));
            taps[j] = distance < 1.0 ? 1.0 - distance : 0.0;
            total += taps[j];
        }
        (*first)[i] = low;
        (*count)[i] = high - low;
        for (int j = 0; j < high - low; ++j)
            (*weights)[(size_t)i * width + j] = (int)(0.5 + (total != 0.0 ? taps[j] / total : taps[j]) * (1 << DIGITS));
    }
    free(taps);
    return width;
}

static inline uint8_t rounded(int sum) {
    const int value = sum >> DIGITS;
    return value < 0 ? 0 : value > 255 ? 255 : value;
}

static void resize_row(const uint8_t *in, uint8_t *out, int out_width, const int *first, const int *count,
                       const int *weights, int width) {
    for (int i = 0; i < out_width; ++i, weights += width) {
        const uint8_t *pixel = in + 3 * first[i];
        int r = 1 << (DIGITS - 1), g = r, b = r;
        for (int j = 0; j < count[i]; ++j, pixel += 3) {
            r += pixel[0] * weights[j];
            g += pixel[1] * weights[j];
            b += pixel[2] * weights[j];
        }
        *out++ = rounded(r);
        *out++ = rounded(g);
        *out++ = rounded(b);
    }
}

VECTORISED static void mix_rows(const uint8_t *in, int64_t bytes, const int *weights, int count, int *sums,
                                uint8_t *out) {
    if (count == 2) {      /* enlarging: nearly all rows */
        const uint8_t *next = in + bytes;
        const int a = weights[0], b = weights[1];
        for (int64_t i = 0; i < bytes; ++i) {
            const int value = ((1 << (DIGITS - 1)) + in[i] * a + next[i] * b) >> DIGITS;
            out[i] = value > 255 ? 255 : value;
        }
        return;
    }
    for (int64_t i = 0; i < bytes; ++i) sums[i] = 1 << (DIGITS - 1);
    for (int j = 0; j < count; ++j, in += bytes)
        for (int64_t i = 0; i < bytes; ++i) sums[i] += in[i] * weights[j];
    for (int64_t i = 0; i < bytes; ++i) {
        const int value = sums[i] >> DIGITS;
        out[i] = value > 255 ? 255 : value;
    }
}

/* uint8 (height, width, 3) -> uint8 (out_height, out_width, 3), rows first along their length, as Pillow. */
int resize_picture(const uint8_t *in, int width, int height, uint8_t *out, int out_width, int out_height) {
    int *first[2] = {0}, *count[2] = {0}, *weights[2] = {0};
    const int64_t bytes = 3 * (int64_t)out_width;
    uint8_t *wide = malloc(bytes * height);
    int *sums = malloc(bytes * sizeof(int)), status = 1;
    const int across = bilinear_weights(width, out_width, &first[0], &count[0], &weights[0]);
    const int down = bilinear_weights(height, out_height, &first[1], &count[1], &weights[1]);
    if (wide && sums && across && down) {
        for (int64_t y = 0; y < height; ++y)
            if (width == out_width)
                memcpy(wide + y * bytes, in + y * bytes, bytes);
            else
                resize_row(in + y * 3 * width, wide + y * bytes, out_width, first[0], count[0], weights[0], across);
        for (int64_t y = 0; y < out_height; ++y)
            if (height == out_height)
                memcpy(out + y * bytes, wide + y * bytes, bytes);
            else
                mix_rows(wide + first[1][y] * bytes, bytes, weights[1] + (size_t)y * down, count[1][y], sums,
                         out + y * bytes);
        status = 0;
    }
    for (int i = 0; i < 2; ++i) {
        free(first[i]);
        free(count[i]);
        free(weights[i]);
    }
    free(wide);
    free(sums);
    return status;
}

/* uint8 (rows * side, columns * side, 3) -> float32 (rows * columns, 3, side, side), by a table (3, 256). */
void cut_tiles(const uint8_t *in, int rows, int columns, int side, const float *table, float *out) {
    const int64_t width = 3 * (int64_t)columns * side, area = (int64_t)side * side;
    for (int64_t y = 0; y < (int64_t)rows * side; ++y)
        for (int column = 0; column < columns; ++column) {
            const uint8_t *pixel = in + y * width + 3 * (int64_t)column * side;
            float *red = out + ((y / side) * columns + column) * 3 * area + (y % side) * side;
            float *green = red + area, *blue = green + area;
            for (int x = 0; x < side; ++x, pixel += 3) {
                red[x] = table[pixel[0]];
                green[x] = table[256 + pixel[1]];
                blue[x] = table[512 + pixel[2]];
            }
        }
}

/* Global view: uint8 (height, width, 3) -> float32 (3, side, side); four rows and four columns of each pixel, their
 * indices and weights (side, 4), after the table of normalised values. */
void shrink_picture(const uint8_t *in, int width, int side, const int64_t *rows, const float *row_weights,
                    const int64_t *columns, const float *column_weights, const float *table, float *out) {
    const int64_t area = (int64_t)side * side;
    for (int y = 0; y < side; ++y)
        for (int x = 0; x < side; ++x) {
            float sum[3] = {0.0f, 0.0f, 0.0f};
            for (int j = 0; j < 4; ++j) {
                float column[3] = {0.0f, 0.0f, 0.0f};
                for (int i = 0; i < 4; ++i) {
                    const uint8_t *pixel = in + 3 * (rows[4 * y + i] * width + columns[4 * x + j]);
                    for (int c = 0; c < 3; ++c) column[c] += table[256 * c + pixel[c]] * row_weights[4 * y + i];
                }
                for (int c = 0; c < 3; ++c) sum[c] += column[c] * column_weights[4 * x + j];
            }
            for (int c = 0; c < 3; ++c) out[c * area + (int64_t)y * side + x] = sum[c];
        }
}
