"""The eager backend: the equations of `reference` over blocks that fit the cache (CPU), or over whole tensors.

On CPU the parameters of a group are cut, or packed together, into blocks of equal size, so that hundreds of small
tensors cost a handful of passes and large ones no large temporaries. The noise of a block is regenerated from the key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ivon_lora.arrays import Array
from ivon_lora.backends import ScoredFromState, Work
from ivon_lora.batch import Batch
from ivon_lora.noise import NoiseKey, normal, normals_of_quads
from ivon_lora.reference import Hyper, draw_sample, estimate_curvature, ivon_step
from ivon_lora.scores import spread

#: elements per block: large enough to hide Python's cost per call, small enough for the second-level cache
BLOCK = 1 << 15


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


class Block:
    """Segments of several parameters, or a part of a large one, seen as one flat array.

    Groups of four elements, which share a call of the noise, start at multiples of four; the gaps hold ones.
    """

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments
        # several whole tensors one after the other: torch moves them in one call
        self._flat = len(segments) > 1 and all(
            s.start == 0 and s.stop == s.work.hess.numel() and s.gaps == (0, 0) for s in segments
        )
        last = segments[-1]
        self.size = last.offset - last.gaps[0] + 4 * last.n_quads

    def gather(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """The block's elements of ``tensors`` (one per segment), in the state's dtype; a view where possible."""
        dtype = self.segments[0].work.hess.dtype
        if self._flat and all(tensor.dtype == dtype for tensor in tensors):
            return torch._utils._flatten_dense_tensors(tensors).detach().numpy()
        parts: list[np.ndarray] = []
        for s, tensor in zip(self.segments, tensors, strict=True):
            part, (before, after) = _part(tensor, s.start, s.stop, dtype), s.gaps
            parts += [np.ones(before, part.dtype), part] if before else [part]
            if after:
                parts.append(np.ones(after, part.dtype))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def scatter(self, values: np.ndarray, tensors: Sequence[Tensor | None]) -> None:
        """Write the block's elements into contiguous ``tensors`` (one per segment), rounding to their dtype."""
        present = [tensor for tensor in tensors if tensor is not None]
        if self._flat and len(present) == len(tensors):
            views = torch._utils._unflatten_dense_tensors(torch.from_numpy(values), present)
            torch._foreach_copy_(present, views)
            return
        for s, tensor in zip(self.segments, tensors, strict=True):
            if tensor is None:
                continue
            part = values[s.offset : s.offset + s.stop - s.start]
            if tensor.dtype == s.work.hess.dtype:
                tensor.numpy().reshape(-1)[s.start : s.stop] = part
            else:
                tensor.view(-1)[s.start : s.stop] = torch.from_numpy(part)

    def normals(self, key: NoiseKey) -> np.ndarray:
        """eps of every element of the block, in the state's dtype."""
        out = np.empty((self.size >> 2, 4), np.float32)
        starts = [s.first_quad for s in self.segments]
        counts = [s.n_quads for s in self.segments]
        quads = np.concatenate([np.arange(a, a + n, dtype=np.uint64) for a, n in zip(starts, counts, strict=True)])
        parameters = np.repeat(np.array([s.work.index for s in self.segments], np.uint64), counts)
        normals_of_quads(key, quads, parameters, out)
        return out.reshape(-1).astype(self.segments[0].work.hess.numpy().dtype, copy=False)

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
    mask = _some(work.rank_mask).numpy()
    inner = math.prod(work.param.shape[work.rank_dim + 1 :])
    start, stop = work.offset + start, work.offset + stop
    first, last = start // inner, -(-stop // inner)
    return np.repeat(mask[np.arange(first, last) % len(mask)], inner)[start - first * inner : stop - first * inner]


def _blocks(works: Sequence[Work]) -> Iterable[Block]:
    """The blocks of the works; those of a batch are kept as long as it does not change."""
    if not isinstance(works, Batch):
        return _cut(works)
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
    if segments:
        yield Block(segments)


class _Staged:
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
            for mean, param in zip(w.mean.view(-1).split(BLOCK), _flat(w.param).split(BLOCK), strict=True):
                mean.copy_(torch.where(mean.to(param.dtype) == param, mean, param.to(mean.dtype)))


def _flat(param: Tensor) -> Tensor:
    return param.detach().contiguous().view(-1)


