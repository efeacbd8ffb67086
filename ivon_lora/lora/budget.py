"""Rank budget over time: the cubic schedule of AdaLoRA (arXiv:2303.10512, eq. 13)."""

from __future__ import annotations


def cubic_budget(step: int, *, initial: int, target: int, total_steps: int, warmup: int, final: int) -> int:
    """Total number of ranks that may live after ``step`` completed steps.

    ``initial`` until ``warmup``, then ``target + (initial - target) (1 - s)^3`` rounded down, where s runs from 0 to 1
    between ``warmup`` and ``total_steps - final``, then ``target``.

    Args:
        step: completed optimizer steps.
        initial, target: total ranks at the start and at the end.
        total_steps, warmup, final: steps (PEFT's AdaLoRA: total_step, tinit, tfinal).
    """
    if step <= warmup:
        return initial
    if step >= total_steps - final:
        return target
    remaining = total_steps - final - step
    span = total_steps - final - warmup
    # In integers: floating-point rounding must not decide about a rank.
    return target + (initial - target) * remaining**3 // span**3
