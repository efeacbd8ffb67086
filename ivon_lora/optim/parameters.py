"""The parameters of an optimizer: their order, their state, and the batches that backends work on."""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ivon_lora.backends import Backend, choose_backend, make_backend
from ivon_lora.backends.batch import Batch
from ivon_lora.functional.ivon import Hyper
from ivon_lora.optim.param_groups import Group, initial_hess, state_dtype
from ivon_lora.optim.sharding import first_element, is_sharded, like, local, local_grad
from ivon_lora.optim.tied import TiedParameters, seen_as

if TYPE_CHECKING:
    from ivon_lora.lora.rank_pruner import RankPruner
    from ivon_lora.optim.ivon import IVON

logger = logging.getLogger(__name__)

State = dict[str, Any]
#: index of a parameter in the noise, its group, and the parameter
Item = tuple[int, Group, Tensor]
#: of a parameter: autograd's count of writes, and the address
Seal = tuple[int, int]

IS_CPU = operator.attrgetter("is_cpu")

_PLAIN = {Tensor, nn.Parameter}  # types that are never sharded: asking them costs more than this look


@dataclass(kw_only=True)
class GroupBatch(Batch):
    """A batch, and where its tensors come from.

    Attributes:
        group, updates: the group of all parameters, and how often each has been updated.
        params, states: the parameters, and their entries in ``optimizer.state``.
        backend: who works on it.
        is_plain: no parameter is sharded.
        copies: contiguous copies of parameters that are not, with the parameters.
        seals: of the parameters when they got their sample: who writes one breaks its seal.
    """

    group: Group
    updates: int
    params: list[Tensor]
    states: list[State]
    backend: Backend
    is_plain: bool
    copies: list[tuple[Tensor, Tensor]]
    seals: list[Seal] = field(default_factory=list)

    def current_seals(self) -> list[Seal]:
        """How the parameters stand now."""
        parts = self.params if self.is_plain else [local(p) for p in self.params]
        return [(part._version, part.data_ptr()) for part in parts]

    def write_back(self, tell_autograd: bool = True) -> None:
        """Bring copies home, and tell autograd that the parameters were written."""
        for p, copy in self.copies:
            p.copy_(copy)
        if tell_autograd:
            torch.autograd.graph.increment_version(self.params)

    def has_its_shape(self, position: int) -> bool:
        """Whether nobody has given a parameter another shape."""
        return local(self.params[position]).shape == self.hess[position].shape

    def has_its_state(self) -> bool:
        """Whether nobody has put other tensors into the state; between steps it has no means."""
        for name, role in (("mean", self.mean), ("momentum", self.momentum), ("hess", self.hess)):
            now = list(map(dict.get, self.states, repeat(name), role))
            if self.is_plain and not all(map(operator.is_, now, role)):
                return False
            if not self.is_plain and [local(t).data_ptr() for t in now] != [t.data_ptr() for t in role]:
                return False
        return True

    def still_stands(self, state: Mapping[Tensor, State]) -> bool:
        """Whether it can serve again: parameters have their memory and their state, and were updated together."""
        counter = self.states[0].get("step")
        has_means = self.param[0].dtype == self.hess[0].dtype or all("mean" in entry for entry in self.states)
        return (
            counter is not None
            and has_means
            and all(map(IS_CPU, self.params))
            and all(map(Tensor.is_set_to, self.params, self.param))
            and all(map(operator.is_, map(state.get, self.params), self.states))
            and all(map(operator.is_, map(dict.get, self.states, repeat("step")), repeat(counter)))
            and self.has_its_state()
        )

    def renew(self, updates: int, hyper: Hyper) -> None:
        """For another draw: other scalars, no gradients, and its means in the state."""
        self.updates, self.hyper = updates, hyper
        self.grad = self.banked_grad = self.banked_curvature = None
        for state, mean in zip(self.states, self.mean, strict=True):
            state["mean"] = mean

    def select(self, positions: Sequence[int]) -> GroupBatch:
        """The same for some of the parameters."""
        roles = {name: value for name, value in vars(self).items() if isinstance(value, list) and name != "copies"}
        chosen: dict[str, Any] = {name: [value[i] for i in positions] for name, value in roles.items()}
        mine = {id(t) for t in chosen["param"]}
        return replace(self, **chosen, copies=[(p, copy) for p, copy in self.copies if id(copy) in mine])


