"""The host side of the kernels: tables of tensors, work lists, and one launch for all tensors of a kind.

`TritonBackend` runs the equations of `ivon_lora.reference` with the bits of the eager backend. Tables are uploaded
again only when an address, a shape or the way the tensors are batched has changed; what changes from step to step
(learning rate, step, seed ...) travels in one small table of scalars, so no value leads to a recompilation and nothing
waits for the device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ivon_lora.kernels import select, sums, tiles
from ivon_lora.kernels.formulas import CRITERIA
from ivon_lora.kernels.sample import sample_kernel
from ivon_lora.kernels.select import score_kernel, select_kernel, zero_kernel
from ivon_lora.kernels.step import bank_kernel, step_kernel

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class LaunchConfig:
    """How kernels are launched; results do not depend on it.

    Attributes:
        tile: elements per program, a power of two of at least 4. 512 is one 16-byte vector per thread of four warps.
        num_warps: warps per program.
        score_block: ranks scored at once, a power of two.
        select_block: ranks compared at once by the selection, a power of two.
    """

    tile: int = 512
    num_warps: int = 4
    score_block: int = 128
    select_block: int = 1024

    def __post_init__(self) -> None:
        for name in ("tile", "score_block", "select_block"):
            value = getattr(self, name)
            if value < 4 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two of at least 4, got {value}")
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"num_warps must be a power of two from 1 to 32, got {self.num_warps}")


class Work(Protocol):
    """One parameter's share of a step: see `ivon_lora.backends.Work`."""

    index: int
    param: Tensor
    mean: Tensor
    momentum: Tensor
    hess: Tensor
    grad: Tensor | None
    mean_state: Tensor | None
    banked_grad: Tensor | None
    banked_curvature: Tensor | None
    rank_mask: Tensor | None
    rank_dim: int
    mean_copy: Tensor | None
    reread: bool


#: `ivon_lora.reference.Hyper` and `ivon_lora.noise.NoiseKey`, which this room may not know
Hyper = Any
Key = Any
#: `ivon_lora.backends.Ranking`
Ranking = Any


class Fallback(Protocol):
    """What is asked of another backend: see `ivon_lora.backends.Backend`."""

    def sample(self, works: Sequence[Any], hyper: Any, key: Any) -> None:
        """See `TritonBackend.sample`."""

    def bank(self, works: Sequence[Any], hyper: Any, key: Any) -> None:
        """See `TritonBackend.bank`."""

    def step(self, works: Sequence[Any], hyper: Any, key: Any, n_samples: int) -> None:
        """See `TritonBackend.step`."""

    def nonfinite_elements(self) -> Tensor | int:
        """See `TritonBackend.nonfinite_elements`."""
        ...


