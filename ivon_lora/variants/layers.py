"""Layers of a model: which of them a method takes, in which block each lies, and which ones to adapt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise

import torch
from torch import nn

from ivon_lora.lora.adapters import LoraLayer, lora_layers
from ivon_lora.lora.names import innermost


def checked_layers(
    model: nn.Module, adapter_name: str, what: str, why_not: Callable[[LoraLayer], str | None]
) -> list[LoraLayer]:
    """All LoRA layers; ValueError, which begins with ``what``, if ``why_not(layer)`` has a reason against one."""
    layers = lora_layers(model, adapter_name)
    for layer in layers:
        if reason := why_not(layer):
            raise ValueError(f"layer {layer.name!r} {what}: {reason}")
    return layers


def unsupported(layer: LoraLayer) -> str | None:
    """Why a layer has no modules A and B with a rank axis of their own; None if it has."""
    reason = "it is an embedding" if layer.is_embedding else layer.why_not
    return None if reason is None else f"{reason}; leave it out of target_modules"


def merged_in_forward(layer: LoraLayer) -> str | None:
    """Why no forward of A, of B or of the base layer is run on its own; None if they are."""
    if not isinstance(innermost(layer.module), nn.MultiheadAttention):
        return None
    return "PEFT merges A and B into nn.MultiheadAttention; leave it out of target_modules"


def not_a_product(layer: LoraLayer, adapter_name: str) -> str | None:
    """Why the update of a layer is not s B A; None if it is."""
    if layer.E is None and adapter_name not in getattr(layer.module, "lora_variant", {}):
        return None
    return "its update is not B A alone; take LoraConfig(use_dora=False)"


def block_of(model: nn.Module, name: str) -> str | None:
    """Path of the transformer block that a module lies in, or is; None for a module outside of all.

    A block is an entry of an outermost ``nn.ModuleList``; where its entries are lists themselves (Funnel), of those.
    """
    paths = list(accumulate(name.split("."), "{}.{}".format))
    are_lists = [isinstance(model.get_submodule(path), nn.ModuleList) for path in paths]
    entries = (i for i, (outside, inside) in enumerate(pairwise(are_lists), 1) if outside and not inside)
    return next((paths[i] for i in entries), None)


def best(scores: Mapping[str, float], share: float) -> list[str]:
    """The ``round(share n)`` names with the largest scores, at least one, in their order; equal ones by it."""
    order = torch.tensor(list(scores.values()), dtype=torch.float64).argsort(descending=True, stable=True).tolist()
    chosen = set(order[: max(1, round(share * len(scores)))])
    return [name for index, name in enumerate(scores) if index in chosen]
