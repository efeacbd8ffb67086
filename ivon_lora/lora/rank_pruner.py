"""Which ranks may live, and when: a schedule of budgets. It knows no optimizer.

AdaLoRA's schedule (arXiv:2303.10512) for the posterior's scores (Bayesian AdaLoRA, arXiv:2409.10673). Soft while
annealing: the gate of a masked rank (E, or its column of B without E) is set to zero and goes on learning, so the next
allocation may revive it. Hard from ``total_steps - final`` on: the mask is frozen, and a masked rank has mean zero, no
update and no noise, so it contributes exactly nothing to any forward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Set
from numbers import Integral
from typing import Any

from torch import Tensor

from ivon_lora.functional.importance import CRITERIA
from ivon_lora.lora.adapters import LoraAdapter


def cubic_budget(step: int, initial: int, target: int, begin: int, end: int) -> int:
    """Ranks that may live after ``step`` completed steps.

    ``initial`` until the step ``begin``, then ``target + (initial - target) (1 - s)^3`` rounded down, where s runs from
    0 to 1 between ``begin`` and ``end``, then ``target``.
    """
    remaining = min(max(end - step, 0), end - begin)
    # In integers: floating-point rounding must not decide about a rank.
    return target + (initial - target) * remaining**3 // (end - begin) ** 3


class RankPruner:
    """Prunes LoRA ranks to a budget inside ``step()``: pass it as ``VAdam(..., pruner=pruner)``, or to `IVON`.

    Args:
        adapters: of :func:`~ivon_lora.lora.adapters.find_adapters`, or hand-made.
        target_rank: mean rank per adapter at the end (PEFT's AdaLoRA: target_r), a number; the total is rounded.
        criterion: "snr_abs", "snr", "magnitude", "inverse_std" or "sensitivity" (see `scores`). The score of a rank is
            s(E_k) + mean_j s(A_kj) + mean_i s(B_ik), without the first term for plain LoRA.
        total_steps: optimizer steps of the run (total_step).
        warmup: steps before the budget shrinks (tinit); a float is a fraction of ``total_steps``.
        final: steps at the end with a frozen mask (tfinal); a float is a fraction of ``total_steps``.
        interval: steps between two allocations (deltaT). One falls due at the end of annealing in any case.
        min_rank: ranks that every adapter keeps.
        max_rank: ranks that an adapter may have at the end, None for no bound: servers give every layer the memory of
            the largest one. The bound falls to it from the largest initial rank as the budget does.

    The scaling of an adapter stays alpha / initial rank, and shapes never change; `export_lora` drops what is pruned.
    Masks are frozen from the step ``end`` on, which is ``total_steps - final``.

    Raises:
        ValueError: an argument outside its bounds.
    """

    def __init__(
        self,
        adapters: Sequence[LoraAdapter],
        target_rank: float,
        criterion: str = "snr_abs",
        *,
        total_steps: int,
        warmup: int | float = 0.1,
        final: int | float = 0.4,
        interval: int = 10,
        min_rank: int = 0,
        max_rank: int | None = None,
    ) -> None:
        self.adapters = list(adapters)
        if not self.adapters:
            raise ValueError("RankPruner needs at least one adapter; find_adapters(model) lists those of a PEFT model")
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
        self.criterion = criterion
        self.total_steps = total_steps = _integer("total_steps", total_steps, 1)
        self.warmup = _steps("warmup", warmup, total_steps)
        self.final = _steps("final", final, total_steps)
        self.interval = _integer("interval", interval, 1)
        self.end = total_steps - self.final
        if self.warmup + self.final >= total_steps:
            raise ValueError(
                f"warmup ({self.warmup}) + final ({self.final}) must be less than total_steps ({total_steps}): "
                "no step is left to anneal the budget; make the run longer or the phases shorter"
            )
        self.initial_budget = sum(a.rank for a in self.adapters)
        smallest = min(a.rank for a in self.adapters)
        self.min_rank = min_rank = _integer("min_rank", min_rank, 0)
        if min_rank > smallest:
            raise ValueError(f"min_rank must be at most {smallest} (the smallest adapter's rank), got {min_rank!r}")
        if not 0 <= target_rank < float("inf"):
            raise ValueError(f"target_rank must be a finite number of at least 0, got {target_rank!r}")
        self.target_budget = min(round(target_rank * len(self.adapters)), self.initial_budget)
        if target_rank * len(self.adapters) > self.initial_budget:
            mean = self.initial_budget / len(self.adapters)
            warnings.warn(
                f"target_rank={target_rank} is above the mean rank, {mean:g}: nothing is pruned", stacklevel=2
            )
        if self.target_budget < min_rank * len(self.adapters):
            raise ValueError(f"target_rank ({target_rank}) must be at least min_rank ({min_rank})")
        self.max_rank = None if max_rank is None else _integer("max_rank", max_rank, max(1, min_rank))
        room = sum(min(a.rank, self.max_rank or a.rank) for a in self.adapters)
        if self.target_budget > room:
            raise ValueError(
                f"target_rank ({target_rank}) must be at most max_rank ({max_rank}), with which {room} ranks can live"
            )
        self.rank_dims = {tensor: dim for a in self.adapters for _, tensor, dim in a.tensors()}
        if len(self.rank_dims) != sum(len(a.tensors()) for a in self.adapters):
            raise ValueError("two adapters share a tensor; list every adapter once")

    def check_covers(self, params: Set[Tensor]) -> None:
        """ValueError unless every tensor of every adapter is among these parameters."""
        for adapter in self.adapters:
            for key, tensor, _ in adapter.tensors():
                if tensor not in params:
                    raise ValueError(
                        f"{key} of adapter {adapter.name!r} is not among the optimizer's parameters; pass it in params"
                    )

    # ---------------------------------------------------------------- schedule

    def budget(self, step: int) -> int:
        """Total number of ranks that may live after ``step`` completed steps."""
        return cubic_budget(step, self.initial_budget, self.target_budget, self.warmup, self.end)

    def rank_bound(self, step: int) -> int | None:
        """Ranks that one adapter may have after ``step`` completed steps; None without ``max_rank``."""
        if self.max_rank is None:
            return None
        largest = max(a.rank for a in self.adapters)
        return cubic_budget(step, largest, min(self.max_rank, largest), self.warmup, self.end)

    def is_hard(self, step: int) -> bool:
        """Whether the mask is frozen after ``step`` completed steps."""
        return step >= self.end

    def unfinished(self, step: int) -> str | None:
        """What to say of a model that is taken after ``step`` completed steps; None in the final phase."""
        if self.is_hard(step):
            return None
        return (
            f"the model is that of step {step}, and its ranks are at the target from step {self.end} on only: stop "
            "later, and compare models from then on"
        )

    def is_due(self, step: int) -> bool:
        """Whether ranks are allocated after ``step`` completed steps: every ``interval``, and when annealing ends."""
        return step == self.end or (self.warmup < step < self.end and step % self.interval == 0)

    def is_scored(self, step: int) -> bool:
        """Whether ranks are scored after ``step`` completed steps: at every allocation, and every ``interval``."""
        return self.is_due(step) or step % self.interval == 0


def _steps(name: str, value: int | float, total_steps: int) -> int:
    if isinstance(value, float):
        if not 0.0 <= value < 1.0:
            raise ValueError(
                f"{name} as a fraction of total_steps must lie in [0, 1), got {value!r}; give whole steps as an int"
            )
        return round(value * total_steps)
    return _integer(name, value, 0)


def _integer(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    return int(value)
