"""What an export is made of, wherever it was read from: the layers of an adapter and all other tensors of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: experts that are layers of their own; servers stack them, so they need one rank
STACKED = re.compile(r"(.*\bexperts)\.\d+\..*")


@dataclass(frozen=True, eq=False)
class Layer:
    """One update, delta = scaling * B diag(E) A, of posterior means.

    A is (rank, in, ...) and B (out, rank, ...), E (rank, 1) or None. With experts they are (experts * rank, in) and
    (out, rank * experts), with groups of a convolution B is (out, rank / groups, ...). ``key`` is the path in PEFT's
    files, ``target`` what ``rank_pattern`` is matched with: the path of the module or parameter that PEFT adapts.
    ``mask`` is the pruner's, bool (rank,), False for pruned ranks; ``bias`` LoRA's own before scaling, ``magnitude``
    DoRA's; ``kernel`` that of a convolution whose A and B are flat (AdaLoRA); ``experts`` is 0 where PEFT adapts a
    module, not one parameter of it; ``module`` the running layer, if there is one.
    """

    key: str
    target: str
    A: Tensor
    B: Tensor
    E: Tensor | None = None
    scaling: float = 1.0
    mask: Tensor | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    is_embedding: bool = False
    kernel: tuple[int, ...] = ()
    experts: int = 0
    groups: int = 1
    module: nn.Module | None = None

    @property
    def size(self) -> int:
        """Its rank, dead ones included."""
        return self.A.shape[0] // max(1, self.experts)

    @property
    def is_whole(self) -> bool:
        """Whether its rank axis is shared (experts, groups) or out of reach: it is exported with all its ranks."""
        return self.experts > 0 or self.groups > 1

    @property
    def live(self) -> Tensor:
        """Ranks to keep, bool (rank,): all, those of the mask, or without one those that are not exactly zero."""
        if self.is_whole:
            return torch.ones(self.size, dtype=torch.bool)
        return self.acting if self.mask is None else self.mask

    @property
    def acting(self) -> Tensor:
        """Ranks whose product is not exactly zero, bool (rank,)."""
        size = self.size
        if size == 0:
            return torch.zeros(0, dtype=torch.bool)
        alive = (self.A.reshape(size, -1) != 0).any(1) & (self.B.transpose(0, 1).reshape(size, -1) != 0).any(1)
        return (alive if self.E is None else alive & (self.E.reshape(size) != 0)).cpu()

    @property
    def rank(self) -> int:
        """Ranks that survive."""
        return int(self.live.sum())

    @property
    def acts_without_ranks(self) -> bool:
        """A DoRA magnitude or a LoRA bias changes the output even when every rank is dead."""
        return self.magnitude is not None or self.bias is not None

    @property
    def stack(self) -> str | None:
        """Which experts a server stacks with this one: they need one rank, the largest of the file."""
        match = STACKED.fullmatch(self.key)
        return match[1] if match else self.key if self.experts else None

    def blocks(self, ranks: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """(left, right) of the products left @ right that the update consists of, in the widest dtype of the device.

        One for most layers, (out, rank) and (rank, in); one for each expert or group. ``ranks`` selects some.
        """
        wide = torch.float32 if self.A.device.type == "mps" else torch.float64
        left, right = self.B.to(wide).flatten(1) * self.scaling, self.A.to(wide).flatten(1)
        if self.E is not None:
            left = left * self.E.to(wide).reshape(1, -1)
        if ranks is not None:
            keep = ranks.nonzero().flatten().to(left.device)
            left, right = left.index_select(1, keep), right.index_select(0, keep)
        if self.experts > 1:
            return [(left[:, e :: self.experts], part) for e, part in enumerate(right.chunk(self.experts))]
        return list(zip(left.chunk(self.groups), right.chunk(self.groups), strict=True))

    def folded(self) -> tuple[Tensor, Tensor]:
        """A and B of a plain LoRA layer of scale 1: live ranks alone, E and the scale in B, cast once to B's dtype."""
        keep = None if self.is_whole else self.live.nonzero().flatten().to(self.B.device)
        wide = torch.promote_types(self.B.dtype, torch.float32)
        a, b = self.A, self.B.to(wide) * self.scaling
        if self.E is not None:
            b = b * self.E.to(wide).reshape(1, -1, *[1] * (b.dim() - 2))
        if keep is not None:
            a, b = a.index_select(0, keep), b.index_select(1, keep)
        if self.kernel:
            a = a.reshape(a.shape[0], -1, *self.kernel)
            b = b.reshape(*b.shape, *[1] * len(self.kernel))
        return a, b.to(self.B.dtype)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter to export: its LoRA layers, all other tensors by key in PEFT's files (heads that were trained whole,
    biases, new rows of a vocabulary), PEFT's configuration by field, and what is known of the base model: the paths of
    all its modules (None if only files are known), its name on a hub or disk, name and module of its class."""

    layers: list[Layer]
    extras: dict[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    modules: Collection[str] | None = None
    base_name: str | None = None
    base_class: tuple[str, str] | None = None
