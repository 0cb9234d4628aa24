/* The consolidated product of positions, taken apart by key/value heads. */
#ifndef MINDFORMERS_IXC_HEADS_H
#define MINDFORMERS_IXC_HEADS_H

#include "cache.h"

/* What goes in and out; `length` positions of each of `batch` rows, `positions` are the cache's S. `places` (B, 2) are a
 * row's first new position and how many of its positions are real. */
typedef struct {
    const float *qkv, *cos, *sin;
    const int32_t *places, *real;
    float scale, *queries, *keys, *values;
    Cache cache_keys, cache_values;
    int64_t batch, heads, groups, length, size, positions;
} Heads;

/* Rotated, scaled queries of more positions (B, KV, G, R, d); their keys and values go behind those in the cache. Whether
 * they are all inside it; if not, nothing is done. */
int take_apart(const Heads *heads) __attribute__((visibility("hidden")));

#endif
