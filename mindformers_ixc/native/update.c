/* The ends of a training step on the CPU: the head's losses, from which gradients begin, and the norm of all gradients
 * and AdamW, where they end; see products.c.
 *
 * No logits are kept: of each labelled position stays the logarithm of the sum of its exponentials, from which the
 * gradients make them again, a block at a time.
 */
#include "products.h"

/* Label of positions without loss. */
#define IGNORED (-100)

/* Logits that are in memory at once, for each thread, and positions at most that they are made for. */
#define LOGITS 4194304
#define MOST_ROWS 256

/* Positions that carry loss, in their order: how many, or -1 for a label that is no word. */
static int64_t find_labelled(const int32_t *labels, int64_t rows, int64_t words, int64_t *found) {
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
        if (labels[r] == IGNORED) continue;
        if (labels[r] < 0 || labels[r] >= words) return -1;
        found[count++] = r;
    }
    return count;
}

static int64_t rows_at_once(int64_t words) {
    const int64_t rows = LOGITS / words;
    return rows < 16 ? 16 : rows > MOST_ROWS ? MOST_ROWS : rows;
}

static void gather_rows(const float *x, const int64_t *rows, int64_t count, int64_t width, float *y) {
    for (int64_t r = 0; r < count; ++r) memcpy(y + r * width, x + rows[r] * width, sizeof(float) * (size_t)width);
}

/* The logarithm of the sum of exponentials of a row. */
VECTORISED static float log_sum(const float *x, int64_t count) {
    float highest = x[0], sum = 0.0f;
    for (int64_t i = 1; i < count; ++i) highest = x[i] > highest ? x[i] : highest;
    for (int64_t i = 0; i < count; ++i) sum += exp_of(x[i] - highest);
    return highest + logf(sum);
}

/* x (N, D), weight (V, D), labels (N) int32 -> losses (N), 0 where nothing is labelled, lse (N) */
KERNEL(head_losses) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    const float *x = params[0], *weight = params[1];
    const int32_t *labels = params[2];
    float *losses = params[3], *lse = params[4];
    const int64_t rows = shapes[0][0], width = shapes[0][1], words = shapes[1][0], most = rows_at_once(words);
    int64_t *places = malloc(sizeof(int64_t) * (size_t)(rows + 1));
    if (!places) return NO_MEMORY;
    const int64_t labelled = find_labelled(labels, rows, words, places);
    int result = labelled < 0 ? BAD_PLACE : DONE;
    const int threads = threads_for(2.0 * (double)labelled * (double)width * (double)words);
    memset(losses, 0, sizeof(float) * (size_t)rows);
    memset(lse, 0, sizeof(float) * (size_t)rows);
    TAKE_THREADS(threads);
    SHARED(threads, labelled, 1, begin, end) {
        float *states = malloc(sizeof(float) * (size_t)(most * (width + words))), *logits = states + most * width;
        if (!states) {
            result = NO_MEMORY;
            continue;
        }
        for (int64_t at = begin; at < end; at += most) {
            const int64_t count_rows = end - at < most ? end - at : most;
            gather_rows(x, places + at, count_rows, width, states);
            multiply('N', 'T', count_rows, words, width, 1.0f, states, width, weight, width, 0.0f, logits, words);
            for (int64_t r = 0; r < count_rows; ++r) {
                const int64_t place = places[at + r];
                lse[place] = log_sum(logits + r * words, words);
                losses[place] = lse[place] - logits[r * words + labels[place]];
            }
        }
        free(states);
    }
    GIVE_THREADS(threads);
    free(places);
    return result;
}

ALSO_NAMED(head_losses_frozen, head_losses)

VECTORISED static void softmax_less(float *logits, float lse, float scale, int64_t count) {
    for (int64_t i = 0; i < count; ++i) logits[i] = exp_of(logits[i] - lse) * scale;
}

VECTORISED static void add_to(float *y, const float *x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] += x[i];
}

/* The gradients of `head_losses`; that of the weight is left out if `dw` is NULL. */
static int losses_back(void **params, int64_t **shapes, float *dx, float *dw) {
    const float *x = params[0], *weight = params[1], *lse = params[3], *d_losses = params[4];
    const int32_t *labels = params[2];
    const int64_t rows = shapes[0][0], width = shapes[0][1], words = shapes[1][0], most = rows_at_once(words);
    int64_t *places = malloc(sizeof(int64_t) * (size_t)(rows + 1));
    const int64_t labelled = places ? find_labelled(labels, rows, words, places) : 0;
    const int threads = threads_for(2.0 * (double)labelled * (double)width * (double)words);
    float *states = malloc(sizeof(float) * (size_t)(most * (width * (threads + 1) + words)));
    if (!places || !states || labelled < 0) {
        free(places);
        free(states);
        return labelled < 0 ? BAD_PLACE : NO_MEMORY;
    }
    float *parts = states + most * width, *logits = parts + most * width * threads;
    memset(dx, 0, sizeof(float) * (size_t)(rows * width));
    if (dw && labelled == 0) memset(dw, 0, sizeof(float) * (size_t)(words * width));
    TAKE_THREADS(threads);
    for (int64_t at = 0; at < labelled; at += most) {
        const int64_t here = labelled - at < most ? labelled - at : most;
        gather_rows(x, places + at, here, width, states);
        memset(parts, 0, sizeof(float) * (size_t)(here * width * threads));
        SHARED(threads, words, 16, begin, end) {
            const int64_t wide = end - begin;
            float *slab = logits + most * begin;
            multiply('N', 'T', here, wide, width, 1.0f, states, width, weight + begin * width, width, 0.0f, slab, wide);
            for (int64_t r = 0; r < here; ++r) {
                const int64_t place = places[at + r], label = labels[place];
                softmax_less(slab + r * wide, lse[place], d_losses[place], wide);
                if (label >= begin && label < end) slab[r * wide + label - begin] -= d_losses[place];
            }
            multiply('N', 'N', here, width, wide, 1.0f, slab, wide, weight + begin * width, width, 0.0f,
                     parts + part * here * width, width);
            if (dw)
                multiply('T', 'N', wide, width, here, 1.0f, slab, wide, states, width, at ? 1.0f : 0.0f,
                         dw + begin * width, width);
        }
        for (int64_t r = 0; r < here; ++r)
            for (int part = 0; part < threads; ++part)
                add_to(dx + places[at + r] * width, parts + (part * here + r) * width, width);
    }
    GIVE_THREADS(threads);
    free(places);
    free(states);
    return DONE;
}

