"""Trained factors between A and B: one for each rank, or one for a layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ivon_lora.lora.adapters import LoraLayer, find_adapters, lora_layers
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import local, whole
from ivon_lora.variants.checks import merged_in_forward, not_a_product, refuse, unsupported

Link = Callable[[Tensor], Tensor]


class Gates(Sequence[nn.Parameter]):
    """Multiplies, in every layer, the output of A by ``link(gate)``; ``gates[i]`` is the parameter of layer i, fp32.

    Make them before DDP or ``fully_shard`` take the model's parameters.

    PEFT saves them with the adapter, for their names begin with ``lora_``; but nobody else multiplies by them, so an
    adapter is given away by `export_lora`, or after `fold`.

    Args:
        model: with PEFT LoRA layers.
        adapter_name: which adapter.
        values: the gate of each layer, in the order of `find_adapters`, at the start: shape (r, 1), (r,) or (1,).
        link: a function of the module level (copies of the model take it along). None for plain gates, of shape (r, 1):
            they have the name of AdaLoRA's singular values, so `find_adapters` knows them as E.
        prior_std: their prior's standard deviation, for VAdam.

    Raises:
        ValueError: a layer cannot have gates.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str,
        values: Sequence[Tensor],
        link: Link | None = None,
        prior_std: float = 1.0,
    ) -> None:
        self.layers, self.prior_std = lora_layers(model, adapter_name), prior_std
        self._model, self._adapter_name = model, adapter_name
        self._name = "lora_E" if link is None else "lora_gate"
        for layer in self.layers:
            refuse(layer, "cannot have gates", self._why_not(layer))
        if len(self.layers) != len(find_adapters(model, adapter_name)):
            raise ValueError("two layers share tensors of an adapter, and cannot have gates of their own; untie them")
        self._handles: list[Any] = []
        for layer, value in zip(self.layers, values, strict=True):
            module: Any = layer.module
            gates: Any = nn.ParameterDict({adapter_name: nn.Parameter(value.to(layer.A.device, torch.float32))})
            gates.factor = link or _as_it_is  # where `export_lora` finds it
            setattr(module, self._name, gates)
            scale = functools.partial(_scale, gates, adapter_name)
            self._handles.append(module.lora_A[adapter_name].register_forward_hook(scale))

    def __getitem__(self, index: Any) -> Any:
        gate: nn.Parameter = getattr(self.layers[index].module, self._name)[self._adapter_name]
        return gate

    def __len__(self) -> int:
        return len(self.layers)

    def factor(self, index: int) -> Tensor:
        """``link(gate)`` of a layer, whole, as the parameter is now: (r,), or (1,) for a layer's."""
        factor: Tensor = getattr(self.layers[index].module, self._name).factor(whole(self[index].detach()))
        return factor.reshape(-1)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """What trains in the model, the gates in a group of their own: no decay, and their own prior."""
        mine = {id(gate) for gate in self}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in mine]
        gates = [gate for gate in self if gate.requires_grad]
        return [{"params": others}, {"params": gates, "weight_decay": 0.0, "prior_std": self.prior_std}]

    def fold(self, optimizer: Optimizer | None) -> None:
        """Multiply B by the factors, and take the gates away."""
        for index, layer in enumerate(lora_layers(self._model, self._adapter_name)):
            column = self.factor(index).to(layer.B.device).view(1, -1, *[1] * (layer.B.dim() - 2))
            local(layer.B.detach()).mul_(column)  # along dimension 1, which is whole in every process
            if isinstance(optimizer, IVON) and "hess" in optimizer.state.get(layer.B, {}):
                _rescale_precision(optimizer, layer.B, column)
        for layer in self.layers:
            delattr(layer.module, self._name)
        for handle in self._handles:
            handle.remove()
        self._handles, self.layers = [], []

    def _why_not(self, layer: LoraLayer) -> str | None:
        if layer.E is not None or hasattr(layer.module, self._name):
            return "it has gates already; build one variant, or take LoraConfig in place of AdaLoraConfig"
        return unsupported(layer) or merged_in_forward(layer) or not_a_product(layer, self._adapter_name)


def _as_it_is(gate: Tensor) -> Tensor:
    return gate


def softmax(gate: Tensor, temperature: float) -> Tensor:
    """The link r softmax(g / temperature): (r,) -> (r,), of mean 1."""
    return len(gate) * torch.softmax(gate / temperature, 0)


def merged(gate: Tensor, slot: int, parent: int, how: str, temperature: float) -> Tensor:
    """A softmax gate (r,) after two ranks got the same: the "average" of theirs, or that of half of their "sum"."""
    pair, gate = gate[[slot, parent]], gate.clone()
    if how == "sum":
        gate[[slot, parent]] = temperature * (torch.logsumexp(pair / temperature, 0) - math.log(2.0))
    else:
        gate[[slot, parent]] = pair.mean()
    return gate


def _rescale_precision(optimizer: IVON, p: Tensor, factor: Tensor) -> None:
    """The posterior of ``factor p``: its precision h + delta is divided by the square; what is 0 has none."""
    state, (_, group) = optimizer.state[p], optimizer.parameters.place(p)
    hess, delta = local(state["hess"]), float(group["weight_decay"])
    scaled = (hess + delta) / factor.to(hess.dtype).square().clamp(min=1e-12) - delta
    hess.copy_(scaled.clamp(min=0.0))


def _scale(gates: Any, adapter_name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A forward hook on A."""
    is_convolution = output.dim() > 2 and not isinstance(module, nn.Linear)
    behind = output.dim() - 2 if is_convolution else 0  # the rank is dimension 1, or the last
    factor: Tensor = gates.factor(gates[adapter_name]).reshape(-1, *[1] * behind)
    return output * factor.to(output.dtype)
