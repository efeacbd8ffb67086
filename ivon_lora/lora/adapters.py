"""LoRA adapters of a model: which tensors they have, where their rank axis lies, which factor scales them.

The rank is dim 0 of A and E and dim 1 of B in all layer kinds of PEFT (Linear, Embedding, Conv1d/2d/3d, DoRA, AdaLoRA).
Adapters are found by the tensors that a layer carries, never by the class of the model around it, so `get_peft_model`,
`inject_adapter_in_model` and `model.add_adapter` all work, and peft itself is not needed here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["LoraAdapter", "find_adapters"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """One low-rank update, delta = scaling * B diag(E) A, with one rank axis shared by its tensors.

    Args:
        name: path of the layer inside the model, e.g. ``"encoder.layer.0.attention.self.query"``.
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


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """A module that carries LoRA tensors for one adapter name; `why_not` says why its ranks cannot be pruned, if so."""

    name: str
    module: nn.Module
    A: Tensor
    B: Tensor
    E: Tensor | None
    scaling: float
    is_embedding: bool
    why_not: str | None

    def adapter(self) -> LoraAdapter:
        """The same tensors as a validated `LoraAdapter`."""
        return LoraAdapter(self.name, self.A, self.B, self.E, self.scaling)


def find_adapters(model: nn.Module, adapter_name: str = "default") -> list[LoraAdapter]:
    """List the LoRA adapters in ``model`` that carry ``adapter_name``, in the order of ``model.named_modules()``.

    Copies of `modules_to_save` and DoRA magnitudes are ordinary parameters and never listed. Tied tensors are listed
    once. Layers whose rank axis is fused with another one (experts of a mixture, groups of a convolution) and layers
    of rank 0 are left out; the reason is logged at INFO level.

    Args:
        model: any module with PEFT LoRA or AdaLoRA layers inside.
        adapter_name: the name given to PEFT (``"default"`` unless you chose another).

    Raises:
        ValueError: if the model has no LoRA layer, none with this name (the message lists the names there are), or
            none with ranks that can be pruned.
    """
    adapters: list[LoraAdapter] = []
    reasons: list[str] = []
    seen: set[object] = set()
    for layer in lora_layers(model, adapter_name):
        why_not = layer.why_not
        identities = {_identity(t) for t in (layer.A, layer.B, layer.E) if t is not None}
        tied = identities & seen
        if why_not is None and tied:
            part = "its tensors are" if tied == identities else "one of its tensors is"
            why_not = f"{part} tied to an adapter listed before"
        if why_not is not None:
            reasons.append(f"{layer.name}: {why_not}")
            # a rank pruned in the listed adapter also loses its tied half here: more than a note
            level = logging.WARNING if tied and tied != identities else logging.INFO
            logger.log(level, "LoRA layer %s is left out: %s", layer.name, why_not)
            continue
        seen |= identities
        adapters.append(layer.adapter())
    if not adapters:
        raise ValueError(f"no LoRA layer under adapter {adapter_name!r} has ranks to prune: {'; '.join(reasons)}")
    return adapters


def lora_layers(model: nn.Module, adapter_name: str) -> list[LoraLayer]:
    """Every layer that carries ``adapter_name``, prunable or not. Raises ValueError as `find_adapters` does."""
    names: set[str] = set()
    found: list[LoraLayer] = []
    for path, module in _lora_modules(model):
        for prefix in ("lora_", "lora_embedding_"):
            holder = _dictionary(module, prefix + "A")
            names.update(holder)
            if adapter_name in holder:
                found.append(_read_layer(path, module, prefix, adapter_name))
    if found:
        return found
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers: add them with peft.get_peft_model(model, LoraConfig(...)) or "
            "peft.inject_adapter_in_model(LoraConfig(...), model)"
        )
    raise ValueError(f"adapter_name={adapter_name!r} is not in the model; it has: {', '.join(sorted(names))}")


def _lora_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if "modules_to_save" in path.split("."):  # a trained full copy; LoRA layers copied with it are never run
            continue
        if _dictionary(module, "lora_A") or _dictionary(module, "lora_embedding_A"):
            yield path, module


def _dictionary(module: nn.Module, attribute: str) -> Mapping[str, object]:
    """A ModuleDict or ParameterDict of PEFT as a plain dict; empty if the module has none."""
    holder = getattr(module, attribute, None)
    if isinstance(holder, (nn.ModuleDict, nn.ParameterDict, Mapping)):
        return dict(holder.items())
    return {}


def _tensor(module: nn.Module, attribute: str, adapter_name: str) -> Tensor | None:
    entry = _dictionary(module, attribute).get(adapter_name)
    weight = entry if isinstance(entry, Tensor) else getattr(entry, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _read_layer(path: str, module: nn.Module, prefix: str, adapter_name: str) -> LoraLayer:
    a = _tensor(module, prefix + "A", adapter_name)
    b = _tensor(module, prefix + "B", adapter_name)
    e = _tensor(module, "lora_E", adapter_name)
    if a is None or b is None:
        raise ValueError(f"layer {path!r} has no tensor {prefix}A or {prefix}B for adapter {adapter_name!r}")
    return LoraLayer(
        name=path,
        module=module,
        A=a,
        B=b,
        E=e,
        scaling=_scaling(module, adapter_name),
        is_embedding=prefix == "lora_embedding_",
        why_not=_why_not(module, a, b),
    )


def _why_not(module: nn.Module, a: Tensor, b: Tensor) -> str | None:
    experts = getattr(module, "num_experts", 1)
    if isinstance(experts, int) and experts > 1:
        return f"its rank axis is fused with {experts} experts (A {tuple(a.shape)})"
    base = getattr(module, "base_layer", None)
    groups = getattr(base, "groups", 1)
    if isinstance(groups, int) and groups > 1:
        return f"its rank axis is split over {groups} convolution groups (A {tuple(a.shape)}, B {tuple(b.shape)})"
    if a.shape[0] == 0:
        return "its rank is 0"
    return None


def _scaling(module: nn.Module, adapter_name: str) -> float:
    """The factor PEFT applies: `scaling`, and for AdaLoRA `scaling / (ranknum + 1e-5)` in the precision of ranknum."""
    table = getattr(module, "scaling", None)
    scaling = float(table.get(adapter_name, 1.0)) if isinstance(table, Mapping) else 1.0
    ranknum = _tensor(module, "ranknum", adapter_name)
    if ranknum is None or ranknum.is_meta:
        return scaling
    return float((scaling / (ranknum.detach() + 1e-5)).item())


def _identity(tensor: Tensor) -> object:
    """Equal for tensors that share memory from the same first element (a tied weight, or a transposed view of it)."""
    if tensor.is_meta or tensor.numel() == 0 or hasattr(tensor, "to_local"):
        return id(tensor)
    return tensor.device, tensor.data_ptr()
