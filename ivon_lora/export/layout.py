"""The plan of an export: the rank of every layer in the file, the tensors under PEFT's names, the configuration."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ivon_lora.export.layer import Adapter, Layer
from ivon_lora.lora.names import PREFIX

LAYOUTS = ("uniform", "compact", "gguf")
#: fields of the trained configuration that keep their meaning in a plain LoRA adapter
KEPT_FIELDS = (
    *("task_type", "base_model_name_or_path", "revision", "auto_mapping", "lora_dropout", "fan_in_fan_out", "bias"),
    *("modules_to_save", "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "use_dora"),
    *("lora_bias", "megatron_config", "megatron_core"),
)
#: fields that say which modules are adapted
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")


def file_ranks(layers: Sequence[Layer], layout: str) -> dict[str, int]:
    """Rank that each kept target gets in the file.

    ``uniform``: the largest surviving rank for all; else its own. A target without ranks is left out unless it
    still acts (DoRA magnitude, LoRA bias: PEFT knows no rank 0, so it gets one zero rank) or is one of the experts that
    servers stack: those have the largest rank, dead ones as zeros. Only groups of a convolution keep what they have.
    """
    needed: dict[str, int] = {}
    alive = {layer.stack for layer in layers if layer.stack and layer.rank}
    for layer in layers:
        rank = max(layer.rank, 1 if layer.acts_without_ranks or layer.stack in alive else 0)
        needed[layer.target] = max(needed.get(layer.target, 0), rank)
    largest = max(needed.values(), default=0)
    fixed = {layer.target for layer in layers if layer.groups > 1}
    stacked = {layer.target for layer in layers if layer.stack}
    return {
        target: largest if target not in fixed and (layout == "uniform" or target in stacked) else rank
        for target, rank in needed.items()
        if rank > 0
    }


def adapter_tensors(layers: Sequence[Layer], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """The LoRA tensors of the file, zero-padded to their rank there."""
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        if layer.target not in ranks:
            continue
        key_a, key_b = tensor_keys(layer)
        tensors[key_a], tensors[key_b] = _padded(layer, ranks[layer.target])
        if layer.bias is not None:
            wide = torch.promote_types(layer.bias.dtype, torch.float32)
            tensors[f"{PREFIX}{layer.key}.lora_B.bias"] = (layer.bias.to(wide) * layer.scaling).to(layer.bias.dtype)
        if layer.magnitude is not None:  # `.weight`: transformers' load_adapter needs it, and PEFT reads both
            tensors[f"{PREFIX}{layer.key}.lora_magnitude_vector.weight"] = layer.magnitude
    return tensors


def tensor_keys(layer: Layer) -> tuple[str, str]:
    """Names of A and B in the file."""
    if layer.is_embedding:
        return f"{PREFIX}{layer.key}.lora_embedding_A", f"{PREFIX}{layer.key}.lora_embedding_B"
    return f"{PREFIX}{layer.key}.lora_A.weight", f"{PREFIX}{layer.key}.lora_B.weight"


def diffusers_prefix(config: Mapping[str, Any]) -> str | None:
    """Of an adapter of a diffusers model: the component of a pipeline that it is for, which starts diffusers' keys."""
    mapping = config.get("auto_mapping") or {}
    if not str(mapping.get("parent_library", "")).startswith("diffusers."):
        return None
    return "unet" if "UNet" in str(mapping.get("base_model_class")) else "transformer"


def adapter_config(adapter: Adapter, ranks: Mapping[str, int], layout: str = "uniform") -> dict[str, Any]:
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
    if adapter.base_name:
        kept.setdefault("base_model_name_or_path", adapter.base_name)
    if "task_type" not in kept and adapter.base_class:
        name, module = adapter.base_class
        kept.setdefault("auto_mapping", {"base_model_class": name, "parent_library": module})
    largest = max(ranks.values())
    alpha = 0 if layout == "gguf" else largest
    config = LoraConfig(
        r=largest,
        lora_alpha=alpha,
        use_rslora=False,
        rank_pattern=_patterns(ranks, largest),
        alpha_pattern=_patterns(ranks, alpha),
        inference_mode=True,
        **_selection(adapter, ranks),
        **kept,
    )
    written: dict[str, Any] = config.to_dict()
    for name, value in written.items():
        if isinstance(value, (set, frozenset)):
            written[name] = sorted(value)
    return written


