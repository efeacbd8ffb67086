"""Arguments of an optimizer as one cell of a table: "temperature=0.01 beta2=0.99"."""

from __future__ import annotations

from typing import Any


def parse_options(text: str) -> dict[str, Any]:
    """Arguments by name: numbers where they read as numbers, None, else strings.

    Raises:
        ValueError: a part is not of the form name=value.
    """
    found: dict[str, Any] = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise ValueError(f"options must be name=value parts, got {part!r}")
        found[name] = _value(value)
    return found


def _value(text: str) -> int | float | str | None:
    if text == "None":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
