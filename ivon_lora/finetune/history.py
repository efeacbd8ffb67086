"""What is recorded while training, for the pictures and the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["QUANTILES", "History"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass
class History:
    """One entry a step; at the steps in ``snr_steps`` also QUANTILES of |mean| / std over live ranks."""

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    budget: list[int] = field(default_factory=list)
    live: list[int] = field(default_factory=list)
    snr_steps: list[int] = field(default_factory=list)
    snr: list[list[float]] = field(default_factory=list)

    def add(self, loss: float, lr: float, budget: int, live: int) -> None:
        """Record one step: loss in nats, learning rate, ranks allowed and ranks live over all adapters."""
        self.loss.append(loss)
        self.lr.append(lr)
        self.budget.append(budget)
        self.live.append(live)

    def add_snr(self, step: int, quantiles: list[float]) -> None:
        """Record the quantiles after step number ``step``."""
        self.snr_steps.append(step)
        self.snr.append(quantiles)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists by name."""
        return asdict(self)
