"""Merge the posterior mean of an adapter into the base model, and check what rounding left of it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.export.layer import Layer
from ivon_lora.export.model import Means, base_layer, find_base, read_model
from ivon_lora.export.validate import check_adapter
from ivon_lora.lora.adapters import adapted_parameter, identity
from ivon_lora.lora.names import unwrapped
from ivon_lora.optim.sharding import is_sharded

#: share of the update that rounding may take before a warning says so
LOSS = 0.01


def merge_lora(model: nn.Module, optimizer: Any | None = None, adapter_name: str = "default") -> nn.Module:
    """Add the update of one adapter to the frozen weights and return the plain base model.

    The same function that `export_lora` writes: the means, without the pruned ranks, with DoRA magnitudes,
    `modules_to_save` and biases. The model is consumed: its PEFT layers are gone afterwards, other adapters too, and so are
    torch.compile and activation checkpointing inside it. A weight that other modules share (a tied embedding) is untied
    first, and ``config.tie_word_embeddings`` says so. Every merged weight is compared with base + update.

    Args:
        model: a PeftModel, a model with injected adapters, or a wrapper around one.
        optimizer: the `IVON` that trained it, or None. A live sample is replaced by the means.
        adapter_name: which adapter of the model.

    Warns:
        UserWarning: rounding to a 16-bit or quantised base loses more than 1 % of an update (in the Frobenius norm).

    Raises:
        ValueError: the model has no such adapter, several PEFT models, sharded or offloaded weights, a number that is not
            finite, a layer that is merged already or cannot be (GPTQ, AWQ), or a tied base that cannot be untied. The
            model is as it was then, but for a sample.
    """
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            "merge_lora needs whole parameters, and the model's are sharded (FSDP2): call export_lora in all "
            "processes, then merge what it wrote in one process that has the whole base model"
        )
    places = find_base(model, adapter_name)
    base = places[0].module
    means = Means(optimizer)
    if means.optimizer is not None:
        means.optimizer.eval()
    adapter = read_model(model, optimizer, adapter_name, merging=True)
    check_adapter(adapter)
    for layer in adapter.layers:
        _check_layer(layer, adapter_name)
    _untie(base, adapter.layers)
    # PEFT merges an attention layer and its output projection in one
    attention = tuple(f"{layer.key}.base_layer." for layer in adapter.layers if _weight_name(layer) == "in_proj_weight")
    for layer in adapter.layers:
        _silence_dead_ranks(layer, adapter_name)
    losses = {
        layer.key: _merge(layer, adapter_name) for layer in adapter.layers if not layer.key.startswith(attention or "\0")
    }
    _unload(base, adapter_name)
    _say_untied(base)
    worst = max(losses, key=lambda key: losses[key])
    if losses[worst] > LOSS:
        warnings.warn(
            f"rounding to the base model's type loses more than 1 % of the update in "
            f"{sum(loss > LOSS for loss in losses.values())} of {len(losses)} layers (up to {losses[worst]:.0%}, in {worst}): "
            "merge into the base model in float32, or serve the adapter unmerged",
            UserWarning,
            stacklevel=2,
        )
    state = vars(base)
    state.pop("peft_config", None)
    if "_hf_peft_config_loaded" in state:
        state["_hf_peft_config_loaded"] = False
    return base


def _check_layer(layer: Layer, adapter_name: str) -> None:
    """Refuse before anything has changed what cannot be merged."""
    module: Any = layer.module
    weight = _weight(layer)
    if adapter_name in getattr(module, "merged_adapters", ()):
        raise ValueError(f"layer {layer.key!r} is merged already: call model.unmerge_adapter() first")
    if weight is None or layer.groups > 1:  # an update over all groups is no weight of a grouped convolution
        kind = type(base_layer(module)).__name__
        raise ValueError(f"layer {layer.key!r} cannot be merged: {kind} has no weight that it could be added to; serve the adapter unmerged")
    if weight.is_meta:
        raise ValueError(f"layer {layer.key!r} is on the meta device (offloaded): load the base model without device_map")
    if layer.bias is not None and getattr(base_layer(module), "bias", None) is None:
        raise ValueError(f"layer {layer.key!r} has a bias of LoRA, but its module has none: serve the adapter unmerged")


def _weight(layer: Layer) -> Tensor | None:
    """The parameter that the layer adapts."""
    weight = getattr(base_layer(_module(layer)), _weight_name(layer), None)
    return weight if isinstance(weight, Tensor) else None


def _weight_name(layer: Layer) -> str:
    is_attention = isinstance(base_layer(_module(layer)), nn.MultiheadAttention)
    return adapted_parameter(_module(layer)) or ("in_proj_weight" if is_attention else "weight")


def _module(layer: Layer) -> nn.Module:
    assert layer.module is not None
    return layer.module


def _silence_dead_ranks(layer: Layer, adapter_name: str) -> None:
    """PEFT knows no masks; while pruning anneals, a masked rank may have learned again."""
    holder: Any = getattr(layer.module, "lora_embedding_B" if layer.is_embedding else "lora_B" if layer.E is None else "lora_E")
    gate = holder[adapter_name]
    tensor = gate if isinstance(gate, Tensor) else gate.weight
    if layer.mask is not None:
        with torch.no_grad():
            tensor.index_fill_(1 if layer.E is None else 0, (~layer.mask).nonzero().flatten().to(tensor.device), 0.0)


def _merge(layer: Layer, adapter_name: str) -> float:
    """Merge one layer; returns the share of its change that rounding lost."""
    module: Any = layer.module
    weight = _weight(layer)
    assert weight is not None
    with torch.no_grad():
        before = _values(module, weight)
        wanted = _merged(layer, before, adapter_name)
        if _weight_name(layer) == "in_proj_weight":
            module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=[adapter_name])
        elif _is_quantised(weight):
            module.merge(adapter_names=[adapter_name])
        else:
            weight.copy_(wanted)
            if layer.bias is not None:
                base_layer(module).bias.add_(layer.bias * layer.scaling)  # type: ignore[union-attr,operator]
        after = _values(module, _weight(layer))
    if not bool(torch.isfinite(after).all()):
        raise ValueError(f"layer {layer.key!r}: merged weights are not finite in {weight.dtype}; load the base in float32")
    change = float((wanted - before).norm())
    return float((after - wanted).norm()) / change if change > 0 else 0.0


def _merged(layer: Layer, weight: Tensor, adapter_name: str) -> Tensor:
    """What the weight should be after the merge, in its own orientation, float32 or wider."""
    module: Any = layer.module
    blocks = layer.blocks(None if layer.is_whole else layer.live)
    if layer.experts > 1:  # PEFT alone knows which axis of the parameter is which
        return weight + module.get_delta_weight(adapter_name).to(weight)
    update = torch.cat([left @ right for left, right in blocks]).to(weight)
    turned = layer.is_embedding or bool(getattr(module, "fan_in_fan_out", False))
    merged = weight + (update.T if turned else update).reshape(weight.shape)
    if layer.magnitude is None:
        return merged
    rows = merged.T if turned else merged  # DoRA: every row of W has the length of a magnitude
    lengths = rows.flatten(1).norm(dim=1) / layer.magnitude.to(weight).flatten()
    rows = rows / lengths.reshape(-1, *[1] * (rows.dim() - 1))
    return rows.T if turned else rows


def _is_quantised(weight: Tensor) -> bool:
    return type(weight.data) is not Tensor or not weight.is_floating_point() or hasattr(weight, "quant_state")


def _values(module: Any, weight: Tensor | None) -> Tensor:
    """The numbers of a weight, float32 or wider."""
    assert weight is not None
    weight = weight.detach()
    if _is_quantised(weight):
        from peft.utils.integrations import dequantize_module_weight

        inner = base_layer(module)
        weight = weight.dequantize() if type(weight) is not Tensor else dequantize_module_weight(inner).detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _untie(base: nn.Module, layers: list[Layer]) -> None:
    """Give every adapted module that shares its weight with another one a weight of its own."""
    owners: dict[object, set[str]] = {}
    for name, p in base.named_parameters(remove_duplicate=False):
        owners.setdefault(identity(p), set()).add(name)
    shared = [layer for layer in layers if len(owners.get(identity(_weight(layer)), ())) > 1]  # type: ignore[arg-type]
    config: Any = getattr(base, "config", None)
    if shared and getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"layer {shared[0].key!r} adapts a weight that other modules share, and encoder-decoder models scale their output "
            "by whether it is shared: serve the adapter unmerged"
        )
    for layer in shared:
        outer: Any = layer.module
        while base_layer(outer) is not outer.base_layer:
            outer = outer.base_layer
        outer.base_layer = copy.deepcopy(outer.base_layer)


def _say_untied(base: nn.Module) -> None:
    """Let the configuration of a transformers model say that embeddings are not tied, where they are not."""
    config: Any = getattr(base, "config", None)
    if not hasattr(base, "get_output_embeddings") or config is None:
        return
    ends = [getattr(end, "weight", None) for end in (base.get_input_embeddings(), base.get_output_embeddings())]  # type: ignore[operator]
    if all(isinstance(end, Tensor) for end in ends) and identity(ends[0]) != identity(ends[1]):
        for part in {id(config): config, **({id(c): c for c in [config.get_text_config()]})}.values():
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False


def _unload(parent: nn.Module, adapter_name: str) -> None:
    """Put the modules of the base model where PEFT's, and wrappers, were."""
    for name, child in list(parent.named_children()):
        plain = _plain(child, adapter_name)
        if plain is not child:
            setattr(parent, name, plain)
        _unload(plain, adapter_name)


def _plain(module: Any, adapter_name: str) -> nn.Module:
    module = unwrapped(module)
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return _plain(dict(module.modules_to_save).get(adapter_name, module.original_module), adapter_name)
    if hasattr(module, "token_adapter"):
        plain: nn.Module = module.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=[adapter_name]
        )
        return plain
    return base_layer(module) if hasattr(module, "get_base_layer") else module
