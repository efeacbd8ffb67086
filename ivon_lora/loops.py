"""The loops of the compiled backend as C++ source: the bodies come from the formulas, only the frame is text.

A loop runs over chunks of the parameters of a table of pointers, so hundreds of small tensors are one call and nothing
is packed or copied. The normals of a chunk live in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ivon_lora.arrays import to_int32, where
from ivon_lora.batch import ROWS
from ivon_lora.c_expressions import Value
from ivon_lora.noise import box_muller, philox_4x32
from ivon_lora.reference import Hyper, draw_sample, estimate_curvature, ivon_step

#: elements per chunk, a multiple of 4
CHUNK = 1024

#: fp32 numbers of a call, in this order: those of `Hyper`, and the number of samples
SCALARS = (
    "ess",
    "weight_decay",
    "lr",
    "beta1",
    "beta1_complement",
    "rho",
    "clip_radius",
    "debias",
    "square_scale",
    "inverse_batch",
    "noise_ess",
    "n_samples",
)

#: 32-bit words of a call: the counter's words 1 and 3, and the key
WORDS = ("c1", "c3", "k0", "k1")


@dataclass(frozen=True)
class Loop:
    """What one compiled function does.

    Attributes:
        task: "sample", "bank" or "step".
        curvature: "price", "gradsq" or "fisher", or "none" for a step without a sample.
        step_rule: "newton" or "adam"; only a step depends on it.
        averaged: the step takes the mean with banked gradients and curvatures.
        half: parameters and gradients are bf16; else fp32.
    """

    task: str
    curvature: str = "price"
    step_rule: str = "newton"
    averaged: bool = False
    half: bool = False

    @property
    def has_noise(self) -> bool:
        """Whether the loop needs eps."""
        return self.task == "sample" or self.curvature == "price"

    def source(self) -> str:
        """C++ source that defines ``int64_t run(table, n_works, first, last, scalars, words)``.

        The table is that of `batch`, row by row. It does chunks ``first..last-1`` of all works and returns how many elements were skipped as not finite.
        """
        replace = {
            "CHUNK": str(CHUNK),
            "SCALARS": _lines(f"const float {name} = scalars[{i}];" for i, name in enumerate(SCALARS)),
            "WORDS": _lines(f"const uint32_t {name} = words[{i}];" for i, name in enumerate(WORDS)),
            "ROW": _lines(f"const int64_t {name} = table[{i} * n_works + w];" for i, name in enumerate(ROWS)),
            "PHILOX": _philox(),
            "BOX_MULLER": _box_muller(),
            "DRAW": "normals(drawn, (n + lead + 3) >> 2, here >> 2, c1, (uint32_t)index, c3, k0, k1);"
            if self.has_noise
            else "",
            "COPY": _COPY if self.task == "sample" else "",
            "MASKED": self._loop(masked=True),
            "PLAIN": self._loop(masked=False),
            "ELEMENT": "uint16_t" if self.half else "float",  # last: the loops contain it
        }
        text = _FRAME
        for word, value in replace.items():
            text = text.replace(f"@{word}@", value)
        return text

    def _loop(self, masked: bool) -> str:
        listing: list[str] = []
        loads, stores = getattr(self, f"_{self.task}")(listing, masked)
        return _lines([*loads, *listing, *stores])

    def _sample(self, listing: list[str], masked: bool) -> tuple[list[str], list[str]]:
        mean, hess, eps = (Value(listing, "float", name) for name in ("mean_i", "hess_i", "eps_i"))
        if masked:
            eps = where(_active(listing), eps, 0.0)
        theta = draw_sample(mean, hess, eps, *_scalars(listing, "noise_ess", "weight_decay"))
        return [_load("mean"), _load("hess"), "const float eps_i = eps[i];"], [_store("param", theta, "ELEMENT")]

    def _observed(self, listing: list[str]) -> tuple[list[str], Value, Value | None]:
        grad, hess, eps = (Value(listing, "float", name) for name in ("grad_i", "hess_i", "eps_i"))
        loads = [_load("hess"), _load("grad", "ELEMENT")]
        if self.curvature == "none":
            return loads, grad, None
        if self.curvature == "price":
            loads.append("const float eps_i = eps[i];")
        return loads, grad, estimate_curvature(grad, hess, eps, self._hyper(listing))

    def _hyper(self, listing: list[str]) -> Hyper:
        numbers = dict(zip(SCALARS[:-1], _scalars(listing, *SCALARS[:-1]), strict=True))
        return Hyper(**numbers, curvature=self.curvature, step_rule=self.step_rule)

    def _bank(self, listing: list[str], masked: bool) -> tuple[list[str], list[str]]:
        loads, grad, curvature = self._observed(listing)
        sums = [Value(listing, "float", f"banked_{name}_i") for name in ("grad", "curvature")]
        loads += [_load("banked_grad"), _load("banked_curvature")]
        assert curvature is not None
        return loads, [_store("banked_grad", sums[0] + grad), _store("banked_curvature", sums[1] + curvature)]

    def _step(self, listing: list[str], masked: bool) -> tuple[list[str], list[str]]:
        loads, grad, curvature = self._observed(listing)
        if self.averaged:
            (n_samples,) = _scalars(listing, "n_samples")
            loads += [_load("banked_grad"), _load("banked_curvature")]
            assert curvature is not None
            grad = (grad + Value(listing, "float", "banked_grad_i")) / n_samples
            curvature = (curvature + Value(listing, "float", "banked_curvature_i")) / n_samples
        mean, momentum, hess = (Value(listing, "float", f"{name}_i") for name in ("mean", "momentum", "hess"))
        active = _active(listing) if masked else None
        mean, momentum, hess, finite = ivon_step(mean, momentum, hess, grad, curvature, self._hyper(listing), active)
        stores = [_store("momentum", momentum), _store("hess", hess), _store("param", mean, "ELEMENT")]
        if self.half:
            stores.append(_store("mean_state", mean))
        return [*loads, _load("mean"), _load("momentum")], [*stores, f"skipped += !{finite.name};"]


def _philox() -> str:
    listing: list[str] = []
    c0 = Value(listing, "words", "c0")
    c1, c2, c3, k0, k1 = (Value(listing, "word", name) for name in ("c1", "c2", "c3", "k0", "k1"))
    key: Any = k0, k1  # annotated as integers, but any kind of number will do
    words = philox_4x32(c0, c1, c2, c3, *key)
    return _lines([*listing, *(f"store(w{i} + j, {x.name});" for i, x in enumerate(words))])


def _box_muller() -> str:
    listing: list[str] = []
    w = [to_int32(Value(listing, "word", f"w{i}[j]")) for i in range(4)]
    normals = *box_muller(w[0], w[1]), *box_muller(w[2], w[3])
    return _lines([*listing, *(f"eps[4 * j + {i}] = {x.name};" for i, x in enumerate(normals))])


def _active(listing: list[str]) -> Value:
    return Value(listing, "bool", "(active[i] != 0)")


def _scalars(listing: list[str], *names: str) -> list[Any]:
    return [Value(listing, "float", name) for name in names]


def _load(name: str, kind: str = "float") -> str:
    kind = "@ELEMENT@" if kind == "ELEMENT" else kind
    return f"const float {name}_i = read((const {kind} *){name} + start + i);"


def _store(name: str, value: Value, kind: str = "float") -> str:
    kind = "@ELEMENT@" if kind == "ELEMENT" else kind
    return f"write(({kind} *){name} + start + i, {value.name});"


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


# The chunk is in the cache afterwards.
_COPY = "if (mean_copy) __builtin_memcpy((float *)mean_copy + start, (const float *)mean + start, 4 * n);"

# Reading and writing through the same address in one round of a loop is allowed (the mean may be the parameter), so no
# pointer is `restrict`; the pragma says that no round depends on another.
_FRAME = r"""
#include <float.h>
#include <math.h>
#include <stdint.h>

