"""An adapter read from the files that PEFT, or a training loop, has saved; the base model is not needed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivon_lora.export.contents import Adapter
from ivon_lora.export.layout import WEIGHTS_FILE
from ivon_lora.lora.config import CONFIG_FILE, changes_base, rank_and_scale, read_config, selected
from ivon_lora.lora.layer import LoraLayer
from ivon_lora.lora.names import PREFIX, matched, one_adapter, tensor_name
from ivon_lora.posterior.tensor_file import read_tensors

if TYPE_CHECKING:
    from ivon_lora.posterior.posterior import PosteriorFile

__all__ = ["adapter_of", "check_files_suffice", "read_adapter", "read_weights"]

#: settings that make a layer more than a product of two matrices
INEXACT = ("use_qalora", "kasa_config", "use_bdlora", "arrow_config", "monteclora_config")


def read_adapter(folder: str | os.PathLike[str], posterior: PosteriorFile | None = None) -> Adapter:
    """Read and check adapter_config.json and its weights.

    Args:
        posterior: its means take the place of the saved tensors, and the ranks that its masks prune are zero.

    Raises:
        ValueError: a file is missing or damaged, the adapter is neither LoRA nor AdaLoRA, `adapter_of` refuses it, or
            the posterior does not fit. One line that says which, and what to do.
        ImportError: if safetensors is missing.
    """
    config = read_config(_file(folder, CONFIG_FILE))
    path, tensors = read_weights(folder)
    try:
        if posterior is None:
            return adapter_of(config, tensors)
        means, masks = _with_posterior(tensors, posterior)
        adapter = adapter_of(config, means)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    layers = [layer.without(~masks[id(layer.B)]) if id(layer.B) in masks else layer for layer in adapter.layers]
    return replace(adapter, layers=layers)


def read_weights(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Tensor]]:
    """The file of weights in an adapter directory, and all its tensors. Raises ValueError as `read_adapter`."""
    path = _file(folder, WEIGHTS_FILE, "adapter_model.bin")
    try:
        return path, read_tensors(path)[0]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None


def _file(folder: str | os.PathLike[str], *names: str) -> Path:
    """The first of some files that is there."""
    for path in (Path(folder) / name for name in names):
        if path.is_file():
            return path
    raise ValueError(f"{folder} has no {names[0]}: give a directory that PEFT's save_pretrained wrote")


def _with_posterior(
    tensors: Mapping[str, Tensor], posterior: PosteriorFile
) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """The posterior's means in the place of the tensors of the same parameters, and its masks, by id of these means.

    A factor that the file has twice, perhaps transposed, is one parameter: that of adapters that are tied.
    """
    names = {key: name for name, key in matched(posterior.names, tensors).items()}
    if not any(tensor_name(key).part for key in names):
        raise ValueError("the posterior does not fit the adapter: they have no tensor in common")
    means, masks = dict(tensors), dict[int, Tensor]()
    for key, old in tensors.items():
        twins = names if tensor_name(key).part and bool(old.any()) else ()
        same = key if key in names else next((other for other in twins if _is_twin(tensors[other], old)), None)
        if same is None:
            continue
        name, mean = names[same], posterior.mean[names[same]]
        if tensors[same].shape != mean.shape:
            raise ValueError(
                f"the posterior does not fit the adapter: {name!r} has shape {tuple(mean.shape)} there, "
                f"{tuple(old.shape)} here; an exported adapter has lost its pruned ranks already and needs no posterior"
            )
        is_turned = same != key and not torch.equal(tensors[same], old)
        means[key] = (mean.t() if is_turned else mean).to(old.dtype)
        if name in posterior.rank_mask:
            masks[id(means[key])] = posterior.rank_mask[name]
    return means, masks


def _is_twin(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or (one.dim() == 2 and torch.equal(one.t(), other))


def adapter_of(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: re.Pattern[str] | None = None
) -> Adapter:
    """What a configuration and tensors under the names of PEFT's files, or of a training state, mean.

    Args:
        prefix: what leads to the base model in the names, if that is known.

    Raises:
        ValueError: several adapters and none is called default, a tensor is none that an `Adapter` can have, or a
            layer has another rank than the configuration says.
    """
    # an export for diffusers has every tensor twice
    tensors = {k: t for k, t in tensors.items() if k.startswith(PREFIX) or PREFIX + k.partition(".")[2] not in tensors}
    if unfinished := [name for name in tensors if ".lora_gate" in name or ".lora_links" in name]:
        raise ValueError(
            f"{unfinished[0]} is of a method of ivon_lora.variants in training: load the checkpoint into its run, "
            "then variant.detach() and export_lora(model, ...)"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for name, (key, part, _) in one_adapter(tensors, prefix).items():
        found, entry = (parts.setdefault(key, {}), part) if part else (extras, key)
        if entry in found:
            raise ValueError(f"{name!r} is in the file twice, under different names: save one adapter")
        found[entry] = tensors[name]
    if not parts:
        raise ValueError("the file of weights has no LoRA tensors")
    adapter = Adapter([_layer(config, key, parts) for key in parts], extras, config)
    for layer in adapter.layers if config["peft_type"] == "LORA" else ():
        rank, _ = rank_and_scale(config, layer.target)
        if len(layer.A) != rank * layer.experts:
            raise ValueError(
                f"layer {layer.key!r} has rank {len(layer.A)}, its configuration says {rank}: if its factors are "
                "transposed give (rank, in) and (out, rank), else save the adapter again"
            )
    return adapter


def check_files_suffice(adapter: Adapter) -> None:
    """Raises ValueError where the update is more than a product of matrices, or of a base that PEFT has changed, or
    where the configuration promises tensors that no consumer would find."""
    config = adapter.config
    reasons = [name for name in INEXACT if config.get(name) not in (None, False)]
    promised = {"modules_to_save": config.get("modules_to_save") or (), "trainable_token_indices": ("token_adapter",)}
    for field, names in promised.items():
        if config.get(field) and not any(f"{name}." in key for name in names for key in adapter.extras):
            reasons.append(f"{field}={config[field]!r}, of which the file has nothing,")
    reasons += [f"init_lora_weights={config['init_lora_weights']!r}"] if changes_base(config) else []
    convolutions = [layer.key for layer in adapter.layers if "conv" in layer.key.lower()]
    reasons += [f"AdaLoRA on {key} (a convolution?)" for key in convolutions if config["peft_type"] == "ADALORA"]
    if reasons:
        raise ValueError(
            f"an adapter with {', '.join(reasons[:3])} cannot be exported from its files alone: load the model and "
            "use export_lora(model, ...)"
        )


def _layer(config: Mapping[str, Any], key: str, layers: Mapping[str, Mapping[str, Tensor]]) -> LoraLayer:
    parts, is_ada = layers[key], config["peft_type"] == "ADALORA"
    is_embedding = "lora_embedding_A" in parts
    kind = "lora_embedding_" if is_embedding else "lora_"
    needed = {"A": f"{kind}A", "B": f"{kind}B"}  # and what the configuration says; nobody reads more
    needed |= {"E": "lora_E"} if is_ada else {}
    needed |= {"magnitude": "lora_magnitude_vector"} if config.get("use_dora") else {}
    needed |= {"bias": "lora_B.bias"} if config.get("lora_bias") and not is_embedding else {}
    if missing := [part for part in needed.values() if part not in parts]:
        raise ValueError(f"layer {key!r} lacks {' and '.join(missing)}: save the adapter again")
    # a layer inside another one: of an attention layer, or of one parameter of several
    is_inside = ".base_layer" in key and key.split(".base_layer")[0] in layers
    path = key.replace(".base_layer", "") if is_inside else key
    tensors: dict[str, Any] = {field: parts[part] for field, part in needed.items()}
    layer = LoraLayer(name=key, key=key, path=path, is_embedding=is_embedding, **tensors)
    if is_ada:
        initial = torch.tensor(float(config["init_r"]), dtype=layer.A.dtype)  # whatever ranks survived
        alpha = float(config["lora_alpha"] if config["lora_alpha"] > 0 else config["init_r"])
        return replace(layer, scaling=float(alpha / (initial + 1e-5)))
    owners = [f".{target}".rpartition(".") for target in config.get("target_parameters") or ()]
    names = [name for owner, _, name in owners if f".{path}".endswith(owner)]  # a bare name is of any module
    if not names or selected(config, [path]):
        return replace(layer, scaling=rank_and_scale(config, layer.target)[1], groups=_groups(layer.A, layer.B))
    # of several parameters of one module, the file does not say which is which, nor how many experts there are
    nested = [parts for other, parts in layers.items() if other.replace(".base_layer", "") == path]
    sizes = [parts["lora_A"].shape[:1].numel() for parts in nested if "lora_A" in parts]
    options = [(name, *rank_and_scale(config, f"{path}.{name}")) for name in names]
    counts = [{size // rank for _, rank, _ in options if size % rank == 0} for size in sizes]
    experts = min(set[int].intersection(*counts), default=1)
    fitting = [option for option in options if option[1] * experts == layer.A.shape[:1].numel()] or options
    if len({scaling for _, _, scaling in fitting}) != 1:
        raise ValueError(
            f"layer {key!r} is of one of the parameters {', '.join(names)}, which differ in rank or scale: load the "
            "model and use export_lora(model, ...)"
        )
    name, _, scaling = fitting[0]
    return replace(layer, parameter=name, scaling=scaling, experts=experts)


def _groups(a: Tensor, b: Tensor) -> int:
    """Of a grouped convolution, whose B is (out, rank / groups, ...): how many there are."""
    is_grouped = 2 < a.dim() == b.dim() and 0 < b.shape[1] < len(a) and len(a) % b.shape[1] == 0
    return len(a) // b.shape[1] if is_grouped else 1
