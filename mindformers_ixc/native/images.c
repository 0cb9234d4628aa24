/* Resizing and cutting of images on the host, called from Python through ctypes (`mindformers_ixc.native.images`). */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectorised.h"

/* Fixed-point weights of a resampled axis: for output i, `count[i]` inputs from `first[i]` on, `width` weights apart.
 * The numbers are those of Pillow's bilinear filter, so that pixels come out equal to the last bit: a triangle as wide
 * as the scale, normalised in double precision, rounded to 22 binary digits. Returns `width`, or 0 without memory; the
 * three arrays are the caller's to free either way. */
#define DIGITS 22

static int bilinear_weights(int in, int out, int **first, int **count, int **weights) {
    const double scale = (double)in / out, stretch = scale < 1.0 ? 1.0 : scale;
    const int width = (int)ceil(stretch) * 2 + 1;
    *first = malloc(out * sizeof(int));
    *count = malloc(out * sizeof(int));
    *weights = calloc((size_t)out * width, sizeof(int));
    double *taps = malloc(width * sizeof(double));
    if (!*first || !*count || !*weights || !taps) {
        free(taps);
        return 0;
    }
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

/* uint8 (height, width, 3) -> uint8 (out_height, out_width, 3), rows first along their length, as Pillow.
 * Returns 0, or 1 without memory. */
int resize_image(const uint8_t *in, int width, int height, uint8_t *out, int out_width, int out_height) {
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

/* uint8 (rows * P, columns * P, 3) -> uint8 (rows * columns, 3, P, P), P `side`. */
void split_tiles(const uint8_t *in, int rows, int columns, int side, uint8_t *out) {
    const int64_t width = 3 * (int64_t)columns * side, area = (int64_t)side * side;
    for (int64_t y = 0; y < (int64_t)rows * side; ++y)
        for (int column = 0; column < columns; ++column) {
            const uint8_t *pixel = in + y * width + 3 * (int64_t)column * side;
            uint8_t *red = out + ((y / side) * columns + column) * 3 * area + (y % side) * side;
            uint8_t *green = red + area, *blue = green + area;
            for (int x = 0; x < side; ++x, pixel += 3) {
                red[x] = pixel[0];
                green[x] = pixel[1];
                blue[x] = pixel[2];
            }
        }
}

/* Global view: uint8 (height, width, 3) -> float32 (3, P, P), P `side`; four rows and four columns of each pixel, their
 * indices and weights (P, 4), after the table of normalised values. */
void shrink_image(const uint8_t *in, int width, int side, const int64_t *rows, const float *row_weights,
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
