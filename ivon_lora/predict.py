"""Prediction with the posterior: probabilities averaged over samples of the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ivon_lora.optimizer import IVON


@torch.no_grad()
def posterior_predict(
    model: nn.Module, optimizer: IVON, forward: Callable[[nn.Module], Tensor], n_samples: int = 8
) -> Tensor:
    """Posterior predictive probabilities: the mean over samples of softmax(logits), not the softmax of mean logits.

    Args:
        model: the model whose parameters the optimizer holds; put it in ``eval()`` mode first if it has dropout.
        optimizer: draws the samples, from a stream of its own that never disturbs training; the model holds the mean
            afterwards.
        forward: ``forward(model)`` returns logits of shape (..., classes).
        n_samples: posterior samples, at least 1.

    Returns:
        probabilities of shape (..., classes), fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: ``n_samples`` is less than 1.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")
    total: Tensor | None = None
    for _ in range(n_samples):
        with optimizer.sampled_params():
            logits = forward(model)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        probabilities = logits.to(dtype).softmax(-1)
        total = probabilities if total is None else total + probabilities
    assert total is not None
    return total / n_samples
