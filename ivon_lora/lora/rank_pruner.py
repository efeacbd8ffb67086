"""Rank pruning to a budget, inside the optimizer step.

AdaLoRA's schedule and allocation (arXiv:2303.10512) on the posterior's scores (Bayesian AdaLoRA, arXiv:2409.10673).
Soft while annealing: the gate of a masked rank (E, or its column of B without E) is set to zero and goes on learning,
so the next allocation may revive it. Hard from ``total_steps - final`` on: the mask is frozen, and a masked rank has
mean zero, no update and no noise, so it contributes exactly nothing to any forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivon_lora.backends import RankedTensor, Ranking
from ivon_lora.functional.importance import CRITERIA, exact_below, exact_sum, settled_means, spread, update_sensitivity
from ivon_lora.lora.adapters import LoraAdapter
from ivon_lora.lora.budget import cubic_budget
from ivon_lora.optim.sharding import is_sharded, like, local, local_grad, mask_part, rank_means
from ivon_lora.rank_map import RankMap, SharedEntry

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON


def select_top(scores: Tensor, budget: int, owners: Tensor | None = None, min_rank: int = 0) -> Tensor:
    """Mask of exactly ``budget`` ranks: the best scores; of equal scores the one with the lower index.

    Args:
        scores: (R,) scores of all ranks of all adapters. A NaN counts as the highest score: an unknown rank is kept.
        budget: ranks to keep, 0..R.
        owners: int64 (R,), which adapter a rank belongs to; needed for ``min_rank``.
        min_rank: the best ``min_rank`` ranks of every adapter are kept first.

    Returns:
        bool (R,), on the device of ``scores``, without waiting for it.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    if min_rank and owners is not None:
        by_owner = order[torch.sort(owners[order], stable=True).indices]  # adapter by adapter, best rank first
        counts = torch.bincount(owners)
        place = torch.arange(len(order), device=scores.device) - (torch.cumsum(counts, 0) - counts)[owners[by_owner]]
        granted = torch.zeros_like(scores, dtype=torch.bool)
        granted[by_owner] = place < min_rank
        order = order[torch.sort(granted[order], descending=True, stable=True).indices]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[:budget]] = True
    return mask


