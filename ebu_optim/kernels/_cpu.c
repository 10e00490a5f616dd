/* The fused kernels for a CPU: selection in one pass, combination in one pass.

   cpu.py is the only caller. This file takes addresses and knows nothing of torch; what each
   function computes is specified by reference.py. Nothing here touches Python while it works, so
   the GIL is released. Every result is an integer, or a sum in a fixed order of fixed blocks: it
   does not depend on the number of threads. Build without -ffast-math and with -ffp-contract=off.
*/

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "-ffast-math breaks the tests for NaN and sets flush-to-zero for the whole process"
#endif

/* -- elements and blocks ---------------------------------------------------------------------- */

enum { NONE = 0, FLOAT32 = 1, FLOAT16 = 2, BFLOAT16 = 3, EXPANDED = 8 }; /* kinds, see cpu.py */
#define KIND(k) ((int)((k) & 7))

/* Memory of any alignment and any declared type. */
typedef uint32_t word __attribute__((aligned(1), may_alias));
typedef uint16_t half __attribute__((aligned(1), may_alias));

#define MAGNITUDE 0x7fffffff
#define INFINITE 0x7f800000

/* A block's buffers stay in the first cache; a task is what one thread takes at a time. */
enum { BLOCK = 1024, TASK = 1 << 16 };

enum { SPARE = 16 }; /* slots behind what `scan` keeps: it stores whole vectors */

