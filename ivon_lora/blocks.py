"""Parameters cut, or packed together, into flat blocks of about equal size, for the eager backend on CPU."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivon_lora.backends import Work
from ivon_lora.backends.batch import ADDRESSES, Batch
from ivon_lora.functional._arrays import Array
from ivon_lora.layout import all_contiguous, dtypes
from ivon_lora.packing import LIMIT, is_small, packs
from ivon_lora.programs import Scratch

#: elements per block: large enough to hide what a call of numpy costs, small enough for the caches
BLOCK = LIMIT

#: rows that a block may need at once
_N_ROWS = 6


@dataclass(frozen=True)
class Segment:
    """Elements ``start..stop-1`` (C order) of one parameter or shard, at ``offset`` inside the block."""

    work: Work
    start: int
    stop: int
    offset: int

    @property
    def first_quad(self) -> int:
        """Group of four elements of the whole parameter that the segment begins in."""
        return (self.work.offset + self.start) >> 2

    @property
    def n_quads(self) -> int:
        """Groups of four elements, the first and the last one perhaps incomplete."""
        return ((self.work.offset + self.stop + 3) >> 2) - self.first_quad

    @property
    def gaps(self) -> tuple[int, int]:
        """Elements that the first and the last group lack."""
        return (self.work.offset + self.start) & 3, -(self.work.offset + self.stop) & 3


class Rows:
    """A few rows of memory that packed blocks are copied into, one after the other."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._known: dict[tuple[int, int, np.dtype], tuple[np.ndarray, int]] = {}

    def row(self, number: int, size: int, dtype: np.dtype) -> tuple[np.ndarray, int]:
        """The first ``size`` elements of a row, and their address."""
        found = self._known.get((number, size, dtype))
        if found is None:
            before = self._scratch.identity
            rows = self._scratch.rows(_N_ROWS, max(size, BLOCK) * dtype.itemsize)
            if len(self._known) > 64 or self._scratch.identity != before:
                self._known.clear()
            row = rows[number, : size * dtype.itemsize].view(dtype)
            found = self._known[number, size, dtype] = row, _address(row)
        return found


@dataclass
class _Place:
    """Where the tensors of one role are.

    Attributes:
        key: their addresses.
        whole: all their elements as one array, where they lie as in the block; else None.
        addresses: the same as a list.
        row, in_row: address of the row they were last copied to or from, and those of the segments in it.
    """

    key: bytes
    whole: np.ndarray | None
    addresses: list[int]
    row: int = 0
    in_row: list[int] = field(default_factory=list)


