"""Compiled loops over LoRA's ranks: the sums behind their scores, and the zeros of pruned ones.

The importance of an element is the formula of `scores`, recorded operation for operation; it is added up in double
precision in whatever order is fast, which `scores.rounded_means` allows for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ivon_lora.backends.batch import Batch
from ivon_lora.c_compiler import compile_function
from ivon_lora.c_expressions import Value
from ivon_lora.functional.importance import importance
from ivon_lora.functional.ivon import root_precision
from ivon_lora.loop_frame import PRELUDE
from ivon_lora.vector_loops import vector_loop

#: elements whose importance is kept in the first-level cache
CHUNK = 1024

_SUMS = r"""
typedef double quad __attribute__((vector_size(32)));

static void importance(float *out, const float *mean, const float *hess, int n, vf ess, vf weight_decay) {
    @LOOP@
}

static inline quad four(const float *p) {
    float x __attribute__((vector_size(16)));
    memcpy(&x, p, sizeof(x));
    return __builtin_convertvector(x, quad);
}

static void add(double *sum, const float *x, int n) {
    quad a = {}, b = {};
    int i = 0;
    for (; i + 8 <= n; i += 8) a += four(x + i), b += four(x + i + 4);
    a += b;
    for (; i < n; ++i) a[0] += x[i];
    for (int k = 0; k < 4; ++k) *sum += a[k];
}

static void add_columns(double *sums, const float *x, int n) {
    for (int i = 0; i < n; i += 4) {
        quad sum;
        memcpy(&sum, sums + i, sizeof(sum));
        sum += four(x + i);
        memcpy(sums + i, &sum, sizeof(sum));
    }
}

// rows of the table: addresses of mean and Hessian, then how often all ranks follow each other, how many there are, and
// how many neighbours belong to one, and the address of the delta in place of the call's, or 0
extern "C" int64_t run(const int64_t *table, int64_t n_works, int64_t first, int64_t last, const float *scalars,
                       double *sums) {
    const vf ess = splat(scalars[0]), common_decay = splat(scalars[1]);
    alignas(64) float x[@CHUNK@];
    alignas(64) double columns[@CHUNK@];
    for (int64_t w = 0; w < last; ++w) {
        const float *mean = (const float *)table[w], *hess = (const float *)table[n_works + w];
        const int64_t outer = table[2 * n_works + w], ranks = table[3 * n_works + w], inner = table[4 * n_works + w];
        const float *const own_decay = (const float *)table[5 * n_works + w];
        const vf weight_decay = own_decay ? splat(*own_decay) : common_decay;
        if (w >= first && inner == 1 && LANES * ranks <= @CHUNK@) {
            // LANES rows are a whole number of vectors, the same ranks in the same lanes
            const int period = (int)(LANES * ranks), most = @CHUNK@ / period * period;
            const int64_t all = outer * ranks;
            for (int i = 0; i < period; ++i) columns[i] = 0;
            for (int64_t at = 0; at < all; at += most) {
                const int n = (int)(all - at < most ? all - at : most);
                importance(x, mean + at, hess + at, n, ess, weight_decay);
                for (int i = n; i % period; ++i) x[i] = 0;
                for (int i = 0; i < n; i += period) add_columns(columns, x + i, period);
            }
            for (int i = 0; i < period; ++i) sums[i % ranks] += columns[i];
        } else if (w >= first) {
            for (int64_t run = 0; run < outer * ranks; ++run)
                for (int64_t at = 0; at < inner; at += @CHUNK@) {
                    const int n = (int)(inner - at < @CHUNK@ ? inner - at : @CHUNK@);
                    importance(x, mean + run * inner + at, hess + run * inner + at, n, ess, weight_decay);
                    add(sums + run % ranks, x, n);
                }
        }
        sums += ranks;
    }
    return 0;
}
"""

_ZERO = r"""
// Ranks whose elements take turns: LANES rows are a whole number of vectors, and always the same ones
static void zero_columns(uint32_t *p, int64_t numel, const uint8_t *mask, int ranks) {
    alignas(64) uint32_t kept[@CHUNK@];
    const int period = (int)LANES * ranks;
    for (int i = 0; i < period; ++i) kept[i] = mask[i % ranks] ? ~0u : 0;
    int64_t at = 0;
    for (; at + period <= numel; at += period)
        for (int i = 0; i < period; ++i) p[at + i] &= kept[i];
    for (int i = 0; at + i < numel; ++i) p[at + i] &= kept[i];
}

