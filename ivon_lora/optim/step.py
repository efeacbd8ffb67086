"""One update: who is updated, from which samples, and in which order the rest follows. The formulas are the backends'."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ivon_lora.functional.noise import NoiseKey
from ivon_lora.functional.prior import INTERVAL, next_weight_decay
from ivon_lora.optim import rank_pruning
from ivon_lora.optim.modes import no_autograd, refuse_capture
from ivon_lora.optim.param_groups import Group, check_group
from ivon_lora.optim.parameters import GroupBatch, by_backend
from ivon_lora.optim.sharding import forget_copies

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

Item = tuple[int, Group, Tensor]

UNSAMPLED = (
    "step() without a posterior sample: {happens}. Call optimizer.attach(model) once, for the model whose forward the "
    "loop calls in training mode, or optimizer.train() before the forward pass, or use sampled_params(train=True)."
)


@no_autograd
def update(optimizer: IVON) -> None:
    """Update mean, momentum and Hessian from the gradients as they stand; the parameters hold the mean afterwards.

    Raises:
        RuntimeError: see `IVON.step`; nothing has changed then.
        ValueError: a hyperparameter left its bounds; nothing has changed then.
    """
    refuse_capture()
    parameters, sampling = optimizer.parameters, optimizer.sampling
    sampling.show()
    items = [item for item in parameters.listed() if _takes_part(optimizer, item)]
    for group in parameters.groups:
        check_group({**group, "params": ()})  # schedulers write there
    examples = optimizer.require_examples() if sampling.pending is not None else optimizer.examples_of_step()
    rehearsal = sampling.taken == 0 and all(float(group["lr"]) == 0 for group in parameters.groups)
    if sampling.taken == 0 and items and not rehearsal:
        _warn_of_no_sample(optimizer)
    optimizer.check_batch_size()
    key, n_samples = sampling.pending, sampling.taken
    replicas = sampling.replicas()
    if replicas is not None and not rehearsal:
        items = optimizer.exchange(replicas)
        key, n_samples = None, sampling.n_banked * replicas.size
    sampling.settle()

    # those that were added or thawed since the draw have no sample, and none has if nothing was drawn
    sampled = [item for item in items if n_samples and (item[0] in sampling.drawn or item[0] in sampling.banked)]
    names = {item[0] for item in sampled}
    fresh = [item for item in items if item[0] not in names]
    batches = _batches_of(optimizer, sampled, examples, zeros=key is None)
    if sampling.n_banked:
        for batch in batches:
            sampling.open_bank(batch)
    others = _batches_of(optimizer, fresh, examples, zeros=False)
    ranking = None if rehearsal else rank_pruning.due(optimizer)
    for backend, mine in by_backend(batches):
        # without a last sample any key will do: a gradient of zero brings a curvature of zero
        backend.step(mine, key or NoiseKey(0, 0), n_samples, ranking)
    for backend, mine in by_backend(others):
        backend.step(mine, None, 1, ranking)
    _finish(optimizer, batches + others, examples, rehearsal)
    decays = _next_priors(optimizer, batches)
    if ranking is not None:
        rank_pruning.prune(optimizer, ranking, batches + others)
    for decay, value in decays:
        decay.copy_(value)


def _takes_part(optimizer: IVON, item: Item) -> bool:
    """Whether a parameter is updated: it has a gradient, or one of an earlier sample of this step.

    Raises:
        RuntimeError: its gradient is sparse.
    """
    index, _, p = item
    if not p.requires_grad or not optimizer.drives(p):
        return False
    if p.grad is not None and p.grad.layout is not torch.strided:
        raise RuntimeError("IVON does not take sparse gradients; build the embedding with sparse=False")
    return p.grad is not None or index in optimizer.sampling.banked


def _batches_of(optimizer: IVON, items: list[Item], examples: int | None, zeros: bool) -> list[GroupBatch]:
    """Batches with gradients: those of the draw where they fit.

    Args:
        zeros: all gradients are zero, because those of all samples are banked already.
    """
    if not items:
        return []
    sampling, hyper = optimizer.sampling, optimizer.sampling.hyper(examples=examples)
    drawn = [p for batch in sampling.batches for p in batch.params]
    if len(drawn) == len(items) and {id(p) for p in drawn} == {id(item[2]) for item in items}:
        batches = sampling.batches
        for batch in batches:
            batch.hyper = hyper(batch.group, batch.updates)
    else:
        batches = optimizer.parameters.batches(items, hyper)
    for batch in batches:
        batch.grad = [torch.zeros_like(h) for h in batch.hess] if zeros else optimizer.parameters.gradients(batch)
    return batches


def _warn_of_no_sample(optimizer: IVON) -> None:
    if optimizer.param_groups[0]["hess_approx"] == "fisher":
        happens = "the curvature is learned at the mean, and nothing is averaged over the posterior"
    else:
        happens = "mean and momentum move, the Hessian does not"
    optimizer.warn_once("unsampled", UNSAMPLED.format(happens=happens))


def _finish(optimizer: IVON, batches: list[GroupBatch], examples: int | None, rehearsal: bool) -> None:
    """The parameters hold the mean, and the step is counted."""
    parameters, sampling = optimizer.parameters, optimizer.sampling
    for batch in batches:
        batch.write_back()
    updated = [p for batch in batches for p in batch.params]
    sampling.end({id(p) for batch in sampling.batches for p in batch.params} - {id(p) for p in updated})
    forget_copies(updated)
    steps = [state["step"] for batch in batches for state in batch.states]
    if steps:
        torch._foreach_add_(steps, torch.ones((), device="cpu"))
    sampling.forget_step()
    for group in parameters.groups:
        group["completed_steps"] += 1
        if not rehearsal:
            stated = group["batch_size"]
            group["examples_seen"] += stated if isinstance(stated, int) else examples or 0


def _next_priors(optimizer: IVON, batches: list[GroupBatch]) -> list[tuple[Tensor, Tensor]]:
    """The deltas that the data choose after this update, with the memory that holds them: a tensor is one rank.

    They are found before ranks are set to zero, which is no news from the data, and set after.
    """
    due = {
        index
        for batch in batches
        for index in batch.indices
        if batch.group["empirical_prior"] and (batch.updates + 1) % INTERVAL == 0
    }
    items = [item for item in optimizer.parameters.listed() if item[0] in due and item[2].numel()]
    if not items:
        return []
    found = []
    for batch, moments in rank_pruning.mean_importances(optimizer, items, "second_moment"):
        initial = float(batch.group["weight_decay"])
        for state, moment in zip(batch.states, moments, strict=True):
            value = next_weight_decay(moment.view(()), batch.hyper.ess, initial)
            found.append((state["weight_decay"].view(()), value))
    return found
