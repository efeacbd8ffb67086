"""Merge the posterior mean of an adapter into the base model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ivon_lora.export.means import Means
from ivon_lora.export.source import find_source
from ivon_lora.lora.adapters import LoraLayer, lora_layers
from ivon_lora.optim.sharding import is_sharded


def merge_lora(model: nn.Module, optimizer: Any | None = None, adapter_name: str = "default") -> nn.Module:
    """Add the update of one adapter to the frozen weights and return the plain base model.

    The same function that `export_lora` writes: the means, without the pruned ranks, with DoRA magnitudes,
    `modules_to_save` and biases. The model is consumed: its PEFT layers are gone afterwards, other adapters too.

    Args:
        model: a PeftModel, a model with injected adapters, or a wrapper around one.
        optimizer: the `IVON` that trained it, or None. A live sample is replaced by the means.
        adapter_name: which adapter of the model.

    Raises:
        ValueError: if the model has no such adapter, or is sharded.
        NotImplementedError: from PEFT, for layers it cannot merge (grouped convolutions).
    """
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            "merge_lora needs whole parameters, and the model's are sharded (FSDP2): call export_lora in all "
            "processes, then merge what it wrote in one process that has the whole base model"
        )
    means = Means(optimizer)
    if hasattr(means.optimizer, "eval"):
        means.optimizer.eval()  # type: ignore[union-attr]
    source = find_source(model, adapter_name)
    for layer in lora_layers(source.base, adapter_name):
        _silence_masked_ranks(layer, means)
        _mend_delta(layer)
    root: Any = source.root
    if hasattr(root, "merge_and_unload"):
        root.set_adapter(adapter_name)  # PEFT merges the named adapter, but takes modules_to_save from the active one
        merged: nn.Module = root.merge_and_unload(adapter_names=[adapter_name])
        return merged
    _unload(source.base, adapter_name)
    state = vars(source.base)
    state.pop("peft_config", None)
    if "_hf_peft_config_loaded" in state:
        state["_hf_peft_config_loaded"] = False
    return source.base


def _unload(parent: nn.Module, adapter_name: str) -> None:
    """What `merge_and_unload` does, for layers that were injected without a PeftModel."""
    for name, child in list(parent.named_children()):
        plain = _plain(child, adapter_name)
        if plain is not child:
            setattr(parent, name, plain)
        _unload(plain, adapter_name)


def _plain(module: Any, adapter_name: str) -> nn.Module:
    plain: nn.Module = module
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        plain = dict(module.modules_to_save).get(adapter_name, module.original_module)
    elif hasattr(module, "unload_and_optionally_merge_module"):
        plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=[adapter_name])
    elif hasattr(module, "get_base_layer") and hasattr(module, "merge"):
        module.merge(adapter_names=[adapter_name])
        plain = module.get_base_layer()
    return plain


def _mend_delta(layer: LoraLayer) -> None:
    """PEFT's update of a Conv3d with kernel (1, 1, k) fails: it is taken for a 1x1 Conv2d. Compute it here instead."""
    module: Any = layer.module
    weight = getattr(module.get_base_layer(), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 5 or weight.shape[2:4] != (1, 1):
        return
    if hasattr(module, "lora_links"):
        raise ValueError(f"layer {layer.name!r} has links of a variant: call variant.detach() first")
    left, right = layer.B.detach().flatten(1), layer.A.detach().flatten(1)
    delta = (left.float() @ right.float() * layer.scaling).reshape(weight.shape).to(right.dtype)
    module.get_delta_weight = lambda adapter_name: delta


def _silence_masked_ranks(layer: LoraLayer, means: Means) -> None:
    """While pruning anneals, a masked rank may have learned again; the export drops it, so the merge does."""
    mask = means.mask(layer.A, layer.B, layer.E)
    if mask is None:
        return
    gate, dim = (layer.B, 1) if layer.E is None else (layer.E, 0)
    with torch.no_grad():
        gate.index_fill_(dim, (~mask).nonzero().flatten().to(gate.device), 0.0)