class Block:
    """Several whole parameters, or a part of a large one, seen as one flat array.

    Groups of four elements, which share a call of the noise, start at multiples of four; the gaps hold ones. Tensors
    are named by their role, an attribute of the works, and found by their addresses, so none is kept alive.
    """

    def __init__(self, batch: Batch, columns: list[int], segments: list[Segment]) -> None:
        self.segments = segments
        self.is_packed = len(segments) > 1
        self.has_gaps = any(s.gaps != (0, 0) for s in segments)
        last = segments[-1]
        self.size = last.offset - last.gaps[0] + 4 * last.n_quads
        #: of the state
        self.dtype = np.dtype(np.float64 if segments[0].work.hess.dtype == torch.float64 else np.float32)
        #: first group of four, number of groups and parameter of each segment: where its normals are; int64 (3, n)
        self.quads = np.array([(s.first_quad, s.n_quads, s.work.index) for s in segments], np.int64).T.copy()
        self._is_masked = any(s.work.rank_mask is not None for s in segments)
        self.has_own_decays = any(s.work.own_decay is not None for s in segments)
        self._offsets = np.array([s.offset for s in segments], np.int64) * self.dtype.itemsize
        self._bytes = [(s.stop - s.start) * self.dtype.itemsize for s in segments]
        self._table, self._columns = batch.table, columns
        if columns == list(range(columns[0], columns[-1] + 1)):
            self._columns = slice(columns[0], columns[-1] + 1)  # type: ignore[assignment]  # a view of the table
        self._known: dict[str, _Place] = {}

    def tensors(self, role: str) -> list[Any]:
        """What the works have for a role."""
        get = attrgetter(role)
        return [get(s.work) for s in self.segments]

    def has(self, role: str) -> bool:
        """Whether the first work has a tensor for a role."""
        return getattr(self.segments[0].work, role) is not None

    def gather(self, role: str, rows: Rows, number: int, memory: np.ndarray | None = None) -> np.ndarray:
        """The block's elements of a role, in the state's dtype; a view where possible.

        Args:
            rows, number: which row may be used.
            memory: of the block's size, to be used instead of a row; only where there are no gaps.
        """
        place = self._place(role)
        if place is not None and place.whole is not None:
            return place.whole
        if not self.is_packed:
            s = self.segments[0]
            part, (before, after) = _part(self.tensors(role)[0], s.start, s.stop, s.work.hess.dtype), s.gaps
            return np.pad(part, (before, after), constant_values=1.0) if before or after else part
        if memory is None:
            row, address = rows.row(number, self.size, self.dtype)
        else:
            row, address = memory, _address(memory)
        if self.has_gaps:
            row.fill(1.0)
        if place is not None:
            self._move(place, address, out=False)
        else:
            with torch.no_grad():
                torch._foreach_copy_(self._parts(row), self.tensors(role))
        return row

    def scatter(self, values: np.ndarray, role: str) -> None:
        """Write the block's elements into the contiguous tensors of a role, rounding to their dtype."""
        place = self._place(role)
        if place is not None and place.whole is not None:
            np.copyto(place.whole, values)
        elif place is not None:
            self._move(place, _address(values), out=True)
        else:
            self.write(values, self.tensors(role))

    def write(self, values: np.ndarray, tensors: Sequence[Tensor | None]) -> None:
        """Write the block's elements into contiguous ``tensors`` (one per segment), rounding to their dtype."""
        for s, tensor in zip(self.segments, tensors, strict=True):
            if tensor is not None:
                part = torch.from_numpy(values[s.offset : s.offset + s.stop - s.start])
                tensor.detach().view(-1)[s.start : s.stop] = part

    def view(self, role: str) -> np.ndarray | None:
        """The block's elements of a role where they lie as in the block, to write to; else None."""
        place = self._place(role)
        return None if place is None else place.whole

    def _place(self, role: str) -> _Place | None:
        """Where the tensors of a role are now; None if they are not of the state's dtype, or not all there."""
        found = self._table[ADDRESSES.index(role), self._columns]
        key = found.tobytes()
        place = self._known.get(role)
        if place is not None and place.key == key and (role != "grad" or self._are_of_the_state(role)):
            return place
        if not found.all() or not self._are_of_the_state(role):
            return None
        starts = found + np.array([s.start for s in self.segments], np.int64) * self.dtype.itemsize
        whole = None
        if not self.has_gaps and (starts - self._offsets == starts[0]).all():
            whole = _array_at(int(starts[0]), self.size, self.dtype)
        self._known[role] = place = _Place(key, whole, starts.tolist())
        return place

    def _are_of_the_state(self, role: str) -> bool:
        return dtypes(self.tensors(role)) == {self.segments[0].work.hess.dtype}

    def _move(self, place: _Place, row: int, out: bool) -> None:
        """Copy from the tensors to a row at an address, or out of it; they do not overlap."""
        if place.row != row:
            place.row, place.in_row = row, (self._offsets + row).tolist()
        ends = (place.addresses, place.in_row) if out else (place.in_row, place.addresses)
        deque(map(ctypes.memmove, *ends, self._bytes), maxlen=0)

    def _parts(self, row: np.ndarray) -> list[Tensor]:
        """A view of the row for each segment, of its tensor's shape."""
        whole = torch.from_numpy(row)
        return [whole[s.offset : s.offset + s.stop - s.start].view(s.work.hess.shape) for s in self.segments]

    def weight_decay(self, common: float) -> Array:
        """delta: ``common``, or one number for each element where parameters have deltas of their own."""
        if not self.has_own_decays:
            return common
        decays = [common if (own := s.work.own_decay) is None else own.numpy() for s in self.segments]
        if not self.is_packed:
            return decays[0]
        ends = [*(s.offset - s.gaps[0] for s in self.segments), self.size]
        return np.repeat(np.array(decays, self.dtype), np.diff(ends))

    def active(self) -> np.ndarray | None:
        """False for the elements of hard-masked ranks; None when there are none."""
        if not self._is_masked:
            return None
        active = np.ones(self.size, bool)
        for s in self.segments:
            if s.work.rank_mask is not None:
                elements = _elements_of_ranks(s.work, s.start, s.stop)
                active[s.offset : s.offset + len(elements)] = elements
        return active


def _part(tensor: Tensor, start: int, stop: int, dtype: torch.dtype) -> np.ndarray:
    """Elements ``start..stop-1`` (C order) of a contiguous tensor; a view of it where it has the dtype."""
    if tensor.dtype == dtype:
        return tensor.detach().numpy().reshape(-1)[start:stop]
    return tensor.detach().view(-1)[start:stop].to(dtype).numpy()  # only the part: the block bounds the temporaries


def _elements_of_ranks(work: Work, start: int, stop: int) -> np.ndarray:
    """The rank mask spread over elements ``start..stop-1`` (C order) of a tensor or piece."""
    mask = some(work.rank_mask).numpy()
    inner = math.prod(work.param.shape[work.rank_dim + 1 :])
    start, stop = work.offset + start, work.offset + stop
    first, last = start // inner, -(-stop // inner)
    return np.repeat(mask[np.arange(first, last) % len(mask)], inner)[start - first * inner : stop - first * inner]


