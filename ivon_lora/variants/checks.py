"""Checks of arguments: each message has the value, the bounds and the cure."""

from __future__ import annotations

from ivon_lora.optim.param_groups import integer


def fraction(name: str, value: float, *, low_is_allowed: bool = False) -> float:
    """A share in (0, 1], or in [0, 1].

    Raises:
        ValueError: naming the argument, its value and its bounds.
    """
    if not (0 < value <= 1 or (low_is_allowed and value == 0)):
        raise ValueError(f"{name} must lie in {'[' if low_is_allowed else '('}0, 1], got {value!r}; give a share")
    return float(value)


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """One of some words.

    Raises:
        ValueError: naming the argument, its value and the words.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def at_least(name: str, value: float, low: float) -> float:
    """A finite number that is not too small.

    Raises:
        ValueError: naming the argument, its value and its bound.
    """
    if not low <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of at least {low:g}, got {value!r}")
    return float(value)


def steps(name: str, value: int | float, total_steps: int, *, low: int) -> int:
    """A number of steps; a float is a share of ``total_steps``, and gives at least ``low``.

    Raises:
        ValueError: naming the argument, its value and its bounds.
    """
    if isinstance(value, float):
        return max(low, round(fraction(name, value) * total_steps))
    return integer(name, value, low=low)
