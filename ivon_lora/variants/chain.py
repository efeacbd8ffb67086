"""What the methods share that train pair after pair of A and B, each added to the model for good."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from ivon_lora.variants.links import STORES, Links, add_links
from ivon_lora.variants.options import choice, integer, state
from ivon_lora.variants.variant import Variant


@dataclass(eq=False, repr=False)
class Chain(Variant):
    """Base class.

    Args:
        store: where finished pairs stay, see `links`.
        warmup: steps of each new pair but the first over which the learning rate grows to the scheduler's: step i has
            a share (i + 1) / (warmup + 1). A new Adam would take the first ones at full size.

    Attributes:
        by_layer: the `Links` of every layer.
        begun: the step after which the live pairs began; 0 for the first ones.
    """

    claims = frozenset({"links", "masks"})

    _: KW_ONLY
    warmup: int = integer(0, low=0)
    store: str = choice(*STORES)
    begun: int = state(int)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.by_layer = add_links(self.model, self.adapter_name, self.store)
        self._rates: list[Any] = []

    def before_step(self) -> None:
        """Lower the learning rate while new pairs warm up."""
        self._restore_rates()  # the last step may have raised
        age = self.step - self.begun
        if self.begun and age < self.warmup:
            self._rates = [group["lr"] for group in self.optimizer.param_groups]
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * (age + 1) / (self.warmup + 1)

    def after_step(self) -> None:
        """The scheduler finds its own rates."""
        self._restore_rates()

    def _restore_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []

    def link(self, chosen: Iterable[Links], shrinkage: float = 1.0) -> float:
        """Make links of live pairs, see `Links.finish`, and start new ones. Returns the largest share lost."""
        self.begun, lost = self.step, 0.0
        for index, links in enumerate(chosen):
            lost = max(lost, links.finish(shrinkage))
            self.restart(*links.live(), index)
        return lost

    def fold(self) -> None:
        """The links become ranks of A and B."""
        for links in self.by_layer:
            links.fold()