class Stretch:
    """Neighbouring blocks, whose normals are drawn at once.

    Attributes:
        blocks: the blocks.
        starts: where the elements of each begin.
        size: elements of all of them.
        quads: as of `Block`, of all of them.
        address: which normals they are.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        sizes = [block.size for block in blocks]
        self.size = sum(sizes)
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.quads = np.concatenate([block.quads for block in blocks], axis=1)
        self.address = self.quads.tobytes()

    def parts(self, values: np.ndarray) -> Iterator[tuple[Block, np.ndarray]]:
        """Each block with its part of an array of the size of all of them."""
        for block, start in zip(self.blocks, self.starts, strict=True):
            yield block, values[start : start + block.size]


def stretches_of(batch: Batch) -> Sequence[Stretch]:
    """The blocks of the works, in stretches; they are kept as long as the batch does not change."""
    if batch.cache.get("block") != BLOCK:
        batch.cache |= {"block": BLOCK, "stretches": _stretches(list(_cut(batch)))}
    stretches: list[Stretch] = batch.cache["stretches"]
    return stretches


def blocks_of(batch: Batch) -> Iterator[Block]:
    """The blocks of the works, in the order of their stretches."""
    return itertools.chain.from_iterable(stretch.blocks for stretch in stretches_of(batch))


def _stretches(blocks: Sequence[Block]) -> list[Stretch]:
    found: list[list[Block]] = []
    room = 0
    for block in blocks:
        if block.size > room:
            found.append([])
            room = 2 * BLOCK
        found[-1].append(block)
        room -= block.size
    return [Stretch(group) for group in found]


def _cut(batch: Batch) -> Iterator[Block]:
    small: list[tuple[int, Segment]] = []
    for column, work in enumerate(batch):
        numel = work.hess.numel()
        if is_small(numel, BLOCK):
            small.append((column, Segment(work, 0, numel, 0)))
            continue
        start = 0
        while start < numel:  # blocks of its own: views, no copies
            before = (work.offset + start) & 3
            stop = min(numel, start + BLOCK - before)
            yield Block(batch, [column], [Segment(work, start, stop, before)])
            start = stop
    for pack in packs([4 * s.n_quads for _, s in small], BLOCK):
        segments, filled = [], 0
        for _, s in (small[i] for i in pack):
            segments.append(replace(s, offset=filled + s.gaps[0]))
            filled += 4 * s.n_quads
        yield Block(batch, [small[i][0] for i in pack], segments)


def are_contiguous(batch: Batch) -> bool:
    """Whether all parameters are; asked once for a batch."""
    if "contiguous" not in batch.cache:
        batch.cache["contiguous"] = all_contiguous(w.param for w in batch)
    contiguous: bool = batch.cache["contiguous"]
    return contiguous


class Staged:
    """Parameters that cannot be written through a flat view (not contiguous) are written here first, then copied."""

    def __init__(self, batch: Batch) -> None:
        self.works = [] if are_contiguous(batch) else [w for w in batch if not w.param.is_contiguous()]
        self.copies = {w.index: torch.empty(w.param.shape, dtype=w.param.dtype) for w in self.works}

    def view(self, block: Block) -> np.ndarray | None:
        """Where the parameters of a block can be written as one array; else None."""
        return None if self.works else block.view("param")

    def scatter(self, block: Block, values: np.ndarray) -> None:
        """Write the parameters of a block."""
        if self.works:
            block.write(values, [self.copies.get(s.work.index, s.work.param) for s in block.segments])
        else:
            block.scatter(values, "param")

    def finish(self) -> None:
        """Copy what was written."""
        for work in self.works:
            work.param.detach().copy_(self.copies[work.index])


def reread_means(works: Sequence[Work]) -> None:
    """Where the mean no longer rounds to a 16-bit parameter, somebody has written there: the parameter is the mean."""
    for w in works:
        if w.reread:
            for mean, param in zip(w.mean.view(-1).split(BLOCK), flat(w.param).split(BLOCK), strict=True):
                mean.copy_(torch.where(mean.to(param.dtype) == param, mean, param.to(mean.dtype)))


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _array_at(address: int, size: int, dtype: np.dtype) -> np.ndarray:
    """The memory at an address as an array, which does not keep it alive."""
    memory: Any = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
    array: np.ndarray = np.frombuffer(memory, dtype)
    return array


def flat(param: Tensor) -> Tensor:
    """The elements of a parameter in C order; a view where possible."""
    return param.detach().contiguous().view(-1)


def some(tensor: Tensor | None) -> Tensor:
    """A tensor that must be there."""
    assert tensor is not None
    return tensor
