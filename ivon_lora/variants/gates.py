"""Trained factors between A and B: one for each rank, or one for a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ivon_lora.lora.adapters import LoraLayer, find_adapters, lora_layers
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import local, whole

#: plain gates, of shape (r, 1), have the name that AdaLoRA gives its singular values: `find_adapters` and `export_lora`
#: know them as E
PLAIN = "lora_E"

Link = Callable[[Tensor], Tensor]


class Gates:
    """Multiplies, in every layer, the output of A by ``link(gate)``; ``gates[i]`` is the parameter of layer i, fp32.

    Make them before DDP or ``fully_shard`` take the model's parameters.

    PEFT saves them with the adapter, for their names begin with ``lora_``; but nobody else multiplies by them, so an
    adapter is given away after `fold` only.

    Args:
        model: with PEFT LoRA layers.
        adapter_name: which adapter.
        initial: the gate of a layer, by the layer's index and the layer: shape (r, 1), (r,) or (1,).
        link: a function of the module level (copies of the model take it along); None for plain gates.
        name: of the new entry of each layer.
        prior_std: their prior's standard deviation, for VAdam.

    Raises:
        ValueError: a layer cannot have gates.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str,
        initial: Callable[[int, LoraLayer], Tensor],
        link: Link | None = None,
        name: str = PLAIN,
        prior_std: float = 1.0,
    ) -> None:
        self.layers = lora_layers(model, adapter_name)
        self.prior_std = prior_std
        self._model, self._adapter_name, self._name, self._link = model, adapter_name, name, link
        for layer in self.layers:
            _refuse(layer, adapter_name, name)
        if len(self.layers) != len(find_adapters(model, adapter_name)):
            raise ValueError(
                "two layers share tensors of their adapters, and cannot have gates of their own; untie them"
            )
        self._handles: list[Any] = []
        for index, layer in enumerate(self.layers):
            gate = nn.Parameter(initial(index, layer).to(layer.A.device, torch.float32))
            module: Any = layer.module
            setattr(module, name, nn.ParameterDict({adapter_name: gate}))
            scale = _Scale(getattr(module, name), adapter_name, link)
            self._handles.append(module.lora_A[adapter_name].register_forward_hook(scale))

    def __getitem__(self, index: int) -> nn.Parameter:
        gate: nn.Parameter = getattr(self.layers[index].module, self._name)[self._adapter_name]
        return gate

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (self[index] for index in range(len(self)))

    def factor(self, index: int) -> Tensor:
        """``link(gate)`` of a layer, whole, as the parameter is now: (r,), or (1,) for a layer's."""
        gate = whole(self[index].detach())
        return (gate if self._link is None else self._link(gate)).reshape(-1)

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


class _Scale:
    """A forward hook on A."""

    def __init__(self, gates: nn.ParameterDict, adapter_name: str, link: Link | None) -> None:
        self.gates, self.adapter_name, self.link = gates, adapter_name, link

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        gate: Tensor = self.gates[self.adapter_name]
        factor = gate if self.link is None else self.link(gate)
        is_convolution = output.dim() > 2 and not isinstance(module, nn.Linear)
        behind = output.dim() - 2 if is_convolution else 0  # the rank is dimension 1, or the last
        factor = factor.reshape(-1, *[1] * behind)
        return output * factor.to(output.dtype)


def _refuse(layer: LoraLayer, adapter_name: str, name: str) -> None:
    if layer.is_embedding:
        reason = "it is an embedding, where A is no module; leave it out of target_modules"
    elif adapter_name in getattr(layer.module, "lora_variant", {}):
        reason = "it is a DoRA layer, whose norm does not see gates; take use_dora=False"
    elif layer.E is not None or hasattr(layer.module, name):
        reason = "it has gates already; build one variant, or take LoraConfig in place of AdaLoraConfig"
    elif layer.why_not is not None:
        reason = f"{layer.why_not}; leave it out of target_modules"
    else:
        return
    raise ValueError(f"layer {layer.name!r} cannot have gates: {reason}")