def supports(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the kernels can run on tensors of a device and dtype, and why (not)."""
    if dtype not in _DTYPES:
        return False, f"the kernels take fp32, bf16 and fp16 parameters, not {dtype}"
    interpreted = isinstance(step_kernel, InterpretedFunction)
    if device.type == "cpu":
        if interpreted:
            return True, "TRITON_INTERPRET=1 runs the kernels in Triton's interpreter (slow: for tests)"
        return False, "Triton needs a GPU (or, for tests, TRITON_INTERPRET=1 set before triton is first imported)"
    if device.type == "cuda":
        if interpreted:
            return False, "TRITON_INTERPRET=1 is set: unset it to run the kernels on the GPU"
        return True, f"{'ROCm' if torch.version.hip else 'CUDA'} tensors"
    return False, f"Triton has no support for tensors on {device.type!r}"


class TritonBackend:
    """Runs many parameters of one device in few launches.

    Args:
        device: where the tensors are.
        config: how to launch.
        fallback: backend for parameters whose dtype the kernels do not take (fp64).

    Raises:
        ValueError: the kernels cannot run there.
    """

    name = "triton"
    ranks = True

    def __init__(
        self, device: torch.device, config: LaunchConfig | None = None, fallback: Fallback | None = None
    ) -> None:
        supported, reason = supports(device, torch.float32)
        if not supported:
            raise ValueError(f"backend 'triton' cannot run on {device}: {reason}")
        self.device = device
        self.config = config or LaunchConfig()
        self._fallback = fallback
        self._nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        self._tables: dict[tuple[Hashable, ...], _Table] = {}
        self._layout: _RankLayout | None = None
        self._ranking: _Ranking | None = None

    def sample(self, works: Sequence[Work], hyper: Hyper, key: Key) -> None:
        """Write a posterior sample, mean + sigma eps(key), into every parameter."""
        if (fallback := self._fallback_for(works)) is not None:
            return fallback.sample(works, hyper, key)
        kinds = _split(works, lambda w: (w.param.dtype, w.mean_copy is not None, w.reread))
        for (dtype, copies, rereads), part in kinds.items():
            with _Staged(part) as params:
                self._launch(
                    sample_kernel,
                    part,
                    _scalars(hyper, key, 1),
                    params=params,
                    DTYPE=_DTYPES[dtype],
                    MASKED=_masked(part),
                    COPY=copies or rereads,
                    REREAD=rereads,
                )

    def bank(self, works: Sequence[Work], hyper: Hyper, key: Key) -> None:
        """Add the gradient, and the curvature it implies, to the banked sums."""
        if (fallback := self._fallback_for(works)) is not None:
            return fallback.bank(works, hyper, key)
        for dtype, part in _split(works, _grad_dtype).items():
            scalars = _scalars(hyper, key, 1)
            self._launch(bank_kernel, part, scalars, GRAD_DTYPE=_DTYPES[dtype], CURVATURE=_curvature(hyper, key))

    def step(self, works: Sequence[Work], hyper: Hyper, key: Key | None, n_samples: int) -> None:
        """Update momentum, Hessian and mean, and write the new mean into the parameter."""
        if (fallback := self._fallback_for(works)) is not None:
            return fallback.step(works, hyper, key, n_samples)
        kinds = _split(
            works,
            lambda w: (w.param.dtype, _grad_dtype(w), w.mean_state is not None, w.banked_grad is not None, w.reread),
        )
        for (dtype, grad_dtype, has_mean_state, banked, rereads), part in kinds.items():
            ranking = self._ranking
            if ranking is not None and not any(w.index in ranking.layout.slots for w in part):
                ranking = None
            selects = ranking is not None and ranking.selects_within(part)
            with _Staged(part) as params:
                self._launch(
                    step_kernel,
                    part,
                    _scalars(hyper, key, n_samples),
                    self._nonfinite,
                    *(ranking.layout.arguments(ranking.numbers) if ranking else _no_ranking(self._nonfinite)),
                    params=params,
                    ranking=ranking,
                    DTYPE=_DTYPES[dtype],
                    GRAD_DTYPE=_DTYPES[grad_dtype],
                    CURVATURE=_curvature(hyper, key),
                    BANKED=banked,
                    MASKED=_masked(part),
                    MEAN_STATE=has_mean_state,
                    REREAD=rereads,
                    CRITERION=0 if ranking is None else CRITERIA[ranking.request.criterion],
                    SELECT=selects,
                    SCORE_BLOCK=self.config.score_block,
                    SELECT_BLOCK=self.config.select_block,
                )
            if ranking is not None:
                ranking.selected |= selects
                ranking.works += [w for w in part if w.index in ranking.layout.slots]

    def begin_ranking(self, ranking: Ranking) -> None:
        """Score ranks, and allocate them if a budget is given, within the launches of the `step` calls to come."""
        rows = _rank_rows(ranking)
        if self._layout is None or self._layout.rows != rows:
            self._layout = _rank_layout(ranking, rows, self.device)
        elif self._ranking is not None:  # the step before did not finish
            self._layout.clear()
        numbers = [self._layout.n_ranks, self._layout.n_slots, ranking.budget or 0, ranking.min_rank]
        self._ranking = _Ranking(ranking, self._layout, _upload([numbers], self.device))

    def finish_ranking(self) -> None:
        """Write scores and masks if the last `step` has not; pruned ranks get mean and momentum 0."""
        ranking = self._ranking
        assert ranking is not None
        layout, blocks = ranking.layout, (self.config.score_block, self.config.select_block)
        if ranking.request.budget is None:
            grid = (-(-layout.n_ranks // blocks[0]),)
            self._run(score_kernel, grid, *layout.tables(ranking.numbers), ranking.request.frozen, blocks[0])
        else:
            if not ranking.selected:
                self._run(select_kernel, (1,), *layout.tables(ranking.numbers), *blocks)
            for (dtype, state), part in _split(
                [w for w in ranking.works if ranking.request.hard or w.index in layout.gates],
                lambda w: (w.param.dtype, w.mean_state is not None),
            ).items():
                with _Staged(part) as params:
                    table = self._table("zero", part, params, None, ranking)
                    if len(table.items):
                        grid = (len(table.items),)
                        constants = (self.config.tile, _DTYPES[dtype], state)
                        self._run(zero_kernel, grid, table.tensors, table.items, *constants)
        self._ranking = None

    def nonfinite_elements(self) -> Tensor:
        """Gradient elements skipped so far because they, or the update they led to, were not finite: int64 [1]."""
        return self._nonfinite if self._fallback is None else self._nonfinite + self._fallback.nonfinite_elements()

    def _fallback_for(self, works: Sequence[Work]) -> Fallback | None:
        """The backend for these works (they share their state's dtype) if the kernels cannot take them."""
        if works and works[0].hess.dtype != torch.float32:
            if self._fallback is None:
                raise ValueError(f"the kernels keep their state in fp32, not {works[0].hess.dtype}")
            return self._fallback
        return None

    def _launch(
        self,
        kernel: Any,
        works: Sequence[Work],
        scalars: list[int],
        *arguments: Any,
        params: dict[int, Tensor] | None = None,
        ranking: _Ranking | None = None,
        **constants: Any,
    ) -> None:
        """Launch one program per tile of ``works``."""
        table = self._table(kernel.__name__, works, params or {}, ranking, None)
        if len(table.items):
            scalars_there = _upload([scalars], self.device)
            self._run(
                kernel,
                (len(table.items),),
                table.tensors,
                table.items,
                scalars_there,
                *arguments,
                TILE=self.config.tile,
                **constants,
            )

    def _run(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            kernel[grid](*arguments, **constants, num_warps=self.config.num_warps, enable_fp_fusion=False)

    def _table(
        self,
        name: str,
        works: Sequence[Work],
        params: dict[int, Tensor],
        scored: _Ranking | None,
        masked: _Ranking | None,
    ) -> _Table:
        """The tables of a launch; uploaded only when something in them has changed.

        Args:
            params: where a parameter is read and written instead of in its own memory.
            scored: gives tensors the slots of their sums.
            masked: gives tensors the rank masks of its adapters, instead of those that are frozen.
        """
        rows = [_row(w, params.get(w.index, w.param), scored, masked) for w in works]
        key = (name, works[0].index, len(works), scored is not None)
        table = self._tables.get(key)
        if table is None or table.rows != rows:
            table = self._tables[key] = _table(rows, self.config.tile, self.device)
        return table


@dataclass(frozen=True)
class _Table:
    """What a launch reads: the rows as they were uploaded, the tensor table and the work list on the device."""

    rows: list[list[int]]
    tensors: Tensor
    items: Tensor


class _Staged:
    """Parameters that are not contiguous are replaced by contiguous copies, and receive their values at the end."""

    def __init__(self, works: Iterable[Work]) -> None:
        self._params = {w.index: w.param.detach() for w in works if not w.param.is_contiguous()}
        self._copies = {index: p.contiguous() for index, p in self._params.items()}

    def __enter__(self) -> dict[int, Tensor]:
        return self._copies

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            for index, param in self._params.items():
                param.copy_(self._copies[index])


def _split(works: Sequence[Work], kind: Callable[[Work], Any]) -> dict[Any, list[Work]]:
    """Works that can share a launch."""
    parts: defaultdict[Any, list[Work]] = defaultdict(list)
    for work in works:
        parts[kind(work)].append(work)
    return parts


def _grad_dtype(work: Work) -> torch.dtype:
    assert work.grad is not None
    return work.grad.dtype


def _masked(works: Iterable[Work]) -> bool:
    return any(w.rank_mask is not None for w in works)


def _curvature(hyper: Hyper, key: Key | None) -> int:
    """The argument CURVATURE of the kernels."""
    return 0 if key is None else 2 if hyper.gradsq else 1


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row(work: Work, param: Tensor, scored: _Ranking | None, masked: _Ranking | None) -> list[int]:
    """A row of the tensor table, and what the work list depends on; the order is that of `tiles`."""
    slot, mask, rank_dim = -1, work.rank_mask, work.rank_dim
    sensitivity = uncertainty = None
    for ranking in (scored, masked):
        if ranking is not None and work.index in ranking.layout.slots:
            tensor = ranking.tensors[work.index]
            rank_dim = tensor.rank_dim
            if ranking is scored:
                slot = ranking.layout.slots[work.index]
                sensitivity, uncertainty = tensor.sensitivity, tensor.uncertainty
            else:
                mask = tensor.mask
    shape = work.hess.shape
    has_ranks = slot >= 0 or mask is not None
    return [
        param.data_ptr(),
        param.data_ptr() if work.mean.data_ptr() == work.param.data_ptr() else work.mean.data_ptr(),
        _address(work.mean if work.reread else work.mean_copy),
        work.momentum.data_ptr(),
        work.hess.data_ptr(),
        _address(work.grad),
        _address(work.banked_grad),
        _address(work.banked_curvature),
        _address(mask),
        work.index,
        0,
        shape[rank_dim] if has_ranks else 1,
        math.prod(shape[rank_dim + 1 :]) if has_ranks else 1,
        slot,
        _address(sensitivity),
        _address(uncertainty),
        work.hess.numel(),
    ]


@dataclass(frozen=True)
class _RankLayout:
    """Where the scores of all ranks add up, and the adapters they belong to, on the device."""

    rows: list[list[int]]
    slots: dict[int, int]
    gates: set[int]
    n_ranks: int
    n_slots: int
    sums: Tensor
    done: Tensor
    adapters: Tensor
    owners: Tensor
    keys: Tensor

    def tables(self, numbers: Tensor) -> tuple[Any, ...]:
        """Arguments of `score_kernel` and `select_kernel`."""
        return self.sums, self.adapters, self.owners, self.keys, numbers

    def arguments(self, numbers: Tensor) -> tuple[Any, ...]:
        """Arguments of `step_kernel`."""
        return self.sums, self.n_slots, self.done, self.adapters, self.owners, self.keys, numbers

    def clear(self) -> None:
        """Forget what an interrupted step has left."""
        self.sums.zero_()
        self.done.zero_()


def _no_ranking(dummy: Tensor) -> tuple[Any, ...]:
    """Arguments of `step_kernel` that nothing reads."""
    return dummy, 0, dummy, dummy, dummy, dummy, dummy


class _Ranking:
    """The ranking of the step that runs now."""

    def __init__(self, request: Ranking, layout: _RankLayout, numbers: Tensor) -> None:
        self.request = request
        self.layout = layout
        self.numbers = numbers
        self.tensors = {tensor.index: tensor for adapter in request.adapters for tensor in adapter}
        self.works: list[Work] = []
        self.selected = False

    def selects_within(self, works: Sequence[Work]) -> bool:
        """Whether a launch of ``works`` can end with the selection: it holds every tensor, and some element."""
        if self.request.budget is None or not any(w.hess.numel() for w in works):
            return False
        return self.layout.slots.keys() <= {w.index for w in works}


def _rank_rows(ranking: Ranking) -> list[list[int]]:
    """Rows of the adapter table; the order is that of `select`."""
    rows, first, slot = [], 0, 0
    for adapter in ranking.adapters:
        r = adapter[0].shape[adapter[0].rank_dim]
        row = [first, r]
        for tensor in adapter:
            count = math.prod(tensor.shape) // r
            row += [slot, count, tensor.scores.data_ptr(), tensor.mask.data_ptr()]
            slot += r
        row += [-1, 1, 0, 0] * (3 - len(adapter))
        rows.append(row)
        first += r
    return rows


def _rank_layout(ranking: Ranking, rows: list[list[int]], device: torch.device) -> _RankLayout:
    slots = {}
    for row, adapter in zip(rows, ranking.adapters, strict=True):
        for i, tensor in enumerate(adapter):
            column = select.TENSORS.value + i * select.TENSOR_COLUMNS.value
            slots[tensor.index] = row[column + select.SLOT.value]
    ranks = [row[select.RANKS.value] for row in rows]
    n_ranks = sum(ranks)
    n_slots = sum(r * len(adapter) for r, adapter in zip(ranks, ranking.adapters, strict=True))
    owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(ranks))
    return _RankLayout(
        rows=rows,
        slots=slots,
        gates={tensor.index for adapter in ranking.adapters for tensor in adapter if tensor.gate},
        n_ranks=n_ranks,
        n_slots=n_slots,
        sums=torch.zeros(sums.ROWS.value, n_slots, dtype=torch.int64, device=device),
        done=torch.zeros(1, dtype=torch.int32, device=device),
        adapters=_upload(rows, device),
        owners=owners.to(device),
        keys=torch.empty(2 * n_ranks, dtype=torch.int32, device=device),
    )


def _scalars(hyper: Hyper, key: Key | None, n_samples: int) -> list[int]:
    """A row of the scalars; the order is that of `tiles`."""
    seed = 0 if key is None else key.seed - (key.seed >> 63 << 64)  # the same 64 bits as a signed integer
    numbers = (
        hyper.ess,
        hyper.weight_decay,
        hyper.lr,
        hyper.beta1,
        hyper.beta1_complement,
        hyper.rho,
        hyper.clip_radius,
        hyper.debias,
        float(n_samples),
    )
    return [seed, 0 if key is None else key.c1, 0 if key is None else key.step, *map(_float_pattern, numbers)]


def _float_pattern(x: float) -> int:
    """Bit pattern of the nearest fp32 number."""
    return int(torch.tensor(x, dtype=torch.float32).view(torch.int32).item())


def _upload(rows: list[list[int]], device: torch.device) -> Tensor:
    """An int64 table on the device, without waiting for it."""
    table = torch.tensor(rows, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _table(rows: list[list[int]], tile: int, device: torch.device) -> _Table:
    items = [_items(number, row, tile) for number, row in enumerate(rows)]
    work_list = torch.cat(items) if items else torch.empty(0, tiles.ITEM_COLUMNS.value, dtype=torch.int64)
    tensors = _upload([row[: tiles.TENSOR_COLUMNS.value] for row in rows], device)
    if device.type == "cuda":
        work_list = work_list.pin_memory().to(device, non_blocking=True)
    return _Table(rows, tensors, work_list)


_ADDRESSES = (0, 1, 2, 3, 4, 5, 6, 7, 14, 15)  # columns that hold addresses of element arrays


def _items(number: int, row: list[int], tile: int) -> Tensor:
    """The tiles of one tensor: int64 [n, ITEM_COLUMNS]."""
    numel, rank, inner, scored = row[-1], row[tiles.RANK.value], row[tiles.INNER.value], row[tiles.SLOT.value] >= 0
    log_tile = tile.bit_length() - 1
    whole = numel & ~3
    if any(row[column] & 15 for column in _ADDRESSES):
        whole = 0
    period = math.lcm(rank * inner, 4)
    short = min(tiles.SHORT_PERIOD.value, tile)
    parts = []
    if not scored:
        parts.append(_tiles(number, 0, whole, tile, tiles.RUN.value, log_tile, tile))
    elif period <= short:
        pitch = short // period * period
        span, log_period = tile // short * pitch, short.bit_length() - 1
        parts.append(_tiles(number, 0, whole, span, tiles.PERIODIC.value, log_period, pitch))
    elif period <= tile:
        pitch = tile // period * period
        parts.append(_tiles(number, 0, whole, pitch, tiles.LONG.value, log_tile, pitch))
    elif inner % 4 == 0:
        runs = [(start, start + inner) for start in range(0, whole, inner)]
        parts += [_tiles(number, *run, tile, tiles.RUN.value, log_tile, tile) for run in runs]
    else:
        whole = 0
    parts.append(_tiles(number, whole, numel, tile, tiles.SCATTERED.value, log_tile, tile))
    return torch.cat(parts)


def _tiles(number: int, start: int, stop: int, span: int, kind: int, log_period: int, pitch: int) -> Tensor:
    """Tiles of one kind that cover the elements start..stop-1, ``span`` elements each."""
    bases = torch.arange(start, max(stop, start), span, dtype=torch.int64)
    columns = (number, bases, stop, kind, log_period, pitch)
    return torch.stack([torch.as_tensor(c, dtype=torch.int64).expand(len(bases)) for c in columns], dim=1)
