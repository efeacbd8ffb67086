"""The compiled backend for CPU: one call of a compiled loop per task, however many tensors there are.

The loops contain the formulas of `noise` and `reference`, operation for operation (see `c_expressions`), so the bits
are those of the eager backend. Everything that changes from step to step is an argument: nothing is compiled twice.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from struct import Struct

import numpy as np
import torch

from ivon_lora.backends import ScoredFromState, Work
from ivon_lora.backends.batch import Batch
from ivon_lora.backends.eager import BlockedEager
from ivon_lora.blocks import reread_means
from ivon_lora.c_compiler import compile_function
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.layout import dtypes, equal
from ivon_lora.loops import CHUNK, MARKS, SCALARS, WORDS, Loop
from ivon_lora.moment_loops import moment_sums
from ivon_lora.quick_look import quicken
from ivon_lora.rank_loops import rank_sums, zero_ranks

_DTYPES = (torch.float32, torch.bfloat16)

#: chunks from which a second thread pays
CHUNKS_PER_THREAD = 128


def check_compiler() -> None:
    """Compile the first loop, or find it compiled.

    Raises:
        ValueError: there is no working C++ compiler.
    """
    _compiled("sample")


@functools.cache
def _compiled(
    task: str, curvature: str = "price", step_rule: str = "newton", averaged: bool = False, half: bool = False
) -> Callable[..., int]:
    """The function of a `Loop`."""
    return compile_function(Loop(task, curvature, step_rule, averaged, half).source(), f"the {task} loop")


class Compiled(ScoredFromState):
    """Compiled backend. What its loops do not take (fp64, fp16, strided parameters) goes the eager way, same bits."""

    name = "compile"
    reads_table = True
    checks_seals = True

    def __init__(self) -> None:
        quicken()
        self._eager = BlockedEager()
        self.store = self._eager.store
        self._nonfinite = 0

    def sample(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        for half, mine in self._mine(works, lambda rest: self._eager.sample(rest, hyper, key)):
            noise = None
            if hyper.needs_noise and isinstance(works, Batch):  # a step follows, and will want it
                noise = self.store.some(key, _facts(mine).address, _facts(mine).elements)
            mine.cache["marks"] = marks = _no_marks(mine)
            _run(_compiled("sample", half=half), mine, hyper, key, 1, noise, marks)

    def bank(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        for half, mine in self._mine(works, lambda rest: self._eager.bank(rest, hyper, key)):
            loop = _compiled("bank", _curvature(hyper, key), half=half)
            _run(loop, mine, hyper, key, 1, self._noise(mine, key))

    def step(
        self,
        works: Sequence[Work],
        hyper: Hyper,
        key: NoiseKey | None,
        n_samples: int,
        seal: np.ndarray | None = None,
        keep_written: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        if seal is not None and keep_written is not None:
            if self._step_sealed(works, hyper, key, n_samples, seal, keep_written):
                return
            if not equal(self.marks(works), seal):
                keep_written(range(len(works)))
        for half, mine in self._mine(works, lambda rest: self._eager.step(rest, hyper, key, n_samples)):
            self._nonfinite += _run(_step(mine, half, hyper, key), mine, hyper, key, n_samples, self._noise(mine, key))

    def _step_sealed(
        self,
        works: Sequence[Work],
        hyper: Hyper,
        key: NoiseKey | None,
        n_samples: int,
        seal: np.ndarray,
        keep_written: Callable[[Sequence[int]], None],
    ) -> bool:
        """Compare with the seal on the way: what was written is left out, and stepped at the end.

        Returns:
            False: it takes more than one loop, or thread; nothing is done.
        """
        batch = Batch.of(works)
        dtype = _facts(batch).dtype
        if dtype is None or not _gradients_fit(batch, dtype) or _n_threads(batch) > 1:
            return False
        loop, left_out = _step(batch, dtype == torch.bfloat16, hyper, key), np.zeros(len(batch), np.uint8)
        self._nonfinite += _run(loop, batch, hyper, key, n_samples, self._noise(batch, key), seal, left_out)
        if left_out.any():
            written = left_out.nonzero()[0].tolist()
            keep_written(written)
            batch.hand_out()
            self.step([batch[i] for i in written], hyper, key, n_samples)
        return True

    def _noise(self, batch: Batch, key: NoiseKey | None) -> tuple[np.ndarray, bool] | None:
        """What is kept of a draw."""
        kept = None if key is None else self.store.find(key, _facts(batch).address)
        return None if kept is None else (kept, True)

    def forget_noise(self) -> None:
        """See `Backend.forget_noise`."""
        self.store.clear()

    def marks(self, works: Sequence[Work]) -> np.ndarray:
        batch = Batch.of(works)
        if not _facts(batch).contiguous:
            return self._eager.marks(works)
        marks = _no_marks(batch)
        if len(marks):
            table, *_ = _Call.of(batch).addresses
            _marks()(table, len(batch), batch[0].param.element_size(), marks.ctypes.data, 0, 0)
        return marks

    def seal(self, works: Sequence[Work]) -> np.ndarray:
        marks: np.ndarray | None = works.cache.pop("marks", None) if isinstance(works, Batch) else None
        return self.marks(works) if marks is None else marks

    def rank_sums(
        self, works: Sequence[Work], rank_dims: Sequence[int], criterion: str, ess: float, weight_decay: float
    ) -> np.ndarray | None:
        batch = Batch.of(works)
        if len(batch) == 0 or not _facts(batch).contiguous or batch[0].hess.dtype != torch.float32:
            return None
        if _facts(batch).rereads:
            reread_means(works)
        return rank_sums(batch, rank_dims, criterion, ess, weight_decay)

    def moment_sums(self, works: Sequence[Work], ess: float) -> np.ndarray | None:
        batch = Batch.of(works)
        return None if _facts(batch).dtype is None else moment_sums(batch, ess)

    def zero_ranks(self, works: Sequence[Work]) -> bool:
        batch = Batch.of(works)
        if not _facts(batch).contiguous:
            return False
        zero_ranks(batch)
        return True

    def nonfinite_elements(self) -> int:
        return self._nonfinite + self._eager.nonfinite_elements()

    def _mine(self, works: Sequence[Work], otherwise: Callable[[list[Work]], None]) -> list[tuple[bool, Batch]]:
        """Works by kind of loop, (bf16, works); those that no loop takes are done when this returns."""
        if not works:
            return []
        batch = Batch.of(works)
        if _facts(batch).rereads:
            reread_means(works)
        dtype = _facts(batch).dtype
        if dtype is not None and _gradients_fit(batch, dtype):
            return [(dtype == torch.bfloat16, batch)]
        batch.hand_out()
        kinds: defaultdict[tuple[bool, bool], list[Work]] = defaultdict(list)
        rest: dict[bool, list[Work]] = {}
        for w in works:
            banked = w.banked_grad is not None
            if _takes(w) and (w.grad is None or w.grad.dtype == w.param.dtype):
                kinds[w.param.dtype == torch.bfloat16, banked].append(w)
            else:
                rest.setdefault(banked, []).append(w)
        for others in rest.values():
            otherwise(others)
        return [(half, Batch(mine)) for (half, _), mine in kinds.items()]


def _gradients_fit(batch: Batch, dtype: torch.dtype) -> bool:
    """Whether the gradients, if there are any, have the dtype of the parameters."""
    if batch.gradients:
        return batch.alike
    return batch[0].grad is None or dtypes(list(map(attrgetter("grad"), batch))) == {dtype}


@dataclass(frozen=True)
class _Facts:
    """What a batch keeps as long as its works do not change.

    Attributes:
        dtype: of all parameters, if the loops take all of them, else None.
        contiguous: all parameters are, and have one dtype.
        chunks, elements: how many there are.
        address: which elements of which parameters they are.
        rereads: some means must be read again, see `Work.reread`.
    """

    dtype: torch.dtype | None
    contiguous: bool
    chunks: int
    elements: int
    address: bytes
    rereads: bool


def _facts(batch: Batch) -> _Facts:
    facts = batch.cache.get("compile")
    if facts is None:
        kinds = {w.param.dtype for w in batch}
        offset, numel = batch.row("offset"), batch.row("numel")
        facts = batch.cache["compile"] = _Facts(
            dtype=next(iter(kinds)) if len(kinds) == 1 and all(map(_takes, batch)) else None,
            contiguous=len(kinds) < 2 and all(w.param.is_contiguous() for w in batch),
            chunks=int((-(-(offset + numel) // CHUNK) - offset // CHUNK).sum()),
            elements=int(numel.sum()),
            address=b"loops" + np.array([batch.row("index"), offset, numel]).tobytes(),
            rereads=any(w.reread for w in batch),
        )
    return facts


def _no_marks(batch: Batch) -> np.ndarray:
    """Memory for the marks of a batch."""
    return np.empty((_facts(batch).chunks, 2), np.uint64)


def _takes(w: Work) -> bool:
    return w.hess.dtype == torch.float32 and w.param.dtype in _DTYPES and w.param.is_contiguous()


@functools.cache
def _marks() -> Callable[..., int]:
    return compile_function(MARKS, "the check of sampled parameters")


def _step(batch: Batch, half: bool, hyper: Hyper, key: NoiseKey | None) -> Callable[..., int]:
    banked = batch[0].banked_grad is not None
    return _compiled("step", _curvature(hyper, key), hyper.step_rule, averaged=banked, half=half)


def _curvature(hyper: Hyper, key: NoiseKey | None) -> str:
    return "none" if key is None else hyper.curvature


class _Call:
    """Memory for the numbers of a call; a batch keeps it.

    Attributes:
        addresses: those of the batch's table, of the scalars, and of the words.
    """

    def __init__(self, batch: Batch) -> None:
        memory = np.zeros(_NUMBERS.size, np.uint8)
        self._memory, scalars = memory.data, memory.ctypes.data
        self.addresses = batch.table.ctypes.data, scalars, scalars + 8 * len(SCALARS)

    def write(self, *numbers: float) -> None:
        """The scalars, then the words."""
        _NUMBERS.pack_into(self._memory, 0, *numbers)

    @staticmethod
    def of(batch: Batch) -> _Call:
        call: _Call | None = batch.cache.get("call")
        if call is None:
            call = batch.cache["call"] = _Call(batch)
        return call


_NUMBERS = Struct(f"={len(SCALARS)}d{len(WORDS)}q")

_scalars = attrgetter(*SCALARS[:-1])


def _run(
    function: Callable[..., int],
    batch: Batch,
    hyper: Hyper,
    key: NoiseKey | None,
    n_samples: int,
    noise: tuple[np.ndarray, bool] | None = None,
    marks: np.ndarray | None = None,
    left_out: np.ndarray | None = None,
) -> int:
    """Run a loop over all works, on torch's number of threads; returns the number of skipped elements.

    Args:
        noise: memory for the normals of the first elements, and whether they are there; see `NoiseStore.some`.
        marks: memory for those of a sample; or those that the parameters should have, for a step on one thread.
        left_out: receives 1 for each work that a step leaves out.
    """
    n_works, n_chunks, call = len(batch), _facts(batch).chunks, _Call.of(batch)
    of_key = (0, 0, 0, 0, 0) if key is None else (key.c1, key.step, *key.philox_key, key.mirrored)
    of_noise = (0, 0, 0) if noise is None else (noise[0].ctypes.data, len(noise[0]), noise[1])
    call.write(*_scalars(hyper), n_samples, *of_key, *of_noise, _address(marks), _address(left_out))
    table, scalars, words = call.addresses

    def part(first: int, last: int) -> int:
        return function(table, n_works, first, last, scalars, words)

    n_threads = _n_threads(batch)
    if n_threads == 1:
        return part(0, n_chunks)
    bounds = [n_chunks * i // n_threads for i in range(n_threads + 1)]
    return sum(_threads(n_threads, os.getpid()).map(part, bounds[:-1], bounds[1:]))


def _address(memory: np.ndarray | None) -> int:
    return 0 if memory is None else memory.ctypes.data


def _n_threads(batch: Batch) -> int:
    return max(1, min(torch.get_num_threads(), _facts(batch).chunks // CHUNKS_PER_THREAD))


@functools.cache
def _threads(n: int, process: int) -> ThreadPoolExecutor:
    """Threads that wait for work; those of a parent process are not there in its fork."""
    return ThreadPoolExecutor(n, thread_name_prefix="ivon_lora")
