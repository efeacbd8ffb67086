"""The part of the compiled loops that is no formula: C++ text around what `loops` writes.

Vectors are those of GCC and Clang (``vector_size``), so that operators work on them; a few functions say what operators
cannot. Noise is drawn for a chunk of elements at a time, into the first-level cache.
"""

# The marks of what was just written, which is in the cache; see `loops.MARKS`.
SEAL = """
            if (marks) mark((const unsigned char *)((const @ELEMENT@ *)param + start), n * (int64_t)sizeof(@ELEMENT@),
                            (uint64_t *)marks + 2 * (chunks_before + chunk));
"""

# A tensor whose marks are no longer those of the sample is left out. They are looked at tensor by tensor: what is small
# is in the cache when it is updated.
CHECK = """
        if (marks && !is_sealed((const @ELEMENT@ *)param, numel, offset, (const uint64_t *)marks + 2 * chunks_before)) {
            ((uint8_t *)left_out)[w] = 1;
            chunks_before += all;
            elements_before += numel;
            continue;
        }
"""

# Two numbers for some bytes: a sum notices what was written, a sum of sums what was exchanged.
MARK = r"""
#include <stdint.h>
#include <string.h>

typedef uint64_t lanes __attribute__((vector_size(32)));

static inline void mark(const unsigned char *p, int64_t n, uint64_t *marks) {
    lanes a0 = {}, a1 = {}, b0 = {}, b1 = {}, word0, word1;
    uint64_t sum = 0, sums = 0;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        memcpy(&word0, p + i, 32);
        memcpy(&word1, p + i + 32, 32);
        b0 += a0 += word0;
        b1 += a1 += word1;
    }
    for (; i < n; ++i) sums += sum += p[i];
    for (int lane = 0; lane < 4; ++lane) {
        sum += a0[lane] + a1[lane];
        sums += b0[lane] * (2 * lane + 1) + b1[lane] * (2 * lane + 9);
    }
    marks[0] = sum;
    marks[1] = sums;
}

template <class T> static bool is_sealed(const T *p, int64_t numel, int64_t offset, const uint64_t *marks) {
    uint64_t found[2];
    for (int64_t start = 0, end; start < numel; start = end, marks += 2) {
        end = ((offset + start) / @CHUNK@ + 1) * @CHUNK@ - offset;
        end = end < numel ? end : numel;
        mark((const unsigned char *)(p + start), (end - start) * (int64_t)sizeof(T), found);
        if (found[0] != marks[0] || found[1] != marks[1]) return false;
    }
    return true;
}
"""

# Normals of this chunk: where they are from an earlier call, or drawn now, into that memory if there is any.
DRAW = r"""
            float *const kept = elements_before + start + n <= room ? (float *)noise + elements_before + start : 0;
            const float *eps = kept;
            if (!kept || !drawn_before) {
                float *const to = kept && n == @CHUNK@ && lead == 0 ? kept : drawn;
                const Ahead ahead(table, n_works, w, numel, start);
                normals(to, (n + lead + 3) >> 2, here >> 2, c1, (uint32_t)index, c3, k0, k1, @AHEAD@);
                eps = to + lead;
                if (kept && to == drawn) memcpy(kept, eps, 4 * n);
            }
            if (mirrored) {
                for (int i = 0; i < n; ++i) drawn[i] = -eps[i];
                eps = drawn;
            }
"""

PRELUDE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

static inline vf splat(float x) {
    vf y;
    for (int k = 0; k < LANES; ++k) y[k] = x;
    return y;
}
static inline vi splat(int x) {
    vi y;
    for (int k = 0; k < LANES; ++k) y[k] = x;
    return y;
}
static inline vi lane_numbers() {
    vi y;
    for (int k = 0; k < LANES; ++k) y[k] = k;
    return y;
}
static inline vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }
static inline vi is_finite(vf x) { return absolute(x) < INFINITY; }

