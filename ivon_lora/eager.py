"""The eager backend: the equations of `reference` over blocks that fit the cache (CPU), or over whole tensors.

On CPU the parameters of a group are cut, or packed together, into `blocks`, so that hundreds of small tensors cost a
handful of passes and large ones no large temporaries. The noise of a sample is kept for the step that follows as far as
there is room (`noise_store`), and drawn again beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivon_lora.arrays import Array
from ivon_lora.backends import ScoredFromState, Work
from ivon_lora.batch import Batch
from ivon_lora.blocks import Block, Rows, Staged, blocks_of, flat, reread_means, some
from ivon_lora.eager_programs import Kind, curvature_program, numbers, sample_program, step_program
from ivon_lora.noise import NoiseKey, normal
from ivon_lora.noise_passes import NormalPasses
from ivon_lora.noise_store import NoiseStore
from ivon_lora.programs import Program, Scratch
from ivon_lora.rank_blocks import rank_sums
from ivon_lora.reference import Hyper, draw_sample, estimate_curvature, ivon_step
from ivon_lora.scores import spread

#: elements whose importance is computed at a time
RANK_BLOCK = 1 << 15


class BlockedEager(ScoredFromState):
    """Eager backend on CPU."""

    name = "eager"

    def __init__(self) -> None:
        self._nonfinite = 0
        self.store, self._passes = NoiseStore(), NormalPasses()
        self._scratch, self._drawn, self._rows = Scratch(), Scratch(), Rows()
        self._programs: dict[Hashable, Program] = {}

    def sample(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        reread_means(works)
        staged, blocks = Staged(works), blocks_of(works)
        if hyper.needs_noise and isinstance(works, Batch):  # a step follows, and will want it
            self.store.open(key, [(block.address, block.size) for block in blocks])
        with np.errstate(all="ignore"):
            for block in blocks:
                segments = block.segments
                targets = [staged.target(s.work) for s in segments]
                target, eps = block.view(targets), self._normals(block, key)
                active = block.active()
                if active is not None:
                    eps = np.where(active, eps, eps.dtype.type(0.0))
                mean = block.gather([s.work.mean for s in segments], self._rows, 0)
                block.scatter(mean, [s.work.mean_copy for s in segments], self._rows, 0)
                (theta,) = self._program(mean.dtype, sample_program).run(
                    self._scratch,
                    block.size,
                    [mean, block.gather([s.work.hess for s in segments], self._rows, 1), eps],
                    [hyper.noise_ess, block.weight_decay(hyper.weight_decay)],
                    out=target,
                )
                if target is None:
                    block.scatter(theta, targets, self._rows, 0)
        staged.finish()

    def bank(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        with np.errstate(all="ignore"):
            for block in blocks_of(works):
                grad = block.gather([some(s.work.grad) for s in block.segments], self._rows, 0)
                kind = Kind.of(hyper, key, False, False, grad.dtype)
                arrays = [grad, block.gather([s.work.hess for s in block.segments], self._rows, 1)]
                arrays += [self._normals(block, key)] if kind.has_noise else []
                program = self._program(kind, curvature_program, "bank")
                (curvature,) = program.run(self._scratch, block.size, arrays, _numbers(block, hyper, 1))
                for s in block.segments:
                    inside = slice(s.offset, s.offset + s.stop - s.start)
                    some(s.work.banked_grad).numpy().reshape(-1)[s.start : s.stop] += grad[inside]
                    some(s.work.banked_curvature).numpy().reshape(-1)[s.start : s.stop] += curvature[inside]

    def step(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey | None, n_samples: int) -> None:
        reread_means(works)
        staged = Staged(works)
        with np.errstate(all="ignore"):
            for block in blocks_of(works):
                segments, active = block.segments, block.active()
                averaged = segments[0].work.banked_grad is not None
                arrays = [
                    block.gather([s.work.mean for s in segments], self._rows, 0),
                    block.gather([s.work.momentum for s in segments], self._rows, 1),
                    block.gather([s.work.hess for s in segments], self._rows, 2),
                    block.gather([some(s.work.grad) for s in segments], self._rows, 3),
                ]
                kind = Kind.of(hyper, key, averaged, active is not None, arrays[0].dtype)
                if kind.has_noise:
                    assert key is not None
                    arrays.append(self._normals(block, key))
                if averaged:
                    arrays.append(block.gather([some(s.work.banked_grad) for s in segments], self._rows, 4))
                    arrays.append(block.gather([some(s.work.banked_curvature) for s in segments], self._rows, 5))
                if active is not None:
                    arrays.append(active)
                program = self._program(kind, step_program, "step")
                scalars = _numbers(block, hyper, n_samples)
                mean, momentum, hess, finite = program.run(self._scratch, block.size, arrays, scalars)
                self._nonfinite += finite.size - int(np.count_nonzero(finite))
                block.scatter(momentum, [s.work.momentum for s in segments], self._rows, 1)
                block.scatter(hess, [s.work.hess for s in segments], self._rows, 2)
                block.scatter(mean, [staged.target(s.work) for s in segments], self._rows, 0)
                if segments[0].work.mean_state is not None:
                    block.scatter(mean, [some(s.work.mean_state) for s in segments], self._rows, 0)
        staged.finish()

    def rank_sums(
        self, works: Sequence[Work], rank_dims: Sequence[int], criterion: str, ess: float, weight_decay: float
    ) -> list[np.ndarray] | None:
        """See `Backend.rank_sums`."""
        if any(w.hess.dtype != torch.float32 for w in works):
            return None
        reread_means(works)
        return rank_sums(works, rank_dims, criterion, ess, weight_decay, RANK_BLOCK)

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
        if any(w.param.dtype != torch.float32 or not w.param.is_contiguous() for w in works):
            return np.array([(w.param._version, _checksum(w.param)) for w in works], np.int64)
        sums = [
            _sum_of_words(block.gather([s.work.param for s in block.segments], self._rows, 0))
            for block in blocks_of(works)
        ]
        return np.array([*(w.param._version for w in works), *sums], np.int64)

    def nonfinite_elements(self) -> int:
        return self._nonfinite

    def _normals(self, block: Block, key: NoiseKey) -> np.ndarray:
        """eps of every element of the block, in the state's dtype; not to be written to."""
        eps = self.store.find(key, block.address)
        if eps is None:
            eps = self.store.keep(key, block.address, block.size)
            if eps is None:
                eps = self._drawn.rows(1, 4 * block.size).view(np.float32)[0]
            firsts, counts, parameters = block.quads
            self._passes.draw(replace(key, mirrored=False), firsts, counts, parameters, eps)
        if key.mirrored:
            eps = -eps
        return eps.astype(block.segments[0].work.hess.numpy().dtype, copy=False)

    def _program(self, kind: Any, build: Callable[[Any], Program], task: str = "") -> Program:
        program = self._programs.get((task, kind))
        if program is None:
            program = self._programs[task, kind] = build(kind)
        return program


def _numbers(block: Block, hyper: Hyper, n_samples: int) -> list[Array]:
    return numbers(hyper.under(block.weight_decay(hyper.weight_decay)), n_samples)


def _sum_of_words(block: np.ndarray) -> int:
    """Of pairs of fp32 numbers as 64-bit words, modulo 2^64."""
    even = len(block) & ~1
    return int(block[:even].view(np.int64).sum()) ^ int(block[even:].view(np.int32).sum())


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
        return np.array([w.param._version for w in works], np.int64)

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
