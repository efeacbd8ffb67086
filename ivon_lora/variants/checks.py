"""Checks of arguments, whose messages have the value, the bounds and the cure, and of layers."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import nn

from ivon_lora.lora.adapters import LoraLayer
from ivon_lora.lora.names import innermost
from ivon_lora.optim.param_groups import integer


def flag(name: str, value: bool) -> bool:
    """True or False, and nothing that is as good as one of them, such as "no"; else ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def is_number(value: Any) -> bool:
    """Whether a value can be compared with numbers."""
    return isinstance(value, Real)


def fraction(name: str, value: Any, *, low_is_allowed: bool = False) -> float:
    """A share in (0, 1], or in [0, 1]; else ValueError."""
    if not is_number(value) or not (0 < value <= 1 or (low_is_allowed and value == 0)):
        raise ValueError(f"{name} must lie in {'[' if low_is_allowed else '('}0, 1], got {value!r}; give a share")
    return float(value)


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """One of some words; else ValueError."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def at_least(name: str, value: Any, low: float) -> float:
    """A finite number that is not too small; else ValueError."""
    if not is_number(value) or not low <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of at least {low:g}, got {value!r}")
    return float(value)


def steps(name: str, value: int | float, total_steps: int, *, low: int) -> int:
    """A number of steps; a float is a share of ``total_steps``, and gives at least ``low``. Else ValueError."""
    if isinstance(value, float):
        return max(low, round(fraction(name, value) * total_steps))
    return integer(name, value, low=low)


def refuse(layer: LoraLayer, what: str, reason: str | None) -> None:
    """ValueError if there is a reason."""
    if reason is not None:
        raise ValueError(f"layer {layer.name!r} {what}: {reason}")


def unsupported(layer: LoraLayer) -> str | None:
    """Why a layer has no modules A and B with a rank axis of their own; None if it has."""
    reason = "it is an embedding" if layer.is_embedding else layer.why_not
    return None if reason is None else f"{reason}; leave it out of target_modules"


def merged_in_forward(layer: LoraLayer) -> str | None:
    """Why no forward of A, of B or of the base layer is run on its own; None if they are."""
    if not isinstance(innermost(layer.module), nn.MultiheadAttention):
        return None
    return "PEFT merges A and B into nn.MultiheadAttention; leave it out of target_modules"


def not_a_product(layer: LoraLayer, adapter_name: str) -> str | None:
    """Why the update of a layer is not s B A; None if it is."""
    if layer.E is None and adapter_name not in getattr(layer.module, "lora_variant", {}):
        return None
    return "its update is not B A alone; take LoraConfig(use_dora=False)"
