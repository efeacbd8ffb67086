"""The optimizers that are compared, by name, for any model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ivon_lora import IVON
from ivon_lora.optim.param_groups import hyper_of

#: AdamW; IVON with the settings published for LoRA; IVON with the defaults of its signature; our defaults
METHODS = ("adamw", "published", "signature", "ours")
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
    temperature: float | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimizer whose ``lr`` is in AdamW's units as far as the method has any.

    Args:
        method: one of `METHODS`.
        params: what it trains.
        lr: learning rate; of "published", learning rate times clip radius.
        temperature: the posterior's; ess is num_examples / temperature. None: 1e7 in "published", 1 in "signature", the
            default in "ours"; AdamW has none.
        num_examples: training examples.
        batch_size: examples averaged into one gradient.
        seed: of the posterior's noise.
        options: passed on to the optimizer.

    Raises:
        ValueError: unknown method.
    """
    if method == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, **options)
    if method == "ours":
        if temperature is not None:
            options["temperature"] = temperature
        if "beta2" in options:
            options["betas"] = (0.9, options.pop("beta2"))
        return IVON.from_adamw(params, lr=lr, num_examples=num_examples, batch_size=batch_size, seed=seed, **options)
    if method == "signature":
        return IVON(params, lr, num_examples / (1.0 if temperature is None else temperature), seed=seed, **options)
    if method == "published":
        ess = 1e7 if temperature is None else num_examples / temperature
        settings: dict[str, Any] = {"hess_init": 1e-3, "clip_radius": PUBLISHED_CLIP, "weight_decay": 0.0}
        settings |= {"rescale_lr": False, "seed": seed, **options}
        return IVON(params, lr / settings["clip_radius"], ess, **settings)
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def clipped_share(optimizer: torch.optim.Optimizer) -> float:
    """Share of the entries of the last update that a clip radius cut; 0 where there is none."""
    if not isinstance(optimizer, IVON):
        return 0.0
    cut = total = 0
    for group in optimizer.param_groups:
        radius = hyper_of(group, optimizer.completed_steps).clip_radius
        for p in group["params"]:
            total += p.numel()
            state = optimizer.state[p]
            if radius == math.inf or "hess" not in state:
                continue
            delta = group["weight_decay"]
            debiased = state["momentum"] / (1 - group["beta1"] ** float(state["step"]))
            if group["step_rule"] == "adam":  # but for the prior's pull
                direction = debiased / (state["hess"] / group["batch_size"]).sqrt()
            else:
                direction = (debiased + delta * p.detach()) / (state["hess"] + delta)
            cut += int((direction.abs() > radius).sum())
    return cut / total
