"""PEFT's ``adapter_config.json``: read and checked, and what it says about the layers of an adapter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONFIG_FILE = "adapter_config.json"
#: fields that say which modules are adapted
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
#: initialisations that move a part of the base model into the adapter
CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a file. ValueError if it is of no LoRA or AdaLoRA adapter, or not as PEFT writes it."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give an adapter directory") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON: save the adapter again") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in ("LORA", "ADALORA"):
        raise ValueError(f"{path} is of an adapter of type {kind}: LORA and ADALORA are supported")
    needed = {"r" if kind == "LORA" else "init_r": _is_rank, "lora_alpha": _is_number}
    if kind == "ADALORA":  # what it calls rank_pattern are masks, of no use here
        config.pop("rank_pattern", None)
    for name, fits in {**FIELDS, **needed}.items():
        value = config.get(name)
        if not fits(value) and (name in needed or value is not None):
            raise ValueError(f"{path} has {name}={value!r}, which no version of PEFT writes: save the adapter again")
    return dict(config)


def rank_and_scale(config: Mapping[str, Any], target: str) -> tuple[int, float]:
    """(r, alpha / r) that PEFT gives to ``target``: the first pattern that matches the end of its path."""
    rank = _pattern_value(config.get("rank_pattern") or {}, target, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern") or {}, target, config["lora_alpha"])
    return int(rank), alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern_value(patterns: Mapping[str, float], target: str, default: float) -> float:
    matches = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", target))
    return next(matches, patterns.get(target, default))


def selected(config: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """Those of the modules that PEFT adapts with such a configuration."""
    from peft.tuners.tuners_utils import check_target_module_exists

    settings = SimpleNamespace(**{name: config.get(name) for name in (*SELECTION, "modules_to_save")})
    if settings.target_modules is None:
        return set()
    return {name for name in names if check_target_module_exists(settings, name)}


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether PEFT has changed the base model of an adapter with this configuration."""
    return str(config.get("init_lora_weights")).lower().startswith(CHANGED)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return _is_number(value) and value >= 1 and value == int(value)


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _is_pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_regex(key) and _is_number(n) and n > 0 for key, n in value.items())


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


#: what fields of a configuration hold where they are not None
FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"), lambda v: _is_regex(v) or _is_list(v, str)
    ),
    "modules_to_save": lambda v: _is_list(v, str) and all(map(_is_regex, v)),  # PEFT matches them as patterns
    "target_parameters": lambda v: _is_list(v, str),
    **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out"), lambda v: isinstance(v, bool)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _is_pattern),
    "layers_to_transform": lambda v: isinstance(v, int) or _is_list(v, int),
    "auto_mapping": lambda v: isinstance(v, dict),
    "lora_dropout": _is_number,
    "bias": lambda v: v in ("none", "all", "lora_only"),
}
