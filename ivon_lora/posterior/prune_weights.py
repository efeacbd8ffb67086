"""Posterior pruning at test time: single weights with a low signal-to-noise ratio become exactly zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ivon_lora.posterior.posterior import PosteriorFile

__all__ = ["SCOPES", "prune_weights"]

SCOPES = ("tensor", "global")


@torch.no_grad()
def prune_weights(
    posterior: PosteriorFile, fraction: float, scope: str = "tensor", names: Sequence[str] | None = None
) -> PosteriorFile:
    """A copy of the posterior in which the weights with the smallest \\|mean\\| / std are zero, without noise.

    Unstructured pruning after training, as in arXiv:2506.14280; ranks are pruned in training by `RankPruner`.
    ``with prune_weights(snapshot_posterior(optimizer), 0.1).loaded(model): ...`` predicts with the pruned means and
    puts the means back; `posterior_predict` takes the copy in the optimizer's place and samples what is left.

    Args:
        posterior: of `snapshot_posterior` or `load_posterior`; it is not changed.
        fraction: share of the weights to prune, in [0, 1]; round(fraction * number) of them, ties by index. Weights
            that are zero without noise already (of pruned ranks) are not counted.
        scope: "tensor" prunes this share of every tensor; "global" of all tensors together, so that noisy tensors
            lose more.
        names: parameters to prune, e.g. ``[n for n in posterior.names if ".lora_" in n]``, which spares the head; None
            for all.

    Returns:
        a posterior that shares the tensors it did not change.

    Raises:
        ValueError: fraction or scope outside its bounds, or a name that the posterior does not have.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    chosen = list(posterior.names if names is None else dict.fromkeys(names))
    if strangers := [name for name in chosen if name not in posterior.mean]:
        raise ValueError(f"the posterior has no parameter {strangers[0]!r}; its names are in posterior.names")
    mean, std = dict(posterior.mean), dict(posterior.std)
    parts = [[name] for name in chosen] if scope == "tensor" else [chosen]
    for part in filter(None, parts):
        ratios = [(mean[name].double().abs() / std[name].double()).flatten() for name in part]  # 0 / 0 is nan
        dead = _lowest(torch.cat(ratios), fraction).split(list(map(len, ratios)))
        for name, mask in zip(part, dead, strict=True):
            mask = mask.reshape(mean[name].shape)
            mean[name], std[name] = mean[name].masked_fill(mask, 0.0), std[name].masked_fill(mask, 0.0)
    return replace(posterior, mean=mean, std=std)


def _lowest(ratios: Tensor, fraction: float) -> Tensor:
    """Mask of the lowest of ``ratios`` (n,): round(fraction * k) of the k that are numbers."""
    mask = torch.zeros_like(ratios, dtype=torch.bool)
    alive = (~ratios.isnan()).nonzero().flatten()
    mask[alive[torch.sort(ratios[alive], stable=True).indices[: round(fraction * len(alive))]]] = True
    return mask
