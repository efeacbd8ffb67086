"""Finished links of a chain of LoRA pairs: kept beside the base, or added to it, while a new pair trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ivon_lora.lora.adapters import LoraLayer, lora_layers
from ivon_lora.optim.sharding import is_sharded, local, part_of, whole

logger = logging.getLogger(__name__)

STORES = ("adapter", "base")

#: of each layer: A of all finished links (R, in), and their B with its scale (out, R)
RIGHT, LEFT = "lora_links_A", "lora_links_B"


class Links:
    """All links but the live pair, which is PEFT's.

    Args:
        model: with PEFT LoRA layers, all of them linear.
        adapter_name: which adapter.
        store: "adapter" keeps the finished links beside the live pair, exact for every base (also a quantised or
            sharded one), at 2 R (in + out) multiplications per token; "base" adds them to the frozen weight, which is
            rounded from its first value at every link, so that rounding errors do not add up. Both are exported alike.

    Attributes:
        ranks: of the finished links.

    Raises:
        ValueError: a layer is not linear, or ``store="base"`` and its weight is quantised or sharded.
    """

    def __init__(self, model: nn.Module, adapter_name: str, store: str = "adapter") -> None:
        self._model, self._adapter_name, self.store = model, adapter_name, store
        self.layers = lora_layers(model, adapter_name)
        for layer in self.layers:
            _refuse(layer, adapter_name, store)
        self.ranks: list[int] = []
        self._handles: list[Any] = []
        self._first: list[Tensor] = []  # of store "base": the frozen weights, on the CPU
        for layer in self.layers:
            module: Any = layer.module
            module.register_buffer(RIGHT, layer.A.new_zeros(0, layer.A.shape[1]), persistent=False)
            module.register_buffer(LEFT, layer.B.new_zeros(layer.B.shape[0], 0), persistent=False)
            if store == "adapter":
                self._handles.append(module.register_forward_hook(_Product(adapter_name)))
            else:
                self._first.append(module.get_base_layer().weight.detach().to("cpu", copy=True))

    def __len__(self) -> int:
        return len(self.ranks)

    def finish(
        self, optimizer: Optimizer | None, normals: Callable[[tuple[int, ...], int], Tensor], shrinkage: float = 1.0
    ) -> None:
        """Finish the live pair, in ``after_step``: it joins the others, and a new one starts with B = 0.

        Args:
            optimizer: forgets what it knows of the live pair.
            normals: of `Variant`; A is drawn as PEFT draws it (kaiming_uniform, a = sqrt 5).
            shrinkage: factor of B.
        """
        for index, layer in enumerate(self.layers):
            module: Any = layer.module
            right, left = whole(layer.A.detach()), whole(layer.B.detach()) * (layer.scaling * shrinkage)
            setattr(module, RIGHT, torch.cat([getattr(module, RIGHT), right]))
            setattr(module, LEFT, torch.cat([getattr(module, LEFT), left], dim=1))
            uniform = torch.erf(normals(tuple(layer.A.shape), index) / math.sqrt(2.0))  # in (-1, 1)
            local(layer.A.detach()).copy_(part_of(layer.A, uniform / math.sqrt(layer.A.shape[1])))
            local(layer.B.detach()).zero_()
            if optimizer is not None:
                optimizer.state.pop(layer.A, None)
                optimizer.state.pop(layer.B, None)
        self.ranks.append(self.layers[0].A.shape[0])
        self._write_bases()

    def delta(self, index: int) -> Tensor:
        """What the finished links of a layer add to its weight: (out, in), fp32."""
        module: Any = self.layers[index].module
        product: Tensor = getattr(module, LEFT).float() @ getattr(module, RIGHT).float()
        return product

    def _write_bases(self) -> None:
        if self.store != "base":
            return
        for index, (layer, first) in enumerate(zip(self.layers, self._first, strict=True)):
            module: Any = layer.module
            weight, delta = module.get_base_layer().weight.detach(), self.delta(index)
            exact = first.to(delta.device).float() + delta
            weight.copy_(exact)
            if weight.dtype != torch.float32 and bool(delta.any()):
                lost = (weight.float() - exact).norm() / delta.norm()
                logger.warning("%s: rounding to %s loses %.1f %% of the links", layer.name, weight.dtype, 100 * lost)

    # ---------------------------------------------------------------- the end, and checkpoints

    def fold(self, rank: int | None = None) -> list[float]:
        """Make one plain adapter of all links and the live pair, and take the rest away.

        Args:
            rank: None for the sum of all ranks, which is exact; else the best approximation of this rank.

        Returns:
            of each layer the relative error, in the Frobenius norm.
        """
        errors = []
        for index, layer in enumerate(self.layers):
            module: Any = layer.module
            left = torch.cat([getattr(module, LEFT) / layer.scaling, whole(layer.B.detach())], dim=1)
            right = torch.cat([getattr(module, RIGHT), whole(layer.A.detach())])
            error = 0.0
            if rank is not None and rank < right.shape[0]:
                left, right, error = compress(left, right, rank)
            errors.append(error)
            if self.ranks:
                _replace(module, self._adapter_name, left.to(layer.B.dtype), right.to(layer.A.dtype))
            delattr(module, RIGHT)
            delattr(module, LEFT)
            if self.store == "base":
                module.get_base_layer().weight.detach().copy_(self._first[index])
        if self.ranks:
            _tell_config(self._model, self._adapter_name, self.layers)
        for handle in self._handles:
            handle.remove()
        self._handles, self.layers = [], []
        return errors

    def state_dict(self) -> dict[str, Any]:
        """Ranks and tensors of the finished links."""
        pairs = [[getattr(layer.module, name).clone() for name in (RIGHT, LEFT)] for layer in self.layers]
        return {"ranks": list(self.ranks), "pairs": pairs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; a base that holds links, more or fewer, gets these."""
        self.ranks = list(state["ranks"])
        for layer, pair in zip(self.layers, state["pairs"], strict=True):
            for name, value in zip((RIGHT, LEFT), pair, strict=True):
                setattr(layer.module, name, value.to(layer.A.device, layer.A.dtype, copy=True))
        self._write_bases()


