"""An adapter read from a running model: posterior means, never a sample; paths of the base model, never of wrappers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.export.contents import Adapter
from ivon_lora.lora.adapters import identity, layer_tensor, lora_layers
from ivon_lora.lora.config import changes_base
from ivon_lora.lora.layer import LoraLayer
from ivon_lora.lora.names import Place, innermost, walk, without_wrappers
from ivon_lora.optim.ownership import samplers
from ivon_lora.optim.sharding import whole
from ivon_lora.optim.tied import seen_as
from ivon_lora.optim.wrappers import unwrap

#: PEFT forward rules that a plain adapter of scale 1 reproduces; others (QALoRA, KaSA, ...) are refused
EXACT_VARIANTS = ("Dora", "ALora", "MiCA", "Velora")


class _Means:
    """What an optimizer knows of tensors: those that it trains, or that have the memory of one, perhaps transposed.

    An optimizer of another kind, or none, holds no samples: there every tensor is its own mean.
    """

    def __init__(self, optimizer: Any | None) -> None:
        self.optimizer: Any = unwrap(optimizer)
        self._trained: dict[object, Tensor] = {}
        for p in () if self.optimizer is None else self.optimizer.parameters:
            self._trained.setdefault((identity(p), p.numel()), p)

    def parameter(self, tensor: Tensor) -> Tensor | None:
        """The parameter that a tensor is."""
        return self._trained.get((identity(tensor), tensor.numel()))

    def mean(self, tensor: Tensor) -> Tensor:
        """In the dtype and shape of ``tensor``; of a sharded one the whole, for which all processes must ask."""
        if (p := self.parameter(tensor)) is None:
            return whole(tensor.detach())
        return whole(seen_as(self.optimizer.posterior(p).mean, p, tensor).to(tensor.dtype))

    def pruned(self, *tensors: Tensor) -> Tensor | None:
        """The ranks that the pruner has masked, bool (rank,), if it prunes one of these tensors."""
        states = [self.optimizer.state.get(p, {}) for p in map(self.parameter, tensors) if p is not None]
        return next((~state["rank_mask"].detach().bool() for state in states if "rank_mask" in state), None)


def read_model(model: nn.Module, optimizer: Any | None, adapter_name: str) -> Adapter:
    """The adapter ``adapter_name`` of a model, as an update of the base model inside it.

    Raises:
        ValueError: the model has no such adapter, or several PEFT models with it; the weights are another optimizer's
            sample; a layer is more than a plain LoRA adapter expresses; or a tensor is none that an `Adapter` can have.
    """
    means, base = _Means(optimizer), _find_base(model, adapter_name)
    if any(sampler is not means.optimizer for sampler in samplers(base)):
        raise ValueError(
            "an IVON holds a sample in the weights, not their means: give optimizer=, or call optimizer.eval() before"
        )
    configs = [(name, vars(config)) for _, _, module in walk(model) for name, config in _configs(module).items()]
    config = dict(next((fields for name, fields in configs if name == adapter_name), {}))
    for _, fields in configs:
        if changes_base(fields):  # for all adapters of the model
            config["init_lora_weights"] = fields["init_lora_weights"]
    layers = [_at_means(layer, means, adapter_name) for layer in lora_layers(base, adapter_name)]
    places = list(walk(base))
    extras = dict(_of_base(places, means, config, {layer.key for layer in layers}))
    extras.update(_copies(places, means, adapter_name))  # last: a copy that was trained stands for its original
    return Adapter(layers, extras, config, base)


def _find_base(model: nn.Module, adapter_name: str) -> nn.Module:
    """The base model that PEFT has wrapped; ``model`` itself, without wrappers, where adapters were injected."""
    roots: dict[str, nn.Module] = {}
    for _, path, module in walk(model):  # from the outside in
        if adapter_name in _configs(module) and not _is_inside(path, roots):
            roots[path] = module
    roots = roots or {"": model}
    outside = [layer.path for layer in lora_layers(model, adapter_name) if not _is_inside(layer.path, roots)]
    if len(roots) > 1 or outside:
        raise ValueError(
            f"adapter {adapter_name!r} is in several PEFT models inside {type(model).__name__}: "
            f"{', '.join([*roots, *outside])}; export or merge each on its own, e.g. "
            "export_lora(model.NAME, optimizer, 'folder/NAME')"
        )
    return innermost(next(iter(roots.values())))


def _configs(module: nn.Module) -> Mapping[str, Any]:
    """PEFT's configurations, by name of the adapter."""
    return getattr(module, "peft_config", None) or {}


def _is_inside(path: str, roots: Iterable[str]) -> bool:
    return any(not root or f"{path}.".startswith(f"{root}.") for root in roots)


def _at_means(layer: LoraLayer, means: _Means, adapter_name: str) -> LoraLayer:
    """The layer with means in the place of its parameters, without ranks that are pruned."""
    variant = (getattr(layer.module, "lora_variant", None) or {}).get(adapter_name)
    if variant is not None and not type(variant).__name__.startswith(EXACT_VARIANTS):
        raise ValueError(
            f"layer {layer.name!r} cannot be exported: a plain LoRA adapter does not express "
            f"{type(variant).__name__}; use model.save_pretrained(...)"
        )
    pruned = means.pruned(layer.A, layer.B)
    tensors: dict[str, Any] = {name: means.mean(t) for name, t in vars(layer).items() if isinstance(t, Tensor)}
    layer = replace(layer, **tensors)
    layer = layer if pruned is None else layer.without(pruned)
    kernel = getattr(innermost(layer.module), "kernel_size", None)
    if kernel is not None and layer.A.dim() == 2:  # AdaLoRA's factors of a convolution
        a, b = layer.A.reshape(len(layer.A), -1, *kernel), layer.B.reshape(*layer.B.shape, *[1] * len(kernel))
        layer = replace(layer, A=a, B=b)
    # of `ivon_lora.variants`: gates, and finished links
    gates: Any = getattr(layer.module, "lora_gate", {})
    if adapter_name in gates:
        gate = gates.factor(means.mean(gates[adapter_name]))
        layer = replace(layer, E=gate.expand(len(layer.A)).reshape(-1, 1))
    links = [layer_tensor(layer.module, "lora_links", adapter_name, factor) for factor in "AB"]
    if links[0] is not None and links[1] is not None:
        layer = replace(layer, A=torch.cat([links[0], layer.A]), B=torch.cat([links[1], layer.B], 1))
    return layer


def _copies(places: Sequence[Place], means: _Means, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """What was trained beside the base model: `modules_to_save` and trainable tokens."""
    for key, _, module in places:
        if hasattr(module, "adapter_state_dict") and adapter_name in getattr(module, "_adapters", {adapter_name}):
            state = module.state_dict(keep_vars=True)
            for name, tensor in module.adapter_state_dict(adapter_name, state).items():  # type: ignore[operator]
                yield f"{key}.{without_wrappers(name)}", means.mean(tensor)


def _of_base(
    places: Sequence[Place], means: _Means, config: Mapping[str, Any], adapted: set[str]
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
