"""Merge the posterior mean of an adapter into the base model, and check what rounding left of it."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.export.read_model import read_model
from ivon_lora.lora.adapters import identity, layer_tensor
from ivon_lora.lora.layer import LoraLayer
from ivon_lora.lora.names import innermost, wrapped_child
from ivon_lora.optim.sharding import is_sharded
from ivon_lora.optim.wrappers import unwrap

#: share of the update that rounding may take before a warning says so
LOSS = 0.01


def merge_lora(model: nn.Module, optimizer: Any | None = None, adapter_name: str = "default") -> nn.Module:
    """Add the update of one adapter to the frozen weights and return the plain base model.

    The same function that `export_lora` writes: the means, without the pruned ranks, with DoRA magnitudes,
    `modules_to_save` and biases. Every merged weight is compared with base + update. The model is consumed: its PEFT
    layers, other adapters, torch.compile and activation checkpointing inside it are gone. A weight that other modules
    share (a tied embedding) is untied first, and ``config.tie_word_embeddings`` says so.

    Args:
        model, adapter_name: as `export_lora`.
        optimizer: the `IVON` that trained it, or None. A live sample is replaced by the means.

    Warns:
        UserWarning: rounding to a 16-bit or quantised base loses more than 1 % of an update (in the Frobenius norm).

    Raises:
        ValueError: the model has no such adapter, several PEFT models, sharded or offloaded weights, a number that is
            not finite, a layer that is merged already or cannot be (GPTQ, grouped convolutions), or a tied base that
            cannot be untied. The model is as it was then, but for a sample.
    """
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            "merge_lora needs whole parameters, and the model's are sharded (FSDP2): call export_lora in all "
            "processes, then merge what it wrote in one process that has the whole base model"
        )
    adapter = read_model(model, optimizer, adapter_name)
    if (ivon := unwrap(optimizer)) is not None:
        ivon.eval()
    base: Any = adapter.base
    if adapter.config.get("alora_invocation_tokens"):
        raise ValueError("an aLoRA adapter acts from its invocation tokens on, which no weight does: serve it unmerged")
    merges = [_Merge(layer, adapter_name) for layer in adapter.layers]
    for merge in merges:
        merge.check()
    _untie(base, merges)
    for merge in merges:
        merge.prepare()
    # PEFT merges an attention layer and the projection inside it in one, the projection twice, as it computes them
    inside = tuple(f"{merge.layer.key}.base_layer." for merge in merges if merge.is_attention)
    losses = {merge.layer.key: merge.run() for merge in merges if not merge.layer.key.startswith(inside)}
    _unload(base, adapter_name)
    _say_untied(base)
    worst = max(losses, key=lambda key: losses[key])
    if losses[worst] > LOSS:
        warnings.warn(
            f"rounding to the base model's type loses more than 1 % of the update in "
            f"{sum(loss > LOSS for loss in losses.values())} of {len(losses)} layers (up to {losses[worst]:.0%}, in "
            f"{worst}): merge into the base model in float32, or serve the adapter unmerged",
            UserWarning,
            stacklevel=2,
        )
    vars(base).pop("peft_config", None)
    if getattr(base, "_hf_peft_config_loaded", False):
        base._hf_peft_config_loaded = False
        base._weight_conversions = None  # else save_pretrained gives the base the names of an adapter that it loaded
    return base


class _Merge:
    """The merge of one layer."""

    def __init__(self, layer: LoraLayer, adapter_name: str) -> None:
        self.layer, self.adapter_name = layer, adapter_name
        self.is_attention = isinstance(self.inner, nn.MultiheadAttention)
        self.parameter = layer.parameter or ("in_proj_weight" if self.is_attention else "weight")

    @property
    def inner(self) -> Any:
        """The module that the layer adapts; another one after it was untied."""
        return innermost(self.layer.module)

    @property
    def weight(self) -> Any:
        """The parameter that the layer adapts, or None."""
        return getattr(self.inner, self.parameter, None)

    @property
    def is_quantised(self) -> bool:
        weight = self.weight
        return type(weight.data) is not Tensor or not weight.is_floating_point() or hasattr(weight, "quant_state")

    def check(self) -> None:
        """Refuse before anything has changed what cannot be merged."""
        layer, weight, padding = self.layer, self.weight, getattr(self.inner, "padding_mode", "zeros")
        fault = None
        if self.adapter_name in getattr(layer.module, "merged_adapters", ()):
            fault = "is merged already: call model.unmerge_adapter() first"
        elif not isinstance(weight, Tensor) or layer.groups > 1:  # an update across groups is no grouped weight
            kind = type(self.inner).__name__
            fault = f"cannot be merged: {kind} has no weight that it could be added to; serve the adapter unmerged"
        elif weight.is_meta:
            fault = "is on the meta device (offloaded): load the base model without device_map"
        elif padding != "zeros":
            fault = f"has padding_mode={padding!r}, its update pads with zeros: serve the adapter unmerged"
        elif layer.bias is not None and getattr(self.inner, "bias", None) is None:
            fault = "has a bias of LoRA, but its module has none: serve the adapter unmerged"
        if fault is not None:
            raise ValueError(f"layer {layer.key!r} {fault}")

    def values(self) -> Tensor:
        """A copy of the weight's numbers, float32 or wider."""
        weight = self.weight.detach()
        if self.is_quantised:
            from peft.utils.integrations import dequantize_module_weight

            is_torchao = type(weight.data) is not Tensor and hasattr(weight, "dequantize")
            weight = weight.dequantize() if is_torchao else dequantize_module_weight(self.inner).detach()
        numbers: Tensor = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        return numbers

    def merged(self, weight: Tensor) -> Tensor:
        """What ``weight`` should be after the merge, in its own orientation."""
        layer = self.layer
        if layer.experts > 1:  # PEFT alone knows which axis of the parameter is which
            return weight + self.layer.module.get_delta_weight(self.adapter_name).to(weight)
        ((left, right),) = layer.blocks()
        rows = weight.T if layer.is_turned else weight
        rows = rows + (left @ right).to(weight).reshape(rows.shape)
        if layer.magnitude is not None:  # DoRA: every row of the weight gets the length of its magnitude
            lengths = rows.flatten(1).norm(dim=1) / layer.magnitude.to(weight).flatten()
            rows = rows / lengths.reshape(-1, *[1] * (rows.dim() - 1))
        return rows.T if layer.is_turned else rows

    @torch.no_grad()
    def prepare(self) -> None:
        """Let the layer of PEFT, which knows no masks, hold what is merged: masked ranks may have learned again."""
        b: Any = layer_tensor(
            self.layer.module, "lora_embedding_B" if self.layer.is_embedding else "lora_B", self.adapter_name
        )
        b.copy_(self.layer.B[:, -b.shape[1] :].reshape(b.shape))  # behind finished links, if there are any

    @torch.no_grad()
    def run(self) -> float:
        """Merge; returns the share of the change that rounding lost."""
        layer, before = self.layer, self.values()
        wanted = self.merged(before)
        if self.is_quantised or self.is_attention:
            self.layer.module.merge(adapter_names=[self.adapter_name])
        else:
            self.weight.copy_(wanted)
            if layer.bias is not None:
                self.inner.bias.add_(layer.bias * layer.scaling)
        after, change = self.values(), float((wanted - before).norm())
        if not bool(torch.isfinite(after).all()):
            raise ValueError(
                f"layer {layer.key!r}: merged weights are not finite in {self.weight.dtype}; load the base in float32"
            )
        return float((after - wanted).norm()) / change if change > 0 else 0.0