static inline uint32_t bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static inline float value(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* on ? a : b, as integers: a choice between floats keeps GCC from vectorising a loop. */
static inline uint32_t pick(int on, uint32_t a, uint32_t b)
{
    const uint32_t mask = 0u - (uint32_t)on;
    return (a & mask) | (b & ~mask);
}

static inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

static inline size_t width(int64_t kind) { return KIND(kind) == FLOAT32 ? 4 : 2; }

/* In the order of reference.STATS. */
enum {
    FORGET_SELECTED, REMEMBER_SELECTED, OVERLAP, OVERLAP_OPPOSED, DOT, FORGET_SQ, REMEMBER_SQ,
    UPDATE_SQ, MOVED_FORGET_ONLY_SQ, MOVED_REMEMBER_ONLY_SQ, MOVED_OVERLAP_SQ, MOVED_UNRELATED_SQ,
    FISHER_SUM, UPDATE_NONFINITE, STATS
};

typedef struct {
    const float *theta, *g_f, *g_r, *anchor, *fisher; /* theta, anchor, fisher may be NULL */
    float *out, *held, *new_fisher; /* none of the above; held, new_fisher may be NULL */
    uint32_t key_f, key_r;
} Block;

typedef struct {
    float on_f, on_r, on_m, on_only_r, blend, partial, full, online, inv_scale;
    int32_t penalized, counted;
} Rule;

/* What a scan looks for: keys in [from, to] are kept. */
typedef struct {
    int32_t from, to;
} Span;

/* How many keys are > to, and how many are of NaN or Inf. */
typedef struct {
    int64_t beyond, nonfinite;
} Tally;

typedef struct {
    void (*widen)(uint32_t *to, const char *from, int kind, size_t n);
    size_t (*narrow)(char *to, const float *from, int kind, size_t n);
    size_t (*scan)(const char *at, size_t n, const Span *span, uint32_t *kept, Tally *tally);
    int64_t (*nonfinite)(const char *from, size_t n);
    void (*put_back)(char *to, const char *from, int kind, size_t n);
    double (*sum)(const float *x, size_t n);
    void (*combine)(const Block *b, const Rule *rule, size_t n, double *sums);
} Lanes;

/* -- instruction sets ------------------------------------------------------------------------- */

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#include <immintrin.h>
#define X86 1
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,popcnt,bmi")))
#define NAME(x) x##_avx512
#define SCAN_AVX512
#include "_cpu_lanes.h"
#undef SCAN_AVX512
#define LANES 8
#define TARGET __attribute__((target("avx2,popcnt,bmi")))
#define NAME(x) x##_avx2
#define SCAN_AVX2
#include "_cpu_lanes.h"
#undef SCAN_AVX2
#endif
#define LANES 4
#define TARGET
#define NAME(x) x##_base
#include "_cpu_lanes.h"

static const Lanes *lanes = &lanes_base;

/* The best of the instruction sets named (all of them for NULL) that this processor has. */
static const char *choose(const char *name)
{
#ifdef X86
    __builtin_cpu_init();
    if ((!name || !strcmp(name, "avx512")) && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        lanes = &lanes_avx512;
        return "avx512";
    }
    if ((!name || !strcmp(name, "avx2")) && __builtin_cpu_supports("avx2") &&
        __builtin_cpu_supports("bmi")) {
        lanes = &lanes_avx2;
        return "avx2";
    }
#endif
    if (!name || !strcmp(name, "base")) {
        lanes = &lanes_base;
        return "base";
    }
    return NULL;
}

/* -- a list of tensors, walked in blocks ------------------------------------------------------ */

typedef struct {
    const uint64_t *at;   /* addresses */
    const int64_t *kind;  /* element kinds, or'ed with EXPANDED where one value stands for all */
    const int64_t *end;   /* end[i]: elements in tensors 0 to i */
    size_t count;
} List;

static inline size_t total(List t) { return t.count ? (size_t)t.end[t.count - 1] : 0; }

/* The tensor that holds element `where` of the concatenation. */
static size_t find(const int64_t *end, size_t count, size_t where)
{
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if ((size_t)end[middle] <= where)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Elements from..from+n of a tensor as float32 patterns: where they lie, or through `buffer`. */
static inline const char *patterns(uint64_t at, int64_t kind, size_t from, size_t n,
                                   uint32_t *buffer)
{
    const char *p = (const char *)(uintptr_t)at;
    if (kind == FLOAT32)
        return p + 4 * from;
    if (kind & EXPANDED) {
        lanes->widen(buffer, p, KIND(kind), 1);
        for (size_t i = 1; i < n; i++)
            buffer[i] = buffer[0];
    } else {
        lanes->widen(buffer, p + width(kind) * from, KIND(kind), n);
    }
    return (const char *)buffer;
}

/* A cursor over elements [from, to) of a list, block by block. */
typedef struct {
    List list;
    size_t from, to, i;
} Walk;

static Walk walk(List list, size_t from, size_t to)
{
    Walk w = {list, from, to, find(list.end, list.count, from)};
    return w;
}

/* The next block of at most BLOCK patterns, or NULL at the end. */
static const char *next(Walk *w, size_t *n, uint32_t *buffer)
{
    if (w->from >= w->to)
        return NULL;
    while ((size_t)w->list.end[w->i] <= w->from)
        w->i++; /* also past tensors without elements */
    size_t start = w->i ? (size_t)w->list.end[w->i - 1] : 0;
    size_t stop = smaller((size_t)w->list.end[w->i], w->to);
    *n = smaller(stop - w->from, BLOCK);
    const char *p = patterns(w->list.at[w->i], w->list.kind[w->i], w->from - start, *n, buffer);
    w->from += *n;
    return p;
}

/* -- selection in a buffer -------------------------------------------------------------------- */

/* The k-th largest of n keys, all in [lo, hi]; the buffer is spent. */
static uint32_t kth_largest(uint32_t *u, size_t n, size_t k, uint32_t lo, uint32_t hi)
{
    while (n > 32 && lo < hi) {
        int digit = n > 512 ? 11 : 8, range = 32 - __builtin_clz(hi - lo);
        int shift = range > digit ? range - digit : 0;
        uint32_t counts[2048];
        memset(counts, 0, sizeof(uint32_t) << digit);
        for (size_t i = 0; i < n; i++)
            counts[(u[i] - lo) >> shift]++;
        uint32_t bin = (hi - lo) >> shift;
        for (; k > counts[bin]; bin--)
            k -= counts[bin];
        size_t m = 0;
        if (shift)
            for (size_t i = 0; i < n; i++) {
                uint32_t x = u[i];
                u[m] = x;
                m += ((x - lo) >> shift) == bin;
            }
        n = m;
        lo += bin << shift;
        uint32_t last = lo + ((1u << shift) - 1);
        hi = last < hi ? last : hi;
    }
    if (lo == hi)
        return lo;
    for (size_t i = 1; i < n; i++) { /* in falling order */
        uint32_t x = u[i];
        size_t j = i;
        for (; j && u[j - 1] < x; j--)
            u[j] = u[j - 1];
        u[j] = x;
    }
    return u[k - 1];
}

/* The bin that holds the k-th from the top; k becomes its rank there. */
static uint32_t from_the_top(const int64_t *counts, size_t bins, size_t *k)
{
    size_t bin = bins - 1;
    for (; *k > (size_t)counts[bin]; bin--)
        *k -= (size_t)counts[bin];
    return (uint32_t)bin;
}

/* counts[i] += mine[i], with other threads doing the same. */
static void add_up(int64_t *counts, const uint32_t *mine, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (mine[i])
            __atomic_fetch_add(counts + i, mine[i], __ATOMIC_RELAXED);
}

/* The digits (key >> shift) & mask of n patterns, in turn into two sets of counters; the mask leaves
   no room for the sign bit. */
static void count(const char *p, size_t n, int shift, uint32_t mask, uint32_t *even, uint32_t *odd)
{
    const word *u = (const word *)p;
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        uint32_t a = (u[i] >> shift) & mask, b = (u[i + 1] >> shift) & mask;
        uint32_t c = (u[i + 2] >> shift) & mask, d = (u[i + 3] >> shift) & mask;
        even[a]++;
        odd[b]++;
        even[c]++;
        odd[d]++;
    }
    for (; i < n; i++)
        even[(u[i] >> shift) & mask]++;
}

/* -- selection in a list ---------------------------------------------------------------------- */

/* The path that was taken, as in cpu.py. */
enum { DIRECT = 0, BRACKET = 1, AGAIN = 2, RADIX = 3, FAILED = -1, REFUTED = -2 };

/* Up to DIRECT_MAX elements a pool is copied and selected in, above SHARED_MIN the threads share
   it; a sample has SAMPLE_MIN to SAMPLE_MAX elements. */
static const size_t DIRECT_MAX = 8192, SHARED_MIN = 1 << 20;
static const size_t SAMPLE_MIN = 1024, SAMPLE_MAX = 1 << 18;
/* The bracket lies so many standard deviations to each side of the rank: refuted once in 2000. */
static const double WIDE = 3.5;

/* Position of sample j: one in each of `size` strata of equal width, which is never worse than
   independent draws, and walks through memory in order. Any draw is right: it only guesses. */
static inline size_t drawn(size_t j, size_t size, size_t n, uint64_t attempt)
{
    uint64_t x = ((uint64_t)j + 1 + (attempt << 32)) * 0x9e3779b97f4a7c15u; /* splitmix64 */
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    double at = ((double)j + (double)(x >> 32) * 0x1p-32) * ((double)n / (double)size);
    return smaller((size_t)at, n - 1);
}

static void sample(List list, size_t size, uint64_t attempt, uint32_t *keys, int threads)
{
    enum { PART = 256 };
    size_t n = total(list), parts = (size + PART - 1) / PART;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (size_t part = 0; part < parts; part++) {
        const char *where[PART];
        int64_t kind[PART];
        const size_t first = part * PART, many = smaller(size - first, PART);
        size_t i = find(list.end, list.count, drawn(first, size, n, attempt));
        for (size_t j = 0; j < many; j++) { /* ask for all before waiting for one */
            size_t at = drawn(first + j, size, n, attempt);
            while ((size_t)list.end[i] <= at)
                i++;
            at -= i ? (size_t)list.end[i - 1] : 0;
            kind[j] = list.kind[i];
            where[j] = (const char *)(uintptr_t)list.at[i];
            if (!(kind[j] & EXPANDED))
                where[j] += at * width(kind[j]);
            __builtin_prefetch(where[j]);
        }
        for (size_t j = 0; j < many; j++) {
            uint32_t u;
            if (KIND(kind[j]) == FLOAT32)
                memcpy(&u, where[j], 4);
            else
                lanes_base.widen(&u, where[j], KIND(kind[j]), 1);
            keys[first + j] = u & MAGNITUDE;
        }
    }
}

/* A selection handles a key of the sample about three times, and each of the 3.5 n / sqrt(size) keys
   in the bracket once or twice: (0.6 n)^(2/3) makes the sum least. */
static size_t sample_size(size_t n)
{
    double size = pow(0.6 * (double)n, 2.0 / 3.0);
    return size < SAMPLE_MIN ? SAMPLE_MIN : smaller((size_t)size, SAMPLE_MAX);
}

/* Where there is room, what one thread has found goes to all that was found. */
static void hand_in(const uint32_t *found, size_t many, uint32_t *kept, size_t room, size_t *inside)
{
    size_t at = __atomic_fetch_add(inside, many, __ATOMIC_RELAXED);
    if (at + many <= room)
        memcpy(kept + at, found, many * sizeof *kept);
}

/* One pass: the keys in [from, to] are kept while there is room; returns how many there are.
   Threads hand in many at a time: at every block they would wait for each other's cache lines. */
static size_t pass(List list, Span span, uint32_t *kept, size_t room, int threads, Tally *tally)
{
    const size_t n = total(list), tasks = (n + TASK - 1) / TASK;
    size_t inside = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        enum { MANY = 4 * BLOCK };
        uint32_t buffer[BLOCK], found[MANY + BLOCK + SPARE];
        size_t many = 0;
        Tally mine = {0};
#pragma omp for schedule(dynamic)
        for (size_t task = 0; task < tasks; task++) {
            Walk w = walk(list, task * TASK, smaller(n, (task + 1) * TASK));
            const char *p;
            size_t m;
            while ((p = next(&w, &m, buffer))) {
                many += lanes->scan(p, m, &span, found + many, &mine);
                if (many > MANY) {
                    hand_in(found, many, kept, room, &inside);
                    many = 0;
                }
            }
        }
        if (many)
            hand_in(found, many, kept, room, &inside);
        __atomic_fetch_add(&tally->beyond, mine.beyond, __ATOMIC_RELAXED);
        __atomic_fetch_add(&tally->nonfinite, mine.nonfinite, __ATOMIC_RELAXED);
    }
    return inside;
}