// rows of the table: address, rank mask, elements, ranks, neighbours that belong to one
extern "C" int64_t run(const int64_t *table, int64_t n_works, int64_t first, int64_t last, int64_t element_size,
                       int64_t) {
    for (int64_t w = first; w < last; ++w) {
        const uint8_t *mask = (const uint8_t *)table[n_works + w];
        const int64_t numel = table[2 * n_works + w], ranks = table[3 * n_works + w], inner = table[4 * n_works + w];
        if (inner == 1 && element_size == 4 && LANES * ranks <= @CHUNK@) {
            if (memchr(mask, 0, ranks)) zero_columns((uint32_t *)table[w], numel, mask, (int)ranks);
            continue;
        }
        for (int64_t rank = 0; rank < ranks; ++rank) {
            if (mask[rank]) continue;
            char *p = (char *)table[w] + rank * inner * element_size;
            for (int64_t at = rank * inner; at < numel; at += ranks * inner, p += ranks * inner * element_size)
                memset(p, 0, inner * element_size);
        }
    }
    return 0;
}
"""


@functools.cache
def _sums_function(criterion: str) -> Callable[..., int]:
    listing: list[str] = []
    mean, hess, ess, weight_decay = (
        Value(listing, "float", name) for name in ("mean_i", "hess_i", "ess", "weight_decay")
    )
    numbers: Any = ess, weight_decay
    value = importance(criterion, mean, root_precision(hess, *numbers))
    lines = [f"const vf {name}_i = read({name} + @I@, @LEFT@);" for name in ("mean", "hess")]
    # four at once: polynomials wait for themselves
    loop = vector_loop([*lines, *listing, f"write(out + @I@, {value.name}, @LEFT@);"], copies=4)
    source = PRELUDE + _SUMS.replace("@LOOP@", loop).replace("@CHUNK@", str(CHUNK))
    return compile_function(source, f"the scores of ranks ({criterion})")


def rank_sums(batch: Batch, rank_dims: Sequence[int], criterion: str, ess: float, weight_decay: float) -> np.ndarray:
    """Sums of the importance of each rank's elements.

    Args:
        batch: contiguous, fp32 state, of whole tensors.
        rank_dims: the rank dimension of each.
        criterion: one that needs no gradient.
        weight_decay: delta of the works that have none of their own.

    Returns:
        float64, the ranks of all works one after the other.
    """
    outer, ranks, inner = _sizes(batch, list(rank_dims))
    columns = [batch.row("mean"), batch.row("hess"), outer, ranks, inner, batch.row("own_decay")]
    table = np.array(columns, np.int64)
    scalars, sums = np.array([ess, weight_decay], np.float32), np.zeros(ranks.sum())
    _sums_function(criterion)(table.ctypes.data, len(batch), 0, len(batch), scalars.ctypes.data, sums.ctypes.data)
    return sums


def _sizes(batch: Batch, rank_dims: list[int]) -> np.ndarray:
    """How often all ranks follow each other, how many there are, and how many neighbours belong to one: (3, n)."""
    known = batch.cache.get("rank sizes")
    if known is None or known[0] != rank_dims:
        shapes = [(w.param.shape, dim) for w, dim in zip(batch, rank_dims, strict=True)]
        sizes = [(math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])) for shape, dim in shapes]
        known = batch.cache["rank sizes"] = rank_dims, np.array(sizes, np.int64).reshape(-1, 3).T
    found: np.ndarray = known[1]
    return found


@functools.cache
def _zero_function() -> Callable[..., int]:
    return compile_function(PRELUDE + _ZERO.replace("@CHUNK@", str(CHUNK)), "the zeros of pruned ranks")


def zero_ranks(batch: Batch) -> None:
    """Set mean and momentum of the ranks that the works' masks prune to zero; all are contiguous, and of one dtype."""
    if not len(batch):
        return
    first = batch[0]
    for role, tensor in (("param", first.param), ("mean", first.mean), ("momentum", first.momentum)):
        if role != "mean" or not np.array_equal(batch.row("mean"), batch.row("param")):
            rows = [batch.row(name) for name in (role, "rank_mask", "numel", "ranks", "inner")]
            table = np.array(rows, np.int64)
            _zero_function()(table.ctypes.data, len(batch), 0, len(batch), tensor.element_size(), 0)
