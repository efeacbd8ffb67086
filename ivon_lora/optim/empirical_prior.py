"""The prior that the data choose: a delta for every tensor, from its second moment, which is a mean over one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ivon_lora.functional.prior import INTERVAL, next_weight_decay
from ivon_lora.optim.parameters import GroupBatch
from ivon_lora.optim.rank_pruning import mean_importances

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON


def next_priors(optimizer: IVON, batches: list[GroupBatch]) -> list[tuple[Tensor, Tensor]]:
    """The deltas that the data choose after this update, with the memory that holds them: a tensor is one rank.

    They are found before ranks are set to zero, which is no news from the data, and set after; and before the step is
    counted, so that only ranks which this update left alone are left out.
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
    for batch, moments in mean_importances(optimizer, items, "second_moment"):
        initial = float(batch.group["weight_decay"])
        for state, moment in zip(batch.states, moments, strict=True):
            value = next_weight_decay(moment.view(()), batch.hyper.ess, initial)
            found.append((state["weight_decay"].view(()), value))
    return found
