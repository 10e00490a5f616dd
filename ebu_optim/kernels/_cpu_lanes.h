/* The inner loops, compiled once for every instruction set: _cpu.c includes this file with
   LANES (floats in a vector), TARGET (function attribute), NAME(x) (suffix) and SCAN_AVX2 or
   SCAN_AVX512 set. GCC's and Clang's vector types make a sum's order part of the source: no
   optimiser flag that reorders floating point is needed, or allowed. */

typedef float NAME(F) __attribute__((vector_size(4 * LANES)));
typedef int32_t NAME(I) __attribute__((vector_size(4 * LANES)));
/* the same in memory: any alignment, any declared type */
typedef float NAME(FM) __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int32_t NAME(IM) __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
#define F NAME(F)
#define I NAME(I)
#define LOAD_F(p) ((F) * (const NAME(FM) *)(p))
#define LOAD_I(p) ((I) * (const NAME(IM) *)(p))
#define STORE_F(p, v) (*(NAME(FM) *)(p) = (NAME(FM))(v))

/* n elements of `from` as the bits of float32: exact, denormals and NaN included, and by integer
   steps alone, which flush-to-zero does not touch. */
TARGET static void NAME(widen)(uint32_t *restrict to, const char *from, int kind, size_t n)
{
    if (kind == FLOAT32) {
        memcpy(to, from, 4 * n);
    } else if (kind == BFLOAT16) {
        const half *h = (const half *)from;
        for (size_t i = 0; i < n; i++)
            to[i] = (uint32_t)h[i] << 16;
    } else {
        const half *h = (const half *)from;
        for (size_t i = 0; i < n; i++) {
            uint32_t a = h[i] & 0x7fffu, sign = (uint32_t)(h[i] & 0x8000u) << 16;
            uint32_t normal = (a << 13) + 0x38000000u + pick(a >= 0x7c00u, 0x38000000u, 0);
            uint32_t tiny = bits((float)(int32_t)a * 0x1p-24f); /* a < 1024: exact, no denormal */
            to[i] = sign | pick(a < 0x400u, tiny, normal);
        }
    }
}

/* n floats rounded to nearest even into 16 bits; how many of the results are not finite. */
TARGET static size_t NAME(narrow)(char *to, const float *restrict from, int kind, size_t n)
{
    half *h = (half *)to;
    uint32_t bad = 0;
    if (kind == BFLOAT16) {
        for (size_t i = 0; i < n; i++) {
            uint32_t u = bits(from[i]);
            uint32_t r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
            r = pick((u & MAGNITUDE) > INFINITE, (u >> 16) | 0x40u, r);
            h[i] = (uint16_t)r;
            bad += (r & 0x7f80u) == 0x7f80u;
        }
    } else {
        for (size_t i = 0; i < n; i++) {
            uint32_t u = bits(from[i]), a = u & MAGNITUDE;
            uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
            /* adding 0.5 rounds what is below 2^-14 to multiples of 2^-24 */
            uint32_t tiny = bits(value(a) + 0.5f) - 0x3f000000u;
            uint32_t r = pick(a < 0x38800000u, tiny, normal);
            r = pick(a >= 0x47800000u, 0x7c00u, r);
            r = pick(a > INFINITE, 0x7e00u, r);
            h[i] = (uint16_t)(r | ((u >> 16) & 0x8000u));
            bad += r >= 0x7c00u;
        }
    }
    return bad;
}

/* How many of n float32 patterns are NaN or Inf. */
TARGET static int64_t NAME(nonfinite)(const char *from, size_t n)
{
    const word *u = (const word *)from;
    uint32_t bad = 0; /* n is a block */
    for (size_t i = 0; i < n; i++)
        bad += (u[i] & MAGNITUDE) >= INFINITE;
    return bad;
}

/* One block of a pass: tallies its keys, and appends those in [s->from, s->to] to `kept` (which has
   room for n + SPARE). Returns how many were appended. Keys have 31 bits: signed comparisons
   order them. */
