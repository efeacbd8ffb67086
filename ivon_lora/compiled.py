"""The compiled backend for CPU: one call of a compiled loop per task, however many tensors there are.

The loops contain the formulas of `noise` and `reference`, operation for operation (see `c_expressions`), so the bits
are those of the eager backend. Everything that changes from step to step is an argument: nothing is compiled twice.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ivon_lora.backends import Work
from ivon_lora.c_compiler import compile_function
from ivon_lora.eager import BlockedEager, reread_means
from ivon_lora.loops import CHUNK, SCALARS, Loop
from ivon_lora.noise import NoiseKey
from ivon_lora.reference import Hyper

_DTYPES = (torch.float32, torch.bfloat16)

#: chunks from which a second thread pays
CHUNKS_PER_THREAD = 128


def check_compiler() -> None:
    """Compile the first loop, or find it compiled.

    Raises:
        ValueError: there is no working C++ compiler.
    """
    _compiled(Loop("sample"))


@functools.cache
def _compiled(loop: Loop) -> Callable[..., int]:
    return compile_function(loop.source(), f"the {loop.task} loop")


class Compiled:
    """Compiled backend. What its loops do not take (fp64, fp16, strided parameters) goes the eager way, same bits."""

    name = "compile"
    ranks = False  # the pruner reads scores from the state
    resamples = False

    def __init__(self) -> None:
        self._eager = BlockedEager()
        self._nonfinite = 0

    def sample(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        reread_means(works)
        for half, _, mine in self._mine(works, lambda rest: self._eager.sample(rest, hyper, key)):
            _run(Loop("sample", half=half), mine, hyper, key, 1)

    def bank(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        for half, _, mine in self._mine(works, lambda rest: self._eager.bank(rest, hyper, key)):
            _run(Loop("bank", _curvature(hyper, key), half=half), mine, hyper, key, 1)

    def step(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey | None, n_samples: int) -> None:
        reread_means(works)
        for half, banked, mine in self._mine(works, lambda rest: self._eager.step(rest, hyper, key, n_samples)):
            loop = Loop("step", _curvature(hyper, key), hyper.step_rule, averaged=banked, half=half)
            self._nonfinite += _run(loop, mine, hyper, key, n_samples)

    def begin_ranking(self, ranking: Any) -> None:
        raise RuntimeError("this backend does not rank: the pruner reads the scores from the state")

    def finish_ranking(self) -> None:
        raise RuntimeError("no ranking was begun")

    def nonfinite_elements(self) -> int:
        return self._nonfinite + self._eager.nonfinite_elements()

    def marks(self, works: Sequence[Work]) -> np.ndarray:
        return self._eager.marks(works)

    def _mine(
        self, works: Sequence[Work], otherwise: Callable[[list[Work]], None]
    ) -> list[tuple[bool, bool, list[Work]]]:
        """Works by kind of loop, (bf16, banked, works); those that no loop takes are done when this returns."""
        kinds: defaultdict[tuple[bool, bool], list[Work]] = defaultdict(list)
        rest: dict[bool, list[Work]] = {}
        for w in works:
            dtype = w.param.dtype
            same = w.grad is None or w.grad.dtype == dtype
            banked = w.banked_grad is not None
            if w.hess.dtype == torch.float32 and dtype in _DTYPES and same and w.param.is_contiguous():
                kinds[dtype == torch.bfloat16, banked].append(w)
            else:
                rest.setdefault(banked, []).append(w)
        for others in rest.values():
            otherwise(others)
        return [(half, banked, mine) for (half, banked), mine in kinds.items()]


def _curvature(hyper: Hyper, key: NoiseKey | None) -> str:
    return "none" if key is None else hyper.curvature


def _run(loop: Loop, works: Sequence[Work], hyper: Hyper, key: NoiseKey | None, n_samples: int) -> int:
    """Run a loop over all works, on torch's number of threads; returns the number of skipped elements."""
    function = _compiled(loop)
    table, n_chunks = _table(works)
    scalars = np.array([*(getattr(hyper, name) for name in SCALARS[:-1]), n_samples], np.float32)
    words = np.array([0, 0, 0, 0] if key is None else [key.c1, key.step, *key.philox_key], np.uint32)

    def part(first: int, last: int) -> int:
        return function(table.ctypes.data, len(works), first, last, scalars.ctypes.data, words.ctypes.data)

    n_threads = min(torch.get_num_threads(), n_chunks // CHUNKS_PER_THREAD)
    if n_threads < 2:
        return part(0, n_chunks)
    bounds = [n_chunks * i // n_threads for i in range(n_threads + 1)]
    with ThreadPoolExecutor(n_threads) as pool:
        return sum(pool.map(part, bounds[:-1], bounds[1:]))


def _table(works: Sequence[Work]) -> tuple[np.ndarray, int]:
    """Addresses and sizes of the works, one row each with the columns of `loops`, and the number of chunks."""
    rows, n_chunks = [], 0
    for w in works:
        numel = w.hess.numel()
        ranks = inner = 1
        if w.rank_mask is not None:
            ranks, inner = len(w.rank_mask), math.prod(w.param.shape[w.rank_dim + 1 :])
        rows.append(
            (
                w.param.data_ptr(),
                w.mean.data_ptr(),
                w.momentum.data_ptr(),
                w.hess.data_ptr(),
                0 if w.grad is None else w.grad.data_ptr(),
                0 if w.mean_state is None else w.mean_state.data_ptr(),
                0 if w.banked_grad is None else w.banked_grad.data_ptr(),
                0 if w.banked_curvature is None else w.banked_curvature.data_ptr(),
                0 if w.rank_mask is None else w.rank_mask.data_ptr(),
                0 if w.mean_copy is None else w.mean_copy.data_ptr(),
                numel,
                w.index,
                ranks,
                inner,
                w.offset,
                n_chunks,
            )
        )
        n_chunks += -(-(w.offset + numel) // CHUNK) - w.offset // CHUNK
    return np.array(rows, np.int64), n_chunks