/* How many keys are > limit (which may be -1). */
static size_t greater(List list, int32_t limit, int threads)
{
    const Span nothing = {MAGNITUDE, limit};
    Tally tally = {0};
    pass(list, nothing, NULL, 0, threads, &tally);
    return (size_t)tally.beyond;
}

/* The memory of a large selection (1 % of its elements) is kept for the next: fresh pages cost more
   than the search in them. Small ones come from the heap, which has them at hand. */
static const size_t SPARE_MIN = 1 << 17;
static struct {
    void *at;
    size_t size;
} spare;
static char spare_taken; /* guards `spare`; who finds it taken does without */

static void *borrow(size_t size)
{
    void *at = NULL;
    if (size >= SPARE_MIN && !__atomic_test_and_set(&spare_taken, __ATOMIC_ACQUIRE)) {
        if (spare.at && spare.size >= size && spare.size / 2 <= size) {
            at = spare.at;
            spare.at = NULL;
        }
        __atomic_clear(&spare_taken, __ATOMIC_RELEASE);
    }
    return at ? at : malloc(size);
}

static void give_back(void *at, size_t size)
{
    void *old = at;
    if (size >= SPARE_MIN && !__atomic_test_and_set(&spare_taken, __ATOMIC_ACQUIRE)) {
        old = spare.at;
        spare.at = at;
        spare.size = size;
        __atomic_clear(&spare_taken, __ATOMIC_RELEASE);
    }
    free(old);
}

