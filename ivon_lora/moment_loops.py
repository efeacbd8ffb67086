"""A compiled loop over whole tensors: the sums behind their priors, see `prior`.

A moment is the formula of `prior`, recorded operation for operation; moments are added up in double precision in
whatever order is fast, which `scores.rounded_means` allows for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ivon_lora.backends import Work
from ivon_lora.backends.batch import Batch
from ivon_lora.c_compiler import compile_function
from ivon_lora.c_expressions import Value
from ivon_lora.loop_frame import PRELUDE
from ivon_lora.prior import second_moment
from ivon_lora.vector_loops import vector_loop

#: elements of masked tensors whose Hessian is copied at once, into the first-level cache
CHUNK = 1024

_SUMS = r"""
// four at a time: compilers keep no vector of doubles in registers that is as long as one of LANES floats
typedef double quad __attribute__((vector_size(32)));
enum { QUADS = LANES / 4 };

static inline void add(quad *total, vf x) {
    for (int k = 0; k < QUADS; ++k) {
        float four __attribute__((vector_size(16)));
        memcpy(&four, (const char *)&x + k * sizeof(four), sizeof(four));
        total[k] += __builtin_convertvector(four, quad);
    }
}

static double moments(const float *mean, const float *hess, int64_t n, vf ess, vf weight_decay) {
    quad total[QUADS] = {};
    @LOOP@
    double sum = 0;
    for (int k = 0; k < QUADS; ++k) sum += (total[k][0] + total[k][1]) + (total[k][2] + total[k][3]);
    return sum;
}

// the Hessian, 0 where the rank is pruned
static void alive(float *out, const float *hess, int64_t start, int64_t n, const uint8_t *mask, int64_t ranks,
                  int64_t inner) {
    int64_t rank = start / inner % ranks, left = inner - start % inner;
    for (int64_t i = 0; i < n;) {
        const int64_t run = left < n - i ? left : n - i;
        if (mask[rank]) memcpy(out + i, hess + i, 4 * run);
        else memset(out + i, 0, 4 * run);
        i += run;
        left = inner;
        rank = rank + 1 == ranks ? 0 : rank + 1;
    }
}

// rows of the table: addresses of mean, Hessian and delta, elements, then the address of the rank mask (or 0), how many
// ranks it has, and how many neighbours belong to one
extern "C" int64_t run(const int64_t *table, int64_t n_works, int64_t first, int64_t last, const float *scalars,
                       double *sums) {
    const vf ess = splat(scalars[0]);
    alignas(64) float h[@CHUNK@];
    for (int64_t w = first; w < last; ++w) {
        const float *mean = (const float *)table[w], *hess = (const float *)table[n_works + w];
        const vf weight_decay = splat(*(const float *)table[2 * n_works + w]);
        const int64_t numel = table[3 * n_works + w], ranks = table[5 * n_works + w], inner = table[6 * n_works + w];
        const uint8_t *mask = (const uint8_t *)table[4 * n_works + w];
        if (!mask) sums[w] = moments(mean, hess, numel, ess, weight_decay);
        else for (int64_t at = 0; at < numel; at += @CHUNK@) {
            const int64_t n = numel - at < @CHUNK@ ? numel - at : @CHUNK@;
            alive(h, hess + at, at, n, mask, ranks, inner);
            sums[w] += moments(mean + at, h, n, ess, weight_decay);
        }
    }
    return 0;
}
"""


@functools.cache
def _function() -> Callable[..., int]:
    listing: list[str] = []
    mean, hess = (Value(listing, "float", name) for name in ("mean_i", "hess_i"))
    numbers: Any = [Value(listing, "float", name) for name in ("ess", "weight_decay")]
    moment = second_moment(mean, hess, *numbers)
    loads = [f"const vf {name}_i = read({name} + @I@, @LEFT@);" for name in ("mean", "hess")]
    total = f"add(total, (vf)((vi){moment.name} & inside));"
    loop = vector_loop([*loads, *listing, total])
    return compile_function(
        PRELUDE + _SUMS.replace("@LOOP@", loop).replace("@CHUNK@", str(CHUNK)), "the sums of moments"
    )


def moment_sums(works: Sequence[Work], ess: float) -> np.ndarray:
    """Sums of the second moments of whole tensors that have deltas of their own, after an update.

    Args:
        works: fp32 state, contiguous; as a batch, with the addresses as they are.

    Returns:
        float64 (n,).
    """
    batch = Batch.of(works)
    state = batch.row("mean_state")
    means = np.where(state != 0, state, batch.row("param"))
    rows = [means, *(batch.row(name) for name in ("hess", "own_decay", "numel", "rank_mask", "ranks", "inner"))]
    table, n = np.stack(rows), len(batch)
    scalars, sums = np.array([ess], np.float32), np.zeros(n)
    _function()(table.ctypes.data, n, 0, n, scalars.ctypes.data, sums.ctypes.data)
    return sums
