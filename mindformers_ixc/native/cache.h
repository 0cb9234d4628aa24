/* Numbers of a key/value cache: float32, or bfloat16, the upper half of a float32. */
#ifndef MINDFORMERS_IXC_CACHE_H
#define MINDFORMERS_IXC_CACHE_H

#include <stdint.h>
#include <string.h>

#include "vectorised.h"

/* Keys or values (entries, S, d). */
typedef struct {
    void *data;
    int is_half;
} Cache;

static inline Cache cache_of(void **params, const char **dtypes, int i) {
    const size_t length = dtypes == NULL ? 0 : strlen(dtypes[i]);
    return (Cache){params[i], length > 2 && strcmp(dtypes[i] + length - 2, "16") == 0};
}

/* The nearest bfloat16, of two equally near ones the even one. */
static inline uint16_t to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float of_half(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

VECTORISED static __attribute__((unused)) void widen_halves(const uint16_t *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; ++i) to[i] = of_half(from[i]);
}

/* Numbers begin .. begin + count of a cache as float32, in `room` if they are not. */
static inline const float *widened(Cache cache, int64_t begin, int64_t count, float *room) {
    if (!cache.is_half) return (const float *)cache.data + begin;
    widen_halves((const uint16_t *)cache.data + begin, count, room);
    return room;
}

/* Puts numbers into a cache, from its number `at` on. */
static inline void put(Cache cache, int64_t at, const float *from, int64_t count) {
    if (cache.is_half)
        for (int64_t i = 0; i < count; ++i) ((uint16_t *)cache.data)[at + i] = to_half(from[i]);
    else
        memcpy((float *)cache.data + at, from, sizeof(float) * (size_t)count);
}

/* Puts zeros into a cache. */
static inline void clear(Cache cache, int64_t at, int64_t count) {
    const int64_t size = cache.is_half ? 2 : 4;
    memset((char *)cache.data + at * size, 0, (size_t)(count * size));
}

/* Makes numbers what a cache can hold of them. */
static inline void as_held(Cache cache, float *x, int64_t count) {
    if (cache.is_half)
        for (int64_t i = 0; i < count; ++i) x[i] = of_half(to_half(x[i]));
}

#endif