class RankPruner:
    """Prunes LoRA ranks to a budget inside ``IVON.step()``: pass it as ``IVON(..., pruner=pruner)``.

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

    The scaling of an adapter stays alpha / initial rank, and shapes never change; export shrinks them.

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
    ) -> None:
        self.adapters = list(adapters)
        if not self.adapters:
            raise ValueError("RankPruner needs at least one adapter; find_adapters(model) lists those of a PEFT model")
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be an integer of at least 1, got {total_steps!r}")
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be an integer of at least 1 step, got {interval!r}")
        self.criterion = criterion
        self.total_steps = total_steps
        self.warmup = _steps("warmup", warmup, total_steps)
        self.final = _steps("final", final, total_steps)
        self.interval = interval
        self.min_rank = min_rank
        if self.warmup + self.final >= total_steps:
            raise ValueError(
                f"warmup ({self.warmup}) + final ({self.final}) must be less than total_steps ({total_steps}): "
                "no step is left to anneal the budget; make the run longer or the phases shorter"
            )
        self.initial_budget = sum(a.rank for a in self.adapters)
        smallest = min(a.rank for a in self.adapters)
        if not isinstance(min_rank, int) or not 0 <= min_rank <= smallest:
            raise ValueError(
                f"min_rank must be an integer in [0, {smallest}] (the smallest adapter's rank), got {min_rank!r}"
            )
        if not 0 <= target_rank < float("inf"):
            raise ValueError(f"target_rank must be a finite number of at least 0, got {target_rank!r}")
        self.target_budget = min(round(target_rank * len(self.adapters)), self.initial_budget)
        if self.target_budget < min_rank * len(self.adapters):
            raise ValueError(f"target_rank ({target_rank}) must be at least min_rank ({min_rank})")
        self._rank_dims = {tensor: dim for a in self.adapters for _, tensor, dim in a.tensors()}
        if len(self._rank_dims) != sum(len(a.tensors()) for a in self.adapters):
            raise ValueError("two adapters share a tensor; list every adapter once")
        self._map = RankMap(self.adapters)
        self._snr = SharedEntry("rank_snr", self._map.sizes, 0.0)
        self._mask = SharedEntry("rank_mask", self._map.sizes, True)
        self._optimizer: IVON | None = None
        self._exchanges = any(is_sharded(tensor) for tensor in self._rank_dims)
        self._stale = False  # updates have been made since the scores in the state were computed

    # ---------------------------------------------------------------- schedule

    def budget(self, step: int) -> int:
        """Total number of ranks that may live after ``step`` completed steps."""
        return cubic_budget(
            step,
            initial=self.initial_budget,
            target=self.target_budget,
            total_steps=self.total_steps,
            warmup=self.warmup,
            final=self.final,
        )

    def is_hard(self, step: int) -> bool:
        """Whether the mask is frozen after ``step`` completed steps."""
        return step >= self.total_steps - self.final

    def is_due(self, step: int) -> bool:
        """Whether ranks are allocated after ``step`` completed steps: every ``interval``, and when annealing ends."""
        end = self.total_steps - self.final
        return step == end or (self.warmup < step < end and step % self.interval == 0)

    # ---------------------------------------------------------------- what the optimizer calls

    def bind(self, optimizer: IVON) -> None:
        """Check that ``optimizer`` trains every tensor of every adapter, and belong to it.

        Raises:
            ValueError: a tensor is missing from it, or the pruner belongs to another optimizer.
        """
        if self._optimizer is not None and self._optimizer is not optimizer:
            raise ValueError("this RankPruner belongs to another optimizer; make a new one")
        params = {p for group in optimizer.param_groups for p in group["params"]}
        for adapter in self.adapters:
            for key, tensor, _ in adapter.tensors():
                if tensor not in params:
                    raise ValueError(
                        f"{key} of adapter {adapter.name!r} is not among the optimizer's parameters; pass it in params"
                    )
        self._optimizer = optimizer

    def rank_dim(self, p: Tensor) -> int:
        """Rank dimension of an adapter's tensor."""
        return self._rank_dims[p]

    @torch.no_grad()
    def after_update(self, optimizer: IVON, updated: Sequence[Tensor], allocate: bool) -> None:
        """Allocate ranks if it is due. The parameters hold the mean.

        Scores cost as much as a good part of a step, so they are computed now only for an allocation; otherwise
        :meth:`refresh` does when somebody looks at the optimizer's state.

        Args:
            updated: parameters with a gradient in this step.
            allocate: whether the step ends with an allocation.
        """
        step = optimizer.completed_steps
        if self.criterion == "sensitivity":
            self._update_sensitivity(optimizer, set(updated))
        self._stale = True
        if not allocate:
            if self._exchanges:  # whoever reads the state later may be alone
                self.refresh(optimizer)
            return
        found = self._refresh(optimizer)
        assert found is not None  # they were stale
        scores, masks = found
        kept = select_top(scores, self.budget(step), self._map.owners(scores.device), self.min_rank)
        masks.copy_(self._map.spread(kept))
        self._set_to_zero(optimizer, hard=self.is_hard(step))

    @torch.no_grad()
    def refresh(self, optimizer: IVON) -> None:
        """Bring the scores in the state up to date, if updates have been made since."""
        if self._stale and optimizer.score_ranks():
            self._stale = False
        self._refresh(optimizer)

    def _refresh(self, optimizer: IVON) -> tuple[Tensor, Tensor] | None:
        """The same on the host: scores (R,), and masks of the ranks of all tensors (T,), which the state has parts of.

        None if the scores are those of now.
        """
        if not self._stale:
            return None
        self._stale = False
        try:
            scores = self._scores(optimizer, frozen=self.is_hard(optimizer.completed_steps - 1))
            snr, masks = self._state(optimizer)
            snr.copy_(self._map.spread(scores))
        except BaseException:
            self._stale = True
            raise
        return scores, masks

    def ranked(self, optimizer: IVON) -> list[list[RankedTensor]]:
        """The tensors of each adapter, as a backend that scores and allocates ranks itself needs to know them."""
        self._state(optimizer)
        adapters = []
        for adapter in self.adapters:
            gate = adapter.B if adapter.E is None else adapter.E
            adapters.append([self._ranked(optimizer, p, dim, p is gate) for _, p, dim in adapter.tensors()])
        return adapters

    def ranking(self, optimizer: IVON, adapters: list[list[RankedTensor]], allocate: bool) -> Ranking:
        """The coming step's allocation, and the scores for it, for such a backend.

        Args:
            adapters: of :meth:`ranked`, as they are now.
            allocate: whether the step ends with an allocation.
        """
        step = optimizer.completed_steps + 1
        self._stale = not allocate
        return Ranking(
            adapters=adapters,
            criterion=self.criterion,
            frozen=self.is_hard(step - 1),
            budget=self.budget(step) if allocate else None,
            min_rank=self.min_rank,
            hard=self.is_hard(step),
            scored=allocate,
        )

    def ranking_of_state(self, optimizer: IVON) -> Ranking:
        """The scores of the posterior as it is, for such a backend."""
        frozen = self.is_hard(optimizer.completed_steps - 1)
        return Ranking(self.ranked(optimizer), self.criterion, frozen, None, self.min_rank, hard=False)

    def _ranked(self, optimizer: IVON, p: Tensor, dim: int, gate: bool) -> RankedTensor:
        state = optimizer.entries[p]
        if self.criterion == "sensitivity":
            for name in ("sensitivity", "uncertainty"):
                if name not in state:
                    state[name] = torch.zeros_like(state["hess"])
        return RankedTensor(
            index=optimizer.index_of(p),
            shape=tuple(p.shape),
            rank_dim=dim,
            gate=gate,
            scores=state["rank_snr"],
            mask=state["rank_mask"],
            sensitivity=state.get("sensitivity"),
            uncertainty=state.get("uncertainty"),
        )

    def _state(self, optimizer: IVON) -> tuple[Tensor, Tensor]:
        """Scores and masks of the ranks of all tensors (T,), whose parts are in the state."""
        entries, device = optimizer.entries_of(self._map.params), self._map.params[0].device
        return self._snr.of(entries, device), self._mask.of(entries, device)

    def _update_sensitivity(self, optimizer: IVON, updated: set[Tensor]) -> None:
        for adapter in self.adapters:
            for _, p, _ in adapter.tensors():
                grad = local_grad(p)
                if p not in updated or grad is None:
                    continue
                state = optimizer.entries[p]
                for name in ("sensitivity", "uncertainty"):
                    if name not in state:
                        state[name] = like(p, torch.zeros_like(local(state["hess"])))
                mean = optimizer.mean_of(p)
                grad = grad.to(mean.dtype)
                old = local(state["sensitivity"]), local(state["uncertainty"])
                finite = torch.isfinite(grad)
                for before, value in zip(old, update_sensitivity(mean, grad, *old), strict=True):
                    before.copy_(torch.where(finite, value, before))

    def _set_to_zero(self, optimizer: IVON, hard: bool) -> None:
        for p in optimizer.zero_ranks(self._map.params if hard else self._map.gates):
            state, dim = optimizer.entries[p], self.rank_dim(p)
            part = local(p)
            dead = ~spread(mask_part(p, state["rank_mask"], dim), dim, tuple(part.shape))
            mean = optimizer.mean_of(p)  # that of a 16-bit p is a tensor of its own
            for tensor in {t.data_ptr(): t for t in (part, local(state["momentum"]), mean)}.values():
                tensor.masked_fill_(dead, 0.0)

    # ---------------------------------------------------------------- reading

    @torch.no_grad()
    def scores(self, optimizer: IVON) -> list[Tensor]:
        """Score of every rank from the posterior as it is now: fp32 (r,) per adapter; 0 for ranks pruned for good.

        With sharded parameters all processes must call it.
        """
        scores = self._scores(optimizer, frozen=self.is_hard(optimizer.completed_steps))
        return list(scores.split(self._map.ranks))

    def _scores(self, optimizer: IVON, frozen: bool) -> Tensor:
        scores = self._map.add(self._rank_means(optimizer))
        return scores * torch.cat([self.mask(a) for a in self.adapters]) if frozen else scores

    def _rank_means(self, optimizer: IVON) -> Tensor:
        """Mean importance of every rank of every tensor: fp32 (T,)."""
        params, dims, counts = self._map.params, self._map.dims, self._map.counts
        sums = optimizer.rank_sums(params, dims, self.criterion)
        if sums is None:
            pairs = zip(params, dims, strict=True)
            return torch.cat(rank_means([(p, optimizer.local_snr(p, self.criterion), dim) for p, dim in pairs]))

        def total(position: int) -> int:
            tensor, rank = self._map.place(position)
            return exact_sum(optimizer.local_snr(params[tensor], self.criterion).select(dims[tensor], rank).numpy())

        return torch.from_numpy(settled_means(sums, counts, total, exact_below(self.criterion)))

    def mask(self, adapter: LoraAdapter) -> Tensor:
        """bool (r,), a copy: False for the ranks pruned now; all True before the first allocation."""
        state: dict[str, Any] = self._optimizer.entries.get(adapter.A, {}) if self._optimizer is not None else {}
        mask = state.get("rank_mask")
        return torch.ones(adapter.rank, dtype=torch.bool, device=adapter.A.device) if mask is None else mask.clone()


def _steps(name: str, value: int | float, total_steps: int) -> int:
    if isinstance(value, float):
        if not 0.0 <= value < 1.0:
            raise ValueError(
                f"{name} as a fraction of total_steps must lie in [0, 1), got {value!r}; give whole steps as an int"
            )
        return round(value * total_steps)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a number of steps of at least 0, or a fraction, got {value!r}")
    return value