#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety) interleave(disable)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

static inline float read(const float *p) { return *p; }
static inline void write(float *p, float x) { *p = x; }
// bf16: to the nearest, ties to even, as torch rounds
static inline float read(const uint16_t *p) { return __builtin_bit_cast(float, (uint32_t)*p << 16); }
static inline void write(uint16_t *p, float x) {
    const uint32_t u = __builtin_bit_cast(uint32_t, x);
    *p = x != x ? 0x7fc0 : (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline uint64_t multiply(uint32_t a, uint32_t b) { return (uint64_t)a * b; }
static inline uint32_t low(uint64_t x) { return (uint32_t)x; }
static inline uint32_t high(uint64_t x) { return (uint32_t)(x >> 32); }

#if defined(__AVX2__)
#include <immintrin.h>
enum { LANES = 8 };
struct words { __m256i v; };
struct wides { __m256i even, odd; };  // products of the even and of the odd lanes
static inline words broadcast(uint32_t a) { return {_mm256_set1_epi32((int32_t)a)}; }
static inline words count_from(uint32_t a) {
    return {_mm256_add_epi32(broadcast(a).v, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))};
}
static inline words operator^(words a, words b) { return {_mm256_xor_si256(a.v, b.v)}; }
static inline words operator^(words a, uint32_t b) { return a ^ broadcast(b); }
static inline words operator^(uint32_t a, words b) { return broadcast(a) ^ b; }
static inline wides multiply(words a, uint32_t b) {
    const __m256i factor = _mm256_set1_epi64x(b);
    return {_mm256_mul_epu32(a.v, factor), _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), factor)};
}
static inline words low(wides x) { return {_mm256_blend_epi32(x.even, _mm256_slli_epi64(x.odd, 32), 0xaa)}; }
static inline words high(wides x) { return {_mm256_blend_epi32(_mm256_srli_epi64(x.even, 32), x.odd, 0xaa)}; }
static inline void store(uint32_t *p, words a) { _mm256_store_si256((__m256i *)p, a.v); }
#else
enum { LANES = 1 };
typedef uint32_t words;
typedef uint64_t wides;
static inline words count_from(uint32_t a) { return a; }
static inline void store(uint32_t *p, words a) { *p = a; }
#endif

