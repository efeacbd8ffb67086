"""What the methods share that train pair after pair of A and B, each added to the model for good."""

from __future__ import annotations

from typing import Any

from torch import nn

from ivon_lora.optim.param_groups import integer
from ivon_lora.variants.checks import choice
from ivon_lora.variants.links import STORES, add_links
from ivon_lora.variants.variant import Variant


class Chain(Variant):
    """Base class, with `links` for every layer.

    Args:
        store: see `links`.
        warmup: steps of a new pair over which the learning rate grows to the scheduler's: step i has a share
            (i + 1) / (warmup + 1). A new Adam would take the first ones at full size.
    """

    claims = frozenset({"links", "masks"})

    def __init__(self, model: nn.Module, *, store: str, warmup: int, adapter_name: str, seed: int) -> None:
        super().__init__(model, adapter_name=adapter_name, seed=seed)
        self.warmup = integer("warmup", warmup, low=0)
        self.links = add_links(model, adapter_name, choice("store", store, STORES))
        self._rates: list[Any] = []

    def age(self) -> int:
        """Steps of the pairs in training; `warmup` for the first ones, which need none."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Lower the learning rate while new pairs warm up."""
        self._restore_rates()  # the last step may have raised
        age = self.age()
        if age < self.warmup:
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

    def fold(self) -> None:
        """See `Variant.fold`: the links become ranks of A and B."""
        for links in self.links:
            links.fold()
