"""Compiled loops over LoRA's ranks: the sums behind their scores, and the zeros of pruned ones.

The importance of an element is the formula of `scores`, recorded operation for operation; it is added up in double
precision in whatever order is fast, which `scores.rounded_means` allows for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ivon_lora.backends import Work
from ivon_lora.c_compiler import compile_function
from ivon_lora.c_expressions import Value
from ivon_lora.loop_frame import PRELUDE
from ivon_lora.loops import vector_loop
from ivon_lora.reference import root_precision
from ivon_lora.scores import importance

#: elements whose importance is kept in the first-level cache
CHUNK = 1024

_SUMS = r"""
typedef double vd __attribute__((vector_size(8 * LANES)));

static void importance(float *out, const float *mean, const float *hess, int n, vf ess, vf weight_decay) {
    @LOOP@
}

static void add(double *sum, const float *x, int n) {
    vd total = {};
    int i = 0;
    for (; i + LANES <= n; i += LANES) total += __builtin_convertvector(read(x + i, LANES), vd);
    for (; i < n; ++i) total[0] += x[i];
    for (int k = 0; k < LANES; ++k) *sum += total[k];
}

// rows of the table: addresses of mean and Hessian, then how often all ranks follow each other, how many there are, and
// how many neighbours belong to one, and the address of the delta in place of the call's, or 0
extern "C" int64_t run(const int64_t *table, int64_t n_works, int64_t first, int64_t last, const float *scalars,
                       double *sums) {
    const vf ess = splat(scalars[0]), common_decay = splat(scalars[1]);
    alignas(64) float x[@CHUNK@];
    for (int64_t w = 0; w < last; ++w) {
        const float *mean = (const float *)table[w], *hess = (const float *)table[n_works + w];
        const int64_t outer = table[2 * n_works + w], ranks = table[3 * n_works + w], inner = table[4 * n_works + w];
        const float *const own_decay = (const float *)table[5 * n_works + w];
        const vf weight_decay = own_decay ? splat(*own_decay) : common_decay;
        if (w >= first && inner == 1 && ranks <= @CHUNK@) {
            const int64_t rows = @CHUNK@ / ranks;
            for (int64_t row = 0; row < outer; row += rows) {
                const int64_t now = outer - row < rows ? outer - row : rows;
                importance(x, mean + row * ranks, hess + row * ranks, (int)(now * ranks), ess, weight_decay);
                for (int64_t i = 0; i < now; ++i)
                    for (int64_t k = 0; k < ranks; ++k) sums[k] += x[i * ranks + k];
            }
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
// rows of the table: address, rank mask, elements, ranks, neighbours that belong to one
extern "C" int64_t run(const int64_t *table, int64_t n_works, int64_t first, int64_t last, int64_t element_size,
                       int64_t) {
    for (int64_t w = first; w < last; ++w) {
        const uint8_t *mask = (const uint8_t *)table[n_works + w];
        const int64_t numel = table[2 * n_works + w], ranks = table[3 * n_works + w], inner = table[4 * n_works + w];
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
    loop = vector_loop([*lines, *listing, f"write(out + @I@, {value.name}, @LEFT@);"])
    source = PRELUDE + _SUMS.replace("@LOOP@", loop).replace("@CHUNK@", str(CHUNK))
    return compile_function(source, f"the scores of ranks ({criterion})")


def rank_sums(
    works: Sequence[Work], rank_dims: Sequence[int], criterion: str, ess: float, weight_decay: float
) -> list[np.ndarray]:
    """Sums of the importance of each rank's elements.

    Args:
        works: fp32 state, of whole tensors.
        rank_dims: the rank dimension of each.
        criterion: one that needs no gradient.
        weight_decay: delta of the works that have none of their own.

    Returns:
        float64 (r,) for each work.
    """
    shapes = [w.param.shape for w in works]
    ranks = [shape[dim] for shape, dim in zip(shapes, rank_dims, strict=True)]
    inner = [shape[dim + 1 :].numel() for shape, dim in zip(shapes, rank_dims, strict=True)]
    outer = [shape[:dim].numel() for shape, dim in zip(shapes, rank_dims, strict=True)]
    means, hessians = [w.mean.data_ptr() for w in works], [w.hess.data_ptr() for w in works]
    decays = [0 if w.own_decay is None else w.own_decay.data_ptr() for w in works]
    table = np.array([means, hessians, outer, ranks, inner, decays], np.int64)
    scalars, sums = np.array([ess, weight_decay], np.float32), np.zeros(sum(ranks))
    _sums_function(criterion)(table.ctypes.data, len(works), 0, len(works), scalars.ctypes.data, sums.ctypes.data)
    return np.split(sums, np.cumsum(ranks)[:-1])


@functools.cache
def _zero_function() -> Callable[..., int]:
    return compile_function(PRELUDE + _ZERO, "the zeros of pruned ranks")


def zero_ranks(works: Sequence[Work]) -> None:
    """Set mean and momentum of the ranks that the works' masks prune to zero; parameters are contiguous."""
    columns: dict[int, list[tuple[int, ...]]] = {}
    for w in works:
        assert w.rank_mask is not None
        inner = w.param.shape[w.rank_dim + 1 :].numel()
        for tensor in {t.data_ptr(): t for t in (w.param, w.mean, w.momentum)}.values():
            column = tensor.data_ptr(), w.rank_mask.data_ptr(), tensor.numel(), len(w.rank_mask), inner
            columns.setdefault(tensor.element_size(), []).append(column)
    for element_size, rows in columns.items():
        table = np.array(rows, np.int64).T.copy()
        _zero_function()(table.ctypes.data, len(rows), 0, len(rows), element_size, 0)
