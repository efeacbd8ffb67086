"""One temperature of the softmax: how sure predictions should be, by labels or, without any, by the posterior."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ivon_lora.posterior.metrics import checked

__all__ = ["fit_temperature"]

#: fewer labels give a temperature that is likelier to do harm than good
FEW = 50
#: what a temperature can be: beyond it every prediction is certain, or none is
BOUNDS = (0.05, 20.0)


def fit_temperature(probabilities: Tensor, targets: Tensor) -> float:
    """The softmax temperature t with the least cross-entropy to targets, e.g. validation labels (arXiv:1706.04599).

    Predictions become the softmax of log(p) / t: of logits / t where p is the softmax of logits, as it is at the mean.
    No class overtakes another. Above 1 predictions become less certain. It belongs to what was averaged in
    ``probabilities``: the mean is more certain than an average over samples or runs.

    Without labels, the average over posterior samples can stand for them: the mean, which predicts right more often,
    then is as certain as the posterior is, in one pass.

    Args:
        probabilities: (n, classes), e.g. of `posterior_predict`, of examples that were not trained on.
        targets: integers (n,), the right class of every example, never of the test set; or probabilities (n, classes).
            A warning below 50 of them.

    Returns:
        t in [0.05, 20], for ``posterior_predict(..., softmax_temperature=t)``.

    Raises:
        ValueError: shapes that do not fit, no examples, or a label that is not a class.
    """
    soft = targets.is_floating_point()
    if soft and targets.shape != probabilities.shape:
        raise ValueError(
            f"targets must be labels (n,) or probabilities of the shape of probabilities, "
            f"{tuple(probabilities.shape)}, got {tuple(targets.shape)}"
        )
    log_p = floored_log(checked(probabilities, targets.argmax(-1) if soft else targets))
    wanted = targets.to(log_p) if soft else one_hot(targets.to(log_p.device), log_p.shape[-1])
    warn_if_few(len(log_p), "examples")
    aim = (wanted * log_p).sum(-1).mean()
    low, high = (1 / t for t in reversed(BOUNDS))
    for _ in range(50):  # the loss is convex in 1 / t, so its slope has one change of sign
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean_log(log_p, middle).mean() < aim else (low, middle)
    return 1 / middle


def soften(probabilities: Tensor, temperature: float) -> Tensor:
    """The softmax of log(p) / t over the last dimension; ValueError unless t is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"softmax_temperature must be positive and finite, got {temperature}: above 1 is less certain")
    if temperature == 1:
        return probabilities
    return (floored_log(probabilities) / temperature).softmax(-1)


def mean_log(log_p: Tensor, sharpness: float) -> Tensor:
    """The mean of log p under the softmax of ``sharpness`` log p: (n, classes) -> (n,).

    The loss of a label, as a function of ``sharpness`` = 1 / t, has the slope of this minus the label's log p.
    """
    return (sharpness * log_p).softmax(-1).mul_(log_p).sum(-1)


def warn_if_few(count: int, what: str) -> None:
    """Warn of a temperature that so many labels are too few for."""
    if count < FEW:
        message = f"a softmax temperature of {count} {what}: below {FEW} it does more harm than good; use 1 instead"
        warnings.warn(message, stacklevel=3)


def floored_log(probabilities: Tensor) -> Tensor:
    """The logarithm; of 0 that of the smallest normal fp32 number."""
    return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()
