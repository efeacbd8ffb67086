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
    strangers = [name for name in chosen if name not in posterior.mean]
    if strangers:
        raise ValueError(f"the posterior has no parameter {strangers[0]!r}; its names are in posterior.names")
    ratios = [signal_to_noise(posterior.mean[name], posterior.std[name]).flatten() for name in chosen]
    if scope == "tensor":
        dead = [_lowest(ratio, fraction) for ratio in ratios]
    else:
        everything = torch.cat(ratios) if ratios else torch.zeros(0)
        dead = list(_lowest(everything, fraction).split([len(ratio) for ratio in ratios]))
    mean, std = dict(posterior.mean), dict(posterior.std)
    for name, mask in zip(chosen, dead, strict=True):
        mask = mask.reshape(mean[name].shape)
        mean[name], std[name] = mean[name].masked_fill(mask, 0.0), std[name].masked_fill(mask, 0.0)
    return replace(posterior, mean=mean, std=std)


def signal_to_noise(mean: Tensor, std: Tensor) -> Tensor:
    """|mean| / std in double precision; where std is 0: infinite, or nan if the mean is 0 too."""
    return mean.double().abs() / std.double()


def _lowest(ratios: Tensor, fraction: float) -> Tensor:
    """Mask of the lowest of ``ratios`` (n,): round(fraction * k) of the k that are numbers."""
    mask = torch.zeros_like(ratios, dtype=torch.bool)
    alive = (~ratios.isnan()).nonzero().flatten()
    mask[alive[torch.sort(ratios[alive], stable=True).indices[: round(fraction * len(alive))]]] = True
    return mask
