"""Replicas that draw their own noise (``sync=True``) and exchange what they learned: one step from all samples.

Replica r of W sees the gradient ghat_r of its own batch at its own sample eps_r. A step needs the means over replicas
of ghat_r and of the curvature ghat_r eps_r / sigma, as if one process had drawn W samples; both are unbiased, and with
W draws instead of one the noise adds a W-th of the variance. The product needs the gradient before anybody averages
it, so DDP must leave the gradient as it is: `keep_local_gradients`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ivon_lora.functional.noise import MASK
from ivon_lora.optim.param_groups import state_dtype

REMEDY = (
    "call optimizer.attach(model) so that DistributedDataParallel leaves the gradient of each replica alone, run "
    "backward within no_sync(), or take sync=False"
)


@dataclass(frozen=True)
class Replicas:
    """The processes of the default group, each with the whole model: ``size`` of them, of which this is ``rank``."""

    rank: int
    size: int

    def sample_number(self, sample: int) -> int:
        """Number of this replica's ``sample``-th sample of a step among those of all replicas."""
        return sample * self.size + self.rank

    def maximum(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """Largest value on any replica, of each number."""
        values = torch.tensor(numbers, dtype=torch.int64, device=device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.tolist()

    def gather(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """The numbers of every replica."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=device)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return torch.stack(rows).tolist()

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the replicas, which is the same everywhere, bit for bit."""
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for alike in kinds.values():
            flat = torch.cat([x.reshape(-1) for x in alike])
            dist.all_reduce(flat)
            for x, total in zip(alike, flat.split([x.numel() for x in alike]), strict=True):
                x.copy_(total.view(x.shape))

    def check(self, same: Sequence[int], gradients: int, device: torch.device) -> bool:
        """Whether replicas agree where they must, and differ where they must.

        Args:
            same: numbers that must be equal on all replicas: of weights, state, seed and steps.
            gradients: checksum of the gradients, 0 if they are all zero.

        Returns:
            False if the gradients say nothing yet, for they are zero.

        Raises:
            RuntimeError: replicas differ in what they started from, or their gradients are equal: averaged already.
        """
        rows = self.gather([*same, gradients], device)
        if any(row[:-1] != rows[0][:-1] for row in rows):
            raise RuntimeError(
                "sync=True: the replicas differ in weights, state, seed or number of steps; give all of them the same "
                "(wrap the model in DistributedDataParallel, or broadcast its weights, before the first step)"
            )
        if len({row[-1] for row in rows}) == 1:
            if gradients:
                raise RuntimeError(
                    f"sync=True: all replicas hold the same gradient, so it has been averaged already: {REMEDY}"
                )
            return False
        return True


class Run(Protocol):
    """What replicas must have in common: the parameters, and what the noise is made of."""

    def __iter__(self) -> Iterator[Tensor]: ...
    @property
    def seed(self) -> int: ...
    @property
    def completed_steps(self) -> int: ...


class States(Protocol):
    """Where a parameter's mean and state are."""

    def mean_of(self, p: Tensor) -> Tensor: ...
    def state_of(self, p: Tensor) -> dict[str, Any]: ...


class Sums(Protocol):
    """What replicas exchange: gradients and curvatures, summed over the samples of a step."""

    drawn: list[Tensor]
    banked: dict[Tensor, tuple[Tensor, Tensor]]

    @property
    def taken(self) -> int: ...
    def close(self) -> None: ...
    def open(self, params: list[Tensor]) -> None: ...


class Exchange:
    """Sums gradients and curvatures over all replicas and samples.

    Attributes:
        agreed: the replicas have been seen to start from the same numbers, and to differ in their gradients.
    """

    def __init__(self) -> None:
        self.agreed = False

    def __call__(self, replicas: Replicas, run: Run, states: States, sums: Sums) -> list[Tensor]:
        """Returns the parameters with a gradient on any replica, whose ``p.grad`` then holds the mean gradient.

        That is how DDP's own reduction leaves them. The sums of ``sums`` are those over all replicas.

        Raises:
            RuntimeError: see `Replicas.check`; or the replicas drew different numbers of samples.
        """
        candidates: list[Tensor] = [p for p in run if p.requires_grad]
        device = candidates[0].device if candidates else torch.device("cpu")
        if not self.agreed:
            hessians = [states.state_of(p)["hess"] for p in candidates]
            own = [p.grad for p in candidates if p.grad is not None] + [grad for grad, _ in sums.banked.values()]
            same = [len(candidates), checksum([states.mean_of(p) for p in candidates]), checksum(hessians)]
            same += [run.completed_steps, run.seed & MASK, run.seed >> 32]
            self.agreed = replicas.check(same, checksum(own), device)
        samples = sums.taken
        has_gradient = [p.grad is not None or p in sums.banked for p in candidates]
        *anywhere, most, least = replicas.maximum([*map(int, has_gradient), samples, -samples], device)
        if most != -least:
            raise RuntimeError(f"sync=True: some replicas drew {-least} samples for this step, others {most}")
        params = [p for p, found in zip(candidates, anywhere, strict=True) if found]
        sums.close()
        drawn = set(sums.drawn) if samples else set()
        sampled = [p for p in params if p in drawn]
        sums.open(sampled)
        gradients = {p: sums.banked[p][0] for p in sampled}
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if p not in gradients:  # added or thawed since the draw, or nothing was drawn
                gradients[p] = p.grad.to(state_dtype(p), copy=True)
        replicas.sum_([*gradients.values(), *(sums.banked[p][1] for p in sampled)])
        for p, total in gradients.items():
            assert p.grad is not None
            p.grad.copy_(total / (replicas.size * (samples if p in sums.banked else 1)))
        return params


def find_replicas() -> Replicas | None:
    """The replicas of this process, or None where there is no process group, or only one process in it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return None
    return Replicas(dist.get_rank(), dist.get_world_size())


def checksum(tensors: Sequence[Tensor]) -> int:
    """A number that other bits would change; 0 for zeros and for no tensor."""
    total = 0
    for place, tensor in enumerate(tensors):
        flat = tensor.detach().contiguous().view(-1)
        words = flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)
        total += (2 * place + 1) * int(words.sum(dtype=torch.int64))
    return (total & 0x7FFFFFFFFFFFFFFF) - (total & (1 << 63))


_local: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def keep_local_gradients(module: nn.Module) -> None:
    """Make the DistributedDataParallel that ``module`` is, or that runs it now, leave gradients as they are.

    Raises:
        RuntimeError: it has a communication hook of its own.
    """
    from torch.nn.parallel import DistributedDataParallel

    ddp: Any = module if isinstance(module, DistributedDataParallel) else None
    if ddp is None:
        ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or ddp in _local:
        return
    try:
        ddp.register_comm_hook(None, lambda state, bucket: _leave_alone(bucket))  # torch reads annotations, if any
    except RuntimeError as error:
        raise RuntimeError(f"sync=True cannot set DistributedDataParallel's communication hook ({error})") from error
    _local.add(ddp)


def _leave_alone(bucket: Any) -> torch.futures.Future[Tensor]:
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