/* Guess a bracket [low, high] from a sample and try it in one pass, which keeps the keys between
   low and high. Ties at either end, of which there may be many, are counted in a second pass, where
   the first says that it is one of them. Returns 0 with the key, or REFUTED (`nonfinite` is right
   either way), or FAILED without memory. */
static int bracket(List list, size_t k, uint64_t attempt, int threads, uint32_t *key,
                   int64_t *nonfinite)
{
    const size_t n = total(list), size = sample_size(n);
    double share = (double)k / (double)n;
    double rank = share * (double)size; /* from the largest */
    double margin = WIDE * sqrt(share * (1 - share) * (double)size) + 2;
    double expected = (2 * margin + 2) / (double)size * (double)n;
    size_t room = smaller((size_t)(1.2 * expected) + 1024, n);

    /* the sample is spent before anything is kept */
    const size_t bytes = (room > 2 * size ? room : 2 * size) * sizeof(uint32_t);
    uint32_t *keys = borrow(bytes);
    if (!keys)
        return FAILED;
    uint32_t *copy = keys + size, *kept = keys;
    sample(list, size, attempt, keys, threads);
    memcpy(copy, keys, size * sizeof *keys);
    uint32_t low = 0, high = MAGNITUDE;
    if (rank - margin > 1)
        high = kth_largest(copy, size, (size_t)(rank - margin), 0, MAGNITUDE);
    if (rank + margin < (double)size)
        low = kth_largest(keys, size, (size_t)(rank + margin) + 1, 0, MAGNITUDE);

    const Span between = {(int32_t)low + (low < MAGNITUDE), (int32_t)high - 1};
    Tally tally = {0};
    size_t inside = pass(list, between, kept, room, threads, &tally);
    const size_t beyond = (size_t)tally.beyond;
    *nonfinite = tally.nonfinite;
    int result = 0;
    if (k <= beyond) {
        *key = high;
        if (greater(list, (int32_t)high, threads) >= k)
            result = REFUTED;
    } else if (k > beyond + inside) {
        *key = low;
        if (low && greater(list, (int32_t)low - 1, threads) < k)
            result = REFUTED;
    } else if (inside > room) {
        result = REFUTED;
    } else {
        *key = kth_largest(kept, inside, k - beyond, low, high);
    }
    give_back(keys, bytes);
    return result;
}

/* counts[d]: how many keys with key >> (shift + digit) == prefix have the digit d at `shift`, where
   shift + digit <= 31. Returns 0, or FAILED without memory. */
static int histogram(List list, uint32_t prefix, int shift, int digit, int threads,
                     int64_t *counts)
{
    const size_t n = total(list), tasks = (n + TASK - 1) / TASK, bins = (size_t)1 << digit;
    const int above = shift + digit;
    const uint32_t first = above < 31 ? prefix << above : 0;
    const Span span = {(int32_t)first, (int32_t)(first + ((1u << above) - 1))};
    int failed = 0;
    (void)threads; /* without OpenMP */
    memset(counts, 0, bins * sizeof *counts);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        /* two sets of counters: ties would wait for each other's store */
        uint32_t buffer[BLOCK], found[BLOCK + SPARE], *mine = calloc(2 * bins, sizeof *mine);
        size_t seen = 0;
        Tally ignored = {0};
        if (!mine)
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(dynamic)
        for (size_t task = 0; task < tasks; task++) {
            if (!mine)
                continue;
            Walk w = walk(list, task * TASK, smaller(n, (task + 1) * TASK));
            const char *p;
            size_t m;
            while ((p = next(&w, &m, buffer))) {
                if (above < 31) {
                    m = lanes->scan(p, m, &span, found, &ignored);
                    p = (const char *)found;
                }
                count(p, m, shift, (uint32_t)bins - 1, mine, mine + bins);
            }
            seen += TASK;
            if (seen >= (size_t)1 << 31) { /* before a counter is full */
                add_up(counts, mine, bins);
                add_up(counts, mine + bins, bins);
                memset(mine, 0, 2 * bins * sizeof *mine);
                seen = 0;
            }
        }
        if (mine) {
            add_up(counts, mine, bins);
            add_up(counts, mine + bins, bins);
        }
        free(mine);
    }
    return failed ? FAILED : 0;
}

