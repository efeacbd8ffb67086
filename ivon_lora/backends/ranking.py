"""An allocation of ranks, as a backend is asked for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RankedTensor:
    """One tensor of an adapter: A, B or E.

    Attributes:
        index: index of the parameter in the optimizer.
        gate: its pruned ranks get mean and momentum 0 also while pruning is soft.
        scores: fp32 ``(r,)``, receives the scores of the adapter's ranks.
        mask: bool ``(r,)``, receives the mask.
    """

    index: int
    gate: bool
    scores: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Ranking:
    """Which ranks are scored after a step, and which of them may stay.

    Attributes:
        adapters: the tensors of each adapter, in the order in which their means are added: A, B, E.
        criterion: see `functional.importance`.
        budget: ranks that stay; None: they are only scored.
        min_rank: ranks that every adapter keeps.
        frozen: the masks are final, and pruned ranks have score 0.
        hard: at the allocation all tensors of a pruned rank get mean and momentum 0, not only the gate.
    """

    adapters: list[list[RankedTensor]]
    criterion: str
    budget: int | None
    min_rank: int
    frozen: bool
    hard: bool
