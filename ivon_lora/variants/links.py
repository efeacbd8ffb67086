"""Finished links: low-rank updates that train no more, kept beside the LoRA pair that does, or merged into the base.

A 16-bit base rounds most of a small update away, and a 4-bit base takes none, so a link stays two factors unless the
base is asked for. `export_lora` writes all as one adapter of the sum of their ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ivon_lora.lora.adapters import LoraLayer
from ivon_lora.optim.sharding import is_sharded, local, part_of, whole
from ivon_lora.variants.layers import checked_layers, not_a_product, unsupported

STORES = ("adapter", "base")


class Links(nn.Module):
    """The links of one layer: buffers ``A`` (R, in, ...) and ``B`` (out, R, ...) of its state dict.

    In the store "adapter" their product joins that of the live pair wherever that acts, but without its dropout. In the
    store "base" the weights hold them already, and they are here for export and for bases that lack them.
    """

    A: Tensor
    B: Tensor
    layer: Any

    def __init__(self, name: str, layer: Any, adapter_name: str, store: str) -> None:
        super().__init__()
        self.name, self.adapter_name, self.store = name, adapter_name, store
        self.__dict__["layer"] = layer  # the parent, so it is no submodule
        a, b = self.live()
        self.rank = a.shape[0]
        self.register_buffer("A", whole(a.detach())[:0].clone())
        self.register_buffer("B", whole(b.detach())[:, :0].clone())
        self.x: Tensor | None = None
        layer.lora_links = nn.ModuleDict({adapter_name: self})
        self.handles = [layer.register_load_state_dict_pre_hook(self._take_size)]
        if store == "base":
            # saved with the base weights, not with the adapter: how many ranks of links those hold
            layer.get_base_layer().register_buffer("links", torch.zeros((), dtype=torch.int64, device="cpu"))
            self.handles += [layer.register_load_state_dict_post_hook(self._after_load)]
        else:
            layer.get_delta_weight = self._delta_weight
            self.handles += [
                layer.lora_dropout[adapter_name].register_forward_pre_hook(self._remember),
                layer.lora_B[adapter_name].register_forward_hook(self._add),
            ]

    def live(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of the pair in training."""
        return self.layer.lora_A[self.adapter_name].weight, self.layer.lora_B[self.adapter_name].weight

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """s B A in the shape of the base weight."""
        delta = self.layer.scaling[self.adapter_name] * (b.flatten(1) @ a.flatten(1))
        return delta.T if getattr(self.layer, "fan_in_fan_out", False) else delta.reshape(len(b), *a.shape[1:])

    @torch.no_grad()
    def finish(self, shrinkage: float = 1.0) -> float:
        """Make a link of the live pair, which then begins anew by `Variant.restart`.

        Returns ||rounded - exact|| / ||exact||, the share of the link that rounding took; 0 in the store "adapter".
        """
        a, b = self.live()
        self.A = torch.cat([self.A, whole(a.detach())])
        self.B = torch.cat([self.B, whole(b.detach()) * shrinkage], 1)
        return self._merge_missing() if self.store == "base" else 0.0

    @torch.no_grad()
    def compress(self, rank: int) -> float:
        """Replace the links by the nearest update of a rank. Returns the relative error, in Frobenius norm."""
        a, b, error = nearest(self.A.flatten(1), self.B.flatten(1), rank)
        self.A, self.B = a.reshape(-1, *self.A.shape[1:]), b.reshape(len(b), -1, *self.B.shape[2:])
        return error

    @torch.no_grad()
    def fold(self) -> None:
        """Take the links off the layer: into its A and B, whose rank grows. Base weights keep those that they hold.

        Sharded parameters (FSDP2) cannot grow: there the links stay, and `export_lora` writes them with A and B.
        """
        a, b = self.live()
        if len(self.A) and self.store == "adapter" and is_sharded(a):
            return
        for handle in self.handles:
            handle.remove()
        del self.layer.lora_links
        if self.store == "base":
            del self.layer.get_base_layer().links
            return
        del self.layer.get_delta_weight
        if len(self.A):
            down, up = self.layer.lora_A[self.adapter_name], self.layer.lora_B[self.adapter_name]
            down.weight = nn.Parameter(torch.cat([self.A, a]), a.requires_grad)
            up.weight = nn.Parameter(torch.cat([self.B, b], 1), b.requires_grad)

    # ---------------------------------------------------------------- the store "adapter"

    def _remember(self, dropout: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.x = args[0]

    def _add(self, up: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x, self.x = self.x, None
        if x is None or not len(self.A):
            return None
        return output + _apply(up, _apply(self.layer.lora_A[self.adapter_name], x, self.A), self.B)

    def _delta_weight(self, adapter_name: str) -> Tensor:
        """PEFT's ``get_delta_weight``, by which it merges, with the links."""
        delta: Tensor = type(self.layer).get_delta_weight(self.layer, adapter_name)
        return delta + self.delta(self.A, self.B).to(delta.dtype) if adapter_name == self.adapter_name else delta

    # ---------------------------------------------------------------- the store "base", and loading

    def _merge_missing(self) -> float:
        """Merge the links that the base weights lack, one after the other, each rounded once; see `finish`."""
        base, lost = self.layer.get_base_layer(), 0.0
        held = int(base.links)
        if held > len(self.A):
            raise ValueError(
                f"layer {self.name!r}: its base weights hold links of {held} ranks, the checkpoint has {len(self.A)}; "
                "load it into a model with fresh base weights, or keep links with store='adapter'"
            )
        part = local(base.weight).detach()
        for begin in range(held, len(self.A), self.rank):
            link = slice(begin, begin + self.rank)
            before = part.to(torch.promote_types(part.dtype, torch.float32), copy=True)
            delta = part_of(base.weight, self.delta(self.A[link], self.B[:, link].contiguous()).to(before.dtype))
            part.copy_(before + delta)
            lost = float((part - (before + delta)).norm() / delta.norm().clamp_min(1e-30))
        base.links.fill_(len(self.A))
        return lost

    def _take_size(self, layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """A checkpoint has as many links as there were then; one of an adapter without links has none."""
        if f"{prefix}lora_A.{self.adapter_name}.weight" in state_dict:
            for key, own in (("A", self.A[:0]), ("B", self.B[:, :0])):
                saved = state_dict.get(f"{prefix}lora_links.{self.adapter_name}.{key}", own)
                setattr(self, key, own.new_empty(saved.shape))

    @torch.no_grad()
    def _after_load(self, layer: Any, incompatible: Any) -> None:
        self._merge_missing()


def add_links(model: nn.Module, adapter_name: str, store: str) -> list[Links]:
    """An empty list of links for every LoRA layer.

    Raises:
        ValueError: a layer whose update is not plainly B A, has links already, or has a base that takes none.
    """

    def why_not(layer: LoraLayer) -> str | None:
        module: Any = layer.module
        if hasattr(module, "lora_links"):
            return "it has links already; build one variant of links"
        reason = unsupported(layer) or not_a_product(layer, adapter_name)
        if reason is None and store == "base" and not module.get_base_layer().weight.is_floating_point():
            return "its base is quantised; take store='adapter'"
        return reason

    layers = checked_layers(model, adapter_name, "takes no links", why_not)
    return [Links(layer.name, layer.module, adapter_name, store) for layer in layers]


def nearest(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factors (rank, n) and (m, rank) of the matrix of a rank that is nearest to ``b @ a``, and the relative error.

    QR of both factors, then the singular values of a small matrix: the product is never formed.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    error = float(s[rank:].norm() / s.norm().clamp_min(1e-300))
    return ((root[:, None] * vh[:rank]) @ q_a.T).to(a.dtype), (q_b @ u[:, :rank] * root).to(b.dtype), error


def _apply(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What the module would do with another weight and no bias."""
    result: Tensor
    result = F.linear(x, weight) if isinstance(module, nn.Linear) else module._conv_forward(x, weight, None)
    return result
