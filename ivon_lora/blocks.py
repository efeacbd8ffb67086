"""Parameters cut, or packed together, into flat blocks of about equal size, for the eager backend on CPU."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ivon_lora.arrays import Array
from ivon_lora.backends import Work
from ivon_lora.batch import Batch, addresses, all_contiguous, dtypes
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

    def row(self, number: int, size: int, dtype: np.dtype) -> np.ndarray:
        """The first ``size`` elements of a row."""
        rows = self._scratch.rows(_N_ROWS, max(size, BLOCK) * dtype.itemsize)
        return rows[number, : size * dtype.itemsize].view(dtype)


class Block:
    """Several whole parameters, or a part of a large one, seen as one flat array.

    Groups of four elements, which share a call of the noise, start at multiples of four; the gaps hold ones.
    """

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments
        self.is_packed = len(segments) > 1
        self.has_gaps = any(s.gaps != (0, 0) for s in segments)
        last = segments[-1]
        self.size = last.offset - last.gaps[0] + 4 * last.n_quads
        #: first group of four, number of groups and parameter of each segment: where its normals are; int64 (3, n)
        self.quads = np.array([(s.first_quad, s.n_quads, s.work.index) for s in segments], np.int64).T.copy()
        self._has_own_decays = any(s.work.own_decay is not None for s in segments)
        self._offsets = np.array([s.offset for s in segments], np.int64) * self.dtype.itemsize
        self._bytes = [(s.stop - s.start) * self.dtype.itemsize for s in segments]

    @property
    def dtype(self) -> np.dtype:
        """Of the state."""
        return np.dtype(np.float64 if self.segments[0].work.hess.dtype == torch.float64 else np.float32)

    def gather(self, tensors: Sequence[Tensor], rows: Rows, number: int) -> np.ndarray:
        """The block's elements of ``tensors`` (one per segment), in the state's dtype; a view where possible.

        Args:
            rows, number: which row may be used.
        """
        if not self.is_packed:
            s, tensor = self.segments[0], tensors[0]
            part, (before, after) = _part(tensor, s.start, s.stop, s.work.hess.dtype), s.gaps
            return np.pad(part, (before, after), constant_values=1.0) if before or after else part
        there = self._together(tensors)
        if there is not None:
            return there
        row = rows.row(number, self.size, self.dtype)
        if self.has_gaps:
            row.fill(1.0)
        if self._are_of_the_state(tensors):
            _copy(self._places(row), addresses(tensors).tolist(), self._bytes)
        else:
            with torch.no_grad():
                torch._foreach_copy_(self._parts(row), list(tensors))
        return row

    def scatter(self, values: np.ndarray, tensors: Sequence[Tensor | None]) -> None:
        """Write the block's elements into contiguous ``tensors`` (one per segment), rounding to their dtype."""
        if not self.is_packed:
            s, tensor = self.segments[0], tensors[0]
            if tensor is not None:
                part = values[s.offset : s.offset + s.stop - s.start]
                if tensor.dtype == s.work.hess.dtype:
                    tensor.detach().numpy().reshape(-1)[s.start : s.stop] = part
                else:
                    tensor.detach().view(-1)[s.start : s.stop] = torch.from_numpy(part)
            return
        there = [tensor for tensor in tensors if tensor is not None]
        target = self._together(there)
        if target is not None:
            np.copyto(target, values)
        elif len(there) == len(tensors) and self._are_of_the_state(there):
            _copy(addresses(there).tolist(), self._places(values), self._bytes)
        elif there:
            parts = [part for part, tensor in zip(self._parts(values), tensors, strict=True) if tensor is not None]
            with torch.no_grad():
                torch._foreach_copy_(there, parts)

    def _together(self, tensors: Sequence[Tensor]) -> np.ndarray | None:
        """The block's elements of ``tensors`` as one array where they lie together as in the block (see `packing`)."""
        if self.has_gaps or len(tensors) < len(self.segments) or not self._are_of_the_state(tensors):
            return None
        starts = addresses(tensors) - self._offsets
        if not (starts == starts[0]).all():
            return None
        storage, first = tensors[0].untyped_storage(), tensors[0].detach()
        if storage.data_ptr() + storage.nbytes() < starts[0] + self.size * self.dtype.itemsize:
            return None  # neighbours by accident
        whole: np.ndarray = first.as_strided((self.size,), (1,), first.storage_offset()).numpy()
        return whole

    def _are_of_the_state(self, tensors: Sequence[Tensor]) -> bool:
        return dtypes(tensors) == {self.segments[0].work.hess.dtype}

    def _places(self, row: np.ndarray) -> list[int]:
        """Addresses of the segments in an array of the block's size."""
        places: list[int] = (self._offsets + row.__array_interface__["data"][0]).tolist()
        return places

    def _parts(self, row: np.ndarray) -> list[Tensor]:
        """A view of the row for each segment, of its tensor's shape."""
        whole = torch.from_numpy(row)
        return [whole[s.offset : s.offset + s.stop - s.start].view(s.work.hess.shape) for s in self.segments]

    def view(self, tensors: Sequence[Tensor]) -> np.ndarray | None:
        """The block's elements of ``tensors`` where they lie as in the block, to write to; else None."""
        if self.is_packed:
            return self._together(tensors)
        s, tensor = self.segments[0], tensors[0]
        if s.gaps != (0, 0) or tensor.dtype != s.work.hess.dtype:
            return None
        return tensor.detach().numpy().reshape(-1)[s.start : s.stop] if tensor.is_contiguous() else None

    def weight_decay(self, common: float) -> Array:
        """delta: ``common``, or one number for each element where parameters have deltas of their own."""
        if not self._has_own_decays:
            return common
        decays = [common if (own := s.work.own_decay) is None else own.numpy() for s in self.segments]
        if not self.is_packed:
            return decays[0]
        ends = [*(s.offset - s.gaps[0] for s in self.segments), self.size]
        return np.repeat(np.array(decays, self.dtype), np.diff(ends))

    def active(self) -> np.ndarray | None:
        """False for the elements of hard-masked ranks; None when there are none."""
        if all(s.work.rank_mask is None for s in self.segments):
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


