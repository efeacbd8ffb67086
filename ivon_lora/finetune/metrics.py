"""How good predicted class probabilities are: accuracy, negative log-likelihood, calibration error, Brier score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Scores", "accuracy", "brier", "ece", "nll", "score"]

ECE_BINS = 15


@dataclass(frozen=True)
class Scores:
    """Metrics on ``n`` sentences. accuracy, ece and brier lie in [0, 1]; nll is in nats a sentence."""

    n: int
    accuracy: float
    nll: float
    ece: float
    brier: float


def score(probabilities: Tensor, labels: Tensor) -> Scores:
    """All metrics of ``probabilities`` (n, classes) against ``labels`` (n,), in double precision."""
    p = probabilities.double()
    return Scores(len(labels), accuracy(p, labels), nll(p, labels), ece(p, labels), brier(p, labels))


def accuracy(p: Tensor, labels: Tensor) -> float:
    """Share of sentences whose most probable class is the label."""
    return float((p.argmax(-1) == labels).double().mean())


def nll(p: Tensor, labels: Tensor) -> float:
    """Mean of -log p(label), nats; probabilities are floored at the smallest normal fp32 number."""
    chosen = p.gather(-1, labels[:, None]).clamp(min=torch.finfo(torch.float32).tiny)
    return float(-chosen.log().mean())


def ece(p: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error of the most probable class over equal-width bins (lower end open, upper closed).

    Naeini, Cooper & Hauskrecht (AAAI 2015); Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), eq. 5.
    """
    confidence, predicted = p.max(-1)
    index = (torch.ceil(confidence * bins) - 1).clamp(0, bins - 1).long()
    right_minus_sure = (predicted == labels).to(p) - confidence
    gap = torch.zeros(bins, dtype=p.dtype).index_add_(0, index.cpu(), right_minus_sure.cpu())
    return float(gap.abs().sum() / len(labels))


def brier(p: Tensor, labels: Tensor) -> float:
    """Half the squared distance to the one-hot label; for two classes this is the mean of (p(class 1) - label)^2."""
    target = torch.nn.functional.one_hot(labels, p.shape[-1]).to(p)
    return float((p - target).square().sum(-1).mean() / 2)
