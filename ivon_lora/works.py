"""The state of each parameter, and what a backend is given to work on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivon_lora.backends import Work
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.layout import Seen
from ivon_lora.members import Members
from ivon_lora.optim.batch_size import ExampleCounter
from ivon_lora.optim.param_groups import hyper_of, initial_hess, state_dtype
from ivon_lora.optim.sharding import first_element, is_sharded, like, local
from ivon_lora.packing import together
from ivon_lora.plan import Entry, Group, Part, Plan, Roster
from ivon_lora.prior import initial_state


@dataclass
class Live:
    """The sample that the parameters hold now.

    Attributes:
        key: which one.
        params: the parameters that hold it.
        parts: the calls that write it; None in a copy of the optimizer.
        complete: False while it is being written.
        seals: for each of the parts the `Backend.marks` of its parameters, to see later whether somebody else has
            written; None when nothing is known of them.
        means_are_shown: the memory that keeps the means is part of the state.
    """

    key: NoiseKey
    params: list[Tensor]
    parts: list[Part] | None
    complete: bool = False
    seals: list[np.ndarray] | None = None
    means_are_shown: bool = False

    @functools.cached_property
    def members(self) -> set[Tensor]:
        """The parameters as a set."""
        return set(self.params)


class Works:
    """Makes state where there is none, and works from state; keeps plans of works from step to step.

    Attributes:
        live: the sample that the parameters hold now; None while they hold the mean.
        examples: counts those of the coming step.
    """

    def __init__(self, members: Members, examples: ExampleCounter) -> None:
        self._members = members
        self.examples = examples
        self.live: Live | None = None
        self._plans: dict[str, Plan] = {}
        self._buffers: dict[Tensor, Tensor] = {}  # memory of the means, kept from sample to sample
        self._memory: dict[str, dict[Tensor, Tensor]] = {
            "momentum": {},
            "hess": {},
        }  # of state that is about to be made

    def forget_plans(self) -> None:
        """Make all plans anew."""
        self._plans = {}

    def forget(self) -> None:
        """State is about to be replaced."""
        self._buffers, self._plans = {}, {}
        self._members.forget_census()

    def state_of(self, p: Tensor) -> Entry:
        """The state of a parameter, made if it has none."""
        state, dtype = self._members.entries[p], state_dtype(p)
        if "hess" not in state:
            _, group = self._members.place(p)
            state["step"] = torch.zeros((), dtype=torch.float32)
            part = local(p)
            momentum, hess = (self._memory[name].pop(p, None) for name in ("momentum", "hess"))
            if momentum is None or hess is None:
                momentum, hess = (torch.empty(part.shape, dtype=dtype, device=p.device) for _ in range(2))
            state["momentum"] = like(p, momentum.zero_())
            state["hess"] = like(p, hess.fill_(initial_hess(group)))
        if "weight_decay" not in state and self._has_own_prior(p):
            state["weight_decay"] = initial_state(self._members.place(p)[1]["weight_decay"], p.device)
        if p.dtype != dtype and "mean" not in state:
            state["mean"] = like(p, local(p).detach().to(dtype, memory_format=torch.contiguous_format))
        return state

    def _has_own_prior(self, p: Tensor) -> bool:
        return self._members.place(p)[1]["prior"] == "empirical"

    def weight_decay_of(self, p: Tensor) -> float | Tensor:
        """delta of a parameter: its own, if its group has empirical priors, else the group's."""
        holder = self.state_of(p) if self._has_own_prior(p) else self._members.place(p)[1]
        decay: float | Tensor = holder["weight_decay"]
        return decay

    def mean_of(self, p: Tensor) -> Tensor:
        """Where the mean is now: the parameter, its copy while a sample is live, or the fp32 mean of a 16-bit one.

        Of a sharded parameter, the part in this process.
        """
        self.show_means()
        mean = self._members.entries[p].get("mean")
        part = local(p).detach()
        if mean is None:
            return part
        mean = local(mean)
        if not self._holds_sample(p):
            # Somebody may have written to a 16-bit parameter: where the mean no longer rounds to it, it is the truth.
            mean.copy_(torch.where(mean.to(p.dtype) == part, mean, part.to(mean.dtype)))
        return mean

    def show_means(self) -> None:
        """Make the memory that keeps the means part of the state.

        Nobody but us needs it there in most steps, so that is done only when somebody looks.
        """
        live = self.live
        if live is not None and not live.means_are_shown:
            for part in live.parts or ():
                part.show_means()
            live.means_are_shown = True

    def _holds_sample(self, p: Tensor) -> bool:
        return self.live is not None and p in self.live.members

    def hyper(self, group: Group, updates: int, prediction: bool = False) -> Hyper:
        """The scalars of the update that follows ``updates`` of them, or of the draw before it."""
        return hyper_of(group, updates + 1, self.examples.batch, prediction)

    def work(self, p: Tensor) -> Work:
        """The parameter's work in the state it is in: MEAN or SAMPLED. It has no gradient yet."""
        members, state = self._members, self.state_of(p)
        mask = state.get("rank_mask") if members.masks_are_hard() else None
        half = p.dtype != state["hess"].dtype
        mean = state.get("mean")
        return Work(
            index=members.place(p)[0],
            param=local(p),
            mean=(local(p).detach() if mean is None else local(mean)).contiguous(),
            momentum=local(state["momentum"]),
            hess=local(state["hess"]),
            mean_state=local(state["mean"]) if half else None,
            rank_mask=mask,
            rank_dim=members.pruner.rank_dim(p) if mask is not None and members.pruner is not None else 0,
            reread=half and not self._holds_sample(p),
            offset=first_element(p),
            own_decay=state["weight_decay"] if self._has_own_prior(p) else None,
        )

    def _work_of_draw(self, p: Tensor) -> Work:
        """The same, with the memory that keeps the mean while the parameter holds a sample."""
        work = self.work(p)
        if work.mean_state is None:
            work.mean_copy = self.buffer_of(p, work.hess)
        return work

    def _work_of_zeros(self, p: Tensor) -> Work:
        """The same, with the mask of the ranks to be set to zero, whether it is final or not."""
        work, pruner = self.work(p), self._members.pruner
        assert pruner is not None
        work.rank_mask, work.rank_dim = self._members.entries[p]["rank_mask"], pruner.rank_dim(p)
        return work

    def _reserve(self, params: list[Tensor], means: bool) -> None:
        """Memory for the state that ``params`` on CPU lack: that of small neighbours lies together (see `packing`).

        Args:
            means: also for the means while samples are live.
        """
        for group in self._members.groups:
            mine = set(group["params"])
            of_group = [p for p in params if p in mine and p.device.type == "cpu" and not is_sharded(p)]
            for dtype in {state_dtype(p) for p in of_group}:
                fresh = [p for p in of_group if state_dtype(p) == dtype and "hess" not in self._members.entries[p]]
                for memory in self._memory.values():
                    memory |= together(fresh, dtype)
                if means:
                    self._buffers |= together(
                        [p for p in of_group if p.dtype == dtype and p not in self._buffers], dtype
                    )

    def buffer_of(self, p: Tensor, hess: Tensor) -> Tensor:
        """The memory that keeps the mean while the parameter holds a sample."""
        buffer = self._buffers.get(p)
        if buffer is None or buffer.shape != hess.shape or buffer.device != hess.device:
            buffer = self._buffers[p] = torch.empty_like(hess)
        return buffer

    def plan(self, task: str, params: list[Tensor], roster: Roster, seen: Seen | None = None) -> Plan:
        """The backend calls for ``params``; made anew only when something has changed.

        Args:
            seen: how they lie now, if that is known.
        """
        members, plan = self._members, self._plans.get(task)
        if plan is not None and not params and not plan.params:
            return plan
        context: tuple[Any, ...] = None if self.live is None else self.live.params, members.masks_are_hard()
        shown = self.live is not None and self.live.means_are_shown
        if plan is None or not plan.renew(params, roster, context, shown, seen):
            self.show_means()
            self._reserve(params, means=task == "draw")
            states = [self.state_of(p) for p in params]
            build = {"draw": self._work_of_draw, "zero": self._work_of_zeros}.get(task, self.work)
            works = [build(p) for p in params]  # may have made new state: hence the new census
            groups = [members.place(p)[1] for p in params]
            reads = {"draw": ("hess",), "scores": ("hess",), "zero": ("momentum",)}.get(task, ("momentum", "hess"))
            plan = Plan(params, works, states, groups, members.census(), members.backend, context, reads)
            self._plans[task] = plan
        return plan
