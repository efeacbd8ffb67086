"""What the pruner has done to ranks by the backends: their sums, their zeros, their allocation within a step."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ivon_lora.backends import Backend, RankedTensor
from ivon_lora.layout import same
from ivon_lora.members import Members
from ivon_lora.optim.param_groups import state_dtype
from ivon_lora.optim.sharding import is_sharded
from ivon_lora.plan import Entry, Plan
from ivon_lora.samples import Samples
from ivon_lora.works import Works

if TYPE_CHECKING:
    from ivon_lora.lora.rank_pruner import RankPruner
    from ivon_lora.optim.ivon import IVON


@dataclass
class _Ranked:
    """What a backend that ranks was told of the pruner's adapters, good for as long as all of this stays.

    Attributes:
        pruner, plan: whose adapters, and by which plan they are updated; not kept alive.
        entries: state of their tensors.
        memory: what `names` are in each of the entries.
    """

    pruner: weakref.ref[RankPruner]
    plan: weakref.ref[Plan]
    backend: Backend
    adapters: list[list[RankedTensor]]
    entries: list[Entry]
    names: tuple[str, ...]
    memory: list[list[Any]]

    def holds(self, pruner: RankPruner, plan: Plan) -> bool:
        """Whether it is still true."""
        return (
            self.pruner() is pruner
            and self.plan() is plan
            and self.names == _names(pruner)
            and all(map(same, _memory(self.entries, self.names), self.memory))
        )


def _names(pruner: RankPruner) -> tuple[str, ...]:
    """State that the backend reads and writes."""
    return ("rank_snr", "rank_mask", *(("sensitivity", "uncertainty") if pruner.criterion == "sensitivity" else ()))


def _memory(entries: list[Entry], names: tuple[str, ...]) -> list[list[Any]]:
    return [[entry.get(name) for entry in entries] for name in names]


class RankWork:
    """Work on the ranks of the pruner's adapters."""

    def __init__(self, members: Members, works: Works, samples: Samples) -> None:
        self._members, self._works, self._samples = members, works, samples
        self._known: _Ranked | None = None

    def sums(self, params: list[Tensor], dims: list[int], criterion: str) -> np.ndarray | None:
        """What `Backend.rank_sums` says of parameters of the pruner's adapters; None if it does not of all of them.

        Args:
            dims: the rank dimension of each parameter.
        """
        if criterion == "sensitivity":
            return None
        plan = self._works.plan("scores", params, self._members.census())
        if not plan.is_plain:
            return None
        found = starts = np.empty(0, np.int64)
        if len(plan.parts) > 1:
            starts = np.cumsum([0, *(p.shape[dim] for p, dim in zip(params, dims, strict=True))])
            found = np.empty(starts[-1])
        for part in plan.parts:
            mine, group = [dims[i] for i in part.numbers], part.group
            sums = part.backend.rank_sums(part.works, mine, criterion, group["ess"], group["weight_decay"])
            if sums is None:
                return None
            if len(mine) == len(params):
                return sums
            found[np.concatenate([np.arange(starts[i], starts[i + 1]) for i in part.numbers])] = sums
        return found

    def zero(self, params: list[Tensor]) -> list[Tensor]:
        """Set mean and momentum of pruned ranks to zero; returns the parameters of which the backend does not."""
        left: list[Tensor] = []
        for part in self._works.plan("zero", params, self._members.census()).parts:
            if not (part.is_plain and part.backend.zero_ranks(part.works)):
                left += part.params
        return left

    def score(self, optimizer: IVON) -> bool:
        """Write the scores of the posterior as it is into the state, by a backend that ranks; False if none can."""
        pruner = self._members.pruner
        assert pruner is not None
        params = [p for adapter in pruner.adapters for _, p, _ in adapter.tensors()]
        backend = self._backend_of(params)
        if backend is None:
            return False
        backend.begin_ranking(pruner.ranking_of_state(optimizer))
        for part in self._works.plan("scores", params, self._members.census()).parts:
            backend.score(part.works, self._works.hyper(part.group, part.updates))
        backend.finish_ranking()
        return True

    def begin(self, optimizer: IVON, params: list[Tensor], plans: tuple[Plan, Plan], allocate: bool) -> Backend | None:
        """The backend that scores and allocates ranks within the launches of this step, if one can and it is time.

        Scores take a good part of what a step takes, so a step has none but for an allocation; `score` finds them when
        somebody looks. The running means behind some are updated in every step.

        Args:
            params: those that this step updates.
            plans: by which it does.
            allocate: whether the step ends with an allocation.
        """
        pruner = self._members.pruner
        if pruner is None or not any(backend.ranks for backend in self._members.backends.values()):
            return None
        for each in self._members.backends.values():
            each.drop_ranking()
        if not allocate and pruner.criterion != "sensitivity":
            return None
        # one plan for all, and no banked samples: every parameter of the plan has a gradient
        lasting = not plans[1].parts and not self._samples.n_banked
        known = self._known
        if known is None or not lasting or not known.holds(pruner, plans[0]):
            self._known = None
            backend = self._ranking_backend(pruner, params)
            if backend is None:
                return None
            adapters = pruner.ranked(optimizer)
            entries = [self._members.entries[p] for adapter in pruner.adapters for _, p, _ in adapter.tensors()]
            names = _names(pruner)
            known = _Ranked(
                weakref.ref(pruner), weakref.ref(plans[0]), backend, adapters, entries, names, _memory(entries, names)
            )
            if lasting:
                self._known = known
        known.backend.begin_ranking(pruner.ranking(optimizer, known.adapters, allocate))
        return known.backend

    def _ranking_backend(self, pruner: RankPruner, params: list[Tensor]) -> Backend | None:
        """The backend that ranks all of the pruner's adapters in a step that updates ``params``, if there is one."""
        updated = set(params)
        tensors = [p for adapter in pruner.adapters for _, p, _ in adapter.tensors()]
        if any(p not in updated or p.grad is None for p in tensors):
            return None
        if pruner.criterion == "sensitivity" and self._samples.n_banked:  # needs the last gradient, not their mean
            return None
        return self._backend_of(tensors)

    def _backend_of(self, tensors: list[Tensor]) -> Backend | None:
        """The one backend of these tensors, if it ranks."""
        backend = self._members.backend(tensors[0].device)
        if (
            not backend.ranks
            or any(p.device != tensors[0].device for p in tensors)
            or any(is_sharded(p) for p in tensors)  # their scores take an exchange
            or any(state_dtype(p) != torch.float32 for p in tensors)
        ):
            return None
        return backend