/* x, weight, labels, lse, dlosses (N) -> dx (N, D), dweight (V, D) */
KERNEL(head_losses_back) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    return losses_back(params, shapes, params[5], params[6]);
}

/* The same for a head that does not train -> dx (N, D) */
KERNEL(head_losses_frozen_back) {
    UNUSED;
    if (!multiply) return NO_PRODUCT;
    return losses_back(params, shapes, params[5], NULL);
}

/* ---- Gradients and weights ---- */

/* Numbers whose squares are summed by themselves, in order, so that the number of threads changes nothing. */
#define PART_NUMBERS 65536

VECTORISED static double squares_of(const float *x, int64_t count) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) sum += (double)x[i] * (double)x[i];
    return sum;
}

/* Whether a number is neither infinite nor NaN: -ffast-math takes isfinite() for granted. */
static int is_finite(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return (bits >> 52 & 0x7ff) != 0x7ff;
}

/* Gradients of any shapes -> their norm (1), and 1 (1) if all of them are finite, else 0.
 *
 * Squares and sums are doubles, in which no sum of squares of finite floats is infinite: the sum is finite if and only
 * if every gradient is. */
KERNEL(gradient_norm) {
    UNUSED;
    const int tensors = count - 2;
    int64_t parts = 0, numbers = 0;
    for (int i = 0; i < tensors; ++i) {
        const int64_t own = numbers_of(ndims, shapes, i);
        parts += (own + PART_NUMBERS - 1) / PART_NUMBERS, numbers += own;
    }
    double *sums = malloc(sizeof(double) * (size_t)(parts + 1)), total = 0.0;
    const float **places = malloc(sizeof(float *) * (size_t)(parts + 1));
    int64_t *counts = malloc(sizeof(int64_t) * (size_t)(parts + 1));
    const int there = sums && places && counts;
    for (int64_t i = 0, p = 0; there && i < tensors; ++i) {
        const int64_t own = numbers_of(ndims, shapes, (int)i);
        for (int64_t at = 0; at < own; at += PART_NUMBERS, ++p) {
            places[p] = (const float *)params[i] + at;
            counts[p] = own - at < PART_NUMBERS ? own - at : PART_NUMBERS;
        }
    }
    if (there) {
        const int threads = threads_for(2.0 * (double)numbers);
        TAKE_THREADS(threads);
        SHARED(threads, parts, 1, begin, end)
            for (int64_t p = begin; p < end; ++p) sums[p] = squares_of(places[p], counts[p]);
        GIVE_THREADS(threads);
        for (int64_t p = 0; p < parts; ++p) total += sums[p];
        const int finite = is_finite(total);
        *(float *)params[tensors] = finite ? (float)sqrt(total) : (float)total;
        *(float *)params[tensors + 1] = finite ? 1.0f : 0.0f;
    }
    free(sums);
    free(places);
    free(counts);
    return there ? DONE : NO_MEMORY;
}

/* Numbers of one step of AdamW. */
typedef struct {
    float keep, first, second, rate, root, eps, factor;
} adamw_t;

VECTORISED static void adamw_values(const float *weight, const float *mean, const float *square, const float *gradient,
                                    adamw_t n, float *to_weight, float *to_mean, float *to_square, int64_t begin,
                                    int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const float g = gradient[i] * n.factor;
        const float m = mean[i] * n.first + g * (1.0f - n.first);
        const float s = square[i] * n.second + g * g * (1.0f - n.second);
        to_weight[i] = weight[i] * n.keep - m / (sqrtf(s) * n.root + n.eps) * n.rate;
        to_mean[i] = m;
        to_square[i] = s;
    }
}

/* weight, mean, square, gradient (any shape), factor (1) of the gradient, rate (1), decay (1), step (1) int32, numbers
 * (3): both betas and eps -> weight, mean, square */
KERNEL(adamw) {
    UNUSED;
    const float *numbers = params[8];
    const double step = (double)*(const int32_t *)params[7], rate = *(const float *)params[5];
    const adamw_t n = {(float)(1.0 - rate * *(const float *)params[6]), numbers[0], numbers[1],
                       (float)(rate / (1.0 - pow(numbers[0], step))),
                       (float)(1.0 / sqrt(1.0 - pow(numbers[1], step))), numbers[2], *(const float *)params[4]};
    const int64_t size = numbers_of(ndims, shapes, 0);
    const int threads = threads_for(10.0 * (double)size);
    TAKE_THREADS(threads);
    SHARED(threads, size, 1024, begin, end)
        adamw_values(params[0], params[1], params[2], params[3], n, params[9], params[10], params[11], begin, end);
    GIVE_THREADS(threads);
    return DONE;
}
