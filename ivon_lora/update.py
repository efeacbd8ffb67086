"""One step: who is updated, from which samples, in which order of calls. The formulas are the backends'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from ivon_lora.backends import Backend, Fused, Sealing
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.layout import same
from ivon_lora.members import Members
from ivon_lora.notices import Notices
from ivon_lora.optim.param_groups import check_again, hyper_of
from ivon_lora.optim.replicas import Exchange
from ivon_lora.optim.sharding import forget_copies
from ivon_lora.plan import Part, Plan
from ivon_lora.prior import next_decays, set_decays
from ivon_lora.prior_work import bounds_within, due_after, is_any_due
from ivon_lora.rank_work import RankWork
from ivon_lora.samples import Samples, observed_at
from ivon_lora.untracked import refuse_capture, untracked
from ivon_lora.weights import Weights
from ivon_lora.works import Works

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON


class Update:
    """Updates mean, momentum and Hessian from the gradients as they stand; the parameters hold the mean afterwards."""

    def __init__(
        self,
        members: Members,
        works: Works,
        samples: Samples,
        weights: Weights,
        ranks: RankWork,
        exchange: Exchange,
        notices: Notices,
    ) -> None:
        self._members, self._works, self._samples, self._weights = members, works, samples, weights
        self._ranks, self._exchange, self._notices = ranks, exchange, notices

    @untracked
    def __call__(self, optimizer: IVON, resample: bool = False) -> None:
        """Make a step.

        Args:
            optimizer: whose members these are; the pruner reads it.
            resample: end with the next training sample, if the launches of this step can.

        Raises:
            RuntimeError: see `IVON.step`; nothing has changed then.
        """
        refuse_capture()
        members, works, samples = self._members, self._works, self._samples
        roster = members.census()
        found = samples.with_gradient(roster)
        params = found.params
        if samples.pending is not None:
            samples.require_examples()
        for group in members.groups:
            check_again(group)  # schedulers write there
        key, n_samples, seen = samples.pending, samples.taken, samples.examples
        # torch.distributed.checkpoint steps a fresh optimizer at lr 0 to make it create its state; nothing may move.
        rehearsal = n_samples == 0 and all(float(group["lr"]) == 0 for group in members.groups)
        if n_samples == 0 and params and not rehearsal:
            self._notices.warn(
                "unsampled",
                "step() without a posterior sample: mean and momentum move, the Hessian does not. Call "
                "optimizer.train() before the forward pass, use sampled_params(train=True), or attach(model) once.",
            )
        samples.check_batch_size()
        replicas = members.replicas()
        if replicas is not None and not rehearsal:
            self._weights.settle(found.seen)
            params = self._exchange(replicas, members, works, samples)
            key, n_samples = None, samples.n_banked * replicas.size
        # the others were added or thawed since the draw, or nothing was drawn
        sampled, fresh = samples.by_part_taken(params) if n_samples else ([], params)
        plans = works.plan("step", sampled, roster, found.seen), works.plan("fresh", fresh, roster, found.seen)
        seals = self._weights.seals(plans[0].parts, found.seen)
        if seals is None:
            self._weights.settle(found.seen)
        self._weights.unsettled = None
        allocates = not rehearsal and members.pruner is not None and members.pruner.is_due(members.completed_steps + 1)
        ranker = self._ranks.begin(optimizer, params, plans, allocates)
        # an allocation after the launches scores ranks under the prior that the step was made with
        priors_within = ranker is not None or not allocates
        following = None
        if resample and not optimizer.in_context and self._can_resample(params, plans, ranker):
            following = NoiseKey(members.seed, members.completed_steps + 1)
        was_written = False
        for number, part in enumerate(plans[0].parts):
            with samples.gradients(part, found if key is not None else None):
                # without a last sample any key will do: a gradient of zero brings a curvature of zero
                examples = works.examples.batch if key else works.examples.batch_of_step
                hyper = hyper_of(part.group, part.updates + 1, examples)
                at = observed_at(key or NoiseKey(0, 0), part.group)
                bounds = bounds_within(part) if priors_within else None
                if following is not None:
                    self._step_and_sample(part, hyper, at, n_samples, following, seen)
                elif bounds is not None:
                    cast(Fused, part.backend).step(part.works, hyper, at, n_samples, decay_bounds=bounds)
                elif seals is not None:
                    was_written |= self._step_sealed(part, hyper, at, n_samples, seals[number])
                else:
                    part.backend.step(part.works, hyper, at, n_samples)
        for part in plans[1].parts:
            with samples.gradients(part, found):
                part.backend.step(part.works, works.hyper(part.group, part.updates), None, 1)
        due = due_after(plans[0], priors_within)
        decays = next_decays(due) if due else []  # before ranks are pruned
        if ranker is not None:
            ranker.finish_ranking()
        if works.live is not None:
            held = works.live.params
            self._weights.drop([] if same(held, params) else _without(held, params))
        for plan in plans:
            plan.were_written()
        if not all(plan.is_plain for plan in plans):
            forget_copies(params)
        for plan in plans:
            for part in plan.parts:
                members.count_updates(part.positions)
        samples.forget()
        members.count("completed_steps")
        if not rehearsal:
            members.count("examples_seen", seen)
        if members.pruner is not None and ranker is None:
            members.pruner.after_update(optimizer, params, allocates)
        if decays:
            set_decays(decays)
        if following is not None:
            self._weights.draw(following, written=True)
        if was_written:
            self._weights.warn_of_written()  # last, for it may raise

    def _can_resample(self, params: list[Tensor], plans: tuple[Plan, Plan], ranker: Backend | None) -> bool:
        """Whether the launches of this step can end with the sample that the next step begins with."""
        pruner, step = self._members.pruner, self._members.completed_steps + 1
        return (
            len(params) == len(self._members.census().trainable())
            and bool(plans[0].parts)
            and not plans[1].parts
            and not is_any_due(plans[0])
            and all(part.backend.resamples and part.is_plain for part in plans[0].parts)
            and all(part.works[0].hess.dtype == torch.float32 for part in plans[0].parts)
            and (
                pruner is None
                or (
                    # the pruner's own running means would follow, and need the mean
                    (ranker is not None or pruner.criterion != "sensitivity")
                    and not pruner.is_due(step)
                    and pruner.is_hard(step) == pruner.is_hard(step - 1)
                )
            )
        )

    def _step_sealed(self, part: Part, hyper: Hyper, key: NoiseKey, n_samples: int, seal: np.ndarray) -> bool:
        """Finds on the way what the user wrote over the sample; whether there was something."""
        found = False

        def keep_written(numbers: Sequence[int]) -> None:
            nonlocal found
            found = self._weights.keep_written([part.params[i] for i in numbers])

        cast(Sealing, part.backend).step(part.works, hyper, key, n_samples, seal, keep_written)
        return found

    def _step_and_sample(
        self, part: Part, hyper: Hyper, key: NoiseKey, n_samples: int, following: NoiseKey, seen: int
    ) -> None:
        works = part.works
        if works[0].mean_copy is not None:
            works.read("mean_copy")  # whoever saw it may have moved it
        elif works[0].mean_state is None:
            works.give("mean_copy", [self._works.buffer_of(p, w.hess) for p, w in zip(part.params, works, strict=True)])
        group = {**part.group, "examples_seen": part.group["examples_seen"] + seen}  # as it will be then
        next_hyper = self._works.hyper(group, part.updates + 1)
        cast(Fused, part.backend).step(works, hyper, key, n_samples, (next_hyper, following))


def _without(params: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    left_out = set(others)
    return [p for p in params if p not in left_out]