TARGET static size_t NAME(scan)(const char *at, size_t n, const Span *s, uint32_t *kept, Tally *tally)
{
    const word *u = (const word *)at;
    const int32_t from = s->from, to = s->to;
    size_t i = 0, m = 0;
    int64_t beyond = 0;
    int32_t largest = 0;
#if defined(SCAN_AVX512)
    const __m512i magnitude = _mm512_set1_epi32(MAGNITUDE), one = _mm512_set1_epi32(1);
    const __m512i froms = _mm512_set1_epi32(from), tos = _mm512_set1_epi32(to);
    __m512i count = _mm512_setzero_si512(), most = count;
    for (; i + 16 <= n; i += 16) {
        __m512i x = _mm512_and_si512(_mm512_loadu_si512((const void *)(u + i)), magnitude);
        __mmask16 gt = _mm512_cmpgt_epi32_mask(x, tos);
        __mmask16 in = _mm512_mask_cmpge_epi32_mask((__mmask16)~gt, x, froms);
        count = _mm512_mask_add_epi32(count, gt, count, one);
        most = _mm512_max_epi32(most, x);
        /* no branch to mispredict; compressed in a register, as some processors are slow at
           compressing into memory */
        _mm512_storeu_si512((void *)(kept + m), _mm512_maskz_compress_epi32(in, x));
        m += (size_t)__builtin_popcount(in);
    }
    beyond = _mm512_reduce_add_epi32(count);
    largest = _mm512_reduce_max_epi32(most);
#elif defined(SCAN_AVX2)
    const __m256i magnitude = _mm256_set1_epi32(MAGNITUDE);
    const __m256i froms = _mm256_set1_epi32(from), tos = _mm256_set1_epi32(to);
    __m256i count = _mm256_setzero_si256(), most = count;
    for (; i + 32 <= n; i += 32) {
        uint32_t out = 0;
        for (int j = 0; j < 4; j++) {
            __m256i x = _mm256_loadu_si256((const void *)(u + i + 8 * j));
            x = _mm256_and_si256(x, magnitude);
            most = _mm256_max_epi32(most, x);
            __m256i gt = _mm256_cmpgt_epi32(x, tos);
            count = _mm256_sub_epi32(count, gt);
            gt = _mm256_or_si256(gt, _mm256_cmpgt_epi32(froms, x));
            out |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(gt)) << (8 * j);
        }
        for (uint32_t in = ~out; in; in &= in - 1)
            kept[m++] = u[i + (size_t)__builtin_ctz(in)] & MAGNITUDE;
    }
    int32_t parts[16];
    _mm256_storeu_si256((void *)parts, count);
    _mm256_storeu_si256((void *)(parts + 8), most);
    for (int j = 0; j < 8; j++) {
        beyond += parts[j];
        largest = parts[8 + j] > largest ? parts[8 + j] : largest;
    }
#else
    for (; i + 32 <= n; i += 32) {
        int32_t gt = 0, in = 0, bad = 0;
        for (size_t j = i; j < i + 32; j++) {
            int32_t x = (int32_t)(u[j] & MAGNITUDE);
            gt += x > to;
            in += (x >= from) & (x <= to);
            bad += x >= INFINITE;
        }
        beyond += gt;
        largest = bad ? INFINITE : largest;
        for (size_t j = i; in && j < i + 32; j++) {
            int32_t x = (int32_t)(u[j] & MAGNITUDE);
            kept[m] = (uint32_t)x;
            m += (x >= from) & (x <= to);
        }
    }
#endif
    for (; i < n; i++) {
        int32_t x = (int32_t)(u[i] & MAGNITUDE);
        kept[m] = (uint32_t)x;
        m += (x >= from) & (x <= to);
        beyond += x > to;
        largest = x > largest ? x : largest;
    }
    tally->beyond += beyond;
    if (largest >= INFINITE) /* a maximum is cheaper than a count that is nearly always 0 */
        tally->nonfinite += NAME(nonfinite)(at, n);
    return m;
}

