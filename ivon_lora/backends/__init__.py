"""Where the work of a step runs: what a backend must do, and which one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ivon_lora.backends.batch import Batch
from ivon_lora.backends.ranking import Ranking
from ivon_lora.functional.noise import NoiseKey

#: values of the argument ``backend``; "compile" is an older name of "cpp"
BACKENDS = ("auto", "eager", "triton", "cpp", "compile")


class Backend(Protocol):
    """Runs the equations of `functional.ivon` over batches of one device; all backends give the same fp32 bits."""

    name: str

    def sample(self, batches: Sequence[Batch], key: NoiseKey) -> None:
        """Keep the mean and write a posterior sample: mean <- param; param <- mean + sigma eps(key).

        Where a parameter of 16 bits still is its mean, rounded, the mean stays as it is.
        """
        ...

    def bank(self, batches: Sequence[Batch], key: NoiseKey) -> None:
        """Add the gradient, and the curvature it implies, to the banked sums."""
        ...

    def step(
        self, batches: Sequence[Batch], key: NoiseKey | None, n_samples: int = 1, ranking: Ranking | None = None
    ) -> None:
        """Update momentum, Hessian and mean, and write the new mean into the parameter.

        Args:
            key: the sample at which the gradient was taken; None where there was none: then the Hessian stays, but
                for the curvature "fisher", which needs no noise.
            n_samples: samples of this step, the banked ones included; where there are banked sums, gradient and
                curvature are (banked + this sample's) / n_samples.
            ranking: what `rank` will be asked for next, so that its sums may be made on the way.
        """
        ...

    def rank_means(self, batches: Sequence[Batch], criterion: str) -> list[Tensor]:
        """Mean importance (see `functional.importance`) of the elements of every rank, as the posterior is now.

        Args:
            batches: of parameters that all have ranks.

        Returns:
            fp32 ``(r,)`` for each parameter, batch after batch: the true mean of the fp32 importances, rounded once.
        """
        ...

    def rank(self, batches: Sequence[Batch], ranking: Ranking) -> bool:
        """Score the ranks; with a budget also write the masks, and set what was pruned to zero.

        Returns:
            False where the backend leaves that to the optimizer, who asks for `rank_means` then.
        """
        ...

    def nonfinite_elements(self) -> Tensor | int:
        """Gradient elements skipped so far because they, or the update they led to, were not finite."""
        ...


def choose_backend(requested: str, device: torch.device) -> tuple[str, str]:
    """Name of the backend for parameters on ``device``, and the reason.

    Raises:
        ValueError: an unknown name, or one that cannot run there.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {requested!r}")
    if requested == "eager":
        return "eager", "asked for"
    if requested in ("cpp", "compile") or (requested == "auto" and device.type == "cpu"):
        from ivon_lora.backends.compiler import why_not

        reason = why_not() if device.type == "cpu" else f"runs on CPU, and there are parameters on {device}"
        if reason is None:
            return "cpp", "CPU, and a C++ compiler"
        if requested == "auto":
            return "eager", f"backend 'cpp' {reason}"
        raise ValueError(f"backend={requested!r} {reason}; take backend='auto' or 'eager'")
    if requested == "auto" and device.type != "cuda":  # as PyTorch calls ROCm devices too
        return "eager", f"no kernels for {device.type}"
    supported, reason = _triton_supports(device)
    if supported:
        return "triton", reason
    if requested == "auto":
        return "eager", reason
    raise ValueError(f"backend='triton' cannot run on {device}: {reason}; take backend='auto' or 'eager'")


def _triton_supports(device: torch.device) -> tuple[bool, str]:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return False, f"Triton cannot be imported ({error})"
    from ivon_lora.kernels.runtime import supports

    return supports(device)


def make_backend(name: str, device: torch.device) -> Backend:
    """The backend ``name`` (of :func:`choose_backend`) for parameters on ``device``."""
    if name == "triton":
        from ivon_lora.kernels.launch import TritonBackend

        return TritonBackend(device)
    if name == "cpp":
        from ivon_lora.backends.cpp import CppBackend

        return CppBackend()
    from ivon_lora.backends.eager import EagerBackend

    return EagerBackend()
