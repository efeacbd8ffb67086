"""The learning rate as a pure function of the step."""

from __future__ import annotations

from .settings import Settings, as_steps

__all__ = ["learning_rate"]


def learning_rate(settings: Settings, step: int) -> float:
    """Learning rate of step ``step`` (from 1): linear warm-up, then linear decay to 0 one step past the end."""
    warmup = max(1, as_steps(settings.lr_warmup, settings.steps))
    if step <= warmup:
        return settings.lr * step / warmup
    return settings.lr * (settings.steps + 1 - step) / (settings.steps + 1 - warmup)
