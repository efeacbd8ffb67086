"""Closures: what a loop gives to ``step`` instead of gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON


def evaluate(optimizer: IVON, closure: Callable[[], Any]) -> Any:
    """Evaluate a closure at each of ``mc_samples`` posterior samples; the mean of its losses, or None."""
    if _evaluates_nothing(closure):
        closure()  # hooks only
        return None
    sampling = optimizer.sampling
    wanted = max(group["mc_samples"] for group in optimizer.param_groups)
    losses: list[Any] = []
    try:
        # A closure that opens sampled_params itself, several times perhaps, has drawn its samples already.
        while not losses or sampling.n_banked + 1 < wanted:
            if losses or (sampling.of_context and not optimizer.is_sampled):
                sampling.next_sample()
            else:
                optimizer.train()  # again the sample of the micro-batches before, if an evaluation dropped it
            with torch.enable_grad():
                losses.append(closure())
    except BaseException:
        sampling.restore()
        sampling.forget_step()
        raise
    if any(loss is None for loss in losses):
        return None
    return losses[0] if len(losses) == 1 else sum(losses) / len(losses)


def _evaluates_nothing(closure: Callable[[], Any]) -> bool:
    """Whether it is what Lightning passes to ``step`` in manual optimization, where the gradients are there already."""
    if isinstance(closure, functools.partial):  # with hooks around it
        return any(callable(arg) and _evaluates_nothing(arg) for arg in closure.args)
    return getattr(closure, "__name__", "") == "do_nothing_closure"
