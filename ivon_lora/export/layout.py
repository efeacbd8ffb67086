"""The plan of an export: the rank of every layer in the file, the tensors under PEFT's names, the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ivon_lora.export.contents import Adapter
from ivon_lora.lora.config import SELECTION, selected
from ivon_lora.lora.layer import LoraLayer
from ivon_lora.lora.names import PREFIX, walk
from ivon_lora.optim.sharding import own_class

LAYOUTS = ("uniform", "compact", "gguf")
#: experts that are layers of their own
STACKED = re.compile(r"(.*\bexperts)\.\d+\..*")
WEIGHTS_FILE = "adapter_model.safetensors"
#: what diffusers reads first in a folder: some pipelines take PEFT's names for those of other programs
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
#: fields of the trained configuration that keep their meaning in a plain LoRA adapter
KEPT_FIELDS = (
    *("task_type", "base_model_name_or_path", "revision", "auto_mapping", "lora_dropout", "fan_in_fan_out", "bias"),
    *("modules_to_save", "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "use_dora"),
    *("lora_bias", "megatron_config", "megatron_core"),
)


def check_layout(layout: str) -> None:
    """ValueError for an unknown layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown: use {' or '.join(map(repr, LAYOUTS))}")


def file_ranks(layers: Sequence[LoraLayer], layout: str) -> dict[str, int]:
    """Rank that each kept target gets in the file.

    ``uniform``: the largest surviving rank for all; else its own. A target without ranks is left out unless it
    still acts (DoRA magnitude, LoRA bias: PEFT knows no rank 0, so it gets one zero rank) or is one of the experts that
    servers stack: those have the largest rank, dead ones as zeros. Only groups of a convolution keep what they have.
    """
    ranks: dict[str, int] = {}
    alive = {_stack(layer) for layer in layers if layer.rank} - {None}
    for layer in layers:
        acts = layer.magnitude is not None or layer.bias is not None or _stack(layer) in alive
        ranks[layer.target] = max(ranks.get(layer.target, 0), layer.rank, int(acts))
    largest = max(ranks.values(), default=0)
    padded = [layer.target for layer in layers if layer.groups == 1 and (_stack(layer) or layout == "uniform")]
    ranks |= {target: largest for target in padded if ranks[target]}
    return {target: rank for target, rank in ranks.items() if rank}


def _stack(layer: LoraLayer) -> str | None:
    """Which experts a server stacks with this one."""
    match = STACKED.fullmatch(layer.key)
    return match[1] if match else layer.key if layer.parameter is not None else None


