"""What a launch reads, on the device: a table of tensors, a work list of tiles, and scalars, at addresses that stay.

Each call of the backend with the same parameters has a `Site` of its own. Its tables are allocated once and written in
place, in the order of the stream, so that a recorded launch (a CUDA graph) finds what the latest call has put there.
They are written only when something in them has changed; comparing costs the host less than a microsecond per tensor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ivon_lora.kernels import sums, tiles
from ivon_lora.kernels.ranking import RankLayout

#: dtypes of parameters and gradients, as the constexpr arguments of the kernels take them
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: the argument CURVATURE, by the curvature of a `Hyper`
CURVATURES = {"price": 1, "gradsq": 2, "fisher": 3}

#: rows of a site's scalars: those of the call, and those of the sample that a step draws at its end
NOW, NEXT = 0, 1


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
    offset: int
    own_decay: Tensor | None


#: `ivon_lora.functional.ivon.Hyper` and `ivon_lora.functional.noise.NoiseKey`, which this room may not know
Hyper = Any
Key = Any


class Kind(NamedTuple):
    """What the parameters of one launch have in common: the constexpr arguments of the kernels."""

    dtype: torch.dtype = torch.float32
    contiguous: bool = True
    grad_dtype: torch.dtype | None = None
    copies: bool = False
    reread: bool = False
    has_mean_state: bool = False
    banked: bool = False


_dtype: Any = torch._C.TensorBase.dtype.__get__  # type: ignore[attr-defined]
_GRAD_DTYPE = Kind._fields.index("grad_dtype")


class Reads(NamedTuple):
    """What a kernel needs of a `Work`.

    Attributes:
        columns: of the table of tensors, for the addresses of `roles`.
        roles: the attributes of a `Work` of some kind that hold these tensors.
        kind: what must be equal within a launch, as the arguments of `Kind`.
        gradients: it reads gradients, which the works of a batch are given anew for every call.
        moments: it adds up what the deltas of works that have their own depend on.
    """

    columns: tuple[int, ...]
    roles: Callable[[Kind], tuple[str, ...]]
    kind: Callable[[Work], tuple[Any, ...]]
    gradients: bool = False
    moments: bool = False


def _columns(*columns: Any) -> tuple[int, ...]:
    return tuple(column.value for column in columns)


def _grad_dtype(work: Work) -> torch.dtype:
    assert work.grad is not None
    return work.grad.dtype


SAMPLE = Reads(
    _columns(tiles.PARAM, tiles.MEAN, tiles.HESS, tiles.MASK, tiles.OWN_DECAY, tiles.MEAN_OUT),
    lambda kind: ("param", "mean", "hess", "rank_mask", "own_decay", "mean" if kind.reread else "mean_copy"),
    lambda w: (w.param.dtype, w.param.is_contiguous(), None, w.mean_copy is not None, w.reread),
)
BANK = Reads(
    _columns(tiles.HESS, tiles.GRAD, tiles.BANKED_GRAD, tiles.BANKED_CURVATURE, tiles.OWN_DECAY),
    lambda kind: ("hess", "grad", "banked_grad", "banked_curvature", "own_decay"),
    lambda w: (torch.float32, True, _grad_dtype(w), False, False, False, True),
    gradients=True,
)
STEP = Reads(
    _columns(
        tiles.PARAM, tiles.MEAN, tiles.HESS, tiles.MASK, tiles.OWN_DECAY, tiles.MEAN_OUT,
        tiles.MOMENTUM, tiles.GRAD, tiles.BANKED_GRAD, tiles.BANKED_CURVATURE,
    ),
    lambda kind: (
        "param", "mean", "hess", "rank_mask", "own_decay", "mean_state" if kind.has_mean_state else "mean_copy",
        "momentum", "grad", "banked_grad", "banked_curvature",
    ),
    lambda w: (
        w.param.dtype, w.param.is_contiguous(), _grad_dtype(w), False, w.reread, w.mean_state is not None,
        w.banked_grad is not None,
    ),
    gradients=True,
    moments=True,
)  # fmt: skip
SCORE = Reads(
    _columns(tiles.MEAN, tiles.HESS, tiles.OWN_DECAY),
    lambda kind: ("mean", "hess", "own_decay"),
    lambda w: (torch.float32, True),
)
ZERO = Reads(
    _columns(tiles.PARAM, tiles.MEAN, tiles.MOMENTUM),
    lambda kind: ("param", "mean", "momentum"),
    lambda w: (w.param.dtype, w.param.is_contiguous(), None, False, False, w.mean_state is not None),
)

_POINTERS = _columns(
    tiles.PARAM, tiles.MEAN, tiles.MEAN_OUT, tiles.MOMENTUM, tiles.HESS, tiles.GRAD, tiles.BANKED_GRAD,
    tiles.BANKED_CURVATURE, tiles.SENSITIVITY, tiles.UNCERTAINTY,
)  # fmt: skip


class Part:
    """The tables of one launch: the parameters of one call that are of one kind.

    Attributes:
        works: the parameters, in the order of the table's rows.
        roles: the attributes of a `Work` whose addresses the table holds.
        tensors: int64 [n, TENSOR_COLUMNS].
        items: int64 [tiles, ITEM_COLUMNS].
        masked: some parameter has a hard rank mask.
        moments: int64 [m, STRIPES, PITCH], the sums of the m works that have a delta of their own, if the launch can
            change it; zeros between two launches.
    """

    def __init__(
        self,
        works: list[Work],
        kind: Kind,
        reads: Reads,
        tile: int,
        layout: RankLayout | None,
        scored: bool,
        device: torch.device,
    ) -> None:
        self.kind = kind
        self.scores = layout is not None and scored and any(w.index in layout.slots for w in works)
        self.works = works
        self._columns, self.roles, self._tile = list(reads.columns), reads.roles(kind), tile
        ranks = [_ranks(w, layout) for w in works]
        rows = [_row(w, *of_ranks, layout, scored) for w, of_ranks in zip(works, ranks, strict=True)]
        self._rows = np.array(rows, np.int64).reshape(-1, tiles.TENSOR_COLUMNS.value)
        self._inner = [inner for _, inner in ranks]
        self._misaligned = np.full(len(works), -1)
        self._known = np.empty((len(self.roles), len(works)), np.int64)
        own = [number for number, w in enumerate(works) if reads.moments and w.own_decay is not None]
        self.moments = torch.zeros(len(own), sums.STRIPES.value, sums.PITCH.value, dtype=torch.int64, device=device)
        pitch = sums.STRIPES.value * sums.PITCH.value * self.moments.element_size()
        self._rows[own, tiles.MOMENTS.value] = self.moments.data_ptr() + pitch * np.arange(len(own))
        self.tensors = torch.empty(self._rows.shape, dtype=torch.int64, device=device)
        self.items = torch.empty(0, tiles.ITEM_COLUMNS.value, dtype=torch.int64, device=device)
        self.refresh(works, force=True)

    @property
    def masked(self) -> bool:
        """Whether some parameter has a hard rank mask."""
        return bool(self._rows[:, tiles.MASK.value].any())

    def use_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Write the addresses of other gradients of the same kind, for a recorded launch.

        Raises:
            RuntimeError: the work list would have to change.
        """
        known = self._known.copy()
        known[self.roles.index("grad")] = [0 if grad is None else grad.data_ptr() for grad in gradients]
        self.refresh(self.works, known, fixed=True)

    def refresh(
        self,
        works: list[Work],
        known: np.ndarray | None = None,
        fixed: bool = False,
        force: bool = False,
    ) -> None:
        """Write addresses that have changed.

        Args:
            known: int64 [roles, works], their addresses, if somebody keeps them.
            fixed: a recorded launch will read the tables, so the work list must stay as it is.
            force: write them all.

        Raises:
            RuntimeError: it would have to change.
        """
        if known is None:
            tensors = attrgetter(*self.roles)
            addresses = np.array([0 if t is None else t.data_ptr() for w in works for t in tensors(w)], np.int64)
            known = addresses.reshape(len(works), len(self.roles)).T
        self.works = works
        if not force and np.array_equal(known, self._known):
            return
        rows = self._rows.copy()
        rows[:, self._columns] = known.T
        misaligned = np.bitwise_or.reduce(rows[:, _POINTERS], axis=1) & 15 != 0
        if not np.array_equal(misaligned, self._misaligned):
            if fixed:
                raise RuntimeError(
                    "a gradient has moved to an address of another alignment since the launches were recorded"
                )
            parts = [
                work_list(number, row, inner, self._tile, odd)
                for number, (row, inner, odd) in enumerate(zip(rows.tolist(), self._inner, misaligned, strict=True))
            ]
            rows[:, tiles.TILES.value] = [len(part) for part in parts]
            rows[:, tiles.ADAPTER_TILES.value] = _added_up(rows[:, tiles.TILES.value], rows[:, tiles.ADAPTER.value])
            items = np.concatenate(parts) if parts else np.empty((0, tiles.ITEM_COLUMNS.value), np.int64)
            self.items = torch.empty(items.shape, dtype=torch.int64, device=self.tensors.device)
            write(self.items, items)
        write(self.tensors, rows)
        self._rows, self._misaligned, self._known = rows, misaligned, known  # not before they are on the device