def compress(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of ``left @ right`` of a rank, without the product (QR of both, SVD of a small matrix).

    Returns:
        left (out, rank), right (rank, in), and the relative error in the Frobenius norm.
    """
    q, upper = torch.linalg.qr(left.double())
    p, lower = torch.linalg.qr(right.double().mT)
    u, s, vh = torch.linalg.svd(upper @ lower.mT)
    root = s[:rank].sqrt()
    error = float(s[rank:].norm() / s.norm().clamp(min=1e-300))
    return q @ u[:, :rank] * root, root[:, None] * (vh[:rank] @ p.mT), error


class _Product:
    """A forward hook on a LoRA layer: adds the finished links' product, as the layer adds the live pair's."""

    def __init__(self, adapter_name: str) -> None:
        self.adapter_name = adapter_name

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        right = getattr(module, RIGHT)
        if not len(right) or module.disable_adapters or self.adapter_name not in module.active_adapters:
            return output
        inner = nn.functional.linear(args[0].to(right.dtype), right)
        return output + nn.functional.linear(inner, getattr(module, LEFT)).to(output.dtype)


def _replace(module: Any, adapter_name: str, left: Tensor, right: Tensor) -> None:
    rank = right.shape[0]
    a, b = module.lora_A[adapter_name], module.lora_B[adapter_name]
    a.weight, b.weight = nn.Parameter(right.contiguous()), nn.Parameter(left.contiguous())
    a.out_features = b.in_features = module.r[adapter_name] = rank


def _tell_config(model: nn.Module, adapter_name: str, layers: list[LoraLayer]) -> None:
    """Let `save_pretrained` write the rank that the layers have now, where they all have one rank and one scale."""
    ranks = {layer.module.r[adapter_name] for layer in layers}  # type: ignore[union-attr, operator, index]
    scales = {layer.scaling for layer in layers}
    config = next(
        (c[adapter_name] for m in model.modules() if isinstance(c := getattr(m, "peft_config", None), dict)), None
    )
    if config is not None and len(ranks) == len(scales) == 1:
        rank, scale = ranks.pop(), scales.pop()
        config.r, config.lora_alpha = rank, scale * (math.sqrt(rank) if config.use_rslora else rank)


def _can_be_written(weight: Tensor) -> bool:
    return weight.is_floating_point() and not hasattr(weight, "quant_state") and not is_sharded(weight)


def _refuse(layer: LoraLayer, adapter_name: str, store: str) -> None:
    module: Any = layer.module
    if layer.is_embedding or layer.A.dim() != 2 or layer.why_not is not None:
        reason = "links are for linear layers; leave it out of target_modules"
    elif adapter_name in getattr(module, "lora_variant", {}) or layer.E is not None:
        reason = "links need plain LoRA; take neither DoRA nor AdaLoRA, and no variant with gates"
    elif getattr(module, "fan_in_fan_out", False):
        reason = "its weight is transposed (Conv1D); leave it out of target_modules"
    elif hasattr(module, RIGHT):
        reason = "it has links already; build one variant"
    elif store == "base" and not _can_be_written(module.get_base_layer().weight):
        reason = "its weight is quantised or sharded, and cannot hold links; take store='adapter'"
    else:
        return
    raise ValueError(f"layer {layer.name!r} cannot have links: {reason}")
