"""What a step does for the pruner: score ranks, select those that stay, and set the others to zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ivon_lora.backends import Backend
from ivon_lora.backends.eager import EagerBackend
from ivon_lora.backends.ranking import RankedTensor, Ranking
from ivon_lora.functional.importance import rank_mean, select_top, spread
from ivon_lora.optim.parameters import GroupBatch, by_backend
from ivon_lora.optim.sharding import is_sharded, like, local, mask_part, whole

if TYPE_CHECKING:
    from ivon_lora.lora.adapters import LoraAdapter
    from ivon_lora.lora.rank_pruner import RankPruner
    from ivon_lora.optim.ivon import IVON


def due(optimizer: IVON) -> Ranking | None:
    """What the coming step has to rank, if its number says so."""
    pruner = optimizer.pruner
    step = optimizer.completed_steps + 1
    if pruner is None or not pruner.is_scored(step):
        return None
    places = {id(p): (index, group) for index, group, p in optimizer.parameters.listed()}
    adapters = []
    for adapter in pruner.adapters:
        gate = adapter.B if adapter.E is None else adapter.E
        tensors = []
        for _, p, _ in adapter.tensors():
            index, group = places[id(p)]
            state = optimizer.parameters.state_of(p, group)
            tensors.append(RankedTensor(index, p is gate, state["rank_snr"], state["rank_mask"]))
        adapters.append(tensors)
    return Ranking(
        adapters=adapters,
        criterion=pruner.criterion,
        budget=pruner.budget(step) if pruner.is_due(step) else None,
        min_rank=pruner.min_rank,
        frozen=pruner.is_hard(step - 1),
        hard=pruner.is_hard(step),
    )


def prune(optimizer: IVON, ranking: Ranking, batches: list[GroupBatch]) -> None:
    """Score after an update; with a budget also select, and set mean and momentum of pruned ranks to zero.

    Args:
        batches: those of the update, whose backend may have prepared the sums on its way.
    """
    pruner = optimizer.pruner
    assert pruner is not None
    backend = _one_backend(pruner, ranking, batches)
    if backend is not None and backend.rank(batches, ranking):
        return
    scores = scores_now(optimizer, pruner, ranking.frozen)
    for tensors, mine in zip(ranking.adapters, scores.split([a.rank for a in pruner.adapters]), strict=True):
        for tensor in tensors:
            tensor.scores.copy_(mine)
    if ranking.budget is None:
        return
    ranks = torch.tensor([a.rank for a in pruner.adapters], device="cpu")
    owners = torch.repeat_interleave(torch.arange(len(ranks), device="cpu"), ranks).to(scores.device)
    bound = pruner.rank_bound(optimizer.completed_steps)
    mask = select_top(scores, ranking.budget, owners, ranking.min_rank, bound)
    for adapter, tensors, mine in zip(pruner.adapters, ranking.adapters, mask.split(ranks.tolist()), strict=True):
        for (_, p, dim), tensor in zip(adapter.tensors(), tensors, strict=True):
            tensor.mask.copy_(mine)
            if ranking.hard or tensor.gate:
                _set_to_zero(optimizer, p, dim, tensor.mask)


def _one_backend(pruner: RankPruner, ranking: Ranking, batches: list[GroupBatch]) -> Backend | None:
    """The backend that may rank all adapters by itself: they are whole, all of this update, and unbounded."""
    found = by_backend(batches)
    if pruner.max_rank is not None or len(found) != 1:
        return None
    updated = {index for batch in batches for index in batch.indices}
    indices = {tensor.index for tensors in ranking.adapters for tensor in tensors}
    whole = not any(is_sharded(p) for batch in batches for p in batch.params)
    return found[0][0] if whole and indices <= updated else None


def scores_now(optimizer: IVON, pruner: RankPruner, frozen: bool) -> Tensor:
    """Score of every rank of every adapter: s(A) + s(B) + s(E), fp32 ``(R,)``; 0 for ranks pruned for good.

    With sharded parameters all processes must call it.
    """
    wanted = {id(p) for adapter in pruner.adapters for _, p, _ in adapter.tensors()}
    items = [item for item in optimizer.parameters.listed() if id(item[2]) in wanted]
    means: dict[int, Tensor] = {}
    for backend, batches in by_backend(optimizer.parameters.batches(items, optimizer.sampling.hyper())):
        params = [p for batch in batches for p in batch.params]
        if any(is_sharded(p) for p in params):  # gathered one by one, so that the bits are those of whole parameters
            eager = EagerBackend()
            parts = (eager.importances(batch, n, pruner.criterion) for batch in batches for n in range(len(batch)))
            pairs = zip(params, parts, strict=True)
            found = [rank_mean(whole(like(p, part)), pruner.rank_dims[p]) for p, part in pairs]
        else:
            found = backend.rank_means(batches, pruner.criterion)
        means |= zip(map(id, params), found, strict=True)
    device = pruner.adapters[0].A.device
    scores = []
    for adapter in pruner.adapters:
        first, *rest = (means[id(p)].to(device) for _, p, _ in adapter.tensors())
        for mean in rest:  # one after the other, as the kernels add them
            first = first + mean
        scores.append(first * mask_of(optimizer, adapter).to(device) if frozen else first)
    return torch.cat(scores)


def mask_of(optimizer: IVON, adapter: LoraAdapter) -> Tensor:
    """bool ``(r,)``: False for the ranks that are pruned now."""
    mask: Tensor | None = optimizer.state.get(adapter.A, {}).get("rank_mask")
    return torch.ones(adapter.rank, dtype=torch.bool, device=adapter.A.device) if mask is None else mask


def _set_to_zero(optimizer: IVON, p: Tensor, dim: int, mask: Tensor) -> None:
    state, part = optimizer.state[p], local(p).detach()
    dead = spread(~mask_part(p, mask, dim).to(part.device), dim, tuple(part.shape))
    for tensor in (part, local(state["momentum"]), *([local(state["mean"])] if "mean" in state else [])):
        tensor.masked_fill_(dead, 0.0)
