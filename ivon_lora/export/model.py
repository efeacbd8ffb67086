"""An adapter read from a running model: posterior means, never a sample; paths of the base model, never of wrappers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.export.changed_base import on_original_base
from ivon_lora.export.layer import Adapter, Layer
from ivon_lora.lora.adapters import LoraLayer, identity, layer_tensor, lora_layers
from ivon_lora.lora.names import Place, walk, without_wrappers, wrapped_child
from ivon_lora.optim.sharding import own_class, whole

#: PEFT forward rules that a plain adapter of scale 1 reproduces; others (QALoRA, KaSA, ...) are refused
EXACT_VARIANTS = ("Dora", "ALora", "MiCA", "Velora")


class Means:
    """Read-only view of an optimizer (or of none) by parameter.

    Args:
        optimizer: an `IVON`, possibly wrapped by Accelerate; any other optimizer, or None, holds no samples, so there
            the parameter itself is the mean.
    """

    def __init__(self, optimizer: Any | None) -> None:
        while optimizer is not None and not hasattr(optimizer, "posterior") and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.optimizer = optimizer if hasattr(optimizer, "posterior") else None
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        self._known: dict[object, Tensor] = {}
        for p in (p for group in groups for p in group["params"]):
            self._known[id(p)] = p
            self._known.setdefault(identity(p), p)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of ``tensor`` in its own dtype and shape, detached; also while a sample is in the parameters.

        A parameter over the memory of a trained one has its mean, transposed if it is a transposed view. Of a sharded
        tensor the whole, for which all processes must ask.
        """
        p = self._trained(tensor)
        if p is None:
            return whole(tensor.detach())
        mean: Tensor = self.optimizer.posterior(p).mean.detach()  # type: ignore[union-attr]
        if p is not tensor and (mean.shape, p.stride()) != (tensor.shape, tensor.stride()):
            mean = mean.t()
        return whole(mean.to(tensor.dtype))

    def mask(self, *tensors: Tensor | None) -> Tensor | None:
        """The rank mask (rank,) that the pruner wrote beside the first of ``tensors`` that has one."""
        for tensor in tensors:
            p = None if tensor is None else self._trained(tensor)
            mask = None if p is None else self.optimizer.state[p].get("rank_mask")  # type: ignore[union-attr]
            if mask is not None:
                return torch.as_tensor(mask).detach().to("cpu", torch.bool)
        return None

    def _trained(self, tensor: Tensor) -> Tensor | None:
        p = self._known.get(id(tensor), self._known.get(identity(tensor)))
        return p if p is not None and p.numel() == tensor.numel() else None


def find_base(model: nn.Module, adapter_name: str) -> list[Place]:
    """The base model that PEFT has wrapped, and the places in it, with keys and paths that start there.

    Raises:
        ValueError: as `lora_layers`; or the adapter is in several PEFT models inside ``model``.
    """
    layers, places = lora_layers(model, adapter_name), list(walk(model))
    has = [p.path for p in places if adapter_name in (getattr(p.module, "peft_config", None) or {})]
    roots = [path for path in dict.fromkeys(has) if not any(_inside(path, other) for other in has)]
    root = roots[0] if roots else ""
    outside = [layer.path for layer in layers if not _inside(layer.path, root)]
    if len(roots) > 1 or outside:
        names = ", ".join(roots if len(roots) > 1 else [root or "the model", *outside])
        raise ValueError(
            f"adapter {adapter_name!r} is in several PEFT models inside {type(model).__name__}: {names}; export or "
            "merge each on its own, e.g. export_lora(model.NAME, optimizer, 'folder/NAME')"
        )
    base = [place for place in places if place.path == root][-1]  # PeftModel, tuner and base model have one path
    key, path = (len(start) + 1 if start else 0 for start in (base.key, root))
    below = [Place(p.key[key:], p.path[path:], p.module) for p in places if _inside(p.path, root)]
    return [Place("", "", base.module), *below]


def _inside(path: str, root: str) -> bool:
    return path != root and (not root or path.startswith(root + "."))


def read_model(
    model: nn.Module,
    optimizer: Any | None,
    adapter_name: str,
    original: nn.Module | None = None,
    *,
    merging: bool = False,
) -> Adapter:
    """The adapter ``adapter_name`` of a model, as an update of the base model that people have.

    Args:
        original: the base model as it was before PEFT, where that has changed its weights (PiSSA, OLoRA, ...).
        merging: as an update of the base model inside ``model`` instead.

    Raises:
        ValueError: as `find_base`; or a layer is more than a plain LoRA adapter expresses.
    """
    means = Means(optimizer)
    places = find_base(model, adapter_name)
    base = places[0].module
    configs = (getattr(module, "peft_config", None) or {} for _, _, module in walk(model))
    config = next((dict(vars(found[adapter_name])) for found in configs if adapter_name in found), {})
    layers = [_layer(layer, means, adapter_name, merging) for layer in lora_layers(base, adapter_name)]
    if not merging:
        layers = [on_original_base(layer, str(config.get("init_lora_weights")), original) for layer in layers]
    extras = dict(_new_rows(places, means, config.get("base_model_name_or_path")))
    extras.update(_biases(places, means, config.get("bias", "none"), {layer.key for layer in layers}))
    extras.update(_trained_whole(places, means, adapter_name))  # last: a copy that was trained stands for its original
    return Adapter(
        layers=layers,
        extras=extras,
        config=config,
        modules=dict.fromkeys(place.path for place in places),
        base_name=getattr(base, "name_or_path", None) or None,
        base_class=(own_class(base).__name__, own_class(base).__module__),
    )


