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

from ivon_lora.kernels import tiles
from ivon_lora.kernels.sample import sample_kernel
from ivon_lora.kernels.step import bank_kernel, step_kernel

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class LaunchConfig:
    """How kernels are launched; results do not depend on it.

    Attributes:
        tile: elements per program, a power of two of at least 4. 512 is one 16-byte vector per thread of four warps.
        num_warps: warps per program.
    """

    tile: int = 512
    num_warps: int = 4

    def __post_init__(self) -> None:
        if self.tile < 4 or self.tile & (self.tile - 1):
            raise ValueError(f"tile must be a power of two of at least 4, got {self.tile}")
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


#: `ivon_lora.reference.Hyper` and `ivon_lora.noise.NoiseKey`, which this room may not know
Hyper = Any
Key = Any


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

    def sample(self, works: Sequence[Work], hyper: Hyper, key: Key) -> None:
        """Write a posterior sample, mean + sigma eps(key), into every parameter."""
        if (fallback := self._fallback_for(works)) is not None:
            return fallback.sample(works, hyper, key)
        for dtype, part in _split(works, lambda w: w.param.dtype).items():
            with _Staged(part) as params:
                self._launch(
                    sample_kernel,
                    part,
                    _scalars(hyper, key, 1),
                    params=params,
                    DTYPE=_DTYPES[dtype],
                    MASKED=_masked(part),
                    COPY=False,
                    REFRESH=False,
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
            works, lambda w: (w.param.dtype, _grad_dtype(w), w.mean_state is not None, w.banked_grad is not None)
        )
        for (dtype, grad_dtype, has_mean_state, banked), part in kinds.items():
            with _Staged(part) as params:
                self._launch(
                    step_kernel,
                    part,
                    _scalars(hyper, key, n_samples),
                    self._nonfinite,
                    self._nonfinite,  # no scores: nothing is added up
                    0,
                    params=params,
                    LOG_TILE=self.config.tile.bit_length() - 1,
                    DTYPE=_DTYPES[dtype],
                    GRAD_DTYPE=_DTYPES[grad_dtype],
                    CURVATURE=_curvature(hyper, key),
                    BANKED=banked,
                    MASKED=_masked(part),
                    MEAN_STATE=has_mean_state,
                    REFRESH=False,
                    CRITERION=0,
                )

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
        **constants: Any,
    ) -> None:
        """Launch one program per tile of ``works``."""
        key = (kernel.__name__, works[0].index, len(works), *constants.values())
        rows = [_row(w, (params or {}).get(w.index, w.param)) for w in works]
        table = self._tables.get(key)
        if table is None or table.rows != rows:
            table = self._tables[key] = _table(rows, self.config.tile, self.device)
        if len(table.items) == 0:
            return
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            kernel[(len(table.items),)](
                table.tensors,
                table.items,
                _upload([scalars], self.device),
                *arguments,
                TILE=self.config.tile,
                **constants,
                num_warps=self.config.num_warps,
                enable_fp_fusion=False,
            )


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


def _row(work: Work, param: Tensor) -> list[int]:
    """A row of the tensor table, and what the work list depends on; the order is that of `tiles`."""
    shape = work.hess.shape
    has_ranks = work.rank_mask is not None
    return [
        _address(param),
        param.data_ptr() if work.mean.data_ptr() == work.param.data_ptr() else work.mean.data_ptr(),
        0,
        work.momentum.data_ptr(),
        work.hess.data_ptr(),
        _address(work.grad),
        _address(work.banked_grad),
        _address(work.banked_curvature),
        _address(work.rank_mask),
        work.index,
        0,
        shape[work.rank_dim] if has_ranks else 1,
        math.prod(shape[work.rank_dim + 1 :]) if has_ranks else 1,
        -1,
        0,
        0,
        work.hess.numel(),
    ]


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
    parts = []
    if not scored:
        parts.append(_tiles(number, 0, whole, tile, tiles.RUN.value, log_tile, tile))
    elif period <= tile:
        log_period = (period - 1).bit_length()
        span = (tile >> log_period) * period
        parts.append(_tiles(number, 0, whole, span, tiles.PERIODIC.value, log_period, period))
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
