"""Who takes part in an optimizer: its parameters in the order that identifies them for the noise, their groups."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ivon_lora.backends import Backend, choose_backend, make_backend
from ivon_lora.optim.replicas import Replicas, find_replicas
from ivon_lora.optim.sharding import check_layout, check_replaced, is_sharded
from ivon_lora.plan import Entry, Group, Roster

if TYPE_CHECKING:
    from ivon_lora.lora.rank_pruner import RankPruner

logger = logging.getLogger(__name__)


class Owner(Protocol):
    """What is read of the optimizer, anew every time: users re-arrange groups, and torch replaces them."""

    param_groups: list[Group]
    pruner: RankPruner | None

    @property
    def entries(self) -> dict[Tensor, Entry]:
        """State of each parameter, as it lies there."""
        ...


class Members:
    """Parameters and groups of an optimizer, and the backends that run them.

    Attributes:
        given: all parameters that `admit` has seen.
        backends: one per device, made when first asked for.

    Args:
        owner: the optimizer. It is not kept alive: in a cycle its memory would wait for the garbage collector.
        backend: its argument.
    """

    def __init__(self, owner: Owner, backend: str) -> None:
        self._owner: Owner = weakref.proxy(owner)
        self._roster: Roster | None = None
        self.given: set[Tensor] = set()
        self.backend_name = backend
        self.backends: dict[torch.device, Backend] = {}

    @property
    def groups(self) -> list[Group]:
        """The groups as they are now."""
        return self._owner.param_groups

    @property
    def entries(self) -> dict[Tensor, Entry]:
        """State of each parameter, as it lies there."""
        return self._owner.entries

    @property
    def pruner(self) -> RankPruner | None:
        """The optimizer's."""
        return self._owner.pruner

    def admit(self, group: Group) -> None:
        """Check the parameters of a new group.

        Raises:
            ValueError: some are pieces of something else, or sharded in a group with ``sync``.
        """
        for i, p in enumerate(group["params"]):
            name = group["param_names"][i] if "param_names" in group else f"number {i} of its group"
            check_layout(name, p)
            if group["sync"] and is_sharded(p):
                raise ValueError(f"sync=True needs whole parameters, and {name} is sharded; take sync=False")
        self.given.update(group["params"])

    def place(self, p: Tensor) -> tuple[int, Group]:
        """Index and group of a parameter.

        Raises:
            ValueError: it is not a parameter of this optimizer.
        """
        place = None if self._roster is None else self._roster.place(p)
        if place is None:  # never seen, or somebody has re-arranged the groups
            place = self.census().place(p)
        if place is None:
            raise ValueError("this tensor is not a parameter of the optimizer; pass one that was given to IVON(params)")
        return place

    def census(self) -> Roster:
        """All parameters as they are arranged now."""
        groups, entries = self.groups, self.entries
        if self._roster is None or not self._roster.holds(groups, entries):
            check_replaced([p for group in groups for p in group["params"]], self.given)
            with torch.inference_mode(False):
                self._roster = Roster(groups, entries)
        return self._roster

    def count_updates(self, positions: np.ndarray) -> None:
        """One more update of some parameters, see `Roster.positions`, since the last census."""
        assert self._roster is not None
        self._roster.count(positions)

    def forget_census(self) -> None:
        """State is about to be replaced."""
        self._roster = None

    def __iter__(self) -> Iterator[Tensor]:
        """The parameters in the order that identifies them for the noise."""
        return (p for group in self.groups for p in group["params"])

    def backend(self, device: torch.device) -> Backend:
        """The backend that runs parameters on a device.

        Raises:
            ValueError: the backend asked for cannot run there.
        """
        if device not in self.backends:
            name, reason = choose_backend(self.backend_name, device)
            slow = device.type == "cuda" and name == "eager" != self.backend_name
            logger.log(
                logging.WARNING if slow else logging.INFO, "backend %s for parameters on %s: %s", name, device, reason
            )
            self.backends[device] = make_backend(name, device)
        return self.backends[device]

    def forget_noise(self) -> None:
        """No backend needs to keep the noise of the last sample any longer."""
        for backend in self.backends.values():
            backend.forget_noise()

    # ---------------------------------------------------------------- counters, which the groups hold

    @property
    def seed(self) -> int:
        """Seed of the noise."""
        seed: int = self.groups[0]["seed"]
        return seed

    @property
    def completed_steps(self) -> int:
        """Steps so far."""
        steps: int = self.groups[0]["completed_steps"]
        return steps

    def count(self, counter: str, amount: int = 1) -> None:
        """That many more."""
        for group in self.groups:
            group[counter] += amount

    def masks_are_hard(self) -> bool:
        """Whether ranks that are masked now are pruned for good."""
        return self.pruner is not None and self.pruner.is_hard(self.completed_steps)

    def replicas(self) -> Replicas | None:
        """The replicas that draw noise of their own, if this is one of them."""
        return find_replicas() if any(group["sync"] for group in self.groups) else None


def refuse_duplicates(params: list[Any]) -> None:
    """Refuse a group that lists a parameter twice.

    Raises:
        ValueError: naming its second place.
    """
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    if len({id(p) for p in tensors}) < len(tensors):
        twice = next(n for n, p in enumerate(tensors) if any(p is q for q in tensors[:n]))
        raise ValueError(f"parameter {twice} of the group appears twice in it; pass every parameter once")