class BlockedEager(ScoredFromState):
    """Eager backend on CPU."""

    name = "eager"

    def __init__(self) -> None:
        self._nonfinite = 0

    def sample(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        reread_means(works)
        staged = _Staged(works)
        with np.errstate(all="ignore"):
            for block in _blocks(works):
                eps = block.normals(key)
                active = block.active()
                if active is not None:
                    eps[~active] = 0.0
                mean = block.gather([s.work.mean for s in block.segments])
                block.scatter(mean, [s.work.mean_copy for s in block.segments])
                theta = draw_sample(
                    mean,
                    block.gather([s.work.hess for s in block.segments]),
                    eps,
                    hyper.noise_ess,
                    hyper.weight_decay,
                )
                block.scatter(theta, [staged.target(s.work) for s in block.segments])
        staged.finish()

    def bank(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        with np.errstate(all="ignore"):
            for block in _blocks(works):
                grad, curvature = _observed(block, hyper, key)
                assert curvature is not None
                for s in block.segments:
                    assert s.work.banked_grad is not None and s.work.banked_curvature is not None
                    inside = slice(s.offset, s.offset + s.stop - s.start)
                    s.work.banked_grad.numpy().reshape(-1)[s.start : s.stop] += grad[inside]
                    s.work.banked_curvature.numpy().reshape(-1)[s.start : s.stop] += curvature[inside]

    def step(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey | None, n_samples: int) -> None:
        reread_means(works)
        staged = _Staged(works)
        with np.errstate(all="ignore"):
            for block in _blocks(works):
                segments = block.segments
                grad, curvature = _observed(block, hyper, key)
                if segments[0].work.banked_grad is not None:
                    assert curvature is not None
                    grad = (grad + block.gather([_some(s.work.banked_grad) for s in segments])) / n_samples
                    curvature = (
                        curvature + block.gather([_some(s.work.banked_curvature) for s in segments])
                    ) / n_samples
                mean, momentum, hess, finite = ivon_step(
                    block.gather([s.work.mean for s in segments]),
                    block.gather([s.work.momentum for s in segments]),
                    block.gather([s.work.hess for s in segments]),
                    grad,
                    curvature,
                    hyper,
                    block.active(),
                )
                self._nonfinite += finite.size - int(np.count_nonzero(finite))
                block.scatter(momentum, [s.work.momentum for s in segments])
                block.scatter(hess, [s.work.hess for s in segments])
                block.scatter(mean, [staged.target(s.work) for s in segments])
                if segments[0].work.mean_state is not None:
                    block.scatter(mean, [_some(s.work.mean_state) for s in segments])
        staged.finish()

    def marks(self, works: Sequence[Work]) -> np.ndarray:
        """Version counters of torch, and checksums, which also see what is written through ``p.data``."""
        if any(w.param.dtype != torch.float32 or not w.param.is_contiguous() for w in works):
            return np.array([(w.param._version, _checksum(w.param)) for w in works], np.int64)
        sums = [
            np.sum(block.gather([s.work.param for s in block.segments]).view(np.int32), dtype=np.int64)
            for block in _blocks(works)
        ]
        return np.array([*(w.param._version for w in works), *sums], np.int64)

    def nonfinite_elements(self) -> int:
        return self._nonfinite


def _checksum(param: Tensor) -> int:
    data = _flat(param).view(torch.uint8).numpy()
    whole = len(data) & ~7
    return int(data[:whole].view(np.int64).sum()) ^ int(data[whole:].sum())


def _some(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _observed(block: Block, hyper: Hyper, key: NoiseKey | None) -> tuple[np.ndarray, Array | None]:
    """Gradient of the block, and the curvature it implies at the sample ``key``."""
    grad = block.gather([_some(s.work.grad) for s in block.segments])
    if key is None:
        return grad, None
    hess = block.gather([s.work.hess for s in block.segments])
    return grad, estimate_curvature(grad, hess, block.normals(key) if hyper.needs_noise else None, hyper)


class TensorEager(ScoredFromState):
    """Eager backend on any device: the same equations, whole tensors, plain torch operations."""

    name = "eager"

    def __init__(self) -> None:
        self._nonfinite: Tensor | int = 0

    def sample(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        reread_means(works)
        for w in works:
            if w.mean_copy is not None:
                w.mean_copy.copy_(w.mean)
            eps = _normal_like(w, key)
            active = _active(w)
            if active is not None:
                eps = eps * active
            w.param.detach().copy_(draw_sample(w.mean.detach(), w.hess, eps, hyper.noise_ess, hyper.weight_decay))

    def bank(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        for w in works:
            grad = _some(w.grad).to(w.hess.dtype)
            _some(w.banked_grad).add_(grad)
            _some(w.banked_curvature).add_(estimate_curvature(grad, w.hess, _normal_like(w, key), hyper))

    def step(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey | None, n_samples: int) -> None:
        reread_means(works)
        for w in works:
            grad = _some(w.grad).to(w.hess.dtype)
            curvature = None if key is None else estimate_curvature(grad, w.hess, _normal_like(w, key), hyper)
            if w.banked_grad is not None:
                grad = (grad + _some(w.banked_grad)) / n_samples
                curvature = (_some(curvature) + _some(w.banked_curvature)) / n_samples
            mean, momentum, hess, finite = ivon_step(
                w.mean.detach(), w.momentum, w.hess, grad, curvature, hyper, _active(w)
            )
            self._nonfinite = self._nonfinite + (~finite).sum()
            w.momentum.copy_(momentum)
            w.hess.copy_(hess)
            w.param.detach().copy_(mean)
            if w.mean_state is not None:
                w.mean_state.copy_(mean)

    def marks(self, works: Sequence[Work]) -> np.ndarray:
        """Version counters of torch: they do not see what is written through ``p.data``, but wait for no device."""
        return np.array([w.param._version for w in works], np.int64)

    def nonfinite_elements(self) -> Tensor | int:
        return self._nonfinite


def _normal_like(work: Work, key: NoiseKey) -> Tensor:
    return normal(key, work.index, work.param.shape, work.param.device, work.offset).to(work.hess.dtype)


def _active(work: Work) -> Tensor | None:
    if work.rank_mask is None:
        return None
    shape, mask = tuple(work.param.shape), work.rank_mask
    if work.rank_dim == 0:  # a piece has some of the ranks
        mask = mask.narrow(0, work.offset // max(math.prod(shape[1:]), 1), shape[0])
    return spread(mask, work.rank_dim, shape)