class Site:
    """The tables of one kind of call of the backend, for one set of parameters.

    Attributes:
        parts: what is launched.
        scalars: int64 [2, SCALAR_COLUMNS], rows `NOW` and `NEXT`.
    """

    def __init__(self, device: torch.device) -> None:
        self.parts: list[Part] = []
        self.scalars = torch.empty(2, tiles.SCALAR_COLUMNS.value, dtype=torch.int64, device=device)
        self._scalars: list[list[int]] = []
        self._kinds: list[tuple[Any, ...]] = []
        self._structure: list[tuple[Any, ...]] = []
        self._alive: list[Tensor] = []  # so that an address in `_structure` means the same tensor
        self._order: list[list[int]] = []
        self._layout: RankLayout | None = None
        self._works: Sequence[Work] | None = None  # the batch of works that the tables are of, if they came as one
        self._places: list[Any] = []  # where the addresses of each part are in the batch's own table
        self._alike, self._banked = False, np.empty(0, bool)  # gradients of the batch when `_kinds` was found

    def set_scalars(self, *rows: list[int]) -> None:
        """Write rows `NOW`, and `NEXT` if given."""
        filled = list(rows) + [rows[0]] * (2 - len(rows))
        if filled != self._scalars:
            write(self.scalars, np.array(filled, np.int64))
            self._scalars = filled

    def refresh(self, works: Sequence[Work], reads: Reads, tile: int, layout: RankLayout | None, scored: bool) -> None:
        """Bring the tables up to date.

        Args:
            layout: where scores add up and masks lie, or None.
            scored: parameters get the slots of their sums; else those of adapters get the masks to come.
        """
        if works is self._works and layout is self._layout and self._gradients_are_alike(works, reads):
            for part, places in zip(self.parts, self._places, strict=True):
                part.refresh(part.works, known=works.table[places])  # type: ignore[attr-defined]
            return
        if hasattr(works, "hand_out"):
            works.hand_out()
        kinds = list(map(reads.kind, works))
        structure = [
            (w.index, id(w.hess), w.rank_dim, w.offset, w.rank_mask is None, w.own_decay is None) for w in works
        ]
        if kinds == self._kinds and structure == self._structure and layout is self._layout:
            for part, order in zip(self.parts, self._order, strict=True):
                part.refresh([works[i] for i in order])
            self._remember(works)
            return
        orders: dict[tuple[Any, ...], list[int]] = {}
        for i, kind in enumerate(kinds):
            orders.setdefault(kind, []).append(i)
        self.parts = [
            Part([works[i] for i in order], Kind(*kind), reads, tile, layout, scored, self.scalars.device)
            for kind, order in orders.items()
        ]
        self._order, self._kinds = list(orders.values()), kinds
        self._structure, self._alive, self._layout = structure, [w.hess for w in works], layout
        self._remember(works)

    def _remember(self, works: Sequence[Work]) -> None:
        """Look no further next time, if the works came as a batch and come so again."""
        self._works = None
        if hasattr(works, "table"):
            roles = works.ROLES  # type: ignore[attr-defined]
            self._works, self._alike = works, works.alike  # type: ignore[attr-defined]
            self._banked = np.array([Kind(*kind).banked for kind in self._kinds])
            self._places = []
            for part, order in zip(self.parts, self._order, strict=True):
                rows = [roles.index(role) for role in part.roles]
                self._places.append(rows if len(order) == len(works) else np.ix_(rows, order))  # the former is quicker

    def _gradients_are_alike(self, works: Any, reads: Reads) -> bool:
        """Whether those of the same batch of works have the dtypes and banked sums that they had before."""
        if not reads.gradients:
            return True
        if not np.array_equal(works.table[works.ROLES.index("banked_grad")] != 0, self._banked):
            return False
        if works.alike and self._alike:  # to their parameters
            return True
        return list(map(_dtype, works.gradients)) == [kind[_GRAD_DTYPE] for kind in self._kinds]


