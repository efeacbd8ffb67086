"""Tables in Markdown. Python alone is enough, because `benchmarks.gpu` runs where pandas is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Goal(NamedTuple):
    """``sign``: "<=" or ">="; ``value``: the measurement, NaN where it was not made."""

    what: str
    sign: str
    bound: float
    value: float
    unit: str = ""


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def goals_table(goals: Sequence[Goal]) -> str:
    """Every goal: reached, missed or not run."""
    lines = []
    for what, sign, bound, value, unit in goals:
        reached = value >= bound if sign == ">=" else value <= bound
        measured, verdict = f"{value:.3g}{unit}", "reached" if reached else "missed"
        if math.isnan(value) or math.isnan(bound):
            measured, verdict = "", "not run"
        lines.append((what, f"{sign} {bound:.3g}{unit}", measured, verdict))
    return markdown(("what", "goal", "measured", "verdict"), lines)
