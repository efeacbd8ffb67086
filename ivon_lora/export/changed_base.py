"""Initialisations that move a part of the base model into the adapter, exported as an update of the original base.

PiSSA, OLoRA and the like leave W' = W - s B0 A0 in the model. The update of W is then W' - W + s B A: the difference of
the weights has the rank of the adapter, so an adapter of twice the rank says the same about the base that people have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.export.layer import Layer

CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_changed(initialisation: str) -> bool:
    """Whether PEFT's ``init_lora_weights`` changes the weights of the base model."""
    return initialisation.lower().startswith(CHANGED)


def on_original_base(layers: Sequence[Layer], initialisation: str, original: nn.Module | None) -> list[Layer]:
    """The layers as updates of ``original``, the base model before PEFT; unchanged if PEFT has not changed it.

    Raises:
        ValueError: the base was changed and ``original`` is missing or has other shapes, or the change is not of low rank
            (LoftQ rounds the weights).
    """
    if not is_changed(initialisation):
        return list(layers)
    if original is None:
        raise ValueError(
            f"init_lora_weights={initialisation!r} moved a part of the base model into the adapter, which is wrong on the "
            "original base: give export_lora(..., base=the model as it was before get_peft_model), or write the merged "
            "model with merge_lora(...)"
        )
    return [_on_original(layer, original) for layer in layers]


def _on_original(layer: Layer, original: nn.Module) -> Layer:
    module: Any = layer.module
    try:
        old = original.get_submodule(layer.target).weight
        new = module.get_base_layer().weight
    except AttributeError:
        raise ValueError(f"base= has no layer {layer.target!r}: give the model as it was before get_peft_model") from None
    if not isinstance(old, Tensor) or old.shape != new.shape:
        raise ValueError(f"layer {layer.target!r} of base= has another shape than the model's: give the same model")
    change = new.detach().double() - old.detach().to(new.device).double()
    if layer.is_embedding or getattr(module, "fan_in_fan_out", False):
        change = change.T
    u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
    u, s, vh = u[:, : layer.size], s[: layer.size], vh[: layer.size]
    rest = float((change.flatten(1) - (u * s) @ vh).abs().max())
    rounding = 4 * max(torch.finfo(new.dtype).eps, 1e-6) * float(old.detach().abs().max())
    if rest > rounding:
        raise ValueError(
            f"layer {layer.target!r} differs from base= by more than {layer.size} ranks (by up to {rest:.2g} elsewhere): "
            "its weights were rounded or trained too; write the merged model with merge_lora(...)"
        )
    a, b = layer.folded()
    split = s.sqrt()
    a = torch.cat([a, (split[:, None] * vh).reshape(layer.size, *a.shape[1:]).to(a.dtype)])
    b = torch.cat([b, (u * split).reshape(-1, layer.size, *b.shape[2:]).to(b.dtype)], 1)
    bias = None if layer.bias is None else layer.bias * layer.scaling
    return replace(layer, A=a, B=b, E=None, scaling=1.0, mask=None, kernel=(), bias=bias)
