"""From the layers of a model to the tensors of the exported adapter: drop dead ranks, fold every factor into B."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.export.means import Means
from ivon_lora.export.verify import largest_element
from ivon_lora.lora.adapters import LoraLayer, lora_layers

#: PEFT forward rules that a plain adapter of scale 1 reproduces; others (QALoRA, KaSA, ...) are refused
EXACT_VARIANTS = ("Dora", "ALora", "MiCA", "Velora")


@dataclass(frozen=True, eq=False)
class PlannedLayer:
    """One LoRA layer before and after: delta = scaling * B diag(E) A becomes delta' = new_B new_A.

    ``name`` is the path in the base model, ``target`` the module PEFT replaces (they differ inside a
    MultiheadAttention), ``live`` the ranks that are kept, ``dropped`` the largest element of the update that the
    other ranks still made (0 once pruning is final).
    """

    name: str
    target: str
    is_embedding: bool
    A: Tensor
    B: Tensor
    E: Tensor | None
    scaling: float
    live: Tensor
    new_A: Tensor
    new_B: Tensor
    bias: Tensor | None
    magnitude: Tensor | None
    dropped: float

    @property
    def rank(self) -> int:
        """Ranks that survive."""
        return int(self.live.sum())

    @property
    def acts_without_ranks(self) -> bool:
        """A DoRA magnitude or a LoRA bias changes the output even when every rank is dead."""
        return self.magnitude is not None or self.bias is not None


def plan_layers(base: nn.Module, means: Means, adapter_name: str) -> list[PlannedLayer]:
    """Plan every LoRA layer of ``base``.

    Raises:
        ValueError: for a layer whose update a plain LoRA adapter cannot express, naming it and the reason.
    """
    return [_plan(layer, means, adapter_name) for layer in lora_layers(base, adapter_name)]


def live_ranks(a: Tensor, b: Tensor, e: Tensor | None, mask: Tensor | None) -> Tensor:
    """Ranks to keep, bool (rank,) on the CPU: the pruner's mask; without one, all that are not exactly zero."""
    if mask is not None:
        return mask
    return contributing_ranks(a, b, e)


def contributing_ranks(a: Tensor, b: Tensor, e: Tensor | None) -> Tensor:
    """Ranks whose product is not exactly zero, bool (rank,) on the CPU."""
    rank = a.shape[0]
    if rank == 0:
        return torch.zeros(0, dtype=torch.bool)
    alive = (a.reshape(rank, -1) != 0).any(1) & (b.transpose(0, 1).reshape(rank, -1) != 0).any(1)
    if e is not None:
        alive &= e.reshape(rank) != 0
    return alive.cpu()


def fold(a: Tensor, b: Tensor, e: Tensor | None, scaling: float, live: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the live ranks and fold E and the scale into B, at least in fp32, then cast once to B's dtype."""
    keep = live.nonzero().flatten().to(b.device)
    wide = torch.promote_types(b.dtype, torch.float32)
    folded = b.index_select(1, keep).to(wide) * scaling
    if e is not None:
        gate = e.reshape(-1).index_select(0, keep).to(wide)
        folded = folded * gate.reshape(1, -1, *[1] * (b.dim() - 2))
    return a.index_select(0, keep), folded.to(b.dtype)


def _plan(layer: LoraLayer, means: Means, adapter_name: str) -> PlannedLayer:
    _refuse_inexact(layer, adapter_name)
    a, b = means.mean(layer.A), means.mean(layer.B)
    e = None if layer.E is None else means.mean(layer.E)
    live = live_ranks(a, b, e, means.mask(layer.A, layer.B, layer.E))
    finished = [_holder_tensor(layer.module, "lora_links", adapter_name, key) for key in "AB"]
    if finished[0] is not None and finished[1] is not None:  # links of `variants`, whose layers have no E
        live = torch.cat([contributing_ranks(finished[0], finished[1], None), live])
        a, b = torch.cat([finished[0], a]), torch.cat([finished[1], b], 1)
    new_a, new_b = _to_lora_shape(layer, *fold(a, b, e, layer.scaling, live))
    bias = _holder_tensor(layer.module, "lora_B", adapter_name, "bias")
    magnitude = _holder_tensor(layer.module, "lora_magnitude_vector", adapter_name, "weight")
    if bias is not None:
        wide = torch.promote_types(bias.dtype, torch.float32)
        bias = (means.mean(bias).to(wide) * layer.scaling).to(bias.dtype)
    return PlannedLayer(
        name=layer.name,
        target=layer.name.split(".base_layer")[0],
        is_embedding=layer.is_embedding,
        A=a,
        B=b,
        E=e,
        scaling=layer.scaling,
        live=live,
        new_A=new_a,
        new_B=new_b,
        bias=bias,
        magnitude=None if magnitude is None else means.mean(magnitude),
        dropped=_largest_dropped(a, b, e, layer.scaling, live),
    )


def _refuse_inexact(layer: LoraLayer, adapter_name: str) -> None:
    if layer.why_not is not None and layer.A.shape[0] > 0:
        raise ValueError(
            f"layer {layer.name!r} cannot be exported: {layer.why_not}; save this model with model.save_pretrained(...)"
        )
    variants: Any = getattr(layer.module, "lora_variant", {})
    variant = type(variants[adapter_name]).__name__ if adapter_name in variants else "Dora"
    if not variant.startswith(EXACT_VARIANTS):
        raise ValueError(
            f"layer {layer.name!r} cannot be exported: a plain LoRA adapter does not express {variant}; save this "
            "model with model.save_pretrained(...)"
        )
    dilation = getattr(_base_layer(layer.module), "dilation", 1)
    if layer.E is not None and any(d != 1 for d in (dilation if isinstance(dilation, tuple) else (dilation,))):
        raise ValueError(
            f"layer {layer.name!r} cannot be exported: PEFT's LoRA convolutions have no dilation, this AdaLoRA layer "
            f"has {dilation}; merge_lora(...) is exact here"
        )


def _to_lora_shape(layer: LoraLayer, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """AdaLoRA keeps the factors of a convolution flat; LoRA wants (rank, in, *kernel) and (out, rank, 1, ...)."""
    kernel = getattr(_base_layer(layer.module), "kernel_size", None)
    if kernel is None or a.dim() > 2:
        return a, b
    return a.reshape(a.shape[0], a.shape[1] // math.prod(kernel), *kernel), b.reshape(*b.shape, *[1] * len(kernel))


def _base_layer(module: nn.Module) -> nn.Module:
    base = module
    while isinstance(inner := getattr(base, "base_layer", None), nn.Module):
        base = inner
    return base


def _holder_tensor(module: nn.Module, attribute: str, adapter_name: str, field: str) -> Tensor | None:
    holder: Any = getattr(module, attribute, None)
    if holder is None or adapter_name not in holder:
        return None
    entry = holder[adapter_name]
    tensor = entry if isinstance(entry, Tensor) and field == "weight" else getattr(entry, field, None)
    return tensor if isinstance(tensor, Tensor) else None


def _largest_dropped(a: Tensor, b: Tensor, e: Tensor | None, scaling: float, live: Tensor) -> float:
    lost = ~live & contributing_ranks(a, b, e)
    if not bool(lost.any()):
        return 0.0
    return largest_element(a, b, e, scaling, lost)