def file_tensors(adapter: Adapter, ranks: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The tensors by file and key: those of LoRA layers, zero-padded to their rank there, and all others."""
    layers = [layer.plain(ranks[layer.target]) for layer in adapter.layers if layer.target in ranks]
    factors = {f"{layer.key}.{name}": tensor for layer in layers for name, tensor in layer.tensors.items()}
    tensors = {PREFIX + key: tensor for key, tensor in factors.items()}
    files = {WEIGHTS_FILE: tensors}
    if (prefix := diffusers_prefix(config)) is not None:  # it reads no other names, and PEFT not these
        files[DIFFUSERS_FILE] = {f"{prefix}.{key}": tensor.clone() for key, tensor in factors.items()}
        tensors |= files[DIFFUSERS_FILE]
    left_out = sorted((layer.key for layer in adapter.layers if layer.target not in ranks), reverse=True)  # inner first
    for key, tensor in adapter.extras.items():
        for layer_key in left_out:  # which have no layer of PEFT around them when the file is loaded
            if key.startswith(wrapped := f"{layer_key}.base_layer."):
                key = f"{layer_key}.{key.removeprefix(wrapped)}"
        tensors[PREFIX + key] = tensor.clone()
    return files


def diffusers_prefix(config: Mapping[str, Any]) -> str | None:
    """Of an adapter of a diffusers model: the component of a pipeline that it is for, which starts diffusers' keys."""
    mapping = config.get("auto_mapping") or {}
    library, kind = (str(mapping.get(name)) for name in ("parent_library", "base_model_class"))
    if not library.startswith("diffusers."):
        return "text_encoder" if kind == "CLIPTextModel" else None
    return "unet" if "UNet" in kind else "transformer"


def adapter_config(adapter: Adapter, ranks: Mapping[str, int], layout: str) -> dict[str, Any]:
    """The configuration as PEFT writes it: a plain LoRA adapter whose scale alpha / r is 1 for every layer.

    ``gguf``: alpha is 0, for which llama.cpp takes the scale 1 whatever the rank, and every layer has its own in
    ``alpha_pattern``, which PEFT reads.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("export_lora needs peft: pip install 'ivon-lora[peft]'") from error
    known = [name for name in KEPT_FIELDS if name in LoraConfig.__dataclass_fields__]
    kept: dict[str, Any] = {name: adapter.config[name] for name in known if adapter.config.get(name) is not None}
    if adapter.base is not None:
        if name := getattr(adapter.base, "name_or_path", None):
            kept.setdefault("base_model_name_or_path", name)
        if "task_type" not in kept:
            kind = own_class(adapter.base)
            kept.setdefault("auto_mapping", {"base_model_class": kind.__name__, "parent_library": kind.__module__})
    largest = max(ranks.values())
    alpha = 0 if layout == "gguf" else largest
    patterns: dict[str, Any] = {"rank_pattern": _patterns(ranks, largest), "alpha_pattern": _patterns(ranks, alpha)}
    config = LoraConfig(
        r=largest, lora_alpha=alpha, inference_mode=True, **patterns, **_selection(adapter, ranks), **kept
    )
    written: dict[str, Any] = config.to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in written.items()}


def _patterns(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """PEFT's ``rank_pattern``: the shortest ends of paths that mean layers of one rank alone.

    So few keys do, and they hold where a library moves its modules.
    """
    ends = {target: [target.split(".", n)[-1] for n in range(target.count("."), -1, -1)] for target in ranks}
    meant: dict[str, set[int]] = {}
    for target, rank in ranks.items():
        for end in ends[target]:
            meant.setdefault(end, set()).add(rank)
    patterns: dict[str, int] = {}
    for target, rank in sorted(ranks.items()):
        if rank != default:
            # none: another layer's path ends like this whole one (and PEFT would take "^q" for a module of that name)
            alone = (re.escape(end) for end in ends[target] if len(meant[end]) == 1)
            patterns[next(alone, rf"\A{re.escape(target)}")] = rank
    return patterns


def _selection(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Fields that select the kept layers: the source's own where they select what it has, else full paths.

    Full paths break when the library of the base model moves its modules; the source's suffixes and patterns do not.
    What either selects besides is excluded.
    """
    adapted = {layer.target for layer in adapter.layers if layer.parameter is None}
    kept = adapted & ranks.keys()
    known = adapted if adapter.base is None else {place.path for place in walk(adapter.base) if place.path}
    source = {name: adapter.config.get(name) for name in SELECTION}
    fields = {name: sorted(value) if isinstance(value, list | set) else value for name, value in source.items()}
    tied = bool(adapter.config.get("ensure_weight_tying"))  # then PEFT adapts what is tied to these by itself
    holds = kept == adapted if tied else selected(adapter.config, known) == adapted
    if holds and tied:
        return fields | {"ensure_weight_tying": True}
    if not holds:
        parameters = [layer.target for layer in adapter.layers if layer.parameter is not None]
        parameters = parameters if adapter.base is not None else []  # files do not name them
        fields = {"target_modules": kept, "target_parameters": parameters or fields["target_parameters"]}
    fields["target_modules"] = fields["target_modules"] or []  # None would mean the defaults of the base model's family
    besides = selected(fields | {"modules_to_save": adapter.config.get("modules_to_save")}, known) - kept
    if besides:
        old = fields.get("exclude_modules") or []
        exclude = [old] if isinstance(old, str) else [rf"(.*\.)?{re.escape(name)}" for name in sorted(old)]
        fields["exclude_modules"] = "|".join([*map(re.escape, sorted(besides)), *exclude])
    return fields