// the first `left` lanes, if there are not LANES of them left
template <class V, class T> static inline V first_lanes(const T *p, int left) {
    V x = {};
    if (left >= LANES) memcpy(&x, p, sizeof(V));
    else memcpy(&x, p, left * sizeof(T));
    return x;
}
template <class V, class T> static inline void put_lanes(T *p, V x, int left) {
    if (left >= LANES) memcpy(p, &x, sizeof(V));
    else memcpy(p, &x, left * sizeof(T));
}
static inline vf read(const float *p, int left) { return first_lanes<vf>(p, left); }
static inline vi read(const int32_t *p, int left) { return first_lanes<vi>(p, left); }
static inline void write(float *p, vf x, int left) { put_lanes(p, x, left); }
// bf16: to the nearest, ties to even, as torch rounds
static inline vf read(const uint16_t *p, int left) {
    return (vf)(__builtin_convertvector(first_lanes<vh>(p, left), vu) << 16);
}
static inline void write(uint16_t *p, vf x, int left) {
    vu u = (vu)x;
    u = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    u = x != x ? (vu)splat(0x7fc0) : u;
    put_lanes(p, __builtin_convertvector(u, vh), left);
}

#if defined(__AVX2__)
static inline vf root(vf x) { return (vf)_mm256_sqrt_ps((__m256)x); }
#else
static inline vf root(vf x) {
    for (int k = 0; k < LANES; ++k) x[k] = sqrtf(x[k]);
    return x;
}
#endif
"""

# From counters to words to normals in the order of their elements.
NOISE = r"""
static inline uint64_t multiply(uint32_t a, uint32_t b) { return (uint64_t)a * b; }
static inline uint32_t low(uint64_t x) { return (uint32_t)x; }
static inline uint32_t high(uint64_t x) { return (uint32_t)(x >> 32); }

// Words lie in the low halves of 64 bits: what is above them never matters, so it is never cleared. Many at once, since
// each round of Philox waits for the one before: two words of each group fill @REGISTERS@ vectors.
#if defined(__AVX2__)
typedef uint64_t part __attribute__((vector_size(32)));
static inline part product(part a, uint32_t b) { return (part)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b)); }
#else
typedef uint64_t part;
static inline part product(part a, uint32_t b) { return multiply((uint32_t)a, b); }
#endif
enum { GROUPS = @REGISTERS@ * LANES / 2, PARTS = GROUPS * sizeof(uint64_t) / sizeof(part) };
struct words { part r[PARTS]; };
typedef words wides;
#define EACH for (int k = 0; k < PARTS; ++k)
static inline words operator^(words a, words b) {
    EACH a.r[k] ^= b.r[k];
    return a;
}
static inline words operator^(words a, uint32_t b) {
    EACH a.r[k] ^= b;
    return a;
}
static inline words operator^(uint32_t a, words b) { return b ^ a; }
static inline wides multiply(words a, uint32_t b) {
    EACH a.r[k] = product(a.r[k], b);
    return a;
}
static inline words low(wides x) { return x; }
static inline words high(wides x) {
    EACH x.r[k] >>= 32;
    return x;
}

// `both` takes two words of each group into the vector k, in turn; `interleave` stores what is made of it. Four groups
// lie in the order that `interleave` puts right.
#if defined(__AVX2__)
static inline words count_from(uint32_t a) {
    words x;
    EACH x.r[k] = part{0, 2, 1, 3} + ((uint64_t)a + 4 * k);
    return x;
}
static inline vi both(words a, words b, int k) {
    return (vi)_mm256_blend_epi32((__m256i)a.r[k], (__m256i)(b.r[k] << 32), 0xaa);
}
static inline void interleave(float *p, vf x, vf y) {
    _mm256_storeu_ps(p, _mm256_unpacklo_ps((__m256)x, (__m256)y));
    _mm256_storeu_ps(p + 8, _mm256_unpackhi_ps((__m256)x, (__m256)y));
}
#else
static inline words count_from(uint32_t a) {
    words x;
    EACH x.r[k] = (uint64_t)a + k;
    return x;
}
static inline vi both(words a, words b, int k) {
    vi x;
    for (int i = 0; i < LANES; ++i) x[i] = (int32_t)(i % 2 ? b : a).r[(k * LANES + i) / 2];
    return x;
}
static inline void interleave(float *p, vf x, vf y) {
    for (int k = 0; k < LANES; ++k) p[2 * k] = x[k], p[2 * k + 1] = y[k];
}
#endif
"""

# Noise is arithmetic, and the rest of a sample waits for memory: so memory fetches what the next chunk needs while the
# noise of this one is drawn. The processor looks less far ahead by itself, and not into the next tensor. GCC takes a
# function that only prefetches for one that does nothing, and drops its calls: hence always_inline.
AHEAD = r"""
// what a sample needs of the elements a chunk behind those from `start` on: of the same work, then of the next one
struct Ahead {
    enum { STREAMS = 3 };
    const float *here[STREAMS], *next[STREAMS];
    int64_t from, numel;

