"""One LoRA layer, in a running model or in files: its tensors, and the update that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ivon_lora.lora.names import innermost

#: elements of an update that are held at once
BLOCK = 1 << 22


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """A layer that carries LoRA tensors for one adapter name, in a running model or in files.

    Attributes:
        name: path inside the running model, without wrappers such as torch.compile's.
        key: path that PEFT's files give it, from the model that was searched.
        path: path in the base model of what it adapts.
        A, B: (rank, in, ...) and (out, rank, ...); with experts (experts * rank, in) and (out, rank * experts), with
            groups of a convolution B is (out, rank / groups, ...).
        E, scaling: as `LoraAdapter`.
        bias, magnitude: LoRA's own bias before scaling, and DoRA's magnitude.
        module: the layer in the running model; None where only files are known.
        parameter: of a layer that adapts one parameter of its module (PEFT's ``target_parameters``): its name.
        experts: how many experts share the rank axis.
        kept: bool (rank,), ranks that a pruner keeps; None where nobody prunes.
        dropped: the largest element of the update that `without` has taken away.
    """

    name: str
    key: str
    path: str
    A: Tensor
    B: Tensor
    E: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    module: Any = None
    parameter: str | None = None
    is_embedding: bool = False
    experts: int = 1
    groups: int = 1
    kept: Tensor | None = None
    dropped: float = 0.0

    @property
    def why_not(self) -> str | None:
        """Why its ranks cannot be pruned; None if they can."""
        a, b = tuple(self.A.shape), tuple(self.B.shape)
        if self.experts > 1:
            return f"its rank axis is fused with {self.experts} experts (A {a})"
        if self.parameter is not None:
            return f"it adapts the parameter {self.parameter!r} of a module (target_parameters)"
        if self.groups > 1:
            return f"its rank axis is split over {self.groups} convolution groups (A {a}, B {b})"
        return "its rank is 0" if a[0] == 0 else None

    @property
    def target(self) -> str:
        """What PEFT matches ``rank_pattern`` with: the path of the module or parameter that it adapts."""
        # the projection inside an attention layer, and one of several parameters, have the rank of the layer around it
        path = self.path if self.key == self.path else self.key.split(".base_layer")[0]
        return path if self.parameter is None else f"{self.path}.{self.parameter}"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it has, by the names in PEFT's files."""
        kind, end = ("lora_embedding_", "") if self.is_embedding else ("lora_", ".weight")
        # `.weight`: transformers' load_adapter needs it for the magnitude, and PEFT reads both
        named = {f"{kind}A{end}": self.A, f"{kind}B{end}": self.B, "lora_E": self.E, "lora_B.bias": self.bias}
        named["lora_magnitude_vector.weight"] = self.magnitude
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def is_turned(self) -> bool:
        """Whether the weight in the running model is (in, out, ...)."""
        return self.is_embedding or bool(getattr(self.module, "fan_in_fan_out", False))

    @property
    def size(self) -> int:
        """Its rank, dead ones included."""
        return len(self.A) // self.experts

    @property
    def live(self) -> Tensor:
        """Ranks to keep, bool (rank,): those that the pruner keeps, or without one those whose product is not exactly
        zero; all where the rank axis is shared (experts, groups of a convolution)."""
        if self.parameter is not None or self.groups > 1:
            return torch.ones(self.size, dtype=torch.bool)
        if self.kept is not None:
            return self.kept.cpu()
        factors = [self.A, self.B.transpose(0, 1), *([] if self.E is None else [self.E.reshape(-1, 1)])]
        return torch.stack([(factor.flatten(1) != 0).any(1) for factor in factors]).all(0).cpu()

    @property
    def rank(self) -> int:
        """Ranks that survive."""
        return int(self.live.sum())

    def without(self, pruned: Tensor) -> LoraLayer:
        """The layer with some ranks, bool (rank,), set to zero: while pruning anneals, masked ranks learn on."""
        rest = replace(self, B=self.B * _columns(pruned, self.B))
        dropped = rest.largest_element() if rest.rank else 0.0
        return replace(self, B=self.B * _columns(~pruned, self.B), kept=~pruned, dropped=dropped)

    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """(left, right) of the products left @ right that the update consists of, in the widest dtype of the device.

        One for most layers, (out, rank) and (rank, in); one for each expert or group.
        """
        wide = torch.float32 if self.A.device.type == "mps" else torch.float64
        left, right = self.B.to(wide).flatten(1) * self.scaling, self.A.to(wide).flatten(1)
        if self.E is not None:
            left = left * _columns(self.E, left)
        if self.experts > 1:
            return [(left[:, e :: self.experts], part) for e, part in enumerate(right.chunk(self.experts))]
        return list(zip(left.chunk(self.groups), right.chunk(self.groups), strict=True))

    def updates(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(left, right, left @ right) of some rows of the update after others."""
        for left, right in self.blocks():
            for rows in torch.split(left, max(1, BLOCK // max(1, right.shape[1]))):
                yield rows, right, rows @ right

    def largest_element(self) -> float:
        """max |delta|."""
        return max(float(update.abs().max()) for _, _, update in self.updates())

    def plain(self, rank: int | None = None) -> LoraLayer:
        """The layer with E and the scale in B and the bias, which are cast once to their dtype: live ranks alone, then
        zeros up to ``rank``. Raises ValueError for a convolution that PEFT's LoRA does not have."""
        a, b, bias = self.A, _wide(self.B) * self.scaling, self.bias
        if self.E is not None:
            b = b * _columns(self.E, b)
        dilation = getattr(self.module and innermost(self.module), "dilation", ())
        if self.E is not None and set(dilation) - {1}:
            raise ValueError(
                f"layer {self.key!r} cannot be exported: PEFT's LoRA convolutions have no dilation, this layer has "
                f"{dilation}; merge_lora(...) is exact here"
            )
        b = b.to(self.B.dtype)
        if self.groups == 1:  # with experts, PEFT unfolds (experts, rank, in) and (out, rank, experts)
            a, b = a.unflatten(0, (self.experts, self.size)), b.unflatten(1, (self.size, self.experts))
            a, b = (_resized(factor, self.live.to(factor.device), rank) for factor in (a, b))
            a, b = a.flatten(0, 1), b.flatten(1, 2)
        bias = None if bias is None else (_wide(bias) * self.scaling).to(bias.dtype)
        return replace(self, A=a, B=b, E=None, scaling=1.0, bias=bias, kept=None)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _columns(values: Tensor, b: Tensor) -> Tensor:
    """A value for each rank, to multiply B with."""
    return values.to(b).reshape(1, -1, *[1] * (b.dim() - 2))


def _resized(factor: Tensor, keep: Tensor, rank: int | None) -> Tensor:
    """The slices along dimension 1 to keep, then zeros."""
    kept = factor[:, keep]
    missing = 0 if rank is None else rank - kept.shape[1]
    return torch.cat([kept, kept.new_zeros(len(kept), missing, *kept.shape[2:])], 1)
