"""The precision that an optimizer learned against the Fisher information that the model has on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.posterior.statistics import spearman
from ivon_lora import IVON


@dataclass(frozen=True)
class Agreement:
    """Learned precision per example, h + delta, against the truth, F + delta; elements with F = 0 are left out.

    Attributes:
        spearman: over all elements.
        ceiling: the same between the Fisher information of the two halves of the held-out data.
        within: median over the tensors of the correlation inside one tensor.
        within_ceiling: the ceiling of that.
        variance_ratio: median of learned over true variance, (F + delta) / (h + delta).
        scale: sum of h over sum of F.
    """

    spearman: float
    ceiling: float
    within: float
    within_ceiling: float
    variance_ratio: float
    scale: float


def agreement(optimizer: IVON, params: Sequence[Tensor], halves: tuple[list[Tensor], list[Tensor]]) -> Agreement:
    """Compare the posterior of ``params`` with the Fisher diagonals of the two halves (tensors like ``params``)."""
    group = optimizer.param_groups[0]
    own = [optimizer.state[p].get("weight_decay", group["weight_decay"]) for p in params]  # an empirical prior's
    priors = [np.full(p.numel(), float(decay)) for p, decay in zip(params, own, strict=True)]
    learned = [_flat(1 / (group["ess"] * optimizer.posterior(p).variance.double())) for p in params]
    first, second = ([_flat(f) for f in half] for half in halves)
    truth = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    live = [t > 0 for t in truth]
    h, f, a, b, delta = (
        np.concatenate([x[keep] for x, keep in zip(parts, live, strict=True)])
        for parts in (learned, truth, first, second, priors)
    )
    tensors = [n for n, keep in enumerate(live) if keep.sum() > 20]
    return Agreement(
        spearman=spearman(h, f),
        ceiling=spearman(a, b),
        within=float(np.median([spearman(learned[n][live[n]], truth[n][live[n]]) for n in tensors])),
        within_ceiling=float(np.median([spearman(first[n][live[n]], second[n][live[n]]) for n in tensors])),
        variance_ratio=float(np.median((f + delta) / h)),
        scale=float((h - delta).sum() / f.sum()),
    )


def binary_fisher(params: Sequence[Tensor], logits: Callable[[int], Tensor], indices: Sequence[int]) -> list[Tensor]:
    """Diagonal of the Fisher information of a classifier with two classes, the label's expectation taken exactly.

    grad log p(1) = p(0) grad z and grad log p(0) = -p(1) grad z with z the difference of the logits, so one example
    brings p(0) p(1) (grad z)^2.

    Args:
        params: with respect to what.
        logits: of example number i, shape (2,), with a graph.
        indices: the examples to average over.
    """
    total = [torch.zeros_like(p) for p in params]
    for i in indices:
        pair = logits(i).float()
        p = pair.detach().softmax(-1)
        for sum_, grad in zip(total, torch.autograd.grad(pair[1] - pair[0], params), strict=True):
            sum_.add_(grad.square(), alpha=float(p[0] * p[1]))
    return [t / len(indices) for t in total]


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().double().flatten().numpy()
