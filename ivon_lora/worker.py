"""What one thread does for the eager backend on CPU: draw the normals of a stretch, run the formulas on its blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ivon_lora.blocks import Block, Rows, Staged, Stretch, some
from ivon_lora.eager_programs import Kind, curvature_program, numbers, sample_program, step_program
from ivon_lora.functional._arrays import Array
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.noise_passes import NormalPasses
from ivon_lora.programs import BrokenAssumption, Program, Scratch

#: memory for the normals of a stretch, or None, and whether they are there already
Normals = tuple[np.ndarray | None, bool]


class Worker:
    """Memory for one stretch at a time, and programs, that stay for the next one.

    A worker keeps some 13 MiB. There is one for each thread (`mine`), whatever the number of optimizers.
    """

    def __init__(self) -> None:
        self._passes, self._drawn = NormalPasses(), Scratch()
        self._scratch, self._rows = Scratch(), Rows()
        self._programs: dict[Hashable, Program] = {}

    def sample(self, stretch: Stretch, normals: Normals, hyper: Hyper, key: NoiseKey, staged: Staged) -> list[int]:
        """`Backend.sample` for the works of a stretch.

        Returns:
            of each block the sum of what has been written (`sum_of_words`); useless where it has gaps.
        """
        sums, common = [], [hyper.noise_ess, hyper.weight_decay]
        with np.errstate(all="ignore"):
            for block, eps in stretch.parts(self._normals(stretch, normals, key)):
                target, eps = staged.view(block), _as_of(eps, key, block)
                active = block.active()
                if active is not None:
                    eps = np.where(active, eps, eps.dtype.type(0.0))
                copy = block.view("mean_copy")
                mean = block.gather("mean", self._rows, 0, copy)
                if mean is not copy and block.has("mean_copy"):
                    block.scatter(mean, "mean_copy")
                (theta,) = self._program(mean.dtype, sample_program).run(
                    self._scratch,
                    block.size,
                    [mean, block.gather("hess", self._rows, 1), eps],
                    [hyper.noise_ess, block.weight_decay(hyper.weight_decay)] if block.has_own_decays else common,
                    out=target,
                )
                if target is None:
                    staged.scatter(block, theta)
                sums.append(sum_of_words(theta))
        return sums

    def bank(self, stretch: Stretch, normals: Normals, hyper: Hyper, key: NoiseKey) -> None:
        """`Backend.bank` for the works of a stretch."""
        with np.errstate(all="ignore"):
            eps_of_all = self._normals(stretch, normals, key) if hyper.needs_noise else None
            for block, start in zip(stretch.blocks, stretch.starts, strict=True):
                grad = block.gather("grad", self._rows, 0)
                arrays = [grad, block.gather("hess", self._rows, 1)]
                if eps_of_all is not None:
                    arrays.append(_as_of(eps_of_all[start : start + block.size], key, block))
                program = self._program(Kind.of(hyper, key, False, False, grad.dtype), curvature_program, "bank")
                (curvature,) = program.run(self._scratch, block.size, arrays, _numbers(block, hyper, 1))
                for s in block.segments:
                    inside = slice(s.offset, s.offset + s.stop - s.start)
                    some(s.work.banked_grad).numpy().reshape(-1)[s.start : s.stop] += grad[inside]
                    some(s.work.banked_curvature).numpy().reshape(-1)[s.start : s.stop] += curvature[inside]

    def step(
        self,
        stretch: Stretch,
        normals: Normals,
        hyper: Hyper,
        key: NoiseKey | None,
        n_samples: int,
        staged: Staged,
    ) -> int:
        """`Backend.step` for the works of a stretch; returns the number of elements that were not finite."""
        nonfinite, common = 0, numbers(hyper, n_samples)
        with np.errstate(all="ignore"):
            eps_of_all = None
            if key is not None and hyper.needs_noise:
                eps_of_all = self._normals(stretch, normals, key)
            for block, start in zip(stretch.blocks, stretch.starts, strict=True):
                active, averaged = block.active(), block.has("banked_grad")
                roles = ("mean", "momentum", "hess", "grad")
                arrays = [block.gather(role, self._rows, number) for number, role in enumerate(roles)]
                if eps_of_all is not None and key is not None:
                    arrays.append(_as_of(eps_of_all[start : start + block.size], key, block))
                if averaged:
                    arrays.append(block.gather("banked_grad", self._rows, 4))
                    arrays.append(block.gather("banked_curvature", self._rows, 5))
                if active is not None:
                    arrays.append(active)
                kind = Kind.of(hyper, key, averaged, active is not None, arrays[0].dtype)
                scalars = _numbers(block, hyper, n_samples) if block.has_own_decays else common
                mean, momentum, hess, missed = self._new_state(kind, block.size, arrays, scalars)
                nonfinite += missed
                block.scatter(momentum, "momentum")
                block.scatter(hess, "hess")
                staged.scatter(block, mean)
                if block.has("mean_state"):
                    block.scatter(mean, "mean_state")
        return nonfinite

    def _new_state(
        self, kind: Kind, size: int, arrays: list[np.ndarray], scalars: list[Array]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """New mean, momentum and Hessian, and how many of them are not finite and stay as they were."""
        if not kind.masked:
            try:
                program = self._program(kind, partial(step_program, assuming=True), "finite step")
                mean, momentum, hess = program.run(self._scratch, size, arrays, scalars)
                return mean, momentum, hess, 0
            except BrokenAssumption:
                pass
        program = self._program(kind, step_program, "step")
        mean, momentum, hess, finite = program.run(self._scratch, size, arrays, scalars)
        return mean, momentum, hess, finite.size - int(np.count_nonzero(finite))

    def sums(self, stretch: Stretch) -> list[int]:
        """`sum_of_words` of the parameters of each block."""
        return [sum_of_words(block.gather("param", self._rows, 0)) for block in stretch.blocks]

    def _normals(self, stretch: Stretch, normals: Normals, key: NoiseKey) -> np.ndarray:
        """fp32, of the draw that is not mirrored; not to be written to."""
        memory, drawn = normals
        if memory is None:
            memory = self._drawn.rows(1, 4 * stretch.size).view(np.float32)[0]
        if not drawn:
            firsts, counts, parameters = stretch.quads
            self._passes.draw(replace(key, mirrored=False), firsts, counts, parameters, memory)
        return memory

    def _program(self, kind: Any, build: Callable[[Any], Program], task: str = "") -> Program:
        program = self._programs.get((task, kind))
        if program is None:
            program = self._programs[task, kind] = build(kind)
        return program


def sum_of_words(values: np.ndarray) -> int:
    """Of pairs of fp32 numbers as 64-bit words, modulo 2^64."""
    even = len(values) & ~1
    return int(values[:even].view(np.int64).sum()) ^ int(values[even:].view(np.int32).sum())


def mine() -> Worker:
    """The worker of this thread."""
    worker = getattr(_workers, "worker", None)
    if worker is None:
        worker = _workers.worker = Worker()
    return worker


_workers = threading.local()


def _as_of(eps: np.ndarray, key: NoiseKey, block: Block) -> np.ndarray:
    """Mirrored if the key is, in the state's dtype."""
    return (-eps if key.mirrored else eps).astype(block.dtype, copy=False)


def _numbers(block: Block, hyper: Hyper, n_samples: int) -> list[Array]:
    return numbers(hyper.under(block.weight_decay(hyper.weight_decay)), n_samples)
