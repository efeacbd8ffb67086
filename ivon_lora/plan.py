"""What the optimizer finds out about its tensors once, and how it sees cheaply that it still holds.

A :class:`Roster` is the order of parameters and state, a :class:`Plan` the batches of one kind of backend call. Users
may re-arrange groups, freeze, move or replace tensors at any time, so both are compared with what is there before every
use. That is done for whole lists at once (see `layout`): some 0.5 us per tensor, where building anew takes some 10 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ivon_lora.backends import Backend, Work
from ivon_lora.backends.batch import ADDRESSES, Batch
from ivon_lora.layout import Look, Seen, addresses, equal, is_constant, same
from ivon_lora.optim.sharding import like, local

Entry = dict[str, Any]
Group = dict[str, Any]

PARAM, MEAN = ADDRESSES.index("param"), ADDRESSES.index("mean")

#: types whose attributes are those of their memory; works of others are built anew every time
_PLAIN = (Tensor, nn.Parameter)


class Roster:
    """All parameters in the order that identifies them for the noise, and how often each has been updated.

    The counts are one tensor; its elements are the ``state["step"]`` of the parameters.

    Attributes:
        params, tensors: the parameters.
        counts, numbers: the counts, as a tensor and as an array; the same memory.
    """

    def __init__(self, groups: list[Group], state: dict[Tensor, Entry]) -> None:
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self.tensors = Look.tensors(self.params)
        self._places: dict[Tensor, tuple[int, Group, int]] = {}
        for group in groups:
            for position, p in enumerate(group["params"]):
                self._places[p] = len(self._places), group, position
        self._groups, self._lists = list(groups), [Look.objects(group["params"]) for group in groups]
        self._state, self._held, self._entries = state, Look.objects(state), list(state.values())
        self.counts = torch.tensor([float(e.get("step", 0)) for e in self._entries], dtype=torch.float32)
        for entry, view in zip(self._entries, self.counts, strict=True):
            if "step" in entry:
                entry["step"] = view
        self._steps = Look.values(self._entries, "step")
        self.numbers = self.counts.numpy()
        self._known: dict[int, tuple[list[Tensor], list[Entry]]] = {}
        self._positions = {id(entry): position for position, entry in enumerate(self._entries)}

    def holds(self, groups: list[Group], state: dict[Tensor, Entry]) -> bool:
        """Whether groups and state are still made of the same objects."""
        return (
            same(groups, self._groups)
            and all(objects.are_in(group["params"]) for objects, group in zip(self._lists, groups, strict=True))
            and state is self._state
            and self._held.are_in(state)
            and self._steps.are_there()
        )

    def entries_of(self, params: list[Tensor]) -> list[Entry]:
        """State of some parameters; the same list every time for a list that nobody changes."""
        known = self._known.get(id(params))
        if known is None or known[0] is not params:
            known = self._known[id(params)] = params, [self._state[p] for p in params]
        return known[1]

    def trainable(self) -> list[Tensor]:
        """Those that require a gradient; the same list every time when all do."""
        return self.look()[0]

    def look(self) -> tuple[list[Tensor], Seen | None]:
        """The same, and how they lie, if that was seen on the way."""
        all_do, seen = self.tensors.all_train()
        return (self.params, seen) if all_do else ([p for p in self.params if p.requires_grad], None)

    def place(self, p: Tensor) -> tuple[int, Group] | None:
        """Index and group of a parameter; None if it is not where it was."""
        index, group, position = self._places.get(p, (0, {"params": []}, 0))
        params = group["params"]
        return (index, group) if position < len(params) and params[position] is p else None

    def positions(self, entries: Sequence[Entry]) -> np.ndarray:
        """Where the counts of these state entries are."""
        return np.array([self._positions[id(entry)] for entry in entries], np.int64)

    def count(self, positions: np.ndarray) -> None:
        """One more update of the entries at ``positions``."""
        if len(positions) == len(self.numbers):
            self.numbers += 1
        else:
            self.numbers[positions] += 1


@dataclass(eq=False)
class Part:
    """One backend call: works that have backend, group, dtypes and number of updates in common.

    Attributes:
        backend: who does the work.
        works: one per parameter.
        group: their group.
        updates: how often they have been updated.
        params, entries: parameters and their state.
        whole, numbers: the plan's parameters, and where these are among them.
        positions: where their counts are, see `Roster.positions`.
        reads: state that the call looks at, of momentum and Hessian.
        is_plain: they are ordinary tensors, not sharded ones.
    """

    backend: Backend
    works: Batch
    group: Group
    updates: int
    params: list[Tensor]
    entries: list[Entry]
    whole: list[Tensor]
    numbers: list[int]
    positions: np.ndarray
    reads: Sequence[str]

    def __post_init__(self) -> None:
        self.is_plain = all(type(p) in _PLAIN for p in self.params)
        self._prior = self.group["prior"]
        self._lasts = self.is_plain and all(p.is_contiguous() for p in self.params)
        names = (*self.reads, "rank_mask", "weight_decay")
        some = [name for name in names if any(name in e for e in self.entries)]
        of_all = [name for name in some if all(name in e for e in self.entries)]
        self._known = [Look.values(self.entries, *of_all)]  # a dictionary is cold but once
        self._known += [Look.values(self.entries, name) for name in some if name not in of_all]
        self._means = Look.values(self.entries, "mean")
        self._params, self._places = Look.tensors(self.params), self.works.table[PARAM]
        self._is_half = any(w.mean_state is not None for w in self.works)
        rows = self.works.table
        self._mean_is_param = np.array_equal(rows[MEAN], rows[PARAM])
        listed: list[Tensor] = []
        self._rows: list[int] = []  # of roles that every work has a tensor for
        self._some: list[str] = []  # roles that only some have
        for role in (*self.reads, "rank_mask", "own_decay"):
            tensors = [getattr(w, role) for w in self.works]
            if all(t is not None for t in tensors):
                self._rows.append(ADDRESSES.index(role))
                listed += tensors
            elif any(t is not None for t in tensors):
                self._some.append(role)
        self._tensors = Look.tensors(listed)
        copies = [(e, p, w.mean_copy) for e, p, w in zip(self.entries, self.params, self.works, strict=True)]
        self._copies = [(e, copy if self.is_plain else like(p, copy)) for e, p, copy in copies if copy is not None]

    def show_means(self) -> None:
        """Make the memory that keeps the means part of the state: the parameters hold a sample."""
        for entry, mean in self._copies:
            entry["mean"] = mean

    def hide_means(self) -> bool:
        """Take it out of the state: the parameters hold the mean. False if somebody had put other memory there."""
        self.works.read("mean_copy")  # whoever saw it may have moved it
        hidden = [entry.pop("mean", None) for entry, _ in self._copies]
        return same(hidden, [mean for _, mean in self._copies])

    def is_in_place(self, seen: Seen | None = None) -> bool:
        """Whether the memory of the parameters, or of their local parts, is still where the works have it.

        Args:
            seen: what is known of it already.
        """
        if self._lasts and seen is not None and seen.tensors is self.whole:
            places = seen.places if len(self.numbers) == len(self.whole) else seen.places[self.numbers]
            return seen.dtype == self.works[0].param.dtype and equal(places, self._places)
        if self._lasts:
            return self._params.lie_at(self._places, self.works[0].param.dtype)
        return equal(addresses(self.params if self.is_plain else [local(p) for p in self.params]), self._places)

    def were_written(self) -> None:
        """Tell autograd that the parameters were."""
        self._params.were_written()

    def renew(self, counts: np.ndarray, means_are_shown: bool, seen: Seen | None) -> bool:
        """Read all addresses but the gradients' again; False where the works themselves are no longer right."""
        updates = counts if len(counts) == len(self.positions) else counts[self.positions]
        means_are_seen = self._is_half or means_are_shown
        if (
            not self._lasts
            or self.group["prior"] != self._prior
            or not is_constant(updates)
            or not all(values.are_there() for values in self._known)
            or (means_are_seen and not self._means.are_there())
        ):
            return False
        if not self.is_in_place(seen):
            return False
        self.updates = int(updates[0])
        found = self._tensors.addresses().reshape(len(self._rows), -1)
        for row, places in zip(self._rows, found, strict=True):
            self.works.table[row] = places
        for role in self._some:
            self.works.read(role)
        if means_are_seen and not self._mean_is_param:  # otherwise nobody else knows that memory
            self.works.read("mean")
            self.works.read("mean_state")
        return True