/* to = where the pattern of `from` is NaN ? to : from */
TARGET static void NAME(put_back)(char *to, const char *from, int kind, size_t n)
{
    if (kind == FLOAT32) {
        word *p = (word *)to;
        const word *h = (const word *)from;
        for (size_t i = 0; i < n; i++)
            p[i] = (h[i] & MAGNITUDE) > INFINITE ? p[i] : h[i];
    } else {
        half *p = (half *)to;
        const half *h = (const half *)from;
        const uint16_t infinite = kind == FLOAT16 ? 0x7c00 : 0x7f80;
        for (size_t i = 0; i < n; i++)
            p[i] = (h[i] & 0x7fff) > infinite ? p[i] : h[i];
    }
}

TARGET static double NAME(sum)(const float *x, size_t n)
{
    F lanes = {0};
    double sum = 0;
    for (size_t i = 0; i < n; i += LANES) /* n is a multiple of LANES */
        lanes += LOAD_F(x + i);
    for (int j = 0; j < LANES; j++)
        sum += lanes[j];
    return sum;
}

/* A choice for each element, in a register of its own where the processor has such: MAGNITUDES_FROM
   compares the magnitudes of x, the others are C's operators on MASKs. PICK takes a where it is set
   and b elsewhere, ADD_WHERE and COUNT add x or 1 where it is set. */
#if defined(SCAN_AVX512)
#define MASK __mmask16
#define MAGNITUDES_FROM(x, key) \
    _mm512_cmpge_epi32_mask((__m512i)((x) & magnitude), (__m512i)(key))
#define SIGNS(x) _mm512_movepi32_mask((__m512i)(x))
#define PICK(m, a, b) (F) _mm512_mask_mov_ps((__m512)(b), m, (__m512)(a))
#define ADD_WHERE(to, m, x) to = (F)_mm512_mask_add_ps((__m512)(to), m, (__m512)(to), (__m512)(x))
#define COUNT(to, m) \
    to = (I)_mm512_mask_sub_epi32((__m512i)(to), m, (__m512i)(to), (__m512i)(none - 1))
#else
#define MASK I
#define MAGNITUDES_FROM(x, key) (I)(((x) & magnitude) >= (key))
#define SIGNS(x) (I)((x) < none)
#define PICK(m, a, b) (F)(((I)(a) & (m)) | ((I)(b) & ~(m)))
#define ADD_WHERE(to, m, x) to += (F)((I)(x) & (m))
#define COUNT(to, m) to -= (m)
#endif

/* Steps 2 to 5 of method.md over one block, n a multiple of LANES, n <= BLOCK; sets sums, of which
   only those of G where they are not `counted`. The order of operations is that of reference.py. A
   sum is kept in LANES floats for one block, then goes on in double. A mask is multiplied, not used
   to choose a term, see reference.py: its product with a weight is one of two numbers, and of these
   it chooses. */
