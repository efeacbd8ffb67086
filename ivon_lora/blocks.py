"""Parameters cut, or packed together, into flat blocks of about equal size, for the eager backend on CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ivon_lora.arrays import Array
from ivon_lora.backends import Work
from ivon_lora.batch import Batch
from ivon_lora.programs import Scratch

#: elements per block: large enough to hide what a call of numpy costs, small enough for the caches
BLOCK = 1 << 17

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
    """A few rows of memory that packed blocks are copied into, one after the other, and out of."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def row(self, number: int, size: int, dtype: np.dtype) -> tuple[np.ndarray, tuple[int, int, int]]:
        """The first ``size`` elements of a row, and what identifies that memory."""
        rows = self._scratch.rows(_N_ROWS, max(size, BLOCK) * dtype.itemsize)
        return rows[number, : size * dtype.itemsize].view(dtype), (self._scratch.identity, number, rows.shape[1])


class Block:
    """Several whole parameters, or a part of a large one, seen as one flat array.

    Groups of four elements, which share a call of the noise, start at multiples of four; the gaps hold ones.
    """

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments
        self.is_packed = len(segments) > 1
        self._has_gaps = any(s.gaps != (0, 0) for s in segments)
        self._views: dict[tuple[int, int, int], list[Tensor]] = {}
        last = segments[-1]
        self.size = last.offset - last.gaps[0] + 4 * last.n_quads
        #: first group of four, number of groups and parameter of each segment: where its normals are; int64 (3, n)
        self.quads = np.array([(s.first_quad, s.n_quads, s.work.index) for s in segments], np.int64).T.copy()
        self.address = self.quads.tobytes()
        self._has_own_decays = any(s.work.own_decay is not None for s in segments)

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
        row, views = self._packed(rows, number)
        if self._has_gaps:
            row.fill(1.0)
        with torch.no_grad():
            torch._foreach_copy_(views, list(tensors))
        return row

    def scatter(self, values: np.ndarray, tensors: Sequence[Tensor | None], rows: Rows, number: int) -> None:
        """Write the block's elements into contiguous ``tensors`` (one per segment), rounding to their dtype.

        Args:
            rows, number: which row may be used.
        """
        if not self.is_packed:
            s, tensor = self.segments[0], tensors[0]
            if tensor is not None:
                part = values[s.offset : s.offset + s.stop - s.start]
                if tensor.dtype == s.work.hess.dtype:
                    tensor.numpy().reshape(-1)[s.start : s.stop] = part
                else:
                    tensor.view(-1)[s.start : s.stop] = torch.from_numpy(part)
            return
        row, views = self._packed(rows, number)
        pairs = [(tensor, view) for tensor, view in zip(tensors, views, strict=True) if tensor is not None]
        if pairs:
            if row.ctypes.data != values.ctypes.data:
                np.copyto(row, values)
            with torch.no_grad():
                torch._foreach_copy_([tensor for tensor, _ in pairs], [view for _, view in pairs])

    def _packed(self, rows: Rows, number: int) -> tuple[np.ndarray, list[Tensor]]:
        """A row, and a view of it for each segment, of its tensor's shape."""
        row, identity = rows.row(number, self.size, self.dtype)
        views = self._views.get(identity)
        if views is None:
            whole = torch.from_numpy(row)
            views = [whole[s.offset : s.offset + s.stop - s.start].view(s.work.hess.shape) for s in self.segments]
            if len(self._views) >= _N_ROWS:  # of memory that has been replaced
                self._views.clear()
            self._views[identity] = views
        return row, views

    def view(self, tensors: Sequence[Tensor]) -> np.ndarray | None:
        """The block's elements of ``tensors`` where they lie as in the block, to write to; else None."""
        s, tensor = self.segments[0], tensors[0]
        if self.is_packed or s.gaps != (0, 0) or tensor.dtype != s.work.hess.dtype:
            return None
        return tensor.numpy().reshape(-1)[s.start : s.stop] if tensor.is_contiguous() else None

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


def blocks_of(works: Sequence[Work]) -> Sequence[Block]:
    """The blocks of the works; those of a batch are kept as long as it does not change."""
    if not isinstance(works, Batch):
        return list(_cut(works))
    if works.cache.get("block") != BLOCK:
        works.cache |= {"block": BLOCK, "blocks": list(_cut(works))}
    blocks: list[Block] = works.cache["blocks"]
    return blocks


def _cut(works: Sequence[Work]) -> Iterator[Block]:
    segments: list[Segment] = []
    filled = 0
    for work in works:
        numel = work.hess.numel()
        start = 0
        while start < numel:
            # Large tensors get blocks of their own: views, no copies. Small ones are not cut.
            if filled and (numel >= BLOCK or filled + numel + 4 > BLOCK):
                yield Block(segments)
                segments, filled = [], 0
            before = (work.offset + start) & 3
            stop = min(numel, start + BLOCK - filled - before)
            segments.append(Segment(work, start, stop, filled + before))
            filled += 4 * segments[-1].n_quads
            start = stop
            if numel >= BLOCK:
                yield Block(segments)
                segments, filled = [], 0
    if segments:
        yield Block(segments)


class Staged:
    """Parameters that cannot be written through a flat view (not contiguous) are written here first, then copied."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.copies = {
            w.index: torch.empty(w.param.shape, dtype=w.param.dtype) for w in works if not w.param.is_contiguous()
        }
        self.works = works

    def target(self, work: Work) -> Tensor:
        return self.copies.get(work.index, work.param.detach())

    def finish(self) -> None:
        for work in self.works:
            if work.index in self.copies:
                work.param.detach().copy_(self.copies[work.index])


def reread_means(works: Sequence[Work]) -> None:
    """Where the mean no longer rounds to a 16-bit parameter, somebody has written there: the parameter is the mean."""
    for w in works:
        if w.reread:
            for mean, param in zip(w.mean.view(-1).split(BLOCK), flat(w.param).split(BLOCK), strict=True):
                mean.copy_(torch.where(mean.to(param.dtype) == param, mean, param.to(mean.dtype)))


def flat(param: Tensor) -> Tensor:
    """The elements of a parameter in C order; a view where possible."""
    return param.detach().contiguous().view(-1)


def some(tensor: Tensor | None) -> Tensor:
    """A tensor that must be there."""
    assert tensor is not None
    return tensor