def _layer(layer: LoraLayer, means: Means, adapter_name: str, merging: bool) -> Layer:
    variant = (getattr(layer.module, "lora_variant", None) or {}).get(adapter_name)
    dilation = getattr(base_layer(layer.module), "dilation", ())
    fault = None
    if variant is not None and not type(variant).__name__.startswith(EXACT_VARIANTS):
        fault = f"a plain LoRA adapter does not express {type(variant).__name__}; use model.save_pretrained(...)"
    elif layer.E is not None and not merging and set(dilation if isinstance(dilation, tuple) else ()) - {1}:
        fault = f"PEFT's LoRA convolutions have no dilation, this layer has {dilation}; merge_lora(...) is exact here"
    if fault is not None:
        raise ValueError(f"layer {layer.name!r} cannot be exported: {fault}")
    a, b, mask = means.mean(layer.A), means.mean(layer.B), means.mask(layer.A, layer.B, layer.E)
    links = [layer_tensor(layer.module, "lora_links", adapter_name, key) for key in "AB"]
    if links[0] is not None and links[1] is not None:  # finished links of `variants`, whose layers have no E
        a, b = torch.cat([links[0].detach(), a]), torch.cat([links[1].detach(), b], 1)
        mask = None if mask is None else torch.cat([torch.ones(len(links[0]), dtype=torch.bool), mask])
    bias = layer_tensor(layer.module, "lora_B", adapter_name, "bias")
    magnitude = layer_tensor(layer.module, "lora_magnitude_vector", adapter_name)
    kernel: Any = getattr(base_layer(layer.module), "kernel_size", ())
    # PEFT gives the projection inside an attention layer the rank of that layer
    target = layer.path if layer.key == layer.path else layer.key.split(".base_layer")[0]
    return Layer(
        key=layer.key,
        target=target if layer.parameter is None else f"{layer.path}.{layer.parameter}",
        A=a,
        B=b,
        E=None if layer.E is None else means.mean(layer.E),
        scaling=layer.scaling,
        mask=mask,
        bias=None if bias is None else means.mean(bias),
        magnitude=None if magnitude is None else means.mean(magnitude),
        is_embedding=layer.is_embedding,
        kernel=tuple(kernel) if layer.A.dim() == 2 else (),
        experts=layer.experts if layer.parameter is not None else 0,
        groups=layer.groups,
        module=layer.module,
    )


def base_layer(module: nn.Module | None) -> nn.Module:
    """The module inside all layers of PEFT around it."""
    while (name := wrapped_child(module)) is not None:  # type: ignore[arg-type]
        module = module._modules[name]  # type: ignore[union-attr]
    return module  # type: ignore[return-value]


def _trained_whole(places: Sequence[Place], means: Means, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """`modules_to_save` and trainable tokens."""
    for key, _, module in places:
        if hasattr(module, "adapter_state_dict") and adapter_name in getattr(module, "_adapters", {adapter_name}):
            state = {name: means.mean(p) for name, p in module.named_parameters(remove_duplicate=False)}
            state |= {name: b.detach() for name, b in module.named_buffers(remove_duplicate=False)}
            state |= {without_wrappers(name): tensor for name, tensor in state.items()}
            for name, tensor in module.adapter_state_dict(adapter_name, state).items():  # type: ignore[operator]
                yield f"{key}.{without_wrappers(name)}", tensor


def _biases(places: Sequence[Place], means: Means, which: str, adapted: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Trained biases of the base model: as PEFT, all whose name has "bias" in it, or those of adapted layers."""
    for key, _, module in places:
        for name, p in module.named_parameters(recurse=False):
            is_adapted = name == "bias" and key.removesuffix(".base_layer") in adapted
            if (which != "none" and is_adapted) or (which == "all" and "bias" in f"{key}.{name}"):
                yield f"{key}.{name}", means.mean(p)


def _new_rows(places: Sequence[Place], means: Means, name: str | None) -> Iterator[tuple[str, Tensor]]:
    """Embeddings of a transformers model whose vocabulary is not the one of the base model it was made from."""
    base: Any = places[0].module
    name = name or getattr(base, "name_or_path", None)
    if not name or not hasattr(base, "get_input_embeddings") or not hasattr(base, "config"):
        return
    try:
        known = type(base.config).from_pretrained(name, local_files_only=True).get_text_config().vocab_size
        grown = base.config.get_text_config().vocab_size != known
    except Exception:  # not on this machine, or a configuration without a vocabulary: then nothing is known, as in PEFT
        return
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]  # both, also where they are tied, as PEFT
    inner = [id(base_layer(embedding)) for embedding in embeddings if embedding is not None]
    for key, _, module in places:
        if grown and id(module) in inner and isinstance(weight := getattr(module, "weight", None), Tensor):
            yield f"{key}.weight", means.mean(weight)
