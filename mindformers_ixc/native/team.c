/* A team of threads for kernels that last some microseconds, on machines that others use as well.
 *
 * A step of decoding is dozens of such pieces of work, one after the other. OpenMP gives every thread its share and waits
 * for all threads: one that the system has put aside for another process's sake holds up the rest, and so does one that
 * has not been woken yet. Here a piece of work is over when its parts are done, whoever did them. Threads take the next
 * part when they are free; a late one finds nothing to do, and nobody has waited for it.
 *
 * Who waits looks for a short time (microseconds are what the next piece takes to come) and then sleeps. A sleeping
 * thread leaves its core, so that the system can move there what it has put aside elsewhere. No thread is bound to a
 * core: which cores are free is known to the system only, and two processes must not choose the same ones.
 *
 * Still, a thread that is put aside in the middle of a part holds up the piece for milliseconds, and so does the one that
 * shares the pieces out. Where threads together work little longer than the piece lasts, there are fewer cores than
 * threads, and one thread less is taken for a while, for a longer one when it is the same afterwards.
 */
#define _GNU_SOURCE
#include "team.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <omp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MOST_WORKERS 255
#define MOST_PARTS 65535

/* Nanoseconds that a worker looks for the next piece of work, and that who shared one out looks for its end. */
#define LOOK_FOR_WORK 100000
#define LOOK_FOR_END 30000

/* Nanoseconds of work after which it is looked at, and the share of their time that threads must have worked at least
 * (half: two that work no longer than one would). If not, one thread less is taken: for FIRST_PAUSE, and twice as long
 * each time it is no better afterwards. */
#define WINDOW 10000000
#define LEAST_SHARE 0.5
#define FIRST_PAUSE 30000000
#define LONGEST_PAUSE 200000000

/* The piece of work in hand: its number, how many parts it has and which one is next, in one word that changes at once.
 * Who takes a part has made sure of all three; until that part is done, `run` and `job` are those of this piece. */
static _Atomic uint64_t ticket;
static _Atomic(part_t) run;
static _Atomic(const void *) job;
static _Atomic uint32_t finished; /* parts of this piece that are done */
static _Atomic uint32_t news;     /* grows with every piece of work; workers sleep on it */
static _Atomic uint32_t sleepers, waits;
static _Atomic int64_t worked; /* time of all threads in parts, since the last look at it */
static _Atomic uint32_t wanted; /* workers that may take parts; the others sleep on it */

/* The team serves one kernel at a time; another one at that time works alone. */
static pthread_mutex_t is_taken = PTHREAD_MUTEX_INITIALIZER;
static int workers;
static uint32_t number;

/* Workers that are left out because they were held up, until when, and for how long one is; what the pieces of work have
 * lasted since the last look at it, and the same times their threads. */
static int left_out;
static int64_t again, pause_for = FIRST_PAUSE, lasted, available;

static void sleep_on(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(_Atomic uint32_t *word, int count) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0); }

