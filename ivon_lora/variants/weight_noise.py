"""Noise on the base weights under LoRA layers, or noise of the same variance on their outputs, and its end."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.lora.adapters import LoraLayer
from ivon_lora.optim.sharding import first_row, forget_copies, is_sharded, local, whole

PLACES, RESTORE = ("weights", "outputs"), ("copy", "cpu", "subtract")


class WeightNoise:
    """Puts noise on the weights, one after the other, and takes all of it away again.

    Args:
        restore: the weights come back from a "copy", from one in the memory of the "cpu", or are found by "subtract",
            which rounds.
    """

    def __init__(self, restore: str) -> None:
        self._restore = restore
        self._back: list[tuple[Tensor, Callable[[], Any]]] = []  # what brings the weights back

    def add(self, layer: LoraLayer, std: Tensor, place: tuple[int, ...]) -> None:
        """Add noise, a function of ``place``, with standard deviations ``std`` (m,) by row; to tied weights once."""
        weight = base_layer(layer).weight
        if any(weight is other for other, _ in self._back):
            return
        part = local(weight).detach()
        matrix = as_matrix(layer, part)
        noise = functools.partial(normals, matrix, (*place, first_row(weight)))
        if self._restore == "subtract":
            bring_back: Callable[[], Any] = lambda: matrix.copy_(matrix - noise() * std[:, None])  # noqa: E731
        else:
            kept = part.to("cpu" if self._restore == "cpu" else part.device, copy=True)
            bring_back = functools.partial(part.copy_, kept)
        self._back.append((weight, bring_back))
        matrix.copy_(matrix + noise() * std[:, None])
        forget_copies([weight])

    def remove(self) -> None:
        """Bring the weights back."""
        for _, bring_back in self._back:
            bring_back()
        forget_copies(weight for weight, _ in self._back)
        self._back = []


class OutputNoise:
    """A forward hook on a linear base layer: ``y_ti += ||x_t|| std_i xi_ti``, the variance of noise on the weights.

    Drawn for each token. Recomputed forwards (activation checkpointing) draw it again; copies of the model have none.

    Attributes:
        std: (m,); None for no noise.
        place, micro_batch: what the noise is a function of.
    """

    def __init__(self) -> None:
        self.std: Tensor | None = None
        self.place: tuple[int, ...] = ()
        self.micro_batch = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> OutputNoise:
        return OutputNoise()

    def __reduce__(self) -> tuple[type[OutputNoise], tuple[()]]:
        return OutputNoise, ()

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.std is None:
            return None
        size = args[0].float().norm(dim=-1, keepdim=True) * self.std
        return output + (size * normals(output, (*self.place, self.micro_batch))).to(output.dtype)


def normals(like: Tensor, place: Sequence[int]) -> Tensor:
    """Standard normals, fp32, as a function of the place; of the device too, for a CPU takes long for a whole base."""
    seed = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(seed, "big") >> 1)
    return torch.randn(like.shape, generator=generator, device=like.device)


def base_layer(layer: LoraLayer) -> Any:
    """The module under a LoRA layer."""
    module: Any = layer.module
    return module.get_base_layer()


def as_matrix(layer: LoraLayer, weight: Tensor) -> Tensor:
    """A view of a base weight as (outputs, inputs)."""
    return weight.T if getattr(layer.module, "fan_in_fan_out", False) else weight.flatten(1)


def dequantised(module: Any) -> Tensor:
    """The weight of a base layer, as floating-point numbers, with the parts of all processes."""
    if module.weight.is_floating_point():
        return whole(module.weight.detach())
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(module)
    return weight


def refuse(layer: LoraLayer, where: str) -> None:
    """Check that a layer can have noise on its "weights" or "outputs".

    Raises:
        ValueError: naming it and the reason.
    """
    module: Any = layer.module
    weight = None if layer.is_embedding else base_layer(layer).weight
    if weight is None or layer.why_not is not None or layer.E is not None:
        reason = f"{layer.why_not or 'its update is not B A alone'}; leave it out of target_modules"
    elif where == "outputs" and weight.dim() > 2:
        reason = "noise on the outputs is for linear layers; take where='weights'"
    elif where == "weights" and not weight.is_floating_point():
        reason = "its base is quantised; take where='outputs'"
    elif is_sharded(weight) and getattr(module, "fan_in_fan_out", False):
        reason = "its base is sharded along its inputs; use DDP"
    else:
        return
    raise ValueError(f"layer {layer.name!r} takes no noise: {reason}")
