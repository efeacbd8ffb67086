"""An adapter read from a running model: posterior means, never a sample; paths of the base model, never of wrappers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.export.changed_base import changes_base
from ivon_lora.export.layer import Adapter, Layer
from ivon_lora.lora.adapters import LoraLayer, identity, layer_tensor, lora_layers
from ivon_lora.lora.names import Place, innermost, walk, without_wrappers
from ivon_lora.optim.drivers import samplers
from ivon_lora.optim.sharding import whole
from ivon_lora.optim.tied import seen_as

#: PEFT forward rules that a plain adapter of scale 1 reproduces; others (QALoRA, KaSA, ...) are refused
EXACT_VARIANTS = ("Dora", "ALora", "MiCA", "Velora")


class Means:
    """Read-only view of an optimizer (or of none) by parameter, or by another one over the memory of a parameter.

    Args:
        optimizer: an `IVON`, possibly wrapped by Accelerate; any other optimizer, or None, holds no samples, so there
            the parameter itself is the mean.
    """

    def __init__(self, optimizer: Any | None) -> None:
        while optimizer is not None and not hasattr(optimizer, "posterior"):
            optimizer = getattr(optimizer, "optimizer", None)
        self.optimizer = optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        self._by_memory: dict[object, Tensor] = {}
        for p in (p for group in groups for p in group["params"]):
            self._by_memory.setdefault(identity(p), p)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of ``tensor`` in its own dtype and shape, detached; also while a sample is in the parameters.

        Of a sharded tensor the whole, for which all processes must ask.
        """
        p = self._trained(tensor)
        if p is None:
            return whole(tensor.detach())
        mean: Tensor = self.optimizer.posterior(p).mean.detach()  # type: ignore[union-attr]
        return whole(seen_as(mean, p, tensor).to(tensor.dtype))

    def mask(self, *tensors: Tensor | None) -> Tensor | None:
        """The rank mask (rank,) that the pruner wrote beside the first of ``tensors`` that has one."""
        trained = [self._trained(tensor) for tensor in tensors if tensor is not None]
        masks = (self.optimizer.state[p].get("rank_mask") for p in trained if p is not None)  # type: ignore[union-attr]
        mask = next((mask for mask in masks if mask is not None), None)
        return None if mask is None else torch.as_tensor(mask).detach().to("cpu", torch.bool)

    def _trained(self, tensor: Tensor) -> Tensor | None:
        """The parameter that ``tensor`` is, or whose memory it has, perhaps transposed."""
        p = self._by_memory.get(identity(tensor))
        return p if p is not None and p.numel() == tensor.numel() else None


def find_base(model: nn.Module, adapter_name: str) -> nn.Module:
    """The base model that PEFT has wrapped; ``model`` itself, without wrappers, where adapters were injected.

    Raises:
        ValueError: as `lora_layers`; or the adapter is in several PEFT models inside ``model``.
    """
    layers, places = lora_layers(model, adapter_name), list(walk(model))
    has = [p.path for p in places if adapter_name in (getattr(p.module, "peft_config", None) or {})]
    roots = [path for path in dict.fromkeys(has) if not any(_inside(path, other) for other in has)] or [""]
    outside = [layer.path for layer in layers if not _inside(layer.path, roots[0])]
    if len(roots) > 1 or outside:
        names = ", ".join(roots if len(roots) > 1 else [roots[0] or "the model", *outside])
        raise ValueError(
            f"adapter {adapter_name!r} is in several PEFT models inside {type(model).__name__}: {names}; export or "
            "merge each on its own, e.g. export_lora(model.NAME, optimizer, 'folder/NAME')"
        )
    return innermost(next(p.module for p in places if p.path == roots[0]))


def _inside(path: str, root: str) -> bool:
    return path != root and (not root or path.startswith(root + "."))


