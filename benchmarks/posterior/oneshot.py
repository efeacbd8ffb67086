"""Prune the ranks of a trained adapter at one stroke: what does each criterion lose at each budget?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.posterior.ledger import Ledger
from ivon_lora import IVON, LoraAdapter, find_adapters
from ivon_lora.functional.importance import rank_mean
from ivon_lora.lora.rank_pruner import select_top

CRITERIA = ("snr_abs", "magnitude", "inverse_std", "random")
SHARES = (1 / 3,)
KEY = ("task", "method", "lr", "seed", "split", "options", "steps", "criterion", "kept")
SCORES = ("test_accuracy", "test_nll", "test_ece", "test_brier")


def ledger(folder: Path) -> Ledger:
    """The file of these cuts; ``kept`` counts ranks over all adapters."""
    return Ledger(folder / "posterior_pruning.csv", KEY, SCORES)


@dataclass(frozen=True)
class Cut:
    """The ``kept`` best ranks of all adapters by one criterion."""

    criterion: str
    kept: int
    adapters: Sequence[LoraAdapter]
    mask: Tensor

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The columns of B of all other ranks are zero inside, and as before after."""
        saved = [adapter.B.detach().clone() for adapter in self.adapters]
        masks = self.mask.split([adapter.rank for adapter in self.adapters])
        try:
            with torch.no_grad():
                for adapter, mask in zip(self.adapters, masks, strict=True):
                    adapter.B.mul_(mask)
            yield
        finally:
            with torch.no_grad():
                for adapter, before in zip(self.adapters, saved, strict=True):
                    adapter.B.copy_(before)


def rank_scores(adapters: Sequence[LoraAdapter], optimizer: IVON, criterion: str) -> Tensor:
    """Score of every rank of every adapter as `RankPruner` has it, (ranks,): the sum of its tensors' means."""
    scores = []
    for adapter in adapters:
        parts = [rank_mean(optimizer.snr(p, criterion), dim) for _, p, dim in adapter.tensors()]
        scores.append(torch.stack(parts).sum(0))
    return torch.cat(scores)


def cuts(model: Any, optimizer: IVON, seed: int) -> Iterator[Cut]:
    """All ranks, then every share by every criterion; "random" is one draw from ``seed``."""
    adapters = find_adapters(model)
    total = sum(adapter.rank for adapter in adapters)
    yield Cut("all", total, adapters, torch.ones(total, dtype=torch.bool))
    generator = torch.Generator().manual_seed(seed)
    for criterion in CRITERIA:
        random = criterion == "random"
        scores = torch.rand(total, generator=generator) if random else rank_scores(adapters, optimizer, criterion)
        for share in SHARES:
            kept = round(share * total)
            yield Cut(criterion, kept, adapters, select_top(scores, kept))