def stretches_of(works: Sequence[Work]) -> Sequence[Stretch]:
    """The blocks of the works, in stretches; those of a batch are kept as long as it does not change."""
    if not isinstance(works, Batch):
        return _stretches(list(_cut(works)))
    if works.cache.get("block") != BLOCK:
        works.cache |= {"block": BLOCK, "stretches": _stretches(list(_cut(works)))}
    stretches: list[Stretch] = works.cache["stretches"]
    return stretches


def blocks_of(works: Sequence[Work]) -> Iterator[Block]:
    """The blocks of the works, in the order of their stretches."""
    return itertools.chain.from_iterable(stretch.blocks for stretch in stretches_of(works))


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


def _cut(works: Sequence[Work]) -> Iterator[Block]:
    small: list[Segment] = []
    for work in works:
        numel = work.hess.numel()
        if is_small(numel, BLOCK):
            small.append(Segment(work, 0, numel, 0))
            continue
        start = 0
        while start < numel:  # blocks of its own: views, no copies
            before = (work.offset + start) & 3
            stop = min(numel, start + BLOCK - before)
            yield Block([Segment(work, start, stop, before)])
            start = stop
    for pack in packs([4 * s.n_quads for s in small], BLOCK):
        segments, filled = [], 0
        for s in (small[i] for i in pack):
            segments.append(replace(s, offset=filled + s.gaps[0]))
            filled += 4 * s.n_quads
        yield Block(segments)


def are_contiguous(works: Sequence[Work]) -> bool:
    """Whether all parameters are; asked once for a batch."""
    if not isinstance(works, Batch):
        return all_contiguous(w.param for w in works)
    if "contiguous" not in works.cache:
        works.cache["contiguous"] = all_contiguous(w.param for w in works)
    contiguous: bool = works.cache["contiguous"]
    return contiguous


class Staged:
    """Parameters that cannot be written through a flat view (not contiguous) are written here first, then copied."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.works = [] if are_contiguous(works) else [w for w in works if not w.param.is_contiguous()]
        self.copies = {w.index: torch.empty(w.param.shape, dtype=w.param.dtype) for w in self.works}

    def target(self, work: Work) -> Tensor:
        """What to write instead of the parameter."""
        return self.copies.get(work.index, work.param)

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


def _copy(targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
    """Copy bytes from addresses to addresses, which must not overlap."""
    deque(map(ctypes.memmove, targets, sources, sizes), maxlen=0)


def flat(param: Tensor) -> Tensor:
    """The elements of a parameter in C order; a view where possible."""
    return param.detach().contiguous().view(-1)


def some(tensor: Tensor | None) -> Tensor:
    """A tensor that must be there."""
    assert tensor is not None
    return tensor
