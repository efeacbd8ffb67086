"""Which layers to adapt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ivon_lora.lora.adapters import LoraAdapter


@dataclass(frozen=True)
class LayerChoice:
    """What a search proposes: ``LoraConfig(**choice.lora_arguments(), task_type=...)``.

    Attributes:
        scores: of all layers, by name.
        layers: names of the chosen ones, in the order of the model.
        rank, alpha: of the adapters that were searched.
    """

    scores: dict[str, float]
    layers: tuple[str, ...]
    rank: int
    alpha: float

    def lora_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``peft.LoraConfig``: target_modules, r, lora_alpha."""
        names = [name.removeprefix("base_model.model.") for name in self.layers]
        return {"target_modules": names, "r": self.rank, "lora_alpha": self.alpha}


def choose_layers(scores: Mapping[str, float], share: float, adapter: LoraAdapter) -> LayerChoice:
    """The ``round(share L)`` layers with the largest scores, at least one; equal ones by their order."""
    order = torch.tensor(list(scores.values())).argsort(descending=True, stable=True).tolist()
    best = set(order[: max(1, round(share * len(scores)))])
    layers = tuple(name for index, name in enumerate(scores) if index in best)
    return LayerChoice(dict(scores), layers, adapter.rank, adapter.scaling * adapter.rank)