/* Exact whatever the values: 16 bits of the key, then the other 15. */
static int radix(List list, size_t k, int threads, uint32_t *key)
{
    enum { UPPER = 1 << 16, LOWER = 1 << 15 };
    int64_t *counts = malloc(UPPER * sizeof *counts);
    int result = counts ? histogram(list, 0, 15, 16, threads, counts) : FAILED;
    if (result != FAILED) {
        uint32_t upper = from_the_top(counts, UPPER, &k);
        result = histogram(list, upper, 0, 15, threads, counts);
        if (result != FAILED)
            *key = upper << 15 | from_the_top(counts, LOWER, &k);
    }
    free(counts);
    return result;
}

/* A small pool: copied, then selected in. */
static int direct(List list, size_t k, uint32_t *key, int64_t *nonfinite)
{
    size_t n = total(list), m, filled = 0;
    uint32_t *keys = malloc((n + SPARE) * sizeof *keys), buffer[BLOCK];
    if (!keys)
        return FAILED;
    const Span everything = {0, MAGNITUDE};
    Tally tally = {0};
    const char *p;
    for (Walk w = walk(list, 0, n); (p = next(&w, &m, buffer)); filled += m)
        lanes->scan(p, m, &everything, keys + filled, &tally);
    *nonfinite = tally.nonfinite;
    *key = kth_largest(keys, n, k, 0, MAGNITUDE);
    free(keys);
    return DIRECT;
}

/* The key of the k-th largest magnitude of a list, and how many of its elements are NaN or Inf;
   returns the path taken. */
static int select_in(List list, size_t k, int threads, int64_t *key, int64_t *nonfinite)
{
    uint32_t found = 0;
    int path = DIRECT, result = REFUTED;
    if (total(list) <= DIRECT_MAX)
        result = direct(list, k, &found, nonfinite);
    while (result == REFUTED) {
        path++;
        result = path == RADIX ? radix(list, k, threads, &found)
                               : bracket(list, k, (uint64_t)path, threads, &found, nonfinite);
    }
    *key = found > INFINITE ? INFINITE + 1 : found; /* all NaN are tied */
    return result == FAILED ? FAILED : path;
}

/* Pools are runs of a list: pool p is tensors first[p] to first[p + 1], its ends counted from its
   own start. Large pools are shared by the threads, small ones are handed out whole. */
static int select_pools(List list, const int64_t *first, const int64_t *k, size_t pools,
                        int threads, int64_t *keys, int64_t *nonfinite, int64_t *paths)
{
    int failed = 0;
    for (int shared = 0; shared < 2; shared++) {
        const int outer = shared ? 1 : threads, inner = shared ? threads : 1;
        (void)outer;
#pragma omp parallel for num_threads(outer) schedule(dynamic) if (outer > 1)
        for (size_t p = 0; p < pools; p++) {
            size_t at = (size_t)first[p];
            List pool = {list.at + at, list.kind + at, list.end + at, (size_t)first[p + 1] - at};
            if (shared != (total(pool) > SHARED_MIN || pools == 1))
                continue;
            int path = select_in(pool, (size_t)k[p], inner, keys + p, nonfinite + p);
            paths[p] = path;
            if (path == FAILED)
                __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        }
    }
    return failed ? FAILED : 0;
}

/* -- other passes over a list ----------------------------------------------------------------- */

static int64_t count_nonfinite(List list, int threads)
{
    size_t n = total(list), tasks = (n + TASK - 1) / TASK;
    int64_t bad = 0;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(+ : bad) if (threads > 1)
    for (size_t task = 0; task < tasks; task++) {
        uint32_t buffer[BLOCK];
        Walk w = walk(list, task * TASK, smaller(n, (task + 1) * TASK));
        const char *p;
        size_t m;
        while ((p = next(&w, &m, buffer)))
            bad += lanes->nonfinite(p, m);
    }
    return bad;
}

static void put_back(const uint64_t *to, List from, int threads)
{
    size_t n = total(from), tasks = (n + TASK - 1) / TASK;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (size_t task = 0; task < tasks; task++) {
        size_t at = task * TASK, stop = smaller(n, at + TASK), m;
        for (size_t i = find(from.end, from.count, at); at < stop; i++, at += m) {
            size_t start = i ? (size_t)from.end[i - 1] : 0, w = width(from.kind[i]);
            m = smaller((size_t)from.end[i], stop) - at;
            lanes->put_back((char *)(uintptr_t)to[i] + w * (at - start),
                            (const char *)(uintptr_t)from.at[i] + w * (at - start),
                            KIND(from.kind[i]), m);
        }
    }
}

