"""The eager backend: the equations of `reference` over blocks that fit the cache (CPU), or over whole tensors.

On CPU the parameters of a group are cut, or packed together, into `blocks`, so that hundreds of small tensors cost a
handful of passes and large ones no large temporaries. The noise of a sample is kept for the step that follows as far as
there is room (`noise_store`), and drawn again beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ivon_lora.backends import ScoredFromState, Work
from ivon_lora.backends.batch import Batch
from ivon_lora.blocks import Staged, Stretch, are_contiguous, blocks_of, flat, reread_means, some, stretches_of
from ivon_lora.functional.importance import spread
from ivon_lora.functional.ivon import Hyper, draw_sample, estimate_curvature, ivon_step
from ivon_lora.functional.noise import NoiseKey, normal
from ivon_lora.layout import Look, dtypes
from ivon_lora.noise_store import NoiseStore
from ivon_lora.rank_blocks import rank_sums
from ivon_lora.worker import Normals, mine

T = TypeVar("T")

#: elements whose importance is computed at a time
RANK_BLOCK = 1 << 15


class BlockedEager(ScoredFromState):
    """Eager backend on CPU.

    Between `sample` and `step` it keeps the normals of the sample, `noise_store.LIMIT` bytes at most. Scratch memory
    belongs to the threads that do the work (`worker`), not to the backend.
    """

    name = "eager"

    def __init__(self) -> None:
        self._nonfinite = 0
        self.store = NoiseStore()
        self._written: dict[int, tuple[Batch, list[int]]] = {}

    def sample(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        reread_means(works)
        batch = Batch.of(works)
        staged, stretches = Staged(batch), stretches_of(batch)
        self._written.pop(id(works), None)
        if hyper.needs_noise and isinstance(works, Batch):  # a step follows, and will want it
            self.store.open(key, [(stretch.address, stretch.size) for stretch in stretches])
        sums = self._for_each(
            stretches, key, lambda stretch, normals: mine().sample(stretch, normals, hyper, key, staged)
        )
        staged.finish()
        if batch is works and _is_summed_by_words(batch) and not any(block.has_gaps for block in blocks_of(batch)):
            self._written[id(works)] = batch, [x for part in sums for x in part]

    def bank(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        self._for_each(
            stretches_of(Batch.of(works)), key, lambda stretch, normals: mine().bank(stretch, normals, hyper, key)
        )

    def step(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey | None, n_samples: int) -> None:
        reread_means(works)
        batch = Batch.of(works)
        staged = Staged(batch)
        found = self._for_each(
            stretches_of(batch),
            key,
            lambda stretch, normals: mine().step(stretch, normals, hyper, key, n_samples, staged),
        )
        self._nonfinite += sum(found)
        staged.finish()

    def _for_each(
        self,
        stretches: Sequence[Stretch],
        key: NoiseKey | None,
        task: Callable[[Stretch, Normals], T],
    ) -> list[T]:
        """The results of a task for each stretch."""
        try:
            return [task(stretch, self._kept(stretch, key)) for stretch in stretches]
        except BaseException:
            self.store.clear()  # what was to be written there may be missing
            raise

    def _kept(self, stretch: Stretch, key: NoiseKey | None) -> Normals:
        if key is None:
            return None, False
        found = self.store.find(key, stretch.address)
        if found is not None:
            return found, True
        return self.store.keep(key, stretch.address, stretch.size), False

    def rank_sums(
        self, works: Sequence[Work], rank_dims: Sequence[int], criterion: str, ess: float, weight_decay: float
    ) -> np.ndarray | None:
        """See `Backend.rank_sums`."""
        if any(w.hess.dtype != torch.float32 for w in works):
            return None
        reread_means(works)
        return np.concatenate(rank_sums(works, rank_dims, criterion, ess, weight_decay, RANK_BLOCK))

    def zero_ranks(self, works: Sequence[Work]) -> bool:
        """See `Backend.zero_ranks`."""
        for w in works:
            dead = torch.nonzero(~some(w.rank_mask)).view(-1)
            for tensor in {t.data_ptr(): t for t in (w.param, w.mean, w.momentum)}.values():
                tensor.detach().index_fill_(w.rank_dim, dead, 0.0)
        return True

    def forget_noise(self) -> None:
        """See `Backend.forget_noise`."""
        self.store.clear()

    def marks(self, works: Sequence[Work]) -> np.ndarray:
        """Version counters of torch, and checksums, which also see what is written through ``p.data``."""
        batch = Batch.of(works)
        versions = [w.param._version for w in works]
        written, sums = self._written.pop(id(works), (None, []))
        if not _is_summed_by_words(batch):
            return np.array([*versions, *(_checksum(w.param) for w in works)], np.int64)
        if written is not works:
            sums = [x for stretch in stretches_of(batch) for x in mine().sums(stretch)]
        return np.array([*versions, *sums], np.int64)

    def nonfinite_elements(self) -> int:
        return self._nonfinite


def _is_summed_by_words(batch: Batch) -> bool:
    """Whether all parameters are fp32 and contiguous."""
    return are_contiguous(batch) and dtypes(w.param for w in batch) <= {torch.float32}


def _checksum(param: Tensor) -> int:
    data = flat(param).view(torch.uint8).numpy()
    whole = len(data) & ~7
    return int(data[:whole].view(np.int64).sum()) ^ int(data[whole:].sum())


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
            decay = _scalars(w, hyper).weight_decay
            w.param.detach().copy_(draw_sample(w.mean.detach(), w.hess, eps, hyper.noise_ess, decay))

    def bank(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        for w in works:
            grad = some(w.grad).to(w.hess.dtype)
            some(w.banked_grad).add_(grad)
            curvature = estimate_curvature(grad, w.hess, _normal_like(w, key), _scalars(w, hyper))
            some(w.banked_curvature).add_(curvature)

    def step(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey | None, n_samples: int) -> None:
        reread_means(works)
        for w in works:
            grad, mine = some(w.grad).to(w.hess.dtype), _scalars(w, hyper)
            curvature = None if key is None else estimate_curvature(grad, w.hess, _normal_like(w, key), mine)
            if w.banked_grad is not None:
                grad = (grad + some(w.banked_grad)) / n_samples
                curvature = (some(curvature) + some(w.banked_curvature)) / n_samples
            mean, momentum, hess, finite = ivon_step(
                w.mean.detach(), w.momentum, w.hess, grad, curvature, mine, _active(w)
            )
            self._nonfinite = self._nonfinite + (~finite).sum()
            w.momentum.copy_(momentum)
            w.hess.copy_(hess)
            w.param.detach().copy_(mean)
            if w.mean_state is not None:
                w.mean_state.copy_(mean)

    def marks(self, works: Sequence[Work]) -> np.ndarray:
        """Version counters of torch: they do not see what is written through ``p.data``, but wait for no device."""
        if not isinstance(works, Batch):
            return Look.tensors([w.param for w in works]).versions()
        if "params" not in works.cache:
            works.cache["params"] = Look.tensors([w.param for w in works])
        versions: np.ndarray = works.cache["params"].versions()
        return versions

    def nonfinite_elements(self) -> Tensor | int:
        return self._nonfinite


def _scalars(work: Work, hyper: Hyper) -> Hyper:
    return hyper if work.own_decay is None else hyper.under(work.own_decay.to(work.hess.dtype))


def _normal_like(work: Work, key: NoiseKey) -> Tensor:
    return normal(key, work.index, work.param.shape, work.param.device, work.offset).to(work.hess.dtype)


def _active(work: Work) -> Tensor | None:
    if work.rank_mask is None:
        return None
    shape, mask = tuple(work.param.shape), work.rank_mask
    if work.rank_dim == 0:  # a piece has some of the ranks
        mask = mask.narrow(0, work.offset // max(math.prod(shape[1:]), 1), shape[0])
    return spread(mask, work.rank_dim, shape)
