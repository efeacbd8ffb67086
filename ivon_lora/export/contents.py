"""What an export is made of, wherever it was read from, and the one check of it: what is wrong and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.lora.layer import LoraLayer

PARTITIONED = (
    "empty, as a run with partitioned parameters (ZeRO-3, FSDP) leaves it: gather them first, e.g. save under "
    "deepspeed.zero.GatheredParameters or summon_full_params"
)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter to export.

    Args:
        layers: its LoRA layers, of posterior means; ranks that are pruned are zero.
        extras: all other tensors by key in PEFT's files: heads that were trained whole, biases, new rows of a
            vocabulary.
        config: PEFT's configuration by field.
        base: the base model; None if only files are known.

    Raises:
        ValueError: a tensor has no values, numbers, rank or shape that an export can have.
    """

    layers: list[LoraLayer]
    extras: dict[str, Tensor]
    config: Mapping[str, Any]
    base: nn.Module | None = None

    def __post_init__(self) -> None:
        for layer in self.layers:
            faults = [_fault(f"has {name.removesuffix('.weight')} that ", t) for name, t in layer.tensors.items()]
            if not math.isfinite(layer.scaling):
                faults.append(f"has the scale {layer.scaling}: lora_alpha must be a finite number")
            if fault := next(filter(None, faults), None) or _fault_of_shapes(layer):
                raise ValueError(f"layer {layer.key!r} {fault}")
        for key, tensor in self.extras.items():
            # a module that was trained whole may count its batches, or hold a mask
            counts = not (tensor.is_floating_point() or tensor.is_meta or key.endswith("weight"))
            if fault := (f"is {PARTITIONED}" if tensor.numel() == 0 else None if counts else _fault("", tensor)):
                raise ValueError(f"tensor {key!r} {fault}")

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks that survive, by key of the layer."""
        return {layer.key: layer.rank for layer in self.layers}


def _fault(name: str, tensor: Tensor) -> str | None:
    if tensor.is_meta:
        return (
            f"{name}is on the meta device (offloaded): load the model without device_map, or bring its weights in with "
            "accelerate.hooks.remove_hook_from_submodules(model)"
        )
    if tensor.dim() == 1 and tensor.numel() == 0:
        return f"{name}is {PARTITIONED}"
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or tensor.layout != torch.strided:
        return f"{name}is {tensor.layout} of {tensor.dtype}: save the adapter dense in 16 or 32 bits"
    if not bool(torch.isfinite(tensor).all()):
        count = f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} numbers, in {tensor.dtype}"
        return f"{name}is not finite ({count}): the run has diverged or a number is too large for its type"
    return None


def _fault_of_shapes(layer: LoraLayer) -> str | None:
    a, b, shapes = layer.A, layer.B, f"lora_A {tuple(layer.A.shape)}, lora_B {tuple(layer.B.shape)}"
    flat, conv = a.dim() == b.dim() == 2, 3 <= a.dim() == b.dim() <= 5 and set(b.shape[2:]) == {1}
    if not (flat or conv):
        return f"is none of LoRA ({shapes}): (rank, in) and (out, rank) are, and convolutions"
    if len(a) != b.shape[1] * layer.groups:
        return f"has factors of different ranks ({shapes}): give (rank, in) and (out, rank), or save the adapter again"
    if len(a) and (a.numel() == 0 or b.numel() == 0):
        return f"has a factor ({shapes}) that is {PARTITIONED}"
    sizes = {"lora_E": len(a), "lora_B.bias": len(b), "lora_magnitude_vector.weight": len(b)}
    for name, tensor in layer.tensors.items():
        if tensor.numel() != sizes.get(name, tensor.numel()):
            found = f"{name} of shape {tuple(tensor.shape)}, not {sizes[name]} numbers"
            return f"has {found} ({shapes}): save the adapter again"
    return None
