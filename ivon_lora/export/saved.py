"""An adapter read from the files that PEFT, or a training loop, has saved; the base model is not needed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivon_lora.export.changed_base import CHANGED
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
        extras, masks, used = dict(self.extras), dict(self.masks), False
        for name in posterior.names:
            mean, found = posterior.mean[name], factor(name)
            is_factor = found is not None and found.layer in layers
            place, key = (layers[found.layer], found.part) if is_factor else (extras, _whole(base_path(name))[0])  # type: ignore[union-attr]
            if not is_factor and key not in extras:
                continue
            if key not in place or place[key].shape != mean.shape:
                raise ValueError(
                    f"the posterior does not fit the adapter: {name!r} has shape {tuple(mean.shape)} there, "
                    f"{tuple(place[key].shape) if key in place else 'no such tensor'} here; an exported adapter has "
                    "lost its pruned ranks already and needs no posterior"
                )
            place[key] = mean.to(place[key].dtype)
            used |= is_factor
            if is_factor and name in posterior.rank_mask:
                masks[found.layer] = posterior.rank_mask[name]  # type: ignore[union-attr]
        if not used:
            raise ValueError("the posterior does not fit the adapter: they have no tensor in common")
        return replace(self, layers=layers, extras=extras, masks=masks)

    def adapter(self) -> Adapter:
        """The same, to be exported.

        Raises:
            ValueError: the update is more than a product of matrices, or one of a base model that PEFT has changed.
        """
        initialisation, is_ada = str(self.config.get("init_lora_weights")), self.config["peft_type"] == "ADALORA"
        reasons = [name for name in INEXACT if self.config.get(name)]
        reasons += [f"init_lora_weights={initialisation!r}"] if initialisation.lower().startswith(CHANGED) else []
        reasons += [f"AdaLoRA on {name} (a convolution?)" for name in self.layers if is_ada and "conv" in name.lower()]
        if reasons:
            raise ValueError(
                f"an adapter with {', '.join(reasons[:3])} cannot be exported from its files alone: load the model and "
                "use export_lora(model, ...)"
            )
        return Adapter(self._layers(), self.extras, self.config)

    def _layers(self) -> list[Layer]:
        return [_layer(self, name, tensors) for name, tensors in self.layers.items()]


def read_adapter(folder: str | os.PathLike[str]) -> SavedAdapter:
    """Read and check adapter_config.json and its weights.

    Raises:
        ValueError: a file is missing or damaged, the adapter is neither LoRA nor AdaLoRA, several adapters are in one
            file and none is called default, or `check_adapter` refuses a tensor. One line that says which, and what to
            do.
        ImportError: if safetensors is missing.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    path = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}: give a directory that PEFT's save_pretrained wrote")
    try:
        tensors = read_tensors(path)[0]
        if unfinished := [name for name in tensors if ".lora_gate" in name or ".lora_links" in name]:
            raise ValueError(
                f"{unfinished[0]} is of a method of ivon_lora.variants in training: load the checkpoint into its run, "
                "then variant.detach() and export_lora(model, ...)"
            )
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
    rank = "r" if kind == "LORA" else "init_r"
    for name in (rank, "lora_alpha"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"{path} has {name}={value!r}, not a number: the scale of the adapter is unknown, save it again"
            )
    if config[rank] < 1 or config[rank] != int(config[rank]):
        raise ValueError(f"{path} has {rank}={config[rank]!r}, not a rank of at least 1: save the adapter again")
    if kind == "ADALORA":  # what it calls rank_pattern are masks, of no use here
        config.pop("rank_pattern", None)
    for name, types in FIELDS.items():
        if config.get(name) is not None and not _fits(name, config[name], types):
            raise ValueError(
                f"{path} has {name}={config[name]!r}, which no version of PEFT writes: save the adapter again"
            )
    return dict(config)


#: what the fields of a configuration hold where they are not None
FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), (str, list)),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (list,)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "auto_mapping"), (dict,)),
    **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out"), (bool,)),
    "layers_to_transform": (int, list),
    "lora_dropout": (int, float),
    "bias": (str,),
}


