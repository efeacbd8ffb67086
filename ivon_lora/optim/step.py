"""One update: who is updated, from which samples, and what follows in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.optim import rank_pruning
from ivon_lora.optim.advice import report_idle, report_lr, report_noise, report_unsampled
from ivon_lora.optim.example_counter import Counts
from ivon_lora.optim.guards import no_autograd, refuse_capture
from ivon_lora.optim.param_groups import Group, count_step
from ivon_lora.optim.parameters import GroupBatch, Item, by_backend
from ivon_lora.optim.replicas import exchange
from ivon_lora.optim.sharding import forget_copies

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON


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
    items = sampling.with_gradients(parameters.trained())
    report_idle(optimizer, items)
    counted = optimizer.examples.on_all_processes(parameters.groups, pending=sampling.pending is not None)
    hyper = sampling.hyper(counted=counted)
    # torch.distributed.checkpoint makes a step of learning rate 0 so that there is a state to load into
    rehearsal = sampling.taken == 0 and all(float(group["lr"]) == 0 for group in parameters.groups)
    if sampling.taken == 0 and items and not rehearsal:
        report_unsampled(optimizer)
    optimizer.examples.check(optimizer, sampling.taken)
    report_lr(optimizer)
    key, n_samples = sampling.pending, sampling.taken
    replicas = sampling.replicas()
    if replicas is not None and not rehearsal:
        items = exchange(replicas, optimizer)
        key, n_samples = None, sampling.n_banked * replicas.size
    sampling.settle()

    # those that were added or thawed since the draw have no sample, and none has if nothing was drawn
    known = sampling.drawn | sampling.banked.keys() if n_samples else set()
    sampled = [item for item in items if item[0] in known]
    fresh = [item for item in items if item[0] not in known] if len(sampled) < len(items) else []
    batches = _batches_of(optimizer, sampled, hyper, zeros=key is None)
    if sampling.n_banked:
        for batch in batches:
            sampling.open_bank(batch)
    others = _batches_of(optimizer, fresh, hyper, zeros=False)
    ranking = None if rehearsal else rank_pruning.due(optimizer)
    for backend, mine in by_backend(batches):
        # without a last sample any key will do: a gradient of zero brings a curvature of zero
        backend.step(mine, key or NoiseKey(0, 0), n_samples, ranking)
    for backend, mine in by_backend(others):
        backend.step(mine, None, 1, ranking)
    _finish(optimizer, batches + others)
    _count(optimizer, counted, rehearsal)
    if ranking is not None:
        rank_pruning.prune(optimizer, ranking, batches + others)


def _batches_of(
    optimizer: IVON, items: list[Item], hyper: Callable[[Group, int], Hyper], zeros: bool
) -> list[GroupBatch]:
    """Batches with gradients: those of the draw where they fit.

    Args:
        zeros: all gradients are zero, because those of all samples are banked already.
    """
    if not items:
        return []
    if optimizer.sampling.holds_exactly(items):
        batches = optimizer.sampling.batches
        for batch in batches:
            batch.hyper = hyper(batch.group, batch.updates)
    else:
        batches = optimizer.parameters.batches(items, hyper)
    for batch in batches:
        batch.grad = [torch.zeros_like(h) for h in batch.hess] if zeros else optimizer.parameters.gradients(batch)
    return batches


def _finish(optimizer: IVON, batches: list[GroupBatch]) -> None:
    """The parameters hold the mean, and their updates are counted."""
    sampling = optimizer.sampling
    for batch in batches:
        batch.write_back()
        batch.grad = None  # the batch may serve again, and the user frees gradients
    sampling.end(updated=batches)
    forget_copies(p for batch in batches if not batch.is_plain for p in batch.params)
    for batch in batches:
        count = torch.full((), batch.updates + 1, dtype=torch.float32, device="cpu")
        for state in batch.states:  # one tensor for all of them, which nobody changes in place
            state["step"] = count


def _count(optimizer: IVON, counted: Counts | None, rehearsal: bool) -> None:
    """The step is over, and counted; at the end of the noise's warm-up a look at its size."""
    optimizer.sampling.forget_step()
    warm = False
    for group in optimizer.param_groups:
        group["completed_steps"] += 1
        if not rehearsal:
            examples, group["labels_per_example"] = count_step(group, counted)
            before, group["examples_seen"] = group["examples_seen"], group["examples_seen"] + examples
            warm = warm or before < group["noise_warmup"] <= group["examples_seen"]
    if warm:
        report_noise(optimizer)