static void normals(float *eps, int n, int64_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    alignas(64) uint32_t w0[@CHUNK@ / 4], w1[@CHUNK@ / 4], w2[@CHUNK@ / 4], w3[@CHUNK@ / 4];
    c1 |= (uint32_t)((uint64_t)first >> 32);  // a chunk never crosses a multiple of 2^32 groups of four
    INDEPENDENT
    for (int j = 0; j < n; j += LANES) {
        const words c0 = count_from((uint32_t)first + (uint32_t)j);
@PHILOX@
    }
    INDEPENDENT
    for (int j = 0; j < n; ++j) {
@BOX_MULLER@
    }
}

static void elements_of_ranks(uint8_t *active, int64_t n, int64_t start, const uint8_t *mask, int64_t ranks,
                              int64_t inner) {
    int64_t rank = start / inner % ranks, left = inner - start % inner;
    for (int64_t i = 0; i < n; ++i) {
        active[i] = mask[rank];
        if (--left == 0) {
            left = inner;
            rank = rank + 1 == ranks ? 0 : rank + 1;
        }
    }
}

extern "C" int64_t run(const int64_t *table, int64_t n_works, int64_t first, int64_t last, const float *scalars,
                       const uint32_t *words) {
@SCALARS@
@WORDS@
    alignas(64) float drawn[@CHUNK@];
    uint8_t active[@CHUNK@];
    int64_t skipped_before = 0, chunks_before = 0;
    for (int64_t w = 0; w < n_works; ++w) {
@ROW@
        const int64_t from = first > chunks_before ? first - chunks_before : 0;
        const int64_t all = (offset + numel + @CHUNK@ - 1) / @CHUNK@ - offset / @CHUNK@;
        const int64_t to = last - chunks_before < all ? last - chunks_before : all;
        for (int64_t chunk = from; chunk < to; ++chunk) {
            // `here` counts from the first element of the whole parameter, `start` from that of this shard
            const int64_t edge = (offset / @CHUNK@ + chunk) * @CHUNK@;
            const int64_t here = edge > offset ? edge : offset, start = here - offset;
            const int64_t end = edge + @CHUNK@ < offset + numel ? edge + @CHUNK@ : offset + numel;
            const int n = (int)(end - here), lead = (int)(here & 3);
            const float *const eps = drawn + lead;
            int skipped = 0;
            @COPY@
            @DRAW@
            if (rank_mask) {
                elements_of_ranks(active, n, here, (const uint8_t *)rank_mask, ranks, inner);
                INDEPENDENT
                for (int i = 0; i < n; ++i) {
@MASKED@
                }
            } else {
                INDEPENDENT
                for (int i = 0; i < n; ++i) {
@PLAIN@
                }
            }
            skipped_before += skipped;
        }
        chunks_before += all;
    }
    return skipped_before;
}
"""

#: C++ source that defines ``int64_t run(table, n_works, first, last, marks, element_size)``: two numbers for the bytes of
#: each of the parameters ``first..last-1``. A sum notices what was written, a sum of sums what was exchanged.
MARKS = r"""
#include <stdint.h>
#include <string.h>

extern "C" int64_t run(const int64_t *table, int64_t n_works, int64_t first, int64_t last, uint64_t *marks,
                       int64_t element_size) {
    for (int64_t w = first; w < last; ++w) {
        const unsigned char *const p = (const unsigned char *)table[@PARAM@ * n_works + w];
        const int64_t n = table[@NUMEL@ * n_works + w] * element_size;
        uint64_t a[8] = {0}, b[8] = {0}, word[8];
        int64_t i = 0;
        for (; i + 64 <= n; i += 64) {
            memcpy(word, p + i, 64);
            for (int lane = 0; lane < 8; ++lane) b[lane] += a[lane] += word[lane];
        }
        uint64_t sum = 0, sums = 0;
        for (; i < n; ++i) sums += sum += p[i];
        for (int lane = 0; lane < 8; ++lane) {
            sum += a[lane];
            sums += b[lane] * (2 * lane + 1);
        }
        marks[2 * w] = sum;
        marks[2 * w + 1] = sums;
    }
    return 0;
}
""".replace("@PARAM@", str(ROWS.index("param"))).replace("@NUMEL@", str(ROWS.index("numel")))