def _fits(name: str, value: Any, types: tuple[type, ...]) -> bool:
    entries = value if isinstance(value, list) else []
    patterns = value if isinstance(value, dict) and name.endswith("_pattern") else {}
    regexes = [value] if isinstance(value, str) and name.endswith("_modules") else list(patterns)
    try:
        return (
            isinstance(value, types)
            and all(isinstance(entry, int if name == "layers_to_transform" else str) for entry in entries)
            and all(isinstance(number, int | float) and 0 < number < math.inf for number in patterns.values())
            and all(re.compile(regex) is not None for regex in regexes)
            and (name != "bias" or value in ("none", "all", "lora_only"))
        )
    except re.error:
        return False


def _sorted_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """LoRA tensors by layer, and all others, of one adapter; under the names that PEFT's files have."""
    # an export for diffusers has every tensor twice
    tensors = {k: t for k, t in tensors.items() if k.startswith(PREFIX) or PREFIX + k.partition(".")[2] not in tensors}
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    named = [(key, factor(key)) for key in tensors if ".modules_to_save." not in key]
    whole = {part.layer for _, part in named if part is not None and part.part != "lora_B.bias"}
    # a bias alone is of a module of the base model that is called lora_B
    found = {key: part for key, part in named if part is not None and part.layer in whole}
    adapter = _one_adapter({part.adapter for part in found.values()})
    layers: dict[str, dict[str, Tensor]] = {}
    for key, part in found.items():
        layer = layers.setdefault(part.layer.replace(".original_module", ""), {}) if part.adapter == adapter else {}
        if part.part in layer:
            raise ValueError(f"{key!r} is in the file twice, under different names: save one adapter")
        layer[part.part] = tensors[key]
    others = [
        (*_whole(base_path(key)), tensors[key]) for key in tensors if key not in found and not UNSAVED.fullmatch(key)
    ]
    trained = adapter or _one_adapter({name for _, name, _ in others if name is not None})
    extras = {path: tensor for path, name, tensor in others if name in (None, trained)}
    if not layers:
        raise ValueError("the file of weights has no LoRA tensors")
    return layers, extras


def _one_adapter(names: Collection[str | None]) -> str | None:
    """The adapter to take of those in a file."""
    if len(names) > 1 and "default" not in names:
        raise ValueError(
            f"the file holds several adapters, {', '.join(sorted(map(str, names)))}, and none is called default: save "
            "each in a directory of its own"
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
    own = {
        "lora_magnitude_vector": config.get("use_dora"),
        "lora_B.bias": config.get("lora_bias") and prefix == "lora_",
    }
    missing += [part for part, needed in own.items() if needed and part not in tensors]
    if missing or a is None or b is None:
        raise ValueError(f"layer {name!r} lacks {' and '.join(missing)}: save the adapter again")
    outer = name.split(".base_layer")[
        0
    ]  # of a layer inside another one: an attention layer, or one parameter of several
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
        initial = torch.tensor(float(config["init_r"]), dtype=a.dtype)  # whatever ranks survived
        alpha = float(config["lora_alpha"] if config["lora_alpha"] > 0 else config["init_r"])
        return replace(layer, scaling=float(alpha / (initial + 1e-5)))
    parameters = [p for p in config.get("target_parameters") or () if f".{path}".endswith(f".{p.rpartition('.')[0]}")]
    targets = [f"{path}.{p.rpartition('.')[2]}" for p in parameters] or [layer.target]
    declared = {consumer_rank_and_scale(config, target) for target in targets}
    if len(declared) > 1:
        raise ValueError(
            f"layer {name!r} is of one of the parameters {', '.join(parameters)}, which differ in rank or scale: load "
            "the model and use export_lora(model, ...)"
        )
    rank, scaling = declared.pop()
    experts = max(1, len(a) // rank) if parameters and a.dim() else 0
    layer = replace(layer, target=targets[0], experts=experts, scaling=scaling)
    check_layer(layer)  # what is wrong with its tensors is said first
    if len(a) != rank * max(1, experts):
        fault = f"has rank {len(a)}, its configuration says {rank}: save the adapter again"
        if a.shape[1] == len(b) == rank:
            fault = "has transposed factors: give (rank, in) and (out, rank)"
        raise ValueError(f"layer {name!r} {fault}")
    return layer