static int64_t nanoseconds(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int64_t now(void) { return nanoseconds(CLOCK_MONOTONIC); }

static inline void rest(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Looks at a word for so many nanoseconds; whether it has another value now. */
static int changes(_Atomic uint32_t *word, uint32_t value, int64_t patience) {
    const int64_t end = now() + patience;
    do {
        for (int i = 0; i < 32; ++i) {
            if (atomic_load_explicit(word, memory_order_acquire) != value) return 1;
            rest();
        }
    } while (now() < end);
    return 0;
}

static uint64_t parts_of(uint64_t taken) { return taken >> 16 & 0xffff; }

/* Takes parts until there is none left. */
static void take_parts(void) {
    uint64_t taken = atomic_load(&ticket);
    if ((taken & 0xffff) >= parts_of(taken)) return;
    const int64_t begin = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    while ((taken & 0xffff) < parts_of(taken)) {
        if (!atomic_compare_exchange_weak(&ticket, &taken, taken + 1)) continue;
        atomic_load(&run)(atomic_load(&job), (int64_t)(taken & 0xffff));
        if (atomic_fetch_add(&finished, 1) + 1 == parts_of(taken) && atomic_load(&waits)) wake(&finished, INT_MAX);
        taken = atomic_load(&ticket);
    }
    atomic_fetch_add(&worked, nanoseconds(CLOCK_THREAD_CPUTIME_ID) - begin);
}

static void *work(void *argument) {
    const uint32_t own = (uint32_t)(intptr_t)argument;
    for (;;) {
        const uint32_t before = atomic_load(&news), others = atomic_load(&wanted);
        if (own >= others) {
            sleep_on(&wanted, others); /* not, if it is another number by now */
            continue;
        }
        take_parts();
        if (changes(&news, before, LOOK_FOR_WORK)) continue;
        atomic_fetch_add(&sleepers, 1);
        sleep_on(&news, before); /* not, if there is news by now */
        atomic_fetch_sub(&sleepers, 1);
    }
    return NULL;
}

/* A process that was forked has none of the workers. */
static void begin_anew(void) {
    pthread_mutex_init(&is_taken, NULL);
    workers = 0;
    atomic_store(&sleepers, 0);
    atomic_store(&ticket, 0);
}

/* Makes workers, as many as wanted or as the system gives. */
static void grow(int count) {
    static int is_watched = 0;
    if (workers >= count) return;
    if (!is_watched) is_watched = !pthread_atfork(NULL, NULL, begin_anew);
    pthread_attr_t attributes;
    sigset_t all, before;
    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads of the program */
    for (pthread_t thread; workers < count; ++workers)
        if (pthread_create(&thread, &attributes, work, (void *)(intptr_t)workers)) break;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* How many workers are to help with the next piece of work. */
static int helpers_of(int most) {
    if (left_out && now() >= again) {
        --left_out;
        again += pause_for;
    }
    return most > left_out ? most - left_out : 0;
}

/* Takes note of what a piece of work has lasted. */
static void learn(int64_t time, int threads) {
    lasted += time, available += time * threads;
    if (lasted < WINDOW) return;
    const int is_bad = (double)atomic_exchange(&worked, 0) < LEAST_SHARE * (double)available;
    lasted = available = 0;
    if (!is_bad) {
        pause_for = FIRST_PAUSE;
        return;
    }
    ++left_out;
    again = now() + pause_for;
    pause_for = 2 * pause_for < LONGEST_PAUSE ? 2 * pause_for : LONGEST_PAUSE;
}

typedef struct {
    float *numbers;
    int64_t size;
} Room;

static pthread_key_t room_key;
static int has_rooms;

static void free_room(void *argument) {
    Room *room = argument;
    free(room->numbers);
    free(room);
}

static void make_rooms(void) { has_rooms = !pthread_key_create(&room_key, free_room); }

float *team_room(int64_t count) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_rooms);
    Room *room = has_rooms ? pthread_getspecific(room_key) : NULL;
    if (room == NULL) {
        room = calloc(1, sizeof(Room));
        if (room == NULL || !has_rooms || pthread_setspecific(room_key, room)) {
            free(room);
            return NULL;
        }
    }
    if (count > room->size) {
        free(room->numbers);
        room->numbers = aligned_alloc(64, (size_t)(count + 15) / 16 * 64);
        room->size = room->numbers ? count : 0;
    }
    return room->numbers;
}

static void set_wanted(uint32_t count) {
    const uint32_t before = atomic_load(&wanted);
    if (before == count) return;
    atomic_store(&wanted, count);
    if (count > before) wake(&wanted, INT_MAX);
}

static void await_end(uint32_t parts) {
    for (uint32_t done; (done = atomic_load(&finished)) < parts;) {
        if (changes(&finished, done, LOOK_FOR_END)) continue;
        atomic_store(&waits, 1);
        sleep_on(&finished, done); /* not, if another part is done by now */
        atomic_store(&waits, 0);
    }
}

static void work_alone(part_t function, const void *argument, int64_t parts) {
    for (int64_t part = 0; part < parts; ++part) function(argument, part);
}

/* Shares a job out; `learns` if threads are left out where they are held up, and what this job shows of that counts. */
static void share(part_t function, const void *argument, int64_t parts, int learns) {
    const int threads = parts > 1 && parts <= MOST_PARTS ? omp_get_max_threads() : 1;
    if (threads == 1 || pthread_mutex_trylock(&is_taken)) {
        work_alone(function, argument, parts);
        return;
    }
    grow(threads - 1 < MOST_WORKERS ? threads - 1 : MOST_WORKERS);
    const int most = threads - 1 < workers ? threads - 1 : workers, helpers = learns ? helpers_of(most) : most;
    set_wanted((uint32_t)helpers);
    if (!helpers) {
        work_alone(function, argument, parts);
    } else {
        const int64_t begin = now(), before = atomic_load(&worked);
        atomic_store(&run, function);
        atomic_store(&job, argument);
        atomic_store(&finished, 0);
        atomic_store(&ticket, (uint64_t)++number << 32 | (uint64_t)parts << 16);
        atomic_fetch_add(&news, 1);
        if (atomic_load(&sleepers)) wake(&news, helpers);
        take_parts();
        await_end((uint32_t)parts);
        if (learns)
            learn(now() - begin, helpers + 1);
        else
            atomic_store(&worked, before);
    }
    pthread_mutex_unlock(&is_taken);
}

void team_share(part_t function, const void *argument, int64_t parts) { share(function, argument, parts, 1); }

void team_share_long(part_t function, const void *argument, int64_t parts) { share(function, argument, parts, 0); }