class Parameters:
    """Order, state and batches of an optimizer's parameters.

    A parameter is identified, for the noise, by its place in the groups. The batches of a draw serve the next one too,
    if nothing that they were gathered from was replaced: gathering them costs more than a step of small tensors.

    Args:
        optimizer: whose parameters; not kept alive.
        backend: the argument of the optimizer.
    """

    def __init__(self, optimizer: IVON, backend: str) -> None:
        self._optimizer: IVON = weakref.proxy(optimizer)
        self.backend_name = backend
        self._backends: dict[tuple[torch.device, bool], Backend] = {}  # whether it is for fp64
        #: of the last draw, on CPUs: the pruner, the parameters, and their batches
        self._drawn: tuple[RankPruner | None, list[Item], list[GroupBatch]] = (None, [], [])
        self.tied = TiedParameters()

    @property
    def groups(self) -> list[Group]:
        """The groups as they are now."""
        groups: list[Group] = self._optimizer.param_groups
        return groups

    def __iter__(self) -> Iterator[Tensor]:
        return (p for group in self.groups for p in group["params"])

    def listed(self) -> list[Item]:
        """Index, group and parameter of every parameter that has memory of its own.

        A lazy one gets it at the first forward; of those that share theirs the first is listed.
        """
        found: list[Item] = []
        index = self.groups[0]["first_index"] if self.groups else 0
        for group in self.groups:
            found += zip(count(index), repeat(group), group["params"])
            index += len(group["params"])
        if not all(_PLAIN.issuperset(map(type, group["params"])) for group in self.groups):
            found = [item for item in found if not is_lazy(item[2])]
        return [item for item in found if not self.tied.is_other(item[2])] if self.tied else found

    def trained(self, ever: bool = False) -> list[Item]:
        """Those of `listed` that train, or ``ever`` did, and that no other optimizer has taken over."""
        items = [item for item in self.listed() if item[2].requires_grad or (ever and self.has_posterior(item[2]))]
        lost = self._optimizer.superseded
        return [item for item in items if id(item[2]) not in lost] if lost else items

    def has_posterior(self, p: Tensor) -> bool:
        """Whether a parameter trains, or did before it was frozen; the value of any other is certain."""
        return p.requires_grad or bool(self._optimizer.state.get(p))

    def place(self, p: Tensor) -> tuple[int, Group]:
        """Index and group of a parameter.

        Raises:
            ValueError: it is not a parameter of this optimizer.
        """
        for index, group, other in self.listed():
            if other is p:
                return index, group
        raise ValueError("this tensor is not a parameter of the optimizer; pass one that was given to IVON(params)")

    def backend(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
        """The backend for parameters of a device and a dtype of the state.

        Raises:
            ValueError: the backend asked for cannot run there.
        """
        kind = device, dtype == torch.float64
        if kind not in self._backends:
            asked = "eager" if dtype == torch.float64 else self.backend_name  # no other takes fp64
            name, reason = choose_backend(asked, device)
            slow = device.type == "cuda" and name == "eager" != asked
            level = logging.WARNING if slow else logging.INFO
            logger.log(level, "backend %s for parameters on %s: %s", name, device, reason)
            self._backends[kind] = make_backend(name, device)
        return self._backends[kind]

    def nonfinite_elements(self) -> int:
        """Gradient elements skipped so far."""
        return sum(int(backend.nonfinite_elements()) for backend in self._backends.values())

    # ---------------------------------------------------------------- state

    def state_of(self, p: Tensor, group: Group) -> State:
        """The state of a parameter, made if it has none, and in the dtype that belongs to the parameter's.

        Raises:
            ValueError: the parameter has another shape than its state.
        """
        state: State = self._optimizer.state[p]
        dtype = state_dtype(p)
        if "hess" not in state:
            part = local(p)
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for name, value in (("momentum", 0.0), ("hess", initial_hess(group))):
                state[name] = like(p, torch.full(part.shape, value, dtype=dtype, device=part.device))
        elif state["hess"].shape != p.shape:
            raise ValueError(
                f"a parameter has the shape {tuple(p.shape)}, and its state {tuple(state['hess'].shape)}: its data "
                "were replaced. Make a new optimizer, or forget what was learned of this one: del optimizer.state[p]"
            )
        elif state["hess"].dtype != dtype:  # the model was cast
            for name in ("momentum", "hess", "mean", "sensitivity", "uncertainty"):
                if name in state:
                    state[name] = like(p, local(state[name]).to(dtype))
        pruner = self._optimizer.pruner
        if pruner is not None and "rank_mask" not in state and p in pruner.rank_dims:
            r = p.shape[pruner.rank_dims[p]]
            state["rank_snr"] = torch.zeros(r, dtype=torch.float32, device=p.device)
            state["rank_mask"] = torch.ones(r, dtype=torch.bool, device=p.device)
            if pruner.criterion == "sensitivity":
                for name in ("sensitivity", "uncertainty"):
                    state.setdefault(name, like(p, torch.zeros_like(local(state["hess"]))))
        if p.dtype != dtype and "mean" not in state:
            state["mean"] = like(p, local(p).detach().to(dtype, memory_format=torch.contiguous_format))
        return state

    def mean_of(self, p: Tensor) -> Tensor:
        """Where the mean is now: the parameter, its copy while a sample is live, or the fp32 mean of a 16-bit one.

        Of a sharded parameter, the part in this process.
        """
        return self._mean(p, local(p).detach(), self._optimizer.state.get(p, {}), draw=False)

    # ---------------------------------------------------------------- batches

    def batches(
        self,
        items: Iterable[Item],
        hyper: Callable[[Group, int], Hyper],
        *,
        draw: bool = False,
        gradients: bool = False,
    ) -> list[GroupBatch]:
        """Parameters gathered by group, device, dtype and number of updates.

        Args:
            items: which, as `listed` has them.
            hyper: the scalars of a group's parameters that have been updated so often.
            draw: they are about to hold a sample: the role "mean" is memory for their means, which becomes part of
                the state.
            gradients: with the role "grad".
        """
        items = list(items)
        found = (self._again(items, hyper) if draw else None) or self._gather(items, hyper, draw)
        for batch in found:
            self._add_ranks(batch)
            if gradients:
                batch.grad = self.gradients(batch)
        return found

    def _gather(self, items: list[Item], hyper: Callable[[Group, int], Hyper], draw: bool) -> list[GroupBatch]:
        kinds: dict[tuple[Any, ...], list[tuple[int, Tensor, State]]] = {}
        groups: dict[int, Group] = {}
        updates: dict[int, tuple[Any, int]] = {}  # of the counters: parameters that are updated together share theirs
        for index, group, p in items:
            state = self.state_of(p, group)
            counter = state["step"]
            if id(counter) not in updates:
                updates[id(counter)] = counter, int(counter)
            groups[id(group)] = group
            key = (id(group), p.device, p.dtype, updates[id(counter)][1], type(p) in _PLAIN or not is_sharded(p))
            kinds.setdefault(key, []).append((index, p, state))
        hypers = [hyper(groups[owner], n) for owner, _, _, n, _ in kinds]  # all, before any state has a mean
        found = [
            self._batch(entries, groups[owner], n, is_plain, scalars, draw)
            for ((owner, _, _, n, is_plain), entries), scalars in zip(kinds.items(), hypers, strict=True)
        ]
        # on other devices the memory of what is replaced, say moved away, shall be free at once
        if draw and all(batch.device.type == "cpu" and batch.is_plain and not batch.copies for batch in found):
            self._drawn = self._optimizer.pruner, items, found
        return found

    def _again(self, items: list[Item], hyper: Callable[[Group, int], Hyper]) -> list[GroupBatch] | None:
        """The batches of the last draw once more, if nobody has replaced anything since."""
        pruner, before, batches = self._drawn
        same = len(items) == len(before) and all(
            p is q and group is owner and i == j for (i, group, p), (j, owner, q) in zip(items, before, strict=True)
        )
        same = same and pruner is self._optimizer.pruner  # which has state of its own
        if not same or not all(batch.still_stands(self._optimizer.state) for batch in batches):
            self.forget_batches()
            return None
        counts = [int(batch.states[0]["step"]) for batch in batches]
        hypers = [hyper(batch.group, n) for batch, n in zip(batches, counts, strict=True)]
        for batch, n, scalars in zip(batches, counts, hypers, strict=True):
            batch.renew(n, scalars)
        return batches

    def forget_batches(self) -> None:
        """The next draw gathers its batches anew, with new memory for the means."""
        self._drawn = None, [], []

    def _batch(
        self,
        entries: list[tuple[int, Tensor, State]],
        group: Group,
        updates: int,
        is_plain: bool,
        hyper: Hyper,
        draw: bool,
    ) -> GroupBatch:
        indices, params, states = [e[0] for e in entries], [e[1] for e in entries], [e[2] for e in entries]
        # p.data counts no writes: `write_back` does
        parts = [p.data for p in params] if is_plain else [local(p).detach() for p in params]
        copies = []
        for i, part in enumerate(parts):
            if not part.is_contiguous():
                parts[i] = part.contiguous()
                copies.append((part, parts[i]))
        momentum, hess = _role(states, "momentum", is_plain), _role(states, "hess", is_plain)
        return GroupBatch(
            hyper,
            indices,
            [0] * len(params) if is_plain else [first_element(p) for p in params],
            parts,
            [self._mean(*item, draw) for item in zip(params, parts, states, strict=True)],
            momentum,
            hess,
            group=group,
            updates=updates,
            params=params,
            states=states,
            backend=self.backend(params[0].device, hess[0].dtype),
            is_plain=is_plain,
            copies=copies,
        )

    def _add_ranks(self, batch: GroupBatch) -> None:
        pruner = self._optimizer.pruner
        if pruner is not None:
            states = batch.states
            batch.sensitivity, batch.uncertainty = _some(states, "sensitivity"), _some(states, "uncertainty")
            batch.rank_dims = [pruner.rank_dims.get(p) for p in batch.params]
            batch.rank_mask = _some(states, "rank_mask") if self._optimizer.masks_are_hard else None

    def _mean(self, p: Tensor, part: Tensor, state: State, draw: bool) -> Tensor:
        if "mean" in state:
            mean = local(state["mean"])
            if not draw and not self._optimizer.sampling.holds(p):
                refresh_mean(part, mean)
            return mean
        if not draw:
            return part
        mean = torch.empty_like(part)  # contiguous, as it is
        state["mean"] = mean if type(p) in _PLAIN else like(p, mean)
        return mean

    def forget_means(self, batch: GroupBatch) -> None:
        """The parameters hold their means again: only 16-bit ones keep a copy in the state."""
        if batch.param[0].dtype == batch.hess[0].dtype:
            for state in batch.states:
                state.pop("mean", None)

    def gradients(self, batch: GroupBatch) -> list[Tensor]:
        """The gradients as they stand, contiguous and of one dtype; zeros where there is none.

        Raises:
            RuntimeError: one has another size than its parameter.
        """
        grads = [p.grad for p in batch.params] if batch.is_plain else [local_grad(p) for p in batch.params]
        if self.tied:
            grads = [self._with_others(p, grad) for p, grad in zip(batch.params, grads, strict=True)]
        found = [torch.zeros_like(h) if grad is None else grad for grad, h in zip(grads, batch.hess, strict=True)]
        if list(map(Tensor.numel, found)) != batch.numbers[0].tolist():
            raise RuntimeError(
                "a gradient has another size than its parameter had when the sample was drawn: the parameter's data "
                "were replaced. Call optimizer.eval() before, and optimizer.zero_grad() after replacing them"
            )
        if not all(map(Tensor.is_contiguous, found)):
            found = [grad.contiguous() for grad in found]
        dtypes = {grad.dtype for grad in found}
        if len(dtypes) == 1 and dtypes <= {batch.param[0].dtype, batch.hess[0].dtype}:
            return found
        return [grad.to(hess.dtype) for grad, hess in zip(found, batch.hess, strict=True)]

    def _with_others(self, p: Tensor, grad: Tensor | None) -> Tensor | None:
        """The gradient of a parameter with those of others over the same memory."""
        for other in self.tied.others(p):
            if other.grad is not None:
                own = seen_as(other.grad, other, p)
                grad = own if grad is None else grad + own
        return grad


def refresh_mean(param: Tensor, mean: Tensor) -> None:
    """Where the mean no longer rounds to the parameter somebody has written there: the parameter is the mean."""
    mean.copy_(torch.where(mean.to(param.dtype) == param, mean, param.to(mean.dtype)))


def by_backend(batches: Sequence[GroupBatch]) -> list[tuple[Backend, list[GroupBatch]]]:
    """The batches of each backend."""
    found: dict[Backend, list[GroupBatch]] = {}
    for batch in batches:
        found.setdefault(batch.backend, []).append(batch)
    return list(found.items())


def _role(states: Sequence[State], name: str, is_plain: bool) -> list[Tensor]:
    """State as the backends take it; what somebody has loaded with other strides is made contiguous for good."""
    found = [state[name] if is_plain else local(state[name]) for state in states]
    if not all(map(Tensor.is_contiguous, found)):
        for state in states:
            state[name] = state[name].contiguous()
        found = [local(state[name]) for state in states]
    return found


def _some(states: Sequence[State], name: str) -> list[Tensor | None] | None:
    found = [local(state[name]) if name in state else None for state in states]
    return found if any(t is not None for t in found) else None
