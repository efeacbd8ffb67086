"""An adapter read from the files that PEFT, or a training loop, has saved; the base model is not needed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivon_lora.export.changed_base import is_changed
from ivon_lora.export.layer import Adapter, Layer
from ivon_lora.export.validate import check_adapter, check_layer
from ivon_lora.export.verify import consumer_rank_and_scale
from ivon_lora.lora.names import PREFIX, base_path, factor
from ivon_lora.posterior.tensor_file import read_tensors

if TYPE_CHECKING:
    from ivon_lora.posterior.posterior import PosteriorFile

__all__ = ["SavedAdapter", "read_adapter"]

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, "adapter_model.bin")
#: settings that make a layer more than a product of two matrices
INEXACT = ("use_qalora", "kasa_config", "use_bdlora", "arrow_config", "monteclora_config")
#: trained tensors that are no LoRA factors, under their names in a training state
WHOLE = re.compile(r"(.*)\.modules_to_save\.([^.]+)\.(.+)|(.*\.token_adapter\.trainable_tokens_delta)\.([^.]+)")
#: what a training state has besides, and nobody loads
UNSAVED = re.compile(
    r".*\.(original_module\..+|modules_to_save\.[^.]+|ranknum(\..+)?|token_adapter\.(token_indices|trainable_tokens_original).*)"
)


@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """The files of a LoRA or AdaLoRA adapter.

    Attributes:
        config: adapter_config.json.
        layers: path of the layer in the base model -> its tensors: ``lora_A``, ``lora_B``, ``lora_E`` (AdaLoRA),
            ``lora_embedding_A``, ``lora_embedding_B``, ``lora_magnitude_vector``, ``lora_B.bias``.
        extras: all other tensors, by path in the base model (a head that was trained whole).
        masks: path -> bool (rank,), False for pruned ranks, where a posterior knows them.
    """

    config: dict[str, Any]
    layers: dict[str, dict[str, Tensor]]
    extras: dict[str, Tensor]
    masks: dict[str, Tensor]

    def ranks(self) -> dict[str, int]:
        """Live ranks by path of the layer: of the mask, or else those whose product is not exactly zero."""
        return {layer.key: layer.rank for layer in self._layers()}

    def tensor(self, name: str) -> Tensor | None:
        """The saved tensor of a parameter, by its name in the running model; None if it is not in the files."""
        found = factor(name)
        if found is not None and found.layer in self.layers:
            return self.layers[found.layer].get(found.part)
        return self.extras.get(_whole(base_path(name))[0])

    def with_posterior(self, posterior: PosteriorFile) -> SavedAdapter:
        """The posterior's means in the place of the saved tensors, and its rank masks.

        Raises:
            ValueError: the posterior does not fit this adapter.
        """
        layers = {name: dict(tensors) for name, tensors in self.layers.items()}
        extras, masks, used = dict(self.extras), dict(self.masks), 0
        for name in posterior.names:
            mean, found = posterior.mean[name], factor(name)
            key = _whole(base_path(name))[0]
            if found is None or found.layer not in layers:
                if key in extras and extras[key].shape == mean.shape:
                    extras[key] = mean.to(extras[key].dtype)
                continue
            saved = layers[found.layer].get(found.part)
            if saved is None or saved.shape != mean.shape:
                raise ValueError(
                    f"the posterior does not fit the adapter: {name!r} has shape {tuple(mean.shape)} there, "
                    f"{'no such tensor' if saved is None else tuple(saved.shape)} here; an exported adapter has lost its "
                    "pruned ranks already and needs no posterior"
                )
            layers[found.layer][found.part] = mean.to(saved.dtype)
            used += 1
            if name in posterior.rank_mask:
                masks[found.layer] = posterior.rank_mask[name]
        if not used:
            raise ValueError("the posterior does not fit the adapter: they have no tensor in common")
        return replace(self, layers=layers, extras=extras, masks=masks)

    def adapter(self) -> Adapter:
        """The same, to be exported.

        Raises:
            ValueError: the update is more than a product of matrices, or one of a base model that PEFT has changed.
        """
        reasons = [name for name in INEXACT if self.config.get(name)]
        initialisation = str(self.config.get("init_lora_weights"))
        if is_changed(initialisation):
            reasons.append(f"init_lora_weights={initialisation!r}")
        if self.config["peft_type"] == "ADALORA":
            reasons += [f"AdaLoRA on {name} (a convolution?)" for name in self.layers if "conv" in name.lower()]
        if reasons:
            raise ValueError(
                f"an adapter with {', '.join(reasons[:3])} cannot be exported from its files alone: load the model and use "
                "export_lora(model, ...)"
            )
        return Adapter(self._layers(), self.extras, self.config)

    def _layers(self) -> list[Layer]:
        return [_layer(self, name, tensors) for name, tensors in self.layers.items()]


def read_adapter(folder: str | os.PathLike[str]) -> SavedAdapter:
    """Read and check adapter_config.json and its weights.

    Raises:
        ValueError: a file is missing or damaged, the adapter is neither LoRA nor AdaLoRA, several adapters are in one file
            and none is called default, or `check_adapter` refuses a tensor. One line that says which, and what to do.
        ImportError: if safetensors is missing.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    path = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}: give a directory that PEFT's save_pretrained wrote")
    try:
        tensors = read_tensors(path)[0]
        layers, extras = _sorted_out(tensors)
        saved = SavedAdapter(config, layers, extras, masks={})
        check_adapter(Adapter(saved._layers(), extras))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error
    return saved


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give an adapter directory") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON: save the adapter again") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in ("LORA", "ADALORA"):
        raise ValueError(f"{path} is of an adapter of type {kind}: LORA and ADALORA are supported")
    for name in ("r" if kind == "LORA" else "init_r", "lora_alpha"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{path} has {name}={value!r}, not a number: the scale of the adapter is unknown, save it again")
        if name != "lora_alpha" and (value < 1 or value != int(value)):
            raise ValueError(f"{path} has {name}={value!r}, not a rank of at least 1: save the adapter again")
    for name, is_good in FIELDS.items():
        value = config.get(name)
        if value is not None and not (kind == "ADALORA" and name.endswith("_pattern")) and not is_good(value):
            raise ValueError(f"{path} has {name}={value!r}, which no version of PEFT writes: save the adapter again")
    return dict(config)


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_pattern(value: Any) -> bool:
    """Of ranks or alphas by regular expression."""
    return isinstance(value, dict) and all(
        _is_regex(key) and isinstance(number, int | float) and 0 < number < math.inf for key, number in value.items()
    )


#: what the fields of a configuration hold where they are not None
FIELDS: dict[str, Callable[[Any], bool]] = {
    "target_modules": lambda value: _is_regex(value) or _are_names(value),
    "exclude_modules": lambda value: _is_regex(value) or _are_names(value),
    "modules_to_save": _are_names,
    "target_parameters": _are_names,
    "layers_to_transform": lambda value: all(isinstance(i, int) for i in (value if isinstance(value, list) else [value])),
    "layers_pattern": lambda value: isinstance(value, str) or _are_names(value),
    "rank_pattern": _is_pattern,
    "alpha_pattern": _is_pattern,
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "lora_dropout": lambda value: isinstance(value, int | float),
    "auto_mapping": lambda value: isinstance(value, dict),
    **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out"), lambda value: isinstance(value, bool)),
}


def _sorted_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """LoRA tensors by layer, and all others, of one adapter; under the names that PEFT's files have."""
    # an export for diffusers has every tensor twice
    tensors = {k: t for k, t in tensors.items() if k.startswith(PREFIX) or PREFIX + k.partition(".")[2] not in tensors}
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    found = {key: factor(key) for key in tensors if ".modules_to_save." not in key}
    whole = {part.layer for part in found.values() if part is not None and part.part != "lora_B.bias"}
    # a bias alone is of a module of the base model that is called lora_B
    found = {key: part for key, part in found.items() if part is not None and part.layer in whole}
    adapter = _one_adapter({part.adapter for part in found.values()})
    layers: dict[str, dict[str, Tensor]] = {}
    for key, part in found.items():
        layer = layers.setdefault(part.layer.replace(".original_module", ""), {}) if part.adapter == adapter else {}
        if part.part in layer:
            raise ValueError(f"{key!r} is in the file twice, under different names: save one adapter")
        layer[part.part] = tensors[key]
    others = [(*_whole(base_path(key)), tensors[key]) for key in tensors if key not in found and not UNSAVED.fullmatch(key)]
    trained = adapter or _one_adapter({name for _, name, _ in others if name is not None})
    extras = {path: tensor for path, name, tensor in others if name in (None, trained)}
    if not layers:
        raise ValueError("the file of weights has no LoRA tensors")
    return layers, extras


def _one_adapter(names: Collection[str | None]) -> str | None:
    """The adapter to take of those in a file."""
    if len(names) > 1 and "default" not in names:
        raise ValueError(
            f"the file holds several adapters, {', '.join(sorted(map(str, names)))}, and none is called default: save each "
            "in a directory of its own"
        )
    return "default" if "default" in names else next(iter(names), None)


def _whole(path: str) -> tuple[str, str | None]:
    """(name in PEFT's files, adapter or None) of a tensor that is no LoRA factor."""
    match = WHOLE.fullmatch(path)
    if match is None:
        return path, None
    return (f"{match[1]}.{match[3]}", match[2]) if match[1] is not None else (match[4], match[5])


def _layer(saved: SavedAdapter, name: str, tensors: Mapping[str, Tensor]) -> Layer:
    config = saved.config
    prefix = "lora_embedding_" if "lora_embedding_A" in tensors else "lora_"
    a, b, e = tensors.get(prefix + "A"), tensors.get(prefix + "B"), tensors.get("lora_E")
    missing = [prefix + part for part, tensor in zip("AB", (a, b), strict=True) if tensor is None]
    missing += ["lora_E"] if config["peft_type"] == "ADALORA" and e is None else []
    own = {"lora_magnitude_vector": config.get("use_dora"), "lora_B.bias": config.get("lora_bias") and prefix == "lora_"}
    missing += [part for part, needed in own.items() if needed and part not in tensors]
    if missing or a is None or b is None:
        raise ValueError(f"layer {name!r} lacks {' and '.join(missing)}: save the adapter again")
    outer = name.split(".base_layer")[0]  # of a layer inside another one: an attention layer, or one parameter of several
    is_inside = outer != name and outer in saved.layers
    path = name.replace(".base_layer", "") if is_inside else name
    layer = Layer(
        key=name,
        target=outer if is_inside else name,
        A=a,
        B=b,
        E=e,
        mask=saved.masks.get(name),
        bias=tensors.get("lora_B.bias") if own["lora_B.bias"] else None,  # else nobody reads it
        magnitude=tensors.get("lora_magnitude_vector") if own["lora_magnitude_vector"] else None,
        is_embedding=prefix == "lora_embedding_",
    )
    if config["peft_type"] == "ADALORA":
        alpha, rank = float(config["lora_alpha"]), torch.tensor(float(config["init_r"]), dtype=a.dtype)
        alpha = alpha if alpha > 0 else float(config["init_r"])
        return replace(layer, scaling=float(alpha / (rank + 1e-5)))  # the initial rank, as PEFT computes it
    parameters = [p for p in config.get("target_parameters") or () if f".{path}".endswith(f".{p.rpartition('.')[0]}")]
    targets = [f"{path}.{p.rpartition('.')[2]}" for p in parameters]
    declared = {consumer_rank_and_scale(config, target) for target in targets or [layer.target]}
    if len(declared) > 1:
        raise ValueError(
            f"layer {name!r} is of one of the parameters {', '.join(parameters)}, which differ in rank or scale: load the "
            "model and use export_lora(model, ...)"
        )
    rank, scaling = declared.pop()
    if targets:
        experts = max(1, a.shape[0] // rank)
        return _declared(replace(layer, target=targets[0], experts=experts, scaling=scaling), rank)
    return _declared(replace(layer, scaling=scaling), rank)


def _declared(layer: Layer, rank: int) -> Layer:
    """The layer, if it has the rank that the configuration declares; what is wrong with its tensors is said first."""
    check_layer(layer)
    if layer.A.shape[0] != rank * max(1, layer.experts):
        if layer.A.shape[1] == layer.B.shape[0] == rank:
            raise ValueError(f"layer {layer.key!r}: the factors are transposed; give (rank, in) and (out, rank)")
        raise ValueError(
            f"layer {layer.key!r} has rank {layer.A.shape[0]}, its configuration says {rank}: save the adapter again"
        )
    return layer