/* -- combination ------------------------------------------------------------------------------ */

/* The columns of combine, in the order of cpu.py. */
enum { THETA, G_F, G_R, ANCHOR, FISHER, OUT, HELD, COLUMNS };

typedef struct {
    const uint64_t *at[COLUMNS];
    const int64_t *kind[COLUMNS];
    const int64_t *end, *key_f, *key_r;
    size_t rows;
} Table;

/* n elements of a column as floats: in place where they are float32 and `whole`, else copied. */
static const float *column(const Table *t, int c, size_t row, size_t from, size_t n, int whole,
                           float *buffer)
{
    if (t->kind[c][row] == NONE)
        return NULL;
    const char *p = patterns(t->at[c][row], t->kind[c][row], from, n, (uint32_t *)(void *)buffer);
    if (whole || p == (const char *)buffer)
        return (const float *)(const void *)p;
    memcpy(buffer, p, n * sizeof *buffer);
    return buffer;
}

/* What was computed for n elements goes where it belongs, rounded; how much is not finite then
   (of 16-bit elements: the others have been counted). */
static size_t deliver(const Table *t, int c, size_t row, size_t from, size_t n, const float *made)
{
    int kind = KIND(t->kind[c][row]);
    char *to = (char *)(uintptr_t)t->at[c][row] + width(kind) * from;
    if (kind != FLOAT32)
        return lanes->narrow(to, made, kind, n);
    memcpy(to, made, n * sizeof *made);
    return 0;
}

/* The four inner products again, in double: float32 does not hold them. */
static void wide_sums(const Block *b, float inv_scale, size_t n, double *sums)
{
    sums[DOT] = sums[FORGET_SQ] = sums[REMEMBER_SQ] = sums[UPDATE_SQ] = 0;
    for (size_t i = 0; i < n; i++) {
        float f, r;
        memcpy(&f, (const char *)b->g_f + 4 * i, 4);
        memcpy(&r, (const char *)b->g_r + 4 * i, 4);
        f *= inv_scale;
        r *= inv_scale;
        sums[DOT] += (double)f * (double)r;
        sums[FORGET_SQ] += (double)f * (double)f;
        sums[REMEMBER_SQ] += (double)r * (double)r;
        sums[UPDATE_SQ] += (double)b->out[i] * (double)b->out[i];
    }
}

/* One block: n elements of a row. Results are made in buffers and delivered at the end, so that
   they may replace what they were made of. A tail is padded with zeros, which nothing selects or
   counts. */
static void combine_block(const Table *t, const Rule *rule, size_t row, size_t from, size_t n,
                          double *sums)
{
    float in[OUT][BLOCK], out[BLOCK], held[BLOCK], new_fisher[BLOCK];
    const size_t padded = (n + 15) & ~(size_t)15;
    const int whole = padded == n;
    const int pulls = rule->counted || rule->penalized;
    const int moves = (pulls && t->kind[ANCHOR][row] != NONE) || t->kind[HELD][row] != NONE;
    const int online = rule->online >= 0 && t->kind[FISHER][row] != NONE;
    for (int c = 0; c < OUT && !whole; c++)
        memset(in[c] + (padded - 16), 0, 16 * sizeof(float));
    Block b = {
        .theta = moves ? column(t, THETA, row, from, n, whole, in[THETA]) : NULL,
        .g_f = column(t, G_F, row, from, n, whole, in[G_F]),
        .g_r = column(t, G_R, row, from, n, whole, in[G_R]),
        .anchor = pulls ? column(t, ANCHOR, row, from, n, whole, in[ANCHOR]) : NULL,
        .fisher = online || rule->penalized ? column(t, FISHER, row, from, n, whole, in[FISHER])
                                            : NULL,
        .out = out,
        .held = t->kind[HELD][row] != NONE ? held : NULL,
        .new_fisher = online ? new_fisher : NULL,
        .key_f = (uint32_t)t->key_f[row],
        .key_r = (uint32_t)t->key_r[row],
    };
    Rule own = *rule;
    own.penalized = rule->penalized && b.fisher && b.anchor;
    double part[STATS] = {0};
    lanes->combine(&b, &own, padded, part);
    if (!isfinite(part[DOT] + part[FORGET_SQ] + part[REMEMBER_SQ] + part[UPDATE_SQ]))
        wide_sums(&b, rule->inv_scale, padded, part);

    const size_t bad = deliver(t, OUT, row, from, n, out);
    if (KIND(t->kind[OUT][row]) != FLOAT32)
        part[UPDATE_NONFINITE] = (double)bad;
    if (b.held)
        deliver(t, HELD, row, from, n, held);
    if (online) {
        const int kind = KIND(t->kind[FISHER][row]);
        deliver(t, FISHER, row, from, n, new_fisher);
        if (kind != FLOAT32) { /* the sum is of what is stored */
            const char *stored = (const char *)(uintptr_t)t->at[FISHER][row] + 2 * from;
            lanes->widen((uint32_t *)(void *)new_fisher, stored, kind, n);
        }
        part[FISHER_SUM] = lanes->sum(new_fisher, padded);
    }
    for (int s = 0; s < STATS; s++)
        sums[s] += part[s];
}

