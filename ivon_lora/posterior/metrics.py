"""How good predicted class probabilities are: accuracy, negative log-likelihood, Brier score, calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

__all__ = ["BINS", "ProbabilityScores", "Reliability", "nll", "reliability", "score_probabilities"]

BINS = 15


@dataclass(frozen=True)
class ProbabilityScores:
    """Metrics of predicted class probabilities on ``n`` examples; all but the nll lie in [0, 1].

    Attributes:
        accuracy: share of examples whose most probable class is the label.
        nll: mean of -log p(label), nats; probabilities are floored at the smallest normal fp32 number.
        ece: expected calibration error of the most probable class: the ``gap`` of `reliability`. Naeini, Cooper &
            Hauskrecht (AAAI 2015); Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), eq. 5.
        brier: half the squared distance to the one-hot label; for two classes this is the mean of (p(class 1) -
            label)^2. Brier, "Verification of forecasts expressed in terms of probability" (1950), divided by two.
    """

    n: int
    accuracy: float
    nll: float
    ece: float
    brier: float


@dataclass(frozen=True)
class Reliability:
    """Examples binned by the probability of their most probable class, in bins of equal width over [0, 1].

    Attributes:
        count: examples in each bin.
        confidence: their mean probability of the predicted class; nan for an empty bin.
        accuracy: the share of them that is predicted right; nan for an empty bin.
    """

    count: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def gap(self) -> float:
        """Expected calibration error of these bins: the mean over examples of |accuracy - confidence| of their bin."""
        rows = zip(self.count, self.confidence, self.accuracy, strict=True)
        return sum(n * abs(right - sure) for n, sure, right in rows if n) / sum(self.count)


def score_probabilities(probabilities: Tensor, labels: Tensor) -> ProbabilityScores:
    """All metrics, in double precision (bins of the calibration error in single).

    Args:
        probabilities: (n, classes), e.g. of `posterior_predict`; every row sums to 1.
        labels: integers (n,), the right class of every example.

    Raises:
        ValueError: shapes that do not fit, no examples, or a label that is not a class.
    """
    p = checked(probabilities, labels)
    labels = labels.to(p.device)
    accuracy = (p.argmax(-1) == labels).double().mean()
    brier = (p - one_hot(labels, p.shape[-1])).square().sum(-1).mean() / 2
    return ProbabilityScores(len(labels), float(accuracy), nll(p, labels), reliability(p, labels).gap, float(brier))


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """That of `score_probabilities`, with its arguments, alone."""
    p = checked(probabilities, labels)
    chosen = p.gather(-1, labels.to(p.device)[:, None]).clamp(min=torch.finfo(torch.float32).tiny)
    return float(-chosen.log().mean())


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """The bins behind the calibration error: how sure the predictions of each bin are, and how often they are right.

    Args:
        probabilities, labels: as `score_probabilities`.
        bins: of equal width, at least 1; a bin contains its lower end.

    Raises:
        ValueError: as `score_probabilities`, or ``bins`` less than 1.
    """
    sure, predicted = checked(probabilities, labels).max(-1)
    return bins_of(sure, predicted.cpu() == labels.cpu(), bins)


def bins_of(confidence: Tensor, right: Tensor, bins: int = BINS) -> Reliability:
    """`reliability` of predictions that are known by their confidence and whether they are right; both ``(n,)``."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    sure = confidence.float().cpu()
    if not bool(torch.isfinite(sure).all()):
        raise ValueError("a confidence is not finite: the model that predicted it has diverged")
    index = torch.bucketize(sure, torch.linspace(0, 1, bins + 1)[1:-1], right=True)
    count = torch.bincount(index, minlength=bins)
    sums = [torch.bincount(index, column, bins) for column in (sure.double(), right.double().cpu())]
    return Reliability(tuple(count.tolist()), *(tuple((total / count).tolist()) for total in sums))


def checked(probabilities: Tensor, labels: Tensor) -> Tensor:
    """``probabilities`` in double precision, detached."""
    if probabilities.dim() != 2 or probabilities.shape[1] < 2 or probabilities.shape[0] < 1:
        raise ValueError(
            f"probabilities must have the shape (n, classes) with one example and two classes or more, got "
            f"{tuple(probabilities.shape)}"
        )
    if labels.shape != probabilities.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape ({probabilities.shape[0]},), one for each row of probabilities, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= probabilities.shape[1]:
        raise ValueError(
            f"labels must lie in [0, {probabilities.shape[1] - 1}], the classes of probabilities, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    return probabilities.detach().double()
