"""The optimizers that are compared, by name, for any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ivon_lora import IVON

#: AdamW; IVON as its authors configure it; our defaults
METHODS = ("adamw", "published", "ours")
#: of the published settings for LoRA (arXiv:2411.04421): most entries are clipped, so lr * clip is the step
PUBLISHED_CLIP = 1e-3


def make_optimizer(
    method: str,
    params: Sequence[Tensor],
    lr: float,
    *,
    num_examples: int,
    batch_size: int,
    seed: int,
    ess: float | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimizer whose ``lr`` is in AdamW's units as far as the method has any.

    Args:
        method: one of `METHODS`.
        params: what it trains.
        lr: learning rate; of "published", learning rate times clip radius.
        num_examples: training examples.
        batch_size: examples averaged into one gradient.
        seed: of the posterior's noise.
        ess: of "published" only.
        options: passed on to `IVON.from_adamw` by "ours", to `IVON` by "published".

    Raises:
        ValueError: unknown method.
    """
    if method == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, **options)
    if method == "published":
        settings: dict[str, Any] = {"hess_init": 1e-3, "clip_radius": PUBLISHED_CLIP, "weight_decay": 0.0}
        settings |= {"ess": 1e7 if ess is None else ess, "rescale_lr": False, "seed": seed, **options}
        return IVON(params, lr=lr / settings["clip_radius"], **settings)
    if method == "ours":
        return IVON.from_adamw(params, lr=lr, num_examples=num_examples, batch_size=batch_size, seed=seed, **options)
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def clipped_share(optimizer: torch.optim.Optimizer) -> float:
    """Share of the entries of the last update that the clip radius cut; 0 where there is no radius."""
    cut = total = 0
    for group in optimizer.param_groups:
        radius = group.get("clip_radius", float("inf"))
        for p in group["params"]:
            total += p.numel()
            state = optimizer.state[p]
            if radius == float("inf") or "hess" not in state:
                continue
            delta = group["weight_decay"]
            debiased = state["momentum"] / (1 - group["beta1"] ** float(state["step"]))
            newton = (debiased + delta * p.detach()) / (state["hess"] + delta)
            cut += int((newton.abs() > radius).sum())
    return cut / total
