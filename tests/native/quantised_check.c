/* Every kernel of quantised.c against plain sums in double, for a processor that NumPy is not there for (aarch64 under
 * qemu): `aarch64-linux-gnu-gcc -static ... && qemu-aarch64 ./a.out`. Prints the largest error; 1 if one is too large. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KERNEL(name) int name(int, void **, int *, int64_t **, const char **, void *, void *)
KERNEL(linear_int4);
KERNEL(linear_int8);
KERNEL(linear_bf16);
KERNEL(linear_f16);

static uint32_t state = 1;

static uint32_t next(void) { return (state = state * 1664525u + 1013904223u) >> 8; }

static float uniform(void) { return (float)next() / (float)(1 << 23) - 1.0f; }

/* Powers of two and their halves: numbers that every format has, with their bits. */
static const double VALUES[] = {0.5, 1.0, -1.5, 0.25, -0.125, 3.0};
static const uint16_t BF16[] = {0x3f00, 0x3f80, 0xbfc0, 0x3e80, 0xbe00, 0x4040};
static const uint16_t F16[] = {0x3800, 0x3c00, 0xbe00, 0x3400, 0xb000, 0x4200};

static double check(const char *name, int (*kernel)(int, void **, int *, int64_t **, const char **, void *, void *),
                    int64_t rows, int64_t in, int64_t out, double allowed) {
    const int64_t groups = in / 128;
    float *x = malloc(sizeof(float) * rows * in), *y = malloc(sizeof(float) * rows * out);
    float *row_scales = malloc(sizeof(float) * out);
    uint8_t *weight = calloc(out * in, 2), *zeros = malloc(out * (groups + 1));
    uint16_t *scales = malloc(2 * out * (groups + 1));
    double *meaning = malloc(sizeof(double) * out * in), worst = 0;
    for (int64_t i = 0; i < rows * in; ++i) x[i] = uniform();
    const int four = strcmp(name, "int4") == 0, eight = strcmp(name, "int8") == 0, brain = strcmp(name, "bf16") == 0;
    for (int64_t o = 0; o < out; ++o) row_scales[o] = 0.01f * (1 + o % 7);
    for (int64_t i = 0; i < out * groups; ++i) {
        scales[i] = F16[i % 2];
        zeros[i] = next() % 16;
    }
    for (int64_t o = 0; o < out; ++o)
        for (int64_t i = 0; i < in; ++i) {
            const uint32_t pick = next();
            double *to = meaning + o * in + i;
            if (four) {
                /* word j of 64 weights holds j, 16 + j, 32 + j and 48 + j */
                const int64_t place = (i % 64) / 16, word = (i / 64) * 16 + i % 16;
                uint16_t bits;
                memcpy(&bits, weight + o * in / 2 + 2 * word, 2);
                bits |= (pick % 16) << (4 * place);
                memcpy(weight + o * in / 2 + 2 * word, &bits, 2);
                *to = ((double)(pick % 16) - zeros[o * groups + i / 128]) * VALUES[(o * groups + i / 128) % 2];
            } else if (eight) {
                ((int8_t *)weight)[o * in + i] = (int8_t)(pick % 255 - 127);
                *to = ((int8_t *)weight)[o * in + i] * (double)row_scales[o];
            } else {
                ((uint16_t *)weight)[o * in + i] = (brain ? BF16 : F16)[pick % 6];
                *to = VALUES[pick % 6];
            }
        }
    int64_t of_x[] = {rows, in}, of_weight[] = {out, four ? in / 2 : in}, of_scales[] = {out, groups};
    int64_t of_y[] = {rows, out};
    void *params[] = {x, weight, four ? (void *)scales : eight ? (void *)row_scales : (void *)y,
                      four ? (void *)zeros : (void *)y, y};
    int64_t *shapes[] = {of_x, of_weight, four || eight ? of_scales : of_y, four ? of_scales : of_y, of_y};
    int ndims[] = {2, 2, four ? 2 : eight ? 1 : 2, 2, 2};
    if (kernel(four ? 5 : eight ? 4 : 3, params, ndims, shapes, NULL, NULL, NULL)) return 1e9;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < out; ++o) {
            double sum = 0, size = 0;
            for (int64_t i = 0; i < in; ++i) {
                sum += x[r * in + i] * meaning[o * in + i];
                size += fabs(x[r * in + i] * meaning[o * in + i]);
            }
            const double error = fabs(y[r * out + o] - sum) / size / allowed;
            worst = error > worst ? error : worst;
        }
    printf("%s, %ld x %ld by %ld: %.3f of what is allowed\n", name, (long)rows, (long)in, (long)out, worst);
    free(x), free(y), free(row_scales), free(weight), free(zeros), free(scales), free(meaning);
    return worst;
}

int main(void) {
    const int64_t rows[] = {1, 3, 8, 9, 70};
    int failed = 0;
    for (int i = 0; i < 5; ++i) {
        const double rounded = rows[i] <= 8 ? 0x1p-14 : 0x1p-20;
        failed |= check("int4", linear_int4, rows[i], 384, 37, rounded) > 1;
        failed |= check("int8", linear_int8, rows[i], 200, 37, rounded) > 1;
        failed |= check("bf16", linear_bf16, rows[i], 200, 37, 0x1p-20) > 1;
        failed |= check("f16", linear_f16, rows[i], 200, 37, 0x1p-20) > 1;
    }
    return failed;
}