def read_model(model: nn.Module, optimizer: Any | None, adapter_name: str) -> Adapter:
    """The adapter ``adapter_name`` of a model, as an update of the base model inside it.

    Raises:
        ValueError: as `find_base`; the weights are another optimizer's sample; or a layer is more than a plain LoRA
            adapter expresses.
    """
    means, base = Means(optimizer), find_base(model, adapter_name)
    if any(sampler is not means.optimizer for sampler in samplers(base)):
        raise ValueError(
            "an IVON holds a sample in the weights, not their means: give optimizer=, or call optimizer.eval() before"
        )
    places = list(walk(base))
    configs = [getattr(module, "peft_config", None) or {} for _, _, module in walk(model)]
    config = next((dict(vars(found[adapter_name])) for found in configs if adapter_name in found), {})
    for other in (vars(other) for found in configs for other in found.values()):
        if changes_base(other):  # for all adapters of the model
            config["init_lora_weights"] = other["init_lora_weights"]
    layers = [_layer(layer, means, adapter_name) for layer in lora_layers(base, adapter_name)]
    extras = dict(_of_base(places, means, config, {layer.key for layer in layers}))
    extras.update(_copies(places, means, adapter_name))  # last: a copy that was trained stands for its original
    return Adapter(layers, extras, config, base)


def _layer(layer: LoraLayer, means: Means, adapter_name: str) -> Layer:
    variant = (getattr(layer.module, "lora_variant", None) or {}).get(adapter_name)
    if variant is not None and not type(variant).__name__.startswith(EXACT_VARIANTS):
        raise ValueError(
            f"layer {layer.name!r} cannot be exported: a plain LoRA adapter does not express "
            f"{type(variant).__name__}; use model.save_pretrained(...)"
        )
    fields: dict[str, Any] = dict(vars(layer))
    fields |= {name: means.mean(value) for name, value in fields.items() if isinstance(value, Tensor)}
    mask = means.mask(layer.A, layer.B, layer.E)
    gates: Any = getattr(layer.module, "lora_gate", {})  # of `variants`, whose layers have no E
    if adapter_name in gates:
        fields["E"] = gates.factor(means.mean(gates[adapter_name])).expand(len(layer.A)).reshape(-1, 1)
    links = [layer_tensor(layer.module, "lora_links", adapter_name, key) for key in "AB"]
    if links[0] is not None and links[1] is not None:  # finished links of `variants`
        fields["A"] = torch.cat([links[0].detach(), fields["A"]])
        fields["B"] = torch.cat([links[1].detach(), fields["B"]], 1)
        mask = None if mask is None else torch.cat([torch.ones(len(links[0]), dtype=torch.bool), mask])
    return Layer(**fields, mask=mask)


def _copies(places: Sequence[Place], means: Means, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """What was trained beside the base model: `modules_to_save` and trainable tokens."""
    for key, _, module in places:
        if hasattr(module, "adapter_state_dict") and adapter_name in getattr(module, "_adapters", {adapter_name}):
            state = module.state_dict(keep_vars=True)
            for name, tensor in module.adapter_state_dict(adapter_name, state).items():  # type: ignore[operator]
                yield f"{key}.{without_wrappers(name)}", means.mean(tensor)


def _of_base(
    places: Sequence[Place], means: Means, config: Mapping[str, Any], adapted: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """What was trained of the base model: as PEFT, the biases that the configuration names, and a new vocabulary."""
    grown, which = _grown_embeddings(places[0].module, config.get("base_model_name_or_path")), config.get("bias")
    for key, _, module in places:
        for name, p in module.named_parameters(recurse=False):
            is_adapted = name == "bias" and key.removesuffix(".base_layer") in adapted
            is_bias = (which == "all" and "bias" in f"{key}.{name}") or (which == "lora_only" and is_adapted)
            if is_bias or (name == "weight" and id(module) in grown):
                yield f"{key}.{name}", means.mean(p)


def _grown_embeddings(base: Any, name: str | None) -> set[int]:
    """The embeddings, by id, of a transformers model whose vocabulary is not the one of the model it was made from."""
    try:
        known = type(base.config).from_pretrained(name or base.name_or_path, local_files_only=True).get_text_config()
        if known.vocab_size == base.config.get_text_config().vocab_size:
            return set()
        embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]  # both, also where tied, as PEFT
        return {id(innermost(embedding)) for embedding in embeddings if embedding is not None}
    except Exception:  # not on this machine, or a configuration without a vocabulary: then nothing is known, as in PEFT
        return set()