TARGET static inline __attribute__((always_inline)) void NAME(combined)(
    const Block *b, const Rule *rule, size_t n, double *sums, const int counted)
{
    const I none = {0};
    const F zero = {0};
    const I magnitude = none + MAGNITUDE, infinite = none + INFINITE;
    const F nan = (F)(none + 0x7fc00000);
    const I key_f = none + (int32_t)b->key_f, key_r = none + (int32_t)b->key_r;
    const F inv = zero + rule->inv_scale, on_f = zero + rule->on_f, on_r = zero + rule->on_r;
    const F on_m = zero + rule->on_m, on_only_r = zero + rule->on_only_r;
    const F minus_blend = zero - rule->blend, blend = zero + rule->blend;
    const F off_m = on_m * 0.0f, off_only_r = on_only_r * 0.0f;
    const F minus_off = minus_blend * 0.0f, off = blend * 0.0f;
    const F full = zero * rule->partial + rule->full, pulled = zero + rule->partial + rule->full;
    const F online = zero + rule->online, offline = zero + (1.0f - rule->online);
    I count_f = none, count_r = none, count_both = none, opposed = none, bad = none;
    F dot = zero, ff = zero, rr = zero, gg = zero;
    F moved_f = zero, moved_r = zero, moved_both = zero, moved_rest = zero;

    const float *at_f = b->g_f, *at_r = b->g_r, *theta_at = b->theta, *anchor = b->anchor;
    const float *fisher = b->fisher;
    float *out = b->out, *held = b->held, *new_fisher = b->new_fisher;
    const int penalized = rule->penalized, early = rule->online < 0.5f;

    for (size_t i = 0; i < n; i += LANES) {
        I bits_f = LOAD_I(at_f + i), bits_r = LOAD_I(at_r + i);
        MASK is_f = MAGNITUDES_FROM(bits_f, key_f), is_r = MAGNITUDES_FROM(bits_r, key_r);
        MASK both = is_f & is_r, only_r = ~is_f & is_r, only_f = is_f & ~is_r;
        if (counted) {
            COUNT(count_f, is_f);
            COUNT(count_r, is_r);
            COUNT(count_both, both);
            COUNT(opposed, both & SIGNS(bits_f ^ bits_r));
        }

        F g_f = (F)bits_f * inv, g_r = (F)bits_r * inv;
        F g = on_f * g_f + on_r * g_r;
        g += PICK(is_f, on_m, off_m) * g_f;
        g += PICK(only_r, on_only_r, off_only_r) * g_r;
        /* in this order alpha = 0 leaves exactly g_r of a blend */
        g += PICK(both, minus_blend, minus_off) * g_f;
        g += PICK(both, blend, off) * g_r;

        F theta = zero;
        if (theta_at)
            theta = LOAD_F(theta_at + i);
        if (anchor) {
            F moved = theta - LOAD_F(anchor + i);
            if (counted) {
                F square = moved * moved;
                ADD_WHERE(moved_f, only_f, square);
                ADD_WHERE(moved_r, only_r, square);
                ADD_WHERE(moved_both, both, square);
                ADD_WHERE(moved_rest, (MASK) ~(is_f | is_r), square);
            }
            if (penalized)
                g += PICK(only_r, pulled, full) * (moved * LOAD_F(fisher + i));
        }
        if (new_fisher) {
            F old = LOAD_F(fisher + i), square = g_r * g_r;
            F way = square - old;
            F now = early ? old + online * way : square - way * offline;
            STORE_F(new_fisher + i, now);
        }
        if (counted) {
            dot += g_f * g_r;
            ff += g_f * g_f;
            rr += g_r * g_r;
        }
        gg += g * g;
        COUNT(bad, MAGNITUDES_FROM((I)g, infinite));
        if (held)
            STORE_F(held + i, PICK(is_f | is_r, nan, theta));
        STORE_F(out + i, g);
    }
    for (int j = 0; j < LANES; j++) {
        sums[FORGET_SELECTED] += count_f[j];
        sums[REMEMBER_SELECTED] += count_r[j];
        sums[OVERLAP] += count_both[j];
        sums[OVERLAP_OPPOSED] += opposed[j];
        sums[DOT] += dot[j];
        sums[FORGET_SQ] += ff[j];
        sums[REMEMBER_SQ] += rr[j];
        sums[UPDATE_SQ] += gg[j];
        sums[MOVED_FORGET_ONLY_SQ] += moved_f[j];
        sums[MOVED_REMEMBER_ONLY_SQ] += moved_r[j];
        sums[MOVED_OVERLAP_SQ] += moved_both[j];
        sums[MOVED_UNRELATED_SQ] += moved_rest[j];
        sums[UPDATE_NONFINITE] += bad[j];
    }
}

TARGET static void NAME(combine)(const Block *b, const Rule *rule, size_t n, double *sums)
{
    if (rule->counted)
        NAME(combined)(b, rule, n, sums, 1);
    else
        NAME(combined)(b, rule, n, sums, 0);
}

static const Lanes NAME(lanes) = {
    NAME(widen), NAME(narrow), NAME(scan), NAME(nonfinite), NAME(put_back), NAME(sum), NAME(combine),
};

#undef MASK
#undef MAGNITUDES_FROM
#undef SIGNS
#undef PICK
#undef ADD_WHERE
#undef COUNT
#undef F
#undef I
#undef LOAD_F
#undef LOAD_I
#undef STORE_F
#undef LANES
#undef TARGET
#undef NAME