/* The caller's floating-point mode (rounding, flush-to-zero), which other threads do not share: a
   result must not depend on which of them it came from. */
#if defined(__GNUC__) && defined(__x86_64__)
typedef unsigned int Mode;
static Mode get_mode(void) { return _mm_getcsr(); }
static void set_mode(Mode mode) { _mm_setcsr(mode); }
#elif defined(__GNUC__) && defined(__aarch64__)
typedef uint64_t Mode;
static Mode get_mode(void)
{
    Mode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
static void set_mode(Mode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
typedef int Mode;
static Mode get_mode(void) { return 0; }
static void set_mode(Mode mode) { (void)mode; }
#endif

/* stats gains the sums of all rows, task by task in order. Returns 0, or FAILED without memory. */
static int combine_rows(const Table *t, const Rule *rule, int threads, double *stats)
{
    size_t n = t->rows ? (size_t)t->end[t->rows - 1] : 0, tasks = (n + TASK - 1) / TASK;
    double *parts = calloc(tasks ? tasks : 1, STATS * sizeof *parts);
    if (!parts)
        return FAILED;
    const Mode callers = get_mode();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (size_t task = 0; task < tasks; task++) {
        size_t at = task * TASK, stop = smaller(n, at + TASK);
        const Mode own = get_mode();
        set_mode(callers);
        for (size_t row = find(t->end, t->rows, at); at < stop; row++) {
            size_t start = row ? (size_t)t->end[row - 1] : 0;
            size_t last = smaller((size_t)t->end[row], stop), m;
            for (; at < last; at += m) {
                m = smaller(last - at, BLOCK);
                if (m > 15)
                    m &= ~(size_t)15; /* the tail alone goes through buffers */
                combine_block(t, rule, row, at - start, m, parts + STATS * task);
            }
        }
        set_mode(own);
    }
    for (size_t task = 0; task < tasks; task++)
        for (int s = 0; s < STATS; s++)
            stats[s] += parts[STATS * task + (size_t)s];
    free(parts);
    return 0;
}

/* -- Python ----------------------------------------------------------------------------------- */

#define ADDRESS(T, x) ((T)(uintptr_t)(x))
typedef unsigned long long address;

static PyObject *done(int result)
{
    if (result == FAILED)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_lanes(PyObject *self, PyObject *args)
{
    (void)self;
    const char *name = NULL, *chosen;
    if (!PyArg_ParseTuple(args, "|z", &name))
        return NULL;
    if (!(chosen = choose(name)))
        return PyErr_Format(PyExc_ValueError, "this processor has no %s", name);
    return PyUnicode_FromString(chosen);
}

static PyObject *py_select(PyObject *self, PyObject *args)
{
    (void)self;
    address at, kind, end, first, k, keys, nonfinite, paths;
    Py_ssize_t count, pools;
    int threads, result;
    if (!PyArg_ParseTuple(args, "KKKnKKnKKKi", &at, &kind, &end, &count, &first, &k, &pools, &keys,
                          &nonfinite, &paths, &threads))
        return NULL;
    List list = {ADDRESS(uint64_t *, at), ADDRESS(int64_t *, kind), ADDRESS(int64_t *, end),
                 (size_t)count};
    Py_BEGIN_ALLOW_THREADS
    result = select_pools(list, ADDRESS(int64_t *, first), ADDRESS(int64_t *, k), (size_t)pools,
                          threads, ADDRESS(int64_t *, keys), ADDRESS(int64_t *, nonfinite),
                          ADDRESS(int64_t *, paths));
    Py_END_ALLOW_THREADS
    return done(result);
}

static PyObject *py_radix(PyObject *self, PyObject *args)
{
    (void)self;
    address at, kind, end;
    Py_ssize_t count, k;
    int threads, result;
    if (!PyArg_ParseTuple(args, "KKKnni", &at, &kind, &end, &count, &k, &threads))
        return NULL;
    List list = {ADDRESS(uint64_t *, at), ADDRESS(int64_t *, kind), ADDRESS(int64_t *, end),
                 (size_t)count};
    uint32_t key = 0;
    Py_BEGIN_ALLOW_THREADS
    result = radix(list, (size_t)k, threads, &key);
    Py_END_ALLOW_THREADS
    return result == FAILED ? PyErr_NoMemory() : PyLong_FromUnsignedLong(key);
}

/* For tests: where the sample of an attempt looks; how many places that are. */
static PyObject *py_positions(PyObject *self, PyObject *args)
{
    (void)self;
    address to;
    Py_ssize_t n;
    int attempt;
    if (!PyArg_ParseTuple(args, "niK", &n, &attempt, &to))
        return NULL;
    const size_t size = sample_size((size_t)n);
    for (size_t j = 0; j < size; j++)
        ADDRESS(int64_t *, to)[j] = (int64_t)drawn(j, size, (size_t)n, (uint64_t)attempt);
    return PyLong_FromSize_t(size);
}

static PyObject *py_histogram(PyObject *self, PyObject *args)
{
    (void)self;
    address at, kind, end, counts;
    Py_ssize_t count;
    unsigned int prefix;
    int shift, digit, threads, result;
    if (!PyArg_ParseTuple(args, "KKKnIiiKi", &at, &kind, &end, &count, &prefix, &shift, &digit,
                          &counts, &threads))
        return NULL;
    List list = {ADDRESS(uint64_t *, at), ADDRESS(int64_t *, kind), ADDRESS(int64_t *, end),
                 (size_t)count};
    Py_BEGIN_ALLOW_THREADS
    result = histogram(list, prefix, shift, digit, threads, ADDRESS(int64_t *, counts));
    Py_END_ALLOW_THREADS
    return done(result);
}

static PyObject *py_count_nonfinite(PyObject *self, PyObject *args)
{
    (void)self;
    address at, kind, end;
    Py_ssize_t count;
    int threads;
    int64_t result;
    if (!PyArg_ParseTuple(args, "KKKni", &at, &kind, &end, &count, &threads))
        return NULL;
    List list = {ADDRESS(uint64_t *, at), ADDRESS(int64_t *, kind), ADDRESS(int64_t *, end),
                 (size_t)count};
    Py_BEGIN_ALLOW_THREADS
    result = count_nonfinite(list, threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(result);
}

static PyObject *py_restore(PyObject *self, PyObject *args)
{
    (void)self;
    address to, at, kind, end;
    Py_ssize_t count;
    int threads;
    if (!PyArg_ParseTuple(args, "KKKKni", &to, &at, &kind, &end, &count, &threads))
        return NULL;
    List list = {ADDRESS(uint64_t *, at), ADDRESS(int64_t *, kind), ADDRESS(int64_t *, end),
                 (size_t)count};
    Py_BEGIN_ALLOW_THREADS
    put_back(ADDRESS(uint64_t *, to), list, threads);
    Py_END_ALLOW_THREADS
    return done(0);
}

static PyObject *py_combine(PyObject *self, PyObject *args)
{
    (void)self;
    address at, kind, end, key_f, key_r, stats;
    Py_ssize_t rows;
    int threads, penalized, counted, result;
    Rule rule;
    if (!PyArg_ParseTuple(args, "KKKnKK(fffffffff)ppKi", &at, &kind, &end, &rows, &key_f, &key_r,
                          &rule.on_f, &rule.on_r, &rule.on_m, &rule.on_only_r, &rule.blend,
                          &rule.partial, &rule.full, &rule.online, &rule.inv_scale, &penalized,
                          &counted, &stats, &threads))
        return NULL;
    rule.penalized = penalized;
    rule.counted = counted;
    Table t = {.end = ADDRESS(int64_t *, end), .key_f = ADDRESS(int64_t *, key_f),
               .key_r = ADDRESS(int64_t *, key_r), .rows = (size_t)rows};
    for (int c = 0; c < COLUMNS; c++) { /* column after column */
        t.at[c] = ADDRESS(uint64_t *, at) + (size_t)c * t.rows;
        t.kind[c] = ADDRESS(int64_t *, kind) + (size_t)c * t.rows;
    }
    Py_BEGIN_ALLOW_THREADS
    result = combine_rows(&t, &rule, threads, ADDRESS(double *, stats));
    Py_END_ALLOW_THREADS
    return done(result);
}

static PyMethodDef methods[] = {
    {"lanes", py_lanes, METH_VARARGS, NULL},
    {"select", py_select, METH_VARARGS, NULL},
    {"radix", py_radix, METH_VARARGS, NULL},
    {"positions", py_positions, METH_VARARGS, NULL},
    {"histogram", py_histogram, METH_VARARGS, NULL},
    {"count_nonfinite", py_count_nonfinite, METH_VARARGS, NULL},
    {"restore", py_restore, METH_VARARGS, NULL},
    {"combine", py_combine, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void)
{
    PyObject *m = PyModule_Create(&module);
    choose(NULL);
#ifdef _OPENMP
    const char *threading = "OpenMP";
#else
    const char *threading = "none";
#endif
    if (m && PyModule_AddStringConstant(m, "threading", threading)) {
        Py_DECREF(m);
        return NULL;
    }
    return m;
}
