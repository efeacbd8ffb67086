"""Initialisations that move a part of the base model into the adapter, exported as an update of the original base.

PiSSA, OLoRA and the like leave W' = W - s B0 A0 in the model. The update of W is then W' - W + s B A: the difference of
the weights has the rank of the adapter, so an adapter of twice the rank says the same about the base that people have.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.export.contents import Adapter
from ivon_lora.lora.config import changes_base
from ivon_lora.lora.layer import LoraLayer
from ivon_lora.lora.names import walk


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
            f"init_lora_weights={adapter.config['init_lora_weights']!r} moved a part of the base model into an "
            "adapter, which is wrong on the original base: give export_lora(..., base=the model as it was before "
            "get_peft_model), or write the merged model with merge_lora(...)"
        )
    old, adapted = dict(original.named_parameters()), {f"{layer.target}.weight" for layer in adapter.layers}
    for key, path, module in walk(original if adapter.base is None else adapter.base):
        for name, p in module.named_parameters(recurse=False):
            was = old.get(f"{path}.{name}", p)
            is_known = f"{path}.{name}" in adapted or f"{key}.{name}" in adapter.extras
            if not is_known and p.is_floating_point() and p.shape == was.shape:
                _check_rest(f"parameter '{path}.{name}'", p.double() - was.to(p.device).double(), was, p.dtype)
    return replace(adapter, layers=[_with_change(layer, original) for layer in adapter.layers])


def _check_rest(what: str, rest: Tensor, old: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError where what no adapter says of the change of a weight is more than its rounding."""
    largest = float(rest.detach().abs().max()) if rest.numel() else 0.0
    if largest > 4 * max(torch.finfo(dtype).eps, 1e-6) * float(old.detach().abs().max()):
        raise ValueError(
            f"{what} differs from base= by up to {largest:.2g}: another adapter has changed it, or its weights were "
            "rounded or trained too; write the merged model with merge_lora(...)"
        )


def _with_change(layer: LoraLayer, original: Any) -> LoraLayer:
    """The layer with what PEFT took from its weight as further ranks."""
    try:
        old, new = original.get_submodule(layer.target).weight, layer.module.get_base_layer().weight
        change = (new.double() - old.to(new.device).double()).detach()
    except (AttributeError, RuntimeError):
        raise ValueError(
            f"base= has no layer {layer.target!r} like the model's: give it as it was before PEFT"
        ) from None
    change = (change.T if layer.is_turned else change).flatten(1)
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    size, root = layer.size, s[: layer.size].sqrt()
    left, right = u[:, :size] * root, root[:, None] * vh[:size]
    _check_rest(f"layer {layer.target!r}, but for {size} ranks,", change - left @ right, old, new.dtype)
    plain = layer.plain()
    right, left = right.reshape(size, *plain.A.shape[1:]), left.reshape(-1, size, *plain.B.shape[2:])
    return replace(
        plain, A=torch.cat([plain.A, right.to(plain.A.dtype)]), B=torch.cat([plain.B, left.to(plain.B.dtype)], 1)
    )
