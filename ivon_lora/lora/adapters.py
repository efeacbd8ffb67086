"""LoRA adapters of a model: which tensors they have, where their rank axis lies, which factor scales them.

The rank is dim 0 of A and E and dim 1 of B in all layer kinds of PEFT (Linear, Embedding, Conv1d/2d/3d, DoRA, AdaLoRA).
Adapters are found by the tensors that a layer carries, never by the class of the model around it, so `get_peft_model`,
`inject_adapter_in_model` and `model.add_adapter` all work, and peft itself is not needed here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ivon_lora.lora.layer import LoraLayer
from ivon_lora.lora.names import unwrapped, walk, without_wrappers

__all__ = ["LoraAdapter", "LoraLayer", "find_adapters"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """One low-rank update, delta = scaling * B diag(E) A, with one rank axis shared by its tensors.

    Args:
        name: path of the layer inside the model, e.g. ``"encoder.layer.0.attention.self.query"``; `find_adapters`
            leaves out what torch.compile, activation checkpointing, FSDP and DDP add to it.
        A: down-projection, shape (rank, in) or (rank, in, *kernel).
        B: up-projection, shape (out, rank) or (out, rank, 1, ...).
        E: AdaLoRA's singular values, shape (rank, 1) or (rank,); None for plain LoRA.
        scaling: the factor by which the layer multiplies the product (no unit).

    Raises:
        ValueError: if A dim 0, B dim 1 and E dim 0 are not the same number.
    """

    name: str
    A: Tensor
    B: Tensor
    E: Tensor | None = None
    scaling: float = 1.0

    def __post_init__(self) -> None:
        ranks_agree = (
            self.A.dim() >= 2
            and self.B.dim() >= 2
            and self.A.shape[0] == self.B.shape[1]
            and (self.E is None or (self.E.dim() in (1, 2) and self.E.numel() == self.E.shape[0] == self.A.shape[0]))
        )
        if not ranks_agree:
            shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor, _ in self.tensors())
            raise ValueError(
                f"adapter {self.name!r} has no common rank axis: {shapes}; give A as (rank, in, ...), B as "
                "(out, rank, ...) and E, if any, as (rank, 1) (transpose the one that differs)"
            )

    @property
    def rank(self) -> int:
        """Number of ranks, dead ones included."""
        return self.A.shape[0]

    def tensors(self) -> list[tuple[str, Tensor, int]]:
        """The tensors as (key, tensor, rank dimension), in the order A, B, E."""
        found = [("A", self.A, 0), ("B", self.B, 1)]
        if self.E is not None:
            found.append(("E", self.E, 0))
        return found


def find_adapters(model: nn.Module, adapter_name: str = "default") -> list[LoraAdapter]:
    """List the LoRA adapters in ``model`` that carry ``adapter_name``, in the order of ``model.named_modules()``.

    Copies of `modules_to_save` and DoRA magnitudes are ordinary parameters and never listed. Tensors over the same
    memory are listed once. Layers whose rank axis is not one of a layer's own (`target_parameters`, fused experts,
    groups of a convolution) and layers of rank 0 are left out; the reason is logged at INFO level, and at WARNING level
    where two parameters share memory, so that what happens to one happens to the other.

    Args:
        model: any module with PEFT LoRA or AdaLoRA layers inside.
        adapter_name: the name given to PEFT (``"default"`` unless you chose another).

    Raises:
        ValueError: if the model has no LoRA layer, none with this name (the message lists the names there are), or
            none with ranks that can be pruned.
    """
    adapters: list[LoraAdapter] = []
    reasons: list[str] = []
    seen: dict[object, Tensor] = {}
    for layer in lora_layers(model, adapter_name):
        why_not, level = layer.why_not, logging.INFO
        memory = {identity(tensor): tensor for tensor in (layer.A, layer.B, layer.E) if tensor is not None}
        tied = memory.keys() & seen.keys()
        if why_not is None and tied:
            part = "its tensors are" if len(tied) == len(memory) else "one of its tensors is"
            why_not = f"{part} tied to an adapter listed before"
            if len(tied) < len(memory) or any(memory[key] is not seen[key] for key in tied):
                level = logging.WARNING
        if why_not is not None:
            reasons.append(f"{layer.name}: {why_not}")
            logger.log(level, "LoRA layer %s is left out: %s", layer.name, why_not)
            continue
        seen.update(memory)
        adapters.append(LoraAdapter(layer.name, layer.A, layer.B, layer.E, layer.scaling))
    if not adapters:
        raise ValueError(f"no LoRA layer under adapter {adapter_name!r} has ranks to prune: {'; '.join(reasons)}")
    return adapters


def lora_layers(model: nn.Module, adapter_name: str) -> list[LoraLayer]:
    """Every layer that carries ``adapter_name``, prunable or not. Raises ValueError as `find_adapters` does."""
    running = {id(module): name for name, module in unwrapped(model).named_modules()}
    names: set[str] = set()
    found: list[LoraLayer] = []
    for key, path, module in walk(model):
        for kind in ("lora_", "lora_embedding_"):
            holder = _dictionary(module, kind + "A")
            names.update(holder)
            if adapter_name in holder:
                name = without_wrappers(running[id(module)])
                found.append(_read_layer(name, key, path, module, kind, adapter_name))
    if found:
        return found
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers: add them with peft.get_peft_model(model, LoraConfig(...)) or "
            "peft.inject_adapter_in_model(LoraConfig(...), model)"
        )
    raise ValueError(f"adapter_name={adapter_name!r} is not in the model; it has: {', '.join(sorted(names))}")


def layer_tensor(module: nn.Module, attribute: str, adapter_name: str, field: str = "weight") -> Tensor | None:
    """``module.attribute[adapter_name]``, or its ``field`` if that is a module."""
    entry = _dictionary(module, attribute).get(adapter_name)
    tensor = entry if isinstance(entry, Tensor) and field == "weight" else getattr(entry, field, None)
    return tensor if isinstance(tensor, Tensor) else None


def identity(tensor: Tensor) -> object:
    """Equal for tensors that share memory from the same first element (a tied weight, or a transposed view of it)."""
    if tensor.is_meta or tensor.numel() == 0 or hasattr(tensor, "to_local") or isinstance(tensor, FakeTensor):
        return id(tensor)
    return tensor.device, tensor.data_ptr()


def _dictionary(module: nn.Module, attribute: str) -> Mapping[str, object]:
    """A ModuleDict or ParameterDict of PEFT as a plain dict; empty if the module has none."""
    holder = getattr(module, attribute, None)
    return dict(holder.items()) if isinstance(holder, nn.ModuleDict | nn.ParameterDict | Mapping) else {}


def _read_layer(name: str, key: str, path: str, module: nn.Module, kind: str, adapter_name: str) -> LoraLayer:
    a, b = (layer_tensor(module, kind + factor, adapter_name) for factor in "AB")
    if a is None or b is None:
        raise ValueError(f"layer {name!r} has no tensor {kind}A or {kind}B for adapter {adapter_name!r}")
    parameter: Any = getattr(module, "parameter_name", None) if hasattr(module, "get_param") else None
    groups: Any = getattr(getattr(module, "base_layer", None), "groups", 1)
    return LoraLayer(
        name=name,
        key=key,
        path=path,
        A=a,
        B=b,
        E=layer_tensor(module, "lora_E", adapter_name),
        scaling=_scaling(module, adapter_name),
        bias=layer_tensor(module, "lora_B", adapter_name, "bias"),
        magnitude=layer_tensor(module, "lora_magnitude_vector", adapter_name),
        module=module,
        parameter=parameter,
        is_embedding=kind == "lora_embedding_",
        experts=1 if parameter is None else getattr(module, "num_experts", 1),
        groups=groups if isinstance(groups, int) and a.dim() > 2 else 1,
    )


def _scaling(module: nn.Module, adapter_name: str) -> float:
    """The factor PEFT applies: `scaling`, and for AdaLoRA `scaling / (ranknum + 1e-5)` in the precision of ranknum."""
    table = getattr(module, "scaling", None)
    scaling = float(table.get(adapter_name, 1.0)) if isinstance(table, Mapping) else 1.0
    ranknum = layer_tensor(module, "ranknum", adapter_name)
    if ranknum is None or ranknum.is_meta:
        return scaling
    return float((scaling / (ranknum.detach() + 1e-5)).item())
