"""Noise on the base weights under LoRA layers, or noise of the same variance on their outputs, and its end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.lora.adapters import LoraLayer
from ivon_lora.optim.sharding import first_row, forget_copies, is_sharded, local, whole
from ivon_lora.variants.layers import merged_in_forward, unsupported
from ivon_lora.variants.variant import Variant


class WeightNoise:
    """Puts noise on the weights, one after the other, and takes all of it away again; ``restore`` as `FlatLora`'s."""

    def __init__(self, restore: str) -> None:
        self._restore = restore
        self._clean: dict[Tensor, Tensor] = {}  # copies of the weights that have noise

    def add(self, layer: LoraLayer, std: Tensor, place: tuple[int, ...]) -> None:
        """Add noise, a function of ``place``, with standard deviations ``std`` (m,) by row; to tied weights once."""
        weight = layer.module.get_base_layer().weight
        if weight in self._clean:
            return
        part = local(weight).detach()
        self._clean[weight] = part.to("cpu" if self._restore == "cpu" else part.device, copy=True)
        matrix = as_matrix(layer, part)
        matrix.copy_(matrix + normals(matrix, (*place, first_row(weight))) * std[:, None])
        forget_copies([weight])

    def remove(self) -> None:
        """Bring the weights back."""
        for weight, copy in self._clean.items():
            local(weight).detach().copy_(copy)
        forget_copies(self._clean)
        self._clean = {}


class OutputNoise:
    """Noise on the outputs of linear layers, ``y_ti += ||x_t|| std_i xi_ti``: the variance of noise on their weights.

    Drawn for each token and each training forward of the variant; recomputed forwards (activation checkpointing) draw
    the same.
    """

    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._drawn: dict[nn.Module, tuple[Tensor, tuple[int, ...]]] = {}

    def add(self, layer: LoraLayer, std: Tensor, place: tuple[int, ...]) -> None:
        """Let a layer have noise, a function of ``place``, with ``std`` (m,)."""
        self._drawn[layer.module.get_base_layer()] = std, place

    def remove(self) -> None:
        """No layer has noise."""
        self._drawn = {}

    def hook(self, base: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """A forward hook of the base layers."""
        if base not in self._drawn:
            return None
        std, place = self._drawn[base]
        size = args[0].float().norm(dim=-1, keepdim=True) * std
        return output + (size * normals(output, (*place, self._variant.forwards))).to(output.dtype)


def normals(like: Tensor, place: Sequence[int]) -> Tensor:
    """Standard normals, fp32, as a function of the place; of the device too, for a CPU takes long for a whole base."""
    seed = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(seed, "big") >> 1)
    return torch.randn(like.shape, generator=generator, device=like.device)


def as_matrix(layer: LoraLayer, weight: Tensor) -> Tensor:
    """A view of a base weight as (outputs, inputs)."""
    return weight.T if getattr(layer.module, "fan_in_fan_out", False) else weight.flatten(1)


def dequantised(base: Any) -> Tensor:
    """The weight of a base layer, as floating-point numbers, with the parts of all processes."""
    if base.weight.is_floating_point():
        return whole(base.weight.detach())
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(base)
    return weight


def why_no_noise(layer: LoraLayer, where: str) -> str | None:
    """Why a layer cannot have noise on its "weights" or "outputs"; None if it can."""
    if reason := unsupported(layer) or merged_in_forward(layer):
        return reason
    weight = layer.module.get_base_layer().weight
    if layer.E is not None:
        return "its update is not B A alone; leave it out of target_modules"
    if where == "outputs" and weight.dim() > 2:
        return "noise on the outputs is for linear layers; take where='weights'"
    if where == "weights" and not weight.is_floating_point():
        return "its base is quantised; take where='outputs'"
    if is_sharded(weight) and getattr(layer.module, "fan_in_fan_out", False):
        return "its base is sharded along its inputs; use DDP"
    return None
