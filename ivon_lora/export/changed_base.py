"""Initialisations that move a part of the base model into the adapter, exported as an update of the original base.

PiSSA, OLoRA and the like leave W' = W - s B0 A0 in the model. The update of W is then W' - W + s B A: the difference of
the weights has the rank of the adapter, so an adapter of twice the rank says the same about the base that people have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ivon_lora.export.layer import Adapter, Layer

CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether PEFT has changed the base model of an adapter with this configuration."""
    return str(config.get("init_lora_weights")).lower().startswith(CHANGED)


def on_original_base(adapter: Adapter, original: nn.Module | None) -> Adapter:
    """The adapter as an update of ``original``, the base model before PEFT; itself if PEFT has not changed the base.

    Raises:
        ValueError: ``original`` is missing or another model, or the change is not of low rank (LoftQ rounds the
            weights).
    """
    if not changes_base(adapter.config):
        return adapter
    if original is None:
        raise ValueError(
            f"init_lora_weights={adapter.config['init_lora_weights']!r} moved a part of the base model into the "
            "adapter, which is wrong on the original base: give export_lora(..., base=the model as it was before "
            "get_peft_model), or write the merged model with merge_lora(...)"
        )
    return replace(adapter, layers=[_with_change(layer, original) for layer in adapter.layers])


def _with_change(layer: Layer, original: Any) -> Layer:
    """The layer with what PEFT took from its weight as further ranks."""
    module: Any = layer.module
    try:
        old, new = original.get_submodule(layer.target).weight, module.get_base_layer().weight
        change = (new.double() - old.to(new.device).double()).detach()
    except (AttributeError, RuntimeError):
        raise ValueError(
            f"base= has no layer {layer.target!r} like the model's: give it as it was before PEFT"
        ) from None
    change = change.T if layer.is_embedding or getattr(module, "fan_in_fan_out", False) else change
    u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
    size, root = layer.size, s[: layer.size].sqrt()
    left, right = u[:, :size] * root, root[:, None] * vh[:size]
    rest = float((change.flatten(1) - left @ right).abs().max())
    if rest > 4 * max(torch.finfo(new.dtype).eps, 1e-6) * float(old.detach().abs().max()):
        raise ValueError(
            f"layer {layer.target!r} differs from base= by more than {size} ranks (by up to {rest:.2g} elsewhere): "
            "its weights were rounded or trained too; write the merged model with merge_lora(...)"
        )
    plain = layer.plain()
    right, left = right.reshape(size, *plain.A.shape[1:]), left.reshape(-1, size, *plain.B.shape[2:])
    return replace(
        plain, A=torch.cat([plain.A, right.to(plain.A.dtype)]), B=torch.cat([plain.B, left.to(plain.B.dtype)], 1)
    )
