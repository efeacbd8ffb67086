"""The equations of `reference` as programs of numpy passes: what the eager backend runs on each block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ivon_lora.functional._arrays import Array
from ivon_lora.functional.ivon import NUMBERS, Hyper, draw_sample, estimate_curvature, ivon_step
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.programs import BOOL, FLOAT, Program, Symbol


@dataclass(frozen=True)
class Kind:
    """Which operations a step consists of.

    Attributes:
        curvature: as in `Hyper`, or "none" for a step without a sample.
        step_rule: as in `Hyper`.
        clips: the clip radius is finite.
        averaged: the step takes the mean with banked gradients and curvatures.
        masked: some ranks do not move.
        dtype: of the state.
    """

    curvature: str
    step_rule: str
    clips: bool
    averaged: bool
    masked: bool
    dtype: np.dtype

    @staticmethod
    def of(hyper: Hyper, key: NoiseKey | None, averaged: bool, masked: bool, dtype: np.dtype) -> Kind:
        """The kind of a step with these scalars; ``key`` as in `Backend.step`."""
        curvature = "none" if key is None else hyper.curvature
        return Kind(curvature, hyper.step_rule, not math.isinf(hyper.clip_radius), averaged, masked, dtype)

    @property
    def has_noise(self) -> bool:
        """Whether eps is among the arrays."""
        return self.curvature == "price"


def numbers(hyper: Hyper, n_samples: int) -> list[Array]:
    """What the programs of a step and of a bank take as numbers; delta may be an array."""
    return [*(getattr(hyper, name) for name in NUMBERS), n_samples]


def sample_program(dtype: np.dtype) -> Program:
    """Mean, Hessian, eps, and the numbers lambda and delta -> theta."""
    return Program(lambda *arguments: [draw_sample(*arguments)], [FLOAT] * 3, 2, dtype)


def curvature_program(kind: Kind) -> Program:
    """Gradient, Hessian, [eps], and `numbers` -> curvature."""
    n_arrays = 3 if kind.has_noise else 2

    def formula(*arguments: Symbol) -> Sequence[Symbol]:
        arrays, (hyper, _) = arguments[:n_arrays], _hyper(kind, arguments[n_arrays:])
        eps: Any = arrays[2] if kind.has_noise else None
        return [estimate_curvature(arrays[0], arrays[1], eps, hyper)]

    return Program(formula, [FLOAT] * n_arrays, len(NUMBERS) + 1, kind.dtype)


def step_program(kind: Kind, assuming: bool = False) -> Program:
    """Mean, momentum, Hessian, gradient, [eps], [both banked sums], [active], and `numbers` -> the new mean, momentum
    and Hessian, and where they are finite.

    Args:
        assuming: that they are finite, and the Hessian positive, everywhere; there is no fourth result then.
    """
    kinds = [FLOAT] * (4 + kind.has_noise + 2 * kind.averaged) + [BOOL] * kind.masked

    def formula(*arguments: Symbol) -> Sequence[Symbol]:
        arrays, (hyper, n_samples) = list(arguments[: len(kinds)]), _hyper(kind, arguments[len(kinds) :])
        mean, momentum, hess, grad, *rest = arrays
        eps: Any = rest.pop(0) if kind.has_noise else None
        curvature = None if kind.curvature == "none" else estimate_curvature(grad, hess, eps, hyper)
        if kind.averaged:
            assert curvature is not None
            grad, curvature = (grad + rest.pop(0)) / n_samples, (curvature + rest.pop(0)) / n_samples
        new = ivon_step(mean, momentum, hess, grad, curvature, hyper, rest.pop() if kind.masked else None)
        return new[:3] if assuming else new

    return Program(formula, kinds, len(NUMBERS) + 1, kind.dtype, assuming)


def _hyper(kind: Kind, symbols: Sequence[Any]) -> tuple[Hyper, Any]:
    named = dict(zip(NUMBERS, symbols[:-1], strict=True))
    if not kind.clips:
        named["clip_radius"] = math.inf
    return Hyper(**named, curvature=kind.curvature, step_rule=kind.step_rule), symbols[-1]