def _untie(base: nn.Module, merges: list[_Merge]) -> None:
    """Give every adapted module that shares its weight with another one a weight of its own."""
    owners = Counter(identity(p) for _, p in base.named_parameters(remove_duplicate=False))
    shared = [merge for merge in merges if owners[identity(merge.weight)] > 1]
    if shared and getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"layer {shared[0].layer.key!r} adapts a weight that other modules share, and encoder-decoder models scale "
            "their output by whether it is shared: serve the adapter unmerged"
        )
    for merge in shared:
        outer = merge.layer.module
        while outer.base_layer is not merge.inner:
            outer = outer.base_layer
        outer.base_layer = copy.deepcopy(outer.base_layer)


def _say_untied(base: Any) -> None:
    """Let the configuration of a transformers model say that embeddings are not tied, where they are not."""
    try:
        ends = {identity(end.weight) for end in (base.get_input_embeddings(), base.get_output_embeddings())}
    except (AttributeError, NotImplementedError):  # no language model
        return
    if len(ends) > 1:
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False


def _unload(base: nn.Module, adapter_name: str) -> None:
    """Put the modules of the base model, or trained copies of them, where PEFT's, and wrappers, were."""
    modules: list[Any] = list(base.modules())
    for module in modules:
        wrapped = wrapped_child(module)
        if wrapped == "token_adapter":
            module.token_adapter.merge(adapter_names=[adapter_name])
        elif wrapped == "original_module" and adapter_name in module.modules_to_save:
            module.original_module = module.modules_to_save[adapter_name]
    for module in modules:
        for name, child in list(module._modules.items()):
            if child is not None and (plain := innermost(child)) is not child:
                setattr(module, name, plain)
