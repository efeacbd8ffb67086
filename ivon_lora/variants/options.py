"""Options and state of a method, the fields of its dataclass.

An option knows the bounds of its values, and which of them read what only some optimizers have: its ``needs`` maps such
a value to `IVON`, of which `VAdam` is one too, or to `VAdam` alone. State is what a checkpoint has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from numbers import Real
from typing import Any

from torch.optim import Optimizer

from ivon_lora.optim import param_groups
from ivon_lora.optim.vadam import VAdam

Needs = Mapping[Any, type[Optimizer]]


def state(make: Callable[[], Any]) -> Any:
    """A plain value, a tensor, a container of these, or an optimizer; ``make()`` at the start."""
    return field(init=False, default_factory=make, metadata={"is_state": True})


def choice(*values: Any, needs: Needs | None = None) -> Any:
    """One of some values, the first by default."""
    allowed = [*values, *(needs or {})]

    def check(name: str, value: Any, total_steps: int) -> Any:
        if not any(value == other and isinstance(value, type(other)) for other in allowed):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        return value

    return _option(values[0], check, needs)


def integer(default: Any = MISSING, low: int = 1) -> Any:
    """An integer of at least ``low``."""
    return _option(default, lambda name, value, total_steps: param_groups.integer(name, value, low=low))


def number(
    default: float, low: float = 0.0, high: float = math.inf, *, above: bool = False, needs: Needs | None = None
) -> Any:
    """A finite number from ``low`` to ``high`` (``above``: greater than ``low``), or a word that ``needs`` has."""

    def check(name: str, value: Any, total_steps: int) -> Any:
        return value if isinstance(value, str) and value in (needs or {}) else within(name, value, low, high, above)

    return _option(default, check, needs)


def fraction(default: float) -> Any:
    """A share in (0, 1]."""
    return number(default, high=1.0, above=True)


def steps(default: float, low: int) -> Any:
    """A number of steps of at least ``low``; a float is a share of the method's ``total_steps``."""

    def check(name: str, value: Any, total_steps: int) -> int:
        if isinstance(value, float) and 0.0 < value <= 1.0:
            return max(low, round(value * total_steps))
        if isinstance(value, float):
            raise ValueError(f"{name} must be a share in (0, 1] or an integer of at least {low}, got {value!r}")
        return param_groups.integer(name, value, low=low)

    return _option(default, check)


def within(name: str, value: Any, low: float, high: float = math.inf, above: bool = False) -> float:
    """A finite number in [low, high], or (low, high]; else ValueError."""
    is_number = isinstance(value, Real)
    if not (is_number and low <= value <= high and value < math.inf) or (above and value == low):
        interval = f"{'(' if above else '['}{low:g}, {high:g}{']' if high < math.inf else ')'}"
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}")
    return float(value)


def _option(default: Any, check: Callable[[str, Any, int], Any], needs: Needs | None = None) -> Any:
    return field(default=default, metadata={"check": check, "needs": needs or {}})


def check_options(method: Any) -> None:
    """Keep what the checks make of the options; ValueError if a value is outside its bounds."""
    for option in fields(method):
        if check := option.metadata.get("check"):
            value = check(option.name, getattr(method, option.name), getattr(method, "total_steps", 0))
            setattr(method, option.name, value)


def check_needs(method: Any, optimizer: Optimizer) -> None:
    """ValueError if the optimizer lacks what the options read."""
    for option in fields(method):
        for value, kind in option.metadata.get("needs", {}).items():
            if getattr(method, option.name) == value and not isinstance(optimizer, kind):
                names = "VAdam" if kind is VAdam else "IVON or VAdam"
                raise ValueError(
                    f"{option.name}={value!r} reads what {type(optimizer).__name__} lacks: take {names}, or "
                    f"{option.name}={option.default!r}"
                )