def _patterns(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """PEFT's ``rank_pattern``: the shortest ends of paths that mean layers of one rank alone.

    So few keys do, and they hold where a library moves its modules.
    """
    meant: dict[str, set[int]] = {}
    for target, rank in ranks.items():
        for end in _ends(target):
            meant.setdefault(end, set()).add(rank)
    patterns: dict[str, int] = {}
    for target, rank in sorted(ranks.items()):
        if rank != default:
            alone = [re.escape(end) for end in _ends(target) if len(meant[end]) == 1]
            # none: another layer's path ends like this whole one (and PEFT would take "^q" for a module of that name)
            patterns[alone[0] if alone else rf"\A{re.escape(target)}"] = rank
    return patterns


def _ends(path: str) -> list[str]:
    """The ends of a path, shortest first: of ``a.b.c`` ``c``, ``b.c`` and ``a.b.c``."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _selection(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Fields that select the kept layers: the source's own where they select what it has, else full paths.

    Full paths break when the library of the base model moves its modules; the source's suffixes and patterns do not.
    """
    modules = {layer.target for layer in adapter.layers if not layer.experts}
    source: dict[str, Any] = {name: adapter.config.get(name) for name in SELECTION}
    source = {name: value for name, value in source.items() if value is not None and value not in ("", [], set())}
    dropped, kept = sorted(modules - ranks.keys()), sorted(modules & ranks.keys())
    tied = bool(adapter.config.get("ensure_weight_tying"))
    if not source or (tied and dropped) or not _selects(adapter, source, modules, tied):
        similar = {name for name in adapter.modules or () if any(name.endswith(f".{target}") for target in kept)}
        parameters = sorted(layer.target for layer in adapter.layers if layer.experts) if adapter.modules else None
        return {
            "target_modules": kept,
            "exclude_modules": "|".join(re.escape(name) for name in sorted(similar.difference(kept))) or None,
            "target_parameters": parameters or source.get("target_parameters"),
        }
    source.setdefault("target_modules", [])  # None would mean the defaults of the base model's family
    for name in source.keys() & {"target_modules", "target_parameters"}:
        source[name] = source[name] if isinstance(source[name], str) else sorted(source[name])
    if dropped:
        old = source.get("exclude_modules") or []
        exclude = [old] if isinstance(old, str) else [rf"(.*\.)?{re.escape(name)}" for name in sorted(old)]
        source["exclude_modules"] = "|".join([*(re.escape(name) for name in dropped), *exclude])
    return source | ({"ensure_weight_tying": True} if tied else {})


def _selects(adapter: Adapter, source: Mapping[str, Any], adapted: Collection[str], tied: bool) -> bool:
    """Whether the source's fields select exactly the adapted modules; of files alone: at least those."""
    from peft.tuners.tuners_utils import check_target_module_exists

    whole = adapter.config.get("modules_to_save")
    fields = SimpleNamespace(**{**dict.fromkeys(SELECTION), **source}, modules_to_save=whole)
    if fields.target_modules is None:
        return not adapted
    if tied:  # PEFT adapts what is tied to these by itself
        return True
    if adapter.modules is None:
        return all(check_target_module_exists(fields, name) for name in adapted)
    return {name for name in adapter.modules if name and check_target_module_exists(fields, name)} == set(adapted)


def _padded(layer: Layer, rank: int) -> tuple[Tensor, Tensor]:
    a, b = layer.folded()
    if layer.experts > 1:  # (experts, rank, in) and (out, rank, experts), as PEFT unfolds them
        a = _pad(a.reshape(layer.experts, layer.size, -1), 1, rank).flatten(0, 1)
        return a, _pad(b.reshape(len(b), layer.size, layer.experts), 1, rank).flatten(1)
    return (a, b) if layer.groups > 1 else (_pad(a, 0, rank), _pad(b, 1, rank))


def _pad(tensor: Tensor, dim: int, rank: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = rank - shape[dim]
    return tensor if shape[dim] == 0 else torch.cat([tensor, tensor.new_zeros(shape)], dim)
