/* Threads that share the work of a kernel for inference. */
#ifndef MINDFORMERS_IXC_TEAM_H
#define MINDFORMERS_IXC_TEAM_H

#include <stdint.h>

/* Does part number `part` of a job. */
typedef void (*part_t)(const void *job, int64_t part);

/* Does parts 0 .. parts of a job, in any order, each once, by as many threads as OpenMP would take (OMP_NUM_THREADS
 * counts); returns when all are done. What a part writes must not be read by another one. */
void team_share(part_t run, const void *job, int64_t parts) __attribute__((visibility("hidden")));

/* The same by all of these threads, even where others hold them up: for jobs that last so long, in parts so small, that
 * one thread less costs more than one that is put aside. */
void team_share_long(part_t run, const void *job, int64_t parts) __attribute__((visibility("hidden")));

/* Memory for so many numbers, which the calling thread keeps until it asks for more or ends: large pieces that come and go
 * cost more than what is done in them. NULL if there is none. What is in it is lost with the next call. */
float *team_room(int64_t count) __attribute__((visibility("hidden")));

#endif