class Plan:
    """The backend calls that do one thing with some of the parameters.

    Attributes:
        params: the parameters, always the same list.
        parts: one per call.
        is_plain: no parameter is sharded.

    Args:
        params: the parameters.
        works: one each.
        entries, groups: their state, and the groups they belong to.
        roster: of all parameters.
        backend_of: the backend for a device.
        context: whatever else the works depend on.
        reads: state that the calls look at, of momentum and Hessian.
    """

    def __init__(
        self,
        params: list[Tensor],
        works: list[Work],
        entries: list[Entry],
        groups: list[Group],
        roster: Roster,
        backend_of: Callable[[torch.device], Backend],
        context: tuple[Any, ...],
        reads: Sequence[str] = ("momentum", "hess"),
    ) -> None:
        # the roster's own list needs no comparison with itself
        self.params = roster.params if same(params, roster.params) else list(params)
        self._roster, self._context = roster, context
        positions, counts = roster.positions(entries), roster.numbers
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, (p, work) in enumerate(zip(params, works, strict=True)):
            group, updates = groups[i], int(counts[positions[i]])
            kinds.setdefault((id(group), p.device, p.dtype, work.hess.dtype, updates), []).append(i)
        self.parts = [
            Part(
                backend=backend_of(params[members[0]].device),
                works=Batch([works[i] for i in members]),
                group=groups[members[0]],
                updates=kind[-1],
                params=self.params if len(members) == len(params) else [params[i] for i in members],
                entries=[entries[i] for i in members],
                whole=self.params,
                numbers=members,
                positions=positions[members],
                reads=reads,
            )
            for kind, members in kinds.items()
        ]
        self.is_plain = all(part.is_plain for part in self.parts)

    def were_written(self) -> None:
        """Tell autograd that the parameters were."""
        for part in self.parts:
            part.were_written()

    def renew(
        self,
        params: list[Tensor],
        roster: Roster,
        context: tuple[Any, ...],
        means_are_shown: bool = False,
        seen: Seen | None = None,
    ) -> bool:
        """Make it a plan for these parameters as they are now; False where it must be made anew.

        Args:
            seen: how they lie now, if that is known.
            means_are_shown: the means that are kept beside samples are part of the state, where they can be replaced.
        """
        return (
            roster is self._roster
            and same(context, self._context)
            and same(params, self.params)
            and all(part.renew(roster.numbers, means_are_shown, seen) for part in self.parts)
        )
