"""The samples of a step: the gradients at all but the last are banked, those at the last stand in ``p.grad``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.optim.example_counter import Counts
from ivon_lora.optim.guards import no_autograd
from ivon_lora.optim.param_groups import Group, check_group, hyper_of
from ivon_lora.optim.parameters import GroupBatch, Item, Parameters, by_backend
from ivon_lora.optim.replicas import Replicas, find_replicas

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON


class StepSamples:
    """What the coming step knows of its samples.

    Attributes:
        pending: the sample at which the gradients in ``p.grad`` are taken; None without one.
        of_context: whether a context of `sampled_params` drew it.
        drawn: indices of the parameters that took part in it.
        banked: sums of gradients and curvatures over the earlier samples of the step, by index.
        n_banked: how many those are.
    """

    def __init__(self, optimizer: IVON, parameters: Parameters) -> None:
        self._optimizer: IVON = weakref.proxy(optimizer)
        self._parameters = parameters
        self.pending: NoiseKey | None = None
        self.of_context = False
        self.drawn: set[int] = set()
        self.banked: dict[int, tuple[Tensor, Tensor]] = {}
        self.n_banked = 0

    def hyper(self, prediction: bool = False, counted: Counts | None = None) -> Callable[[Group, int], Hyper]:
        """The scalars of the next update, or of the draw before it. ValueError if a hyperparameter left its bounds."""
        for group in self._parameters.groups:  # schedulers write there
            check_group(group)
        return lambda group, updates: hyper_of(group, updates + 1, counted, prediction)

    @property
    def taken(self) -> int:
        """Samples of the coming step so far."""
        return self.n_banked + (self.pending is not None)

    def replicas(self) -> Replicas | None:
        """The replicas that draw noise of their own, if this is one of them."""
        return find_replicas() if any(group["sync"] for group in self._parameters.groups) else None

    def next_key(self) -> NoiseKey:
        """The sample that follows those banked."""
        replicas, group = self.replicas(), self._parameters.groups[0]
        sample = self.n_banked if replicas is None else replicas.sample_number(self.n_banked)
        return NoiseKey(group["seed"], group["completed_steps"], sample)

    @no_autograd
    def bank(self) -> None:
        """Add gradient and curvature of the pending sample to the sums of this step."""
        if self.pending is None:
            return
        items = self.with_gradients(item for item in self._parameters.listed() if item[0] in self.drawn)
        if not items:
            return
        counted = self._optimizer.examples.on_all_processes(self._parameters.groups, pending=True)
        batches = self._parameters.batches(items, self.hyper(counted=counted), gradients=True)
        replicas = self.replicas()
        for batch in batches:
            if replicas is not None and batch.hyper.curvature == "fisher":  # the mean gradient of this replica's share
                batch.hyper = replace(batch.hyper, square_scale=batch.hyper.square_scale / replicas.size)
            self.open_bank(batch)
        for backend, mine in by_backend(batches):
            backend.bank(mine, self.pending)
        for _, _, p in items:
            for tensor in (p, *self._parameters.tied.others(p)):
                if tensor.grad is not None:
                    tensor.grad.zero_()  # the next sample's gradient must not contain this one's
        self.count_banked()

    def with_gradients(self, items: Iterable[Item]) -> list[Item]:
        """The parameters that have a gradient, or one of an earlier sample of this step.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        found = []
        for item in items:
            index, _, p = item
            if (grad := p.grad) is not None:
                if grad.layout is not torch.strided:
                    raise RuntimeError("IVON does not take sparse gradients; build the embedding with sparse=False")
                found.append(item)
            elif index in self.banked or any(other.grad is not None for other in self._parameters.tied.others(p)):
                found.append(item)
        return found

    def close(self) -> None:
        """Bank the pending sample, with gradients of zero if there are none."""
        self.bank()
        if self.pending is not None:
            self.count_banked()

    def open_bank(self, batch: GroupBatch) -> None:
        """Give a batch its banked sums: zeros for an earlier sample without a gradient."""
        for index, hess in zip(batch.indices, batch.hess, strict=True):
            if index not in self.banked:
                self.banked[index] = torch.zeros_like(hess), torch.zeros_like(hess)
        batch.banked_grad = [self.banked[index][0] for index in batch.indices]
        batch.banked_curvature = [self.banked[index][1] for index in batch.indices]

    def count_banked(self) -> None:
        """The pending sample is banked."""
        self.n_banked += 1
        self._optimizer.examples.next_sample()
        self.pending, self.of_context = None, False

    def forget_step(self) -> None:
        """The step is over, or given up."""
        self.pending, self.of_context, self.drawn = None, False, set()
        self.banked, self.n_banked = {}, 0
        self._optimizer.examples.next_step()
