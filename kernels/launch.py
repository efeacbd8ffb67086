"""The backend that runs the kernels: one launch for all parameters of a dtype, whatever their groups.

It has the bits of the eager backend. What changes from step to step (addresses, learning rate, seed ...) travels in one
small table per launch, so no value leads to a recompilation and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ivon_lora.functional.noise import NoiseKey
from ivon_lora.kernels import runtime, tiles
from ivon_lora.kernels.ranks import RankSums, importance_kernel
from ivon_lora.kernels.runtime import Flags, LaunchConfig, supports
from ivon_lora.kernels.sample import sample_kernel
from ivon_lora.kernels.step import bank_kernel, step_kernel
from ivon_lora.kernels.table import DTYPES, lay_out, on_device, rows_of, tables

if TYPE_CHECKING:
    from ivon_lora.backends.batch import Batch
    from ivon_lora.backends.ranking import RankedTensor, Ranking

#: work lists that are kept: one for the tensors of a dtype, more where some of them have no gradient
_MOST_WORK_LISTS = 8
#: ranks of more elements than this overflow the exact sums
_MOST_ELEMENTS = 2**31 - 1


class TritonBackend:
    """Runs many parameters of one device in few launches; methods as of `backends.Backend`.

    Args:
        device: where the tensors are.
        config: how to launch; None for what suits the device.

    Raises:
        ValueError: the kernels cannot run there.
    """

    name = "triton"

    def __init__(self, device: torch.device, config: LaunchConfig | None = None) -> None:
        supported, reason = supports(device)
        if not supported:
            raise ValueError(f"backend 'triton' cannot run on {device}: {reason}")
        self.device = device
        self.config = config or LaunchConfig.of(device)
        self._nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        self._work_lists: dict[bytes, tuple[np.ndarray, Tensor]] = {}
        self._rank_sums: RankSums | None = None  # of rankings
        self._ranking: Ranking | None = None  # a step has added up scores for it
        self._added: set[int] = set()  # the parameters whose scores it has added

    def sample(self, batches: Sequence[Batch], key: NoiseKey) -> None:
        for dtype, alike in _by(_dtype, batches):
            rows = rows_of(alike)
            flags = Flags(self.config.tile, dtype, MASKED=_any(rows, tiles.RANK_MASK))
            self._launch(sample_kernel, flags, rows, alike, key)

    def bank(self, batches: Sequence[Batch], key: NoiseKey) -> None:
        for (_, grad_dtype, curvature, _), alike in _by(_step_kind, batches):
            flags = Flags(self.config.tile, GRAD_DTYPE=grad_dtype, CURVATURE=curvature)
            self._launch(bank_kernel, flags, rows_of(alike), alike, key)

    def step(
        self, batches: Sequence[Batch], key: NoiseKey | None, n_samples: int = 1, ranking: Ranking | None = None
    ) -> None:
        to = None if ranking is None else self._sums_of(ranking)
        sums = (self._nonfinite, 0) if to is None else (to.sums, to.sums.shape[1])
        for (dtype, grad_dtype, curvature, banked), alike in _by(_step_kind, batches):
            rows = rows_of(alike)
            if to is not None:
                _set_slots(rows, to.slots)
            flags = Flags(
                TILE=self.config.tile,
                DTYPE=dtype,
                GRAD_DTYPE=grad_dtype,
                CURVATURE=curvature,
                UPDATES_HESS=key is not None or curvature == "fisher",
                BANKED=banked,
                MASKED=_any(rows, tiles.RANK_MASK),
                SENSITIVITY=_any(rows, tiles.SENSITIVITY),
                CRITERION="" if ranking is None else ranking.criterion,
            )
            self._launch(step_kernel, flags, rows, alike, key, self._nonfinite, *sums, n_samples=n_samples)
            self._added.update(*(batch.indices for batch in alike))

    def rank_means(self, batches: Sequence[Batch], criterion: str) -> list[Tensor]:
        if not batches:
            return []
        rows = rows_of(batches)
        ranks = rows[:, tiles.RANKS.value].tolist()
        indices = rows[:, tiles.INDEX.value].tolist()
        sums = RankSums([(r, [index]) for r, index in zip(ranks, indices, strict=True)], self.device)
        self._add_importance(rows, batches, sums, criterion)
        means = torch.empty(sum(ranks), device=self.device).split(ranks)
        counts = np.maximum(rows[:, tiles.NUMEL.value] // ranks, 1).tolist()
        # count and scores; neither a mask to read nor a parameter to zero
        columns = [[[n, mean.data_ptr(), 0, 1, 0, 0, 0, 0]] for n, mean in zip(counts, means, strict=True)]
        sums.score(columns, budget=0, min_rank=0, frozen=False)
        return list(means)

    def rank(self, batches: Sequence[Batch], ranking: Ranking) -> bool:
        to = self._sums_of(ranking)
        rows = rows_of(batches)
        row_of = dict(zip(rows[:, tiles.INDEX.value].tolist(), rows.tolist(), strict=True))
        if missing := to.slots.keys() - row_of.keys():
            raise ValueError(f"parameters {sorted(missing)} of the ranking are in none of the batches")
        dtypes = {index: batch.param[0].dtype for batch in batches for index in batch.indices}
        if not to.slots.keys() <= self._added:
            rest = rows[~np.isin(rows[:, tiles.INDEX.value], list(self._added))]
            self._add_importance(rest, batches, to, ranking.criterion)
        columns = [
            [_columns(t, row_of[t.index], dtypes[t.index], ranking) for t in adapter] for adapter in ranking.adapters
        ]
        to.score(columns, ranking.budget or 0, ranking.min_rank, ranking.frozen)
        if ranking.budget is not None:
            losers = [t for adapter in ranking.adapters for t in adapter if ranking.hard or t.gate]
            to.select(max((row_of[t.index][tiles.NUMEL.value] for t in losers), default=0))
        self._ranking, self._added = None, set()
        return True

    def nonfinite_elements(self) -> Tensor:
        return self._nonfinite

    def _sums_of(self, ranking: Ranking) -> RankSums:
        """Where the scores of a ranking add up: zeros, or what the step before has added for it."""
        adapters = [(len(adapter[0].scores), [t.index for t in adapter]) for adapter in ranking.adapters]
        if self._rank_sums is None or self._rank_sums.adapters != adapters:
            self._rank_sums, self._ranking = RankSums(adapters, self.device), None
        if self._ranking is not ranking:
            if self._ranking is not None:  # whose `rank` never came
                self._rank_sums.sums.zero_()
            self._ranking, self._added = ranking, set()
        return self._rank_sums

    def _add_importance(self, rows: np.ndarray, batches: Sequence[Batch], to: RankSums, criterion: str) -> None:
        rows = rows[_set_slots(rows, to.slots)]
        flags = Flags(self.config.tile, CRITERION=criterion)
        self._launch(importance_kernel, flags, rows, batches, None, to.sums, to.sums.shape[1])

    def _launch(
        self, kernel: Any, flags: Flags, rows: np.ndarray, batches: Sequence[Batch], key: NoiseKey | None,
        *more: Tensor | int, n_samples: int = 1,
    ) -> None:  # fmt: skip
        """Launch a kernel on some rows, one program per tile, with its tables and what more it takes."""
        shapes = rows[:, tiles.OFFSET.value : tiles.INNER.value + 1].tobytes()
        if shapes not in self._work_lists:
            if len(self._work_lists) == _MOST_WORK_LISTS:
                self._work_lists.clear()
            columns, work_list = lay_out(rows, self.config.tile)
            self._work_lists[shapes] = columns, on_device(work_list, self.device)
        layout, items = self._work_lists[shapes]
        rows[:, tiles.KIND.value : tiles.SLOT.value] = layout
        table, hypers, words = tables(rows, [batch.hyper for batch in batches], key, n_samples, self.device)
        grid, num_warps = (items.shape[1],), self.config.num_warps
        runtime.run(kernel, grid, table, items, hypers, words, *more, FLAGS=flags, num_warps=num_warps)


def _by(kind: Callable[[Batch], Any], batches: Sequence[Batch]) -> Iterator[tuple[Any, list[Batch]]]:
    """Batches that can share a launch."""
    found: dict[Hashable, list[Batch]] = {}
    for batch in batches:
        if len(batch):
            found.setdefault(kind(batch), []).append(batch)
    yield from found.items()


def _dtype(batch: Batch) -> str:
    return DTYPES[batch.param[0].dtype]


def _step_kind(batch: Batch) -> tuple[str, str, str, bool]:
    assert batch.grad is not None
    return _dtype(batch), DTYPES[batch.grad[0].dtype], batch.hyper.curvature, batch.banked_grad is not None


def _any(rows: np.ndarray, column: Any) -> bool:
    return bool(rows[:, column.value].any())


def _set_slots(rows: np.ndarray, slots: dict[int, int]) -> np.ndarray:
    """Write the slots of those that have some; returns which these are. ValueError if a rank has too many elements."""
    found = np.array([slots.get(index, -1) for index in rows[:, tiles.INDEX.value].tolist()], np.int64)
    rows[:, tiles.SLOT.value] = found
    largest = np.max((rows[:, tiles.NUMEL.value] // rows[:, tiles.RANKS.value])[found >= 0], initial=0)
    if largest > _MOST_ELEMENTS:
        raise ValueError(f"a rank of {largest} elements is too large for exact sums: take backend='eager'")
    return found >= 0


def _columns(t: RankedTensor, row: list[int], dtype: torch.dtype, ranking: Ranking) -> list[int]:
    """What the table of adapters says of a tensor, from COUNT on."""
    numel = row[tiles.NUMEL.value]
    columns = [max(numel // len(t.mask), 1), t.scores.data_ptr(), t.mask.data_ptr(), row[tiles.INNER.value]]
    if ranking.budget is None or not (ranking.hard or t.gate) or not numel:
        return [*columns, 0, 0, 0, 0]
    mean = 0 if dtype == torch.float32 else row[tiles.MEAN.value]
    return [*columns, row[tiles.PARAM.value], dtype.itemsize, row[tiles.MOMENTUM.value], mean]