    Ahead(const int64_t *table, int64_t n_works, int64_t w, int64_t numel, int64_t start) : numel(numel) {
        static const int rows[STREAMS] = {@MEAN_ROW@, @HESS_ROW@, @MEAN_COPY_ROW@};
        from = start + (numel < @CHUNK@ ? numel : @CHUNK@);
        for (int k = 0; k < STREAMS; ++k) {
            const int64_t *place = table + rows[k] * n_works + w;
            if (!*place) place = table + rows[0] * n_works + w;  // there is no copy
            here[k] = (const float *)place[0];
            next[k] = (const float *)place[w + 1 < n_works];
        }
    }
    __attribute__((always_inline)) void fetch(int64_t i, int64_t n) const {
        for (int k = 0; k < STREAMS; ++k) {
            const float *const p = from + i < numel ? here[k] + from + i : next[k] + (from + i - numel);
            for (int64_t line = 0; line < n; line += 16) __builtin_prefetch(p + line);
        }
    }
};
"""

FRAME = (
    PRELUDE
    + MARK
    + NOISE
    + AHEAD
    + r"""
static void normals(float *eps, int n, int64_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1,
                    const Ahead *ahead) {
    c1 |= (uint32_t)((uint64_t)first >> 32);  // a chunk never crosses a multiple of 2^32 groups of four
    for (int j = 0; j < n; j += GROUPS) {
        if (ahead) ahead->fetch(4 * j, 4 * GROUPS);
        const words c0 = count_from((uint32_t)first + (uint32_t)j);
@PHILOX@
@BOX_MULLER@
    }
}

static void elements_of_ranks(int32_t *active, int64_t n, int64_t start, const uint8_t *mask, int64_t ranks,
                              int64_t inner) {
    const int64_t period = ranks * inner, first = period < n ? period : n;
    int64_t rank = start / inner % ranks, end = inner - start % inner;
    for (int64_t i = 0; i < first; end += inner) {  // rank by rank
        const int32_t value = mask[rank];
        for (; i < end && i < first; ++i) active[i] = value;
        rank = rank + 1 == ranks ? 0 : rank + 1;
    }
    for (int64_t i = period; i < n; i += period) memcpy(active + i, active, 4 * (i + period < n ? period : n - i));
}

extern "C" int64_t run(const int64_t *table, int64_t n_works, int64_t first, int64_t last, const double *scalars,
                       const int64_t *words) {
@SCALARS@
@WORDS@
    alignas(64) float drawn[@CHUNK@];
    alignas(64) int32_t active[@CHUNK@];
    int64_t skipped_before = 0, chunks_before = 0, elements_before = 0;
    for (int64_t w = 0; w < n_works; ++w) {
@ROW@
        const vf weight_decay = own_decay ? splat(*(const float *)own_decay) : common_decay;
        const int64_t from = first > chunks_before ? first - chunks_before : 0;
        const int64_t all = (offset + numel + @CHUNK@ - 1) / @CHUNK@ - offset / @CHUNK@;
        const int64_t to = last - chunks_before < all ? last - chunks_before : all;
        @CHECK@
        for (int64_t chunk = from; chunk < to; ++chunk) {
            // `here` counts from the first element of the whole parameter, `start` from that of this shard
            const int64_t edge = (offset / @CHUNK@ + chunk) * @CHUNK@;
            const int64_t here = edge > offset ? edge : offset, start = here - offset;
            const int64_t end = edge + @CHUNK@ < offset + numel ? edge + @CHUNK@ : offset + numel;
            const int n = (int)(end - here), lead = (int)(here & 3);
            vi skipped = splat(0);
            @DRAW@
            if (rank_mask) {
                elements_of_ranks(active, n, here, (const uint8_t *)rank_mask, ranks, inner);
                @MASKED@
            } else {
                @PLAIN@
            }
            @SEAL@
            for (int k = 0; k < LANES; ++k) skipped_before += skipped[k];
        }
        chunks_before += all;
        elements_before += numel;
    }
    return skipped_before;
}
"""
)
