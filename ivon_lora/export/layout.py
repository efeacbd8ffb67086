"""How planned layers become a PEFT adapter: the tensors under PEFT's names and the configuration that reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.export.plan import PlannedLayer
from ivon_lora.export.source import Source
from ivon_lora.optim.sharding import own_class

LAYOUTS = ("uniform", "compact")
PREFIX = "base_model.model."
#: fields of the trained configuration that keep their meaning in a plain LoRA adapter
KEPT_FIELDS = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_dora",
    "lora_bias",
    "megatron_config",
    "megatron_core",
)


def file_ranks(layers: Sequence[PlannedLayer], layout: str) -> dict[str, int]:
    """Rank that each kept module gets in the file.

    ``uniform``: the largest surviving rank for all; ``compact``: its own. A module without ranks is left out unless it
    still acts (DoRA magnitude, LoRA bias): PEFT knows no rank 0, so it gets one zero rank.
    """
    ranks: dict[str, int] = {}
    for layer in layers:
        needed = max(layer.rank, 1 if layer.acts_without_ranks else 0)
        ranks[layer.target] = max(ranks.get(layer.target, 0), needed)
    ranks = {target: rank for target, rank in ranks.items() if rank > 0}
    if layout == "uniform":
        ranks = dict.fromkeys(ranks, max(ranks.values(), default=0))
    return ranks


def adapter_tensors(layers: Sequence[PlannedLayer], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """The LoRA tensors of the file, zero-padded to their rank there, contiguous, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        if layer.target not in ranks:
            continue
        rank = ranks[layer.target]
        key_a, key_b = tensor_keys(layer)
        tensors[key_a] = _pad(layer.new_A, 0, rank)
        tensors[key_b] = _pad(layer.new_B, 1, rank)
        if layer.bias is not None:
            tensors[f"{PREFIX}{layer.name}.lora_B.bias"] = layer.bias
        if layer.magnitude is not None:
            tensors[f"{PREFIX}{layer.name}.lora_magnitude_vector"] = layer.magnitude
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def tensor_keys(layer: PlannedLayer) -> tuple[str, str]:
    """Names of A and B in the file."""
    if layer.is_embedding:
        return f"{PREFIX}{layer.name}.lora_embedding_A", f"{PREFIX}{layer.name}.lora_embedding_B"
    return f"{PREFIX}{layer.name}.lora_A.weight", f"{PREFIX}{layer.name}.lora_B.weight"


def adapter_config(source: Source, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration as PEFT writes it: a plain LoRA adapter whose scale alpha / r is 1 for every module."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("export_lora needs peft: pip install 'ivon-lora[peft]'") from error
    kept = {name: source.config_value(name) for name in KEPT_FIELDS if name in LoraConfig.__dataclass_fields__}
    kept = {name: value for name, value in kept.items() if value is not None}
    kept.setdefault("base_model_name_or_path", getattr(source.base, "name_or_path", None) or None)
    if "task_type" not in kept:
        kept.setdefault(
            "auto_mapping",
            {"base_model_class": own_class(source.base).__name__, "parent_library": own_class(source.base).__module__},
        )
    largest = max(ranks.values())
    patterns = {_pattern(t, ranks): rank for t, rank in sorted(ranks.items()) if rank != largest}
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        use_rslora=False,
        target_modules=sorted(ranks),
        exclude_modules=_excluded(source.base, ranks),
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        inference_mode=True,
        **kept,
    )
    written: dict[str, Any] = config.to_dict()
    for name, value in written.items():
        if isinstance(value, (set, frozenset)):
            written[name] = sorted(value)
    return written


def _pattern(target: str, ranks: Mapping[str, int]) -> str:
    """A key for ``target`` alone: PEFT also matches the end of a longer path, so anchor where there is one."""
    escaped = re.escape(target)
    return f"^{escaped}" if any(other.endswith(f".{target}") for other in ranks) else escaped


def _excluded(base: nn.Module, ranks: Mapping[str, int]) -> str | None:
    """A regex for modules that PEFT would adapt because their path ends like a target's, or None."""
    inside_peft = {"base_layer", "modules_to_save", "original_module"}
    names = [
        name
        for name, _ in base.named_modules()
        if name not in ranks
        and not inside_peft & set(name.split("."))
        and any(name.endswith(f".{target}") for target in ranks)
    ]
    return "|".join(re.escape(name) for name in sorted(names)) or None


def _pad(tensor: Tensor, dim: int, rank: int) -> Tensor:
    missing = rank - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
