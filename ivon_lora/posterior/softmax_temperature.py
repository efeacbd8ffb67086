"""One temperature of the softmax, from validation labels: how sure predictions should be."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from ivon_lora.posterior.metrics import checked

__all__ = ["fit_temperature"]

#: fewer labels give a temperature that is likelier to do harm than good
FEW = 50
#: what a temperature can be: beyond it every prediction is certain, or none is
BOUNDS = (0.05, 20.0)


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The softmax temperature t with the least negative log-likelihood of validation labels (arXiv:1706.04599).

    Predictions become the softmax of log(p) / t: of logits / t where p is the softmax of logits, as it is at the mean.
    No class overtakes another. Above 1 predictions become less certain. It belongs to what was averaged in
    ``probabilities``: the mean is more certain than an average over samples or runs.

    Args:
        probabilities: (n, classes) of the validation examples, e.g. of `posterior_predict`; never of the test set.
        labels: integers (n,), the right class of every example. A warning below 50 of them.

    Returns:
        t in [0.05, 20], for ``posterior_predict(..., softmax_temperature=t)``.

    Raises:
        ValueError: shapes that do not fit, no examples, or a label that is not a class.
    """
    log_p, labels = _log(checked(probabilities, labels)), labels.to(probabilities.device)
    if len(labels) < FEW:
        warnings.warn(
            f"a softmax temperature of {len(labels)} labels: below {FEW} it does more harm than good; use 1 instead",
            stacklevel=2,
        )
    right = log_p.gather(-1, labels[:, None]).mean()
    low, high = (1 / t for t in reversed(BOUNDS))
    for _ in range(50):  # the loss is convex in 1 / t, so its slope has one change of sign
        middle = math.sqrt(low * high)
        slope = ((middle * log_p).softmax(-1) * log_p).sum(-1).mean() - right
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1 / middle


def soften(probabilities: Tensor, temperature: float) -> Tensor:
    """The softmax of log(p) / t over the last dimension; ValueError unless t is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"softmax_temperature must be positive and finite, got {temperature}: above 1 is less certain")
    if temperature == 1:
        return probabilities
    return (_log(probabilities) / temperature).softmax(-1)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()
