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

/* Steps 2 to 5 of method.md over one block, n a multiple of LANES, n <= BLOCK; sets sums, of which
   only those of G where they are not `counted`. The order of operations is that of reference.py. A
   sum is kept in LANES floats for one block, then goes on in double. Masks are multiplied, not used
   to choose: see reference.py. */
TARGET static inline __attribute__((always_inline)) void NAME(combined)(
    const Block *b, const Rule *rule, size_t n, double *sums, const int counted)
{
    const I none = {0};
    const F zero = {0};
    const I magnitude = none + MAGNITUDE, infinite = none + INFINITE, one = none + 0x3f800000;
    const I nan = none + 0x7fc00000;
    const I key_f = none + (int32_t)b->key_f, key_r = none + (int32_t)b->key_r;
    const F inv = zero + rule->inv_scale, on_f = zero + rule->on_f, on_r = zero + rule->on_r;
    const F on_m = zero + rule->on_m, on_only_r = zero + rule->on_only_r;
    const F minus_blend = zero - rule->blend, blend = zero + rule->blend;
    const F partial = zero + rule->partial, full = zero + rule->full;
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
        I f_is = (I)((bits_f & magnitude) >= key_f), r_is = (I)((bits_r & magnitude) >= key_r);
        I both_is = f_is & r_is;
        F m_f = (F)(f_is & one), both = (F)(both_is & one), only_r = (F)(~f_is & r_is & one);
        if (counted) {
            count_f -= f_is;
            count_r -= r_is;
            count_both -= both_is;
            opposed -= both_is & (I)((bits_f ^ bits_r) < none);
        }

        F g_f = (F)bits_f * inv, g_r = (F)bits_r * inv;
        F g = on_f * g_f + on_r * g_r;
        g += on_m * m_f * g_f;
        g += on_only_r * only_r * g_r;
        g += minus_blend * both * g_f; /* in this order alpha = 0 leaves exactly g_r of a blend */
        g += blend * both * g_r;

        F theta = zero;
        if (theta_at)
            theta = LOAD_F(theta_at + i);
        if (anchor) {
            F moved = theta - LOAD_F(anchor + i);
            if (counted) {
                I square = (I)(moved * moved);
                moved_f += (F)(square & f_is & ~r_is);
                moved_r += (F)(square & r_is & ~f_is);
                moved_both += (F)(square & both_is);
                moved_rest += (F)(square & ~(f_is | r_is));
            }
            if (penalized)
                g += (partial * only_r + full) * (moved * LOAD_F(fisher + i));
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
        bad -= (I)(((I)g & magnitude) >= infinite);
        if (held) {
            I kept = f_is | r_is;
            STORE_F(held + i, (F)(((I)theta & ~kept) | (nan & kept)));
        }
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

#undef F
#undef I
#undef LOAD_F
#undef LOAD_I
#undef STORE_F
#undef LANES
#undef TARGET
#undef NAME
