"""The learning rate as a pure function of the step."""

from __future__ import annotations

from ivon_lora.finetune.settings import Settings, as_steps

__all__ = ["learning_rate"]


def learning_rate(settings: Settings, step: int, peak: float | None = None) -> float:
    """Learning rate of step ``step`` (from 1): linear warm-up, then linear decay to 0 one step past the end.

    Args:
        peak: the largest; None: that of the settings.
    """
    warmup = max(1, as_steps(settings.lr_warmup, settings.steps))
    peak = settings.lr if peak is None else peak
    if step <= warmup:
        return peak * step / warmup
    return peak * (settings.steps + 1 - step) / (settings.steps + 1 - warmup)
