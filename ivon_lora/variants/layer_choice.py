"""Which layers to adapt: scores read from an optimizer's state, and what to do with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ivon_lora.functional.importance import rank_mean
from ivon_lora.lora.adapters import LoraAdapter
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import whole
from ivon_lora.optim.vadam import VAdam
from ivon_lora.variants.gain import gain_of

#: "snr": mean SNR of a layer's elements; "gain": the fall of the loss that the state of B predicts (see `gain`)
POSTERIOR_SCORES = ("snr", "gain")


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


def check_score(kind: str, optimizer: Optimizer) -> None:
    """Whether an optimizer has what a score is read from.

    Raises:
        ValueError: it has not.
    """
    if kind == "snr" and not isinstance(optimizer, IVON):
        raise ValueError("score='snr' reads a posterior; take IVON or VAdam, or score='gate'")
    if kind == "gain" and not isinstance(optimizer, VAdam):
        raise ValueError("score='gain' reads the curvature and prior of VAdam; take that, or score='gate'")


def score_of(kind: str, optimizer: Any, adapter: LoraAdapter) -> float:
    """Score of a layer, of `POSTERIOR_SCORES`."""
    if kind == "gain":
        return gain_of(optimizer, adapter.B)
    means = [rank_mean(whole(optimizer.snr(p)), dim) for _, p, dim in adapter.tensors()]
    return float(torch.stack(means).sum(0).mean())