class Staged:
    """Parameters that are not contiguous are replaced by contiguous copies, and receive their values at the end."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._originals = [] if part.kind.contiguous else part.works

    def __enter__(self) -> None:
        if self._originals:
            copies = [copy.copy(w) for w in self._originals]
            for w in copies:
                w.param = w.param.detach().contiguous()
            self._part.refresh(copies)

    def __exit__(self, error: object, *_: object) -> None:
        for original, staged in zip(self._originals, self._part.works, strict=False):
            if error is None:
                original.param.detach().copy_(staged.param)
        if self._originals:
            self._part.works = self._originals


def write(target: Tensor, values: np.ndarray) -> None:
    """Copy numbers to the device after what it has been given to do before, and without waiting for it."""
    source = torch.from_numpy(np.array(values, np.int64))
    target.copy_(source.pin_memory() if target.device.type == "cuda" else source, non_blocking=True)


_OFFSET = tiles.OFFSET.value


def _added_up(counts: np.ndarray, adapters: np.ndarray) -> np.ndarray:
    """For every tensor the counts of all tensors of its adapter; 1 for a tensor that is of none (-1)."""
    totals = np.zeros(adapters.max(initial=-1) + 1, np.int64)
    np.add.at(totals, adapters[adapters >= 0], counts[adapters >= 0])
    return np.where(adapters >= 0, np.append(totals, 0)[adapters], 1)


def _ranks(work: Work, layout: RankLayout | None) -> tuple[int, int]:
    """How many ranks a tensor has, and how many elements are between two of them; both at least 1."""
    shape, dim, r = tuple(work.hess.shape), work.rank_dim, 1
    if layout is not None and work.index in layout.slots:
        tensor = layout.tensors[work.index]
        shape, dim = tensor.shape, tensor.rank_dim
        r = shape[dim]
    elif work.rank_mask is not None:
        r = work.rank_mask.numel()
    return max(r, 1), max(math.prod(shape[dim + 1 :]), 1)


def _row(work: Work, r: int, inner: int, layout: RankLayout | None, scored: bool) -> list[int]:
    """What a row of the tensor table holds beside the addresses of `Reads`; ``r`` and ``inner`` as of `_ranks`."""
    slot, adapter = -1, -1
    row = [0] * tiles.TENSOR_COLUMNS.value
    if layout is not None and work.index in layout.slots:
        tensor = layout.tensors[work.index]
        if scored:
            slot, adapter = layout.slots[work.index], layout.numbers_of_adapters[work.index]
            if tensor.sensitivity is not None and tensor.uncertainty is not None:
                row[tiles.SENSITIVITY.value] = tensor.sensitivity.data_ptr()
                row[tiles.UNCERTAINTY.value] = tensor.uncertainty.data_ptr()
        else:
            row[tiles.MASK.value] = tensor.mask.data_ptr()
    row[tiles.INDEX.value], row[_OFFSET], row[tiles.NUMEL.value] = work.index, work.offset, work.hess.numel()
    row[tiles.RANK.value], row[tiles.SLOT.value], row[tiles.ADAPTER.value] = r, slot, adapter
    row[tiles.RANK_RECIPROCAL.value], row[tiles.INNER_RECIPROCAL.value] = reciprocal(r), reciprocal(inner)
    return row


def scalars(
    hyper: Hyper, key: Key | None, n_samples: int, decay_bounds: tuple[float, float] | None = None
) -> list[int]:
    """A row of the scalars; the order is that of `tiles`.

    Args:
        decay_bounds: of the deltas that are set after this call; None: they stay.
    """
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
        hyper.square_scale,
        hyper.inverse_batch,
        hyper.noise_ess,
        -1.0 if key is not None and key.mirrored else 1.0,
        hyper.prior_weight,
        *(decay_bounds or (0.0, 0.0)),
    )
    patterns = np.array(numbers, np.float32).view(np.int32).tolist()
    patterns.insert(-2, int(decay_bounds is not None))
    return [seed, 0 if key is None else key.c1, 0 if key is None else key.step, *patterns]


def reciprocal(d: int) -> int:
    """What divides by ``d`` on the device: see `tiles.ranks`."""
    return (2**32 - 1) // d


def work_list(number: int, row: list[int], inner: int, tile: int, misaligned: bool) -> np.ndarray:
    """The tiles of one tensor: int64 [n, ITEM_COLUMNS].

    Args:
        number: the tensor's row in the table.
        row: that row.
        inner: elements between two ranks.
        misaligned: some address is no multiple of 16 bytes.
    """
    rank, offset, numel = row[tiles.RANK.value], row[_OFFSET], row[tiles.NUMEL.value]
    if not numel:
        return np.empty((0, tiles.ITEM_COLUMNS.value), np.int64)
    scored = row[tiles.SLOT.value] >= 0
    log_tile = tile.bit_length() - 1
    shift = offset & 3  # tiles start where a call of Philox starts
    whole = 0 if misaligned or shift else numel & ~3
    period = math.lcm(rank * inner, 4)
    short = min(tiles.SHORT_PERIOD.value, tile)
    aligned = offset % (rank * inner) == 0
    parts: list[np.ndarray] = []
    if not scored:
        parts.append(_tiles(number, 0, whole, tile, tiles.RUN.value, log_tile, tile))
    elif period <= short and aligned:
        pitch = short // period * period
        span, log_period = tile // short * pitch, short.bit_length() - 1
        parts.append(_tiles(number, 0, whole, span, tiles.PERIODIC.value, log_period, pitch))
    elif period <= tile and aligned:
        pitch = tile // period * period
        parts.append(_tiles(number, 0, whole, pitch, tiles.LONG.value, log_tile, pitch))
    elif inner % 4 == 0 and offset % inner == 0:
        runs = [(start, min(start + inner, whole)) for start in range(0, whole, inner)]
        parts += [_tiles(number, *run, tile, tiles.RUN.value, log_tile, tile) for run in runs]
    else:
        whole = 0
    parts.append(_tiles(number, whole or -shift, numel, tile, tiles.SCATTERED.value, log_tile, tile))
    items = np.concatenate(parts)
    first = items[:, tiles.ITEM_BASE.value] + offset
    items[:, tiles.ITEM_RANK.value] = first // inner % rank
    items[:, tiles.ITEM_NEXT.value] = np.minimum(inner - first % inner, tile) if rank > 1 else tile
    return items


def _tiles(number: int, start: int, stop: int, span: int, kind: int, log_period: int, pitch: int) -> np.ndarray:
    """Tiles of one kind that cover the elements start..stop-1, ``span`` elements each."""
    bases = np.arange(start, max(stop, start), span, dtype=np.int64)
    items = np.empty((len(bases), tiles.ITEM_COLUMNS.value), np.int64)
    items[:] = (number, 0, 0, kind, log_period, pitch, 0, 0)
    items[:, tiles.ITEM_BASE.value] = bases
    items[:, tiles.ITEM_LENGTH.value] = np.minimum(stop - bases, span)
    return items
