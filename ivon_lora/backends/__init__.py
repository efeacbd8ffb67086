"""Where the work of a step runs: what a backend is given, what it must do, and which one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey

BACKENDS = ("auto", "eager", "triton", "compile")


@dataclass
class Work:
    """One parameter's share of a step.

    Attributes:
        index: index of the parameter in the optimizer, its identity for the noise.
        param: the parameter, or this process's shard of it, of any strides; receives the sample, or the new mean.
        mean: where the mean is read: the parameter itself, or a tensor of the state's dtype; contiguous.
        momentum, hess: state, contiguous, updated in place.
        grad: gradient, contiguous, or None where only a sample is drawn.
        mean_state: fp32 mean of a 16-bit parameter, receives the new mean too; else None.
        banked_grad, banked_curvature: sums over the earlier samples of this step, or None.
        rank_mask: bool (r,), False for ranks that neither move nor get noise, or None; of the whole tensor's ranks.
        rank_dim: the parameter's rank dimension when there is a mask.
        mean_copy: receives the mean before the sample is written, or None.
        reread: where ``mean`` no longer rounds to the (16-bit) parameter, the parameter is the mean.
        offset: index of the first element (C order) in the whole tensor, of which this may be a piece, whose elements
            are neighbours.
        own_decay: fp32, one element, on the device of the parameter: delta of this parameter, which takes the place of
            the call's; or None.
    """

    index: int
    param: Tensor
    mean: Tensor
    momentum: Tensor
    hess: Tensor
    grad: Tensor | None = None
    mean_state: Tensor | None = None
    banked_grad: Tensor | None = None
    banked_curvature: Tensor | None = None
    rank_mask: Tensor | None = None
    rank_dim: int = 0
    mean_copy: Tensor | None = None
    reread: bool = False
    offset: int = 0
    own_decay: Tensor | None = None


@dataclass(frozen=True)
class RankedTensor:
    """One tensor of an adapter: A, B or E.

    Attributes:
        index: index of the parameter in the optimizer.
        shape, rank_dim: its shape, whose dimension ``rank_dim`` is the rank r.
        gate: its ranks get mean and momentum 0 when they are pruned, also while pruning is soft.
        scores: fp32 (r,), receives the scores of the adapter's ranks.
        mask: bool (r,), receives the mask.
        sensitivity, uncertainty: running means of the criterion "sensitivity", updated in place, or None.
    """

    index: int
    shape: tuple[int, ...]
    rank_dim: int
    gate: bool
    scores: Tensor
    mask: Tensor
    sensitivity: Tensor | None = None
    uncertainty: Tensor | None = None


@dataclass(frozen=True)
class Ranking:
    """What a backend needs to score ranks, and to allocate them, inside the launches of a step.

    Attributes:
        adapters: the tensors of each adapter, in the order in which their scores are added: A, B, E.
        criterion: see `scores`.
        frozen: masks are final, and pruned ranks have score 0.
        budget: ranks to keep, or None when no allocation is due.
        min_rank: ranks that every adapter keeps.
        hard: at the allocation all tensors of a pruned rank get mean and momentum 0, not only the gate.
        scored: False: no scores, only the running means of the criterion "sensitivity".
    """

    adapters: list[list[RankedTensor]]
    criterion: str
    frozen: bool
    budget: int | None
    min_rank: int
    hard: bool
    scored: bool = True


class Backend(Protocol):
    """Runs the equations of `reference` over many parameters that share their hyperparameters."""

    name: str
    #: whether it scores and allocates ranks within its launches (`begin_ranking`)
    ranks: bool
    #: whether a step can end with the next sample: it is a `Fused`
    resamples: bool
    #: whether a step can change the works' own deltas: it is a `Fused`
    fits_priors: bool
    #: whether it finds gradients in the table of a `Batch`; otherwise every work must have its own
    reads_table: bool
    #: whether a step can look on the way whether somebody has written over the sample: it is a `Sealing`
    checks_seals: bool

    def sample(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        """Write a posterior sample, mean + sigma eps(key), into every parameter."""
        ...

    def bank(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        """Add the gradient, and the curvature it implies, to the banked sums."""
        ...

    def step(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey | None, n_samples: int) -> None:
        """Update momentum, Hessian and mean, and write the new mean into the parameter.

        Args:
            key: the sample at which ``grad`` was taken; None when there was none, then the Hessian stays.
            n_samples: samples of this step, the banked ones included; where there are banked sums, gradient and
                curvature are (banked + this sample's) / n_samples.
        """
        ...

    def marks(self, works: Sequence[Work]) -> np.ndarray:
        """Numbers that change when somebody writes into one of the parameters, as far as that can be seen cheaply."""
        ...

    def seal(self, works: Sequence[Work]) -> np.ndarray:
        """The same right after `sample`, which may have found them on the way."""
        ...

    def rank_sums(
        self, works: Sequence[Work], rank_dims: Sequence[int], criterion: str, ess: float, weight_decay: float
    ) -> np.ndarray | None:
        """Sums, float64, of the importance of each rank's elements, work after work; None: take `scores.rank_mean`."""
        ...

    def moment_sums(self, works: Sequence[Work], ess: float) -> np.ndarray | None:
        """After `step`: sums, float64 (n,), of `prior.second_moment` over whole tensors; None: `prior` does it."""
        ...

    def zero_ranks(self, works: Sequence[Work]) -> bool:
        """Set mean and momentum of the ranks pruned by the works' masks to zero; False: nothing is done."""
        ...

    def begin_ranking(self, ranking: Ranking) -> None:
        """Before the `step` calls of one step, or `score`: score and allocate on the way. All tensors are in them."""
        ...

    def score(self, works: Sequence[Work], hyper: Hyper) -> None:
        """In place of the `step` calls: score the posterior, or the running means, as they are."""
        ...

    def finish_ranking(self) -> None:
        """After the `step` calls: scores and masks are written then, and pruned ranks are zero."""
        ...

    def drop_ranking(self) -> None:
        """Before `step` calls that do not rank: a ranking that was begun and not finished, if there is one, is over."""
        ...

    def forget_noise(self) -> None:
        """No `step` or `bank` with the key of the last `sample` follows: let go of what was kept for it."""
        ...

    def nonfinite_elements(self) -> Tensor | int:
        """Gradient elements skipped so far because they, or the update they led to, were not finite."""
        ...


class Fused(Backend, Protocol):
    """A backend whose step can also write the next sample instead of the mean, or change priors."""

    def step(
        self,
        works: Sequence[Work],
        hyper: Hyper,
        key: NoiseKey | None,
        n_samples: int,
        following: tuple[Hyper, NoiseKey] | None = None,
        decay_bounds: tuple[float, float] | None = None,
    ) -> None:
        """As `Backend.step`.

        Args:
            following: do what `sample` would do next with these arguments; the mean goes to ``mean_copy`` (or
                ``mean_state``).
            decay_bounds: set ``own_decay`` of all works by the posterior after the step, see `prior`, within these
                bounds; None where there is a ``following``.
        """
        ...


class Sealing(Backend, Protocol):
    """A backend whose step can compare the parameters with their `seal`."""

    def step(
        self,
        works: Sequence[Work],
        hyper: Hyper,
        key: NoiseKey | None,
        n_samples: int,
        seal: np.ndarray | None = None,
        keep_written: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        """As `Backend.step`.

        Args:
            seal: of the parameters, see `Backend.seal`.
            keep_written: is called with the positions of works whose parameters have another one now, and perhaps of
                others, before these are stepped.
        """
        ...


class ScoredFromState:
    """What backends have in common that update parameters only: the pruner reads its scores from the state."""

    ranks = False
    resamples = False
    fits_priors = False
    reads_table = False
    checks_seals = False

    def marks(self, works: Sequence[Work]) -> np.ndarray:
        """See `Backend.marks`."""
        raise NotImplementedError

    def seal(self, works: Sequence[Work]) -> np.ndarray:
        """See `Backend.seal`."""
        return self.marks(works)

    def rank_sums(
        self, works: Sequence[Work], rank_dims: Sequence[int], criterion: str, ess: float, weight_decay: float
    ) -> np.ndarray | None:
        """See `Backend.rank_sums`."""
        return None

    def moment_sums(self, works: Sequence[Work], ess: float) -> np.ndarray | None:
        """See `Backend.moment_sums`."""
        return None

    def zero_ranks(self, works: Sequence[Work]) -> bool:
        """See `Backend.zero_ranks`."""
        return False

    def forget_noise(self) -> None:
        """See `Backend.forget_noise`."""

    def begin_ranking(self, ranking: Ranking) -> None:
        """Refused: ``ranks`` is False."""
        raise RuntimeError("this backend does not rank: the pruner reads its scores from the state")

    def score(self, works: Sequence[Work], hyper: Hyper) -> None:
        """Refused, as `begin_ranking`."""
        raise RuntimeError("this backend does not rank: the pruner reads its scores from the state")

    def finish_ranking(self) -> None:
        """Refused: nothing was begun."""
        raise RuntimeError("no ranking was begun")

    def drop_ranking(self) -> None:
        """See `Backend.drop_ranking`."""


def choose_backend(requested: str, device: torch.device) -> tuple[str, str]:
    """Name of the backend for parameters on ``device``, and the reason.

    Raises:
        ValueError: an unknown name, or one that cannot run there.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {requested!r}")
    if requested == "eager":
        return "eager", "asked for"
    if requested == "compile":
        _check_compile(device)
        return "compile", "asked for"
    if requested == "auto" and device.type != "cuda":  # as PyTorch calls ROCm devices too
        return "eager", "no GPU"
    supported, reason = _triton_supports(device)
    if supported:
        return "triton", reason
    if requested == "auto":
        return "eager", reason
    raise ValueError(f"backend='triton' cannot run on {device}: {reason}; take backend='auto' or 'eager'")


def _check_compile(device: torch.device) -> None:
    if device.type != "cpu":
        raise ValueError(f"backend='compile' runs on CPU, and there are parameters on {device}; take backend='auto'")
    from ivon_lora.backends.compiled import check_compiler

    try:
        check_compiler()
    except ValueError as error:
        raise ValueError(f"backend='compile' {error}; or take backend='eager'") from error


def _triton_supports(device: torch.device) -> tuple[bool, str]:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return False, f"Triton cannot be imported ({error})"
    from ivon_lora.kernels.launch import supports

    return supports(device, torch.float32)


def make_backend(name: str, device: torch.device) -> Backend:
    """The backend ``name`` (of :func:`choose_backend`) for parameters on ``device``."""
    from ivon_lora.backends.eager import BlockedEager, TensorEager

    eager: Backend = BlockedEager() if device.type == "cpu" else TensorEager()
    if name == "eager":
        return eager
    if name == "compile":
        from ivon_lora.backends.compiled import Compiled

        return Compiled()
    from ivon_lora.kernels.launch import TritonBackend
    from ivon_lora.quick_look import quicken

    quicken()
    return TritonBackend(device, fallback=eager)
