"""Trained factors between A and B: one for each rank, or one for a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ivon_lora.lora.adapters import LoraLayer, find_adapters, lora_layers
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import local, whole
from ivon_lora.variants.gradients import group_of
from ivon_lora.variants.layers import checked_layers, merged_in_forward, not_a_product, unsupported


def plain(gate: Tensor) -> Tensor:
    """The link of gates that are the factors themselves."""
    return gate


class Gates(Sequence[nn.Parameter]):
    """Multiplies, in every layer, the output of A by ``link(gate)``; ``gates[i]`` is the parameter of layer i, fp32.

    PEFT saves them with the adapter, for their names begin with ``lora_``, but does not multiply by them: give an
    adapter away by `export_lora`, or after `fold`.

    Args:
        model, adapter_name: see `Variant`.
        values: the gate of each layer, in the order of `find_adapters`, at the start: shape (r, 1), (r,) or (1,).
        link: a function of the module level (copies of the model take it along). `plain` gates, of shape (r, 1), have
            the name of AdaLoRA's singular values, so `find_adapters` knows them as E.
        prior_std: their prior's standard deviation, for VAdam.

    Raises:
        ValueError: a layer cannot have gates.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str,
        values: Sequence[Tensor],
        link: Callable[[Tensor], Tensor] = plain,
        prior_std: float = 1.0,
    ) -> None:
        self._model, self._adapter_name, self._prior_std = model, adapter_name, prior_std
        self._name = "lora_E" if link is plain else "lora_gate"
        self._layers = checked_layers(model, adapter_name, "cannot have gates", self._why_not)
        if len(self._layers) != len(find_adapters(model, adapter_name)):
            raise ValueError("two layers share tensors of an adapter, and cannot have gates of their own; untie them")
        self._handles: list[Any] = []
        for layer, value in zip(self._layers, values, strict=True):
            module: Any = layer.module
            gates: Any = nn.ParameterDict({adapter_name: nn.Parameter(value.to(layer.A.device, torch.float32))})
            gates.factor = link  # where `export_lora` finds it
            setattr(module, self._name, gates)
            scale = functools.partial(_scale, gates, adapter_name)
            self._handles.append(module.lora_A[adapter_name].register_forward_hook(scale))

    def __getitem__(self, index: Any) -> Any:
        return getattr(self._layers[index].module, self._name)[self._adapter_name]

    def __len__(self) -> int:
        return len(self._layers)

    def factor(self, index: int) -> Tensor:
        """``link(gate)`` of a layer, whole, as the parameter is now: (r,), or (1,) for a layer's."""
        factor: Tensor = getattr(self._layers[index].module, self._name).factor(whole(self[index].detach()))
        return factor.reshape(-1)

    def group(self) -> dict[str, Any]:
        """A group of an optimizer: no decay, and a prior of their own."""
        gates = [gate for gate in self if gate.requires_grad]
        return {"params": gates, "weight_decay": 0.0, "prior_std": self._prior_std}

    def fold(self, optimizer: Optimizer | None) -> None:
        """Multiply B by the factors, divide its precision h + delta by their squares, and take the gates away."""
        for index, layer in enumerate(lora_layers(self._model, self._adapter_name)):
            b = layer.B
            column = self.factor(index).to(b.device).view(1, -1, *[1] * (b.dim() - 2))
            local(b.detach()).mul_(column)  # along dimension 1, which is whole in every process
            if isinstance(optimizer, IVON) and "hess" in optimizer.state.get(b, {}):
                hess, delta = local(optimizer.state[b]["hess"]), float(group_of(optimizer, b)["weight_decay"])
                precision = (hess + delta) / column.to(hess.dtype).square().clamp(min=1e-12)
                hess.copy_((precision - delta).clamp(min=0.0))
        for layer in self._layers:
            delattr(layer.module, self._name)
        for handle in self._handles:
            handle.remove()
        self._handles, self._layers = [], []

    def _why_not(self, layer: LoraLayer) -> str | None:
        if layer.E is not None or hasattr(layer.module, self._name):
            return "it has gates already; build one variant, or take LoraConfig in place of AdaLoraConfig"
        return unsupported(layer) or merged_in_forward(layer) or not_a_product(layer, self._adapter_name)


def _scale(gates: Any, adapter_name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A forward hook on A."""
    is_convolution = output.dim() > 2 and not isinstance(module, nn.Linear)
    behind = output.dim() - 2 if is_convolution else 0  # the rank is dimension 1, or the last
    factor: Tensor = gates.factor(gates[adapter_name]).reshape(-1, *[1] * behind)
    return output * factor.to(output.dtype)
