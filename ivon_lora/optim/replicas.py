"""Replicas that draw their own noise (``sync=True``) and exchange what they learned: one step from all samples.

Replica r of W sees the gradient ghat_r of its own batch at its own sample eps_r. A step needs the means over replicas
of ghat_r and of the curvature ghat_r eps_r / sigma, as if one process had drawn W samples; both are unbiased, and with
W draws instead of one the noise adds a W-th of the variance. The product needs the gradient before anybody averages
it, so DDP must leave the gradient as it is: `prepare_ddp`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ivon_lora.functional.noise import MASK
from ivon_lora.optim.param_groups import Group, state_dtype

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

REMEDY = (
    "call optimizer.attach(model) so that DistributedDataParallel leaves the gradient of each replica alone, run "
    "backward within no_sync(), or take sync=False"
)

JOIN = (
    "inside DistributedDataParallel's join() a process whose data are over would not take part in the sums of this "
    "optimizer's steps (of examples counted; with sync=True, of gradients), and the others would wait for ever: leave "
    "join() out, and give all processes the same number of batches"
)


@dataclass(frozen=True)
class Replicas:
    """The processes of the default group, each with the whole model: ``size`` of them, of which this is ``rank``."""

    rank: int
    size: int

    def sample_number(self, sample: int) -> int:
        """Number of this replica's ``sample``-th sample of a step among those of all replicas."""
        return sample * self.size + self.rank

    def gather(self, numbers: Sequence[int], device: torch.device | None = None) -> list[list[int]]:
        """The numbers of every replica, exchanged on a device, by default the one that the backend wants."""
        wanted = "cuda" if dist.get_backend() == "nccl" else "cpu"
        mine = torch.tensor(numbers, dtype=torch.int64, device=device or wanted)
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


def exchange(replicas: Replicas, optimizer: IVON) -> list[tuple[int, Group, Tensor]]:
    """Sum gradients and curvatures over all replicas and samples.

    Returns:
        index, group and parameter of those with a gradient on any replica, whose ``p.grad`` then holds the mean
        gradient, as DDP's own reduction leaves it, and whose banked sums are those over all replicas.

    Raises:
        RuntimeError: replicas differ in what they started from or in the number of samples that they drew, or their
            gradients are averaged already.
    """
    parameters, sampling = optimizer.parameters, optimizer.sampling
    items = [item for item in parameters.listed() if item[2].requires_grad]
    device = items[0][2].device if items else None
    agree = optimizer.replicas_agree or _agree(replicas, optimizer, items, device)
    samples = sampling.taken
    has_gradient = [p.grad is not None or index in sampling.banked for index, _, p in items]
    *have, counts = zip(*replicas.gather([*map(int, has_gradient), samples], device), strict=True)
    if min(counts) != max(counts):
        raise RuntimeError(f"sync=True: some replicas drew {min(counts)} samples for this step, others {max(counts)}")
    found = [item for item, anywhere in zip(items, have, strict=True) if any(anywhere)]
    sampling.close()
    sampled = [item for item in found if samples and item[0] in sampling.drawn]
    for batch in parameters.batches(sampled, sampling.hyper()):
        sampling.open_bank(batch)
    totals = {index: sampling.banked[index][0] for index, _, _ in sampled}
    for index, _, p in found:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if index not in totals:  # added or thawed since the draw, or nothing was drawn
            totals[index] = p.grad.to(state_dtype(p), copy=True)
    replicas.sum_([*totals.values(), *(sampling.banked[index][1] for index, _, _ in sampled)])
    for index, _, p in found:
        assert p.grad is not None
        p.grad.copy_(totals[index] / (replicas.size * (samples if index in sampling.banked else 1)))
    optimizer.replicas_agree = agree
    return found


def _agree(
    replicas: Replicas, optimizer: IVON, items: list[tuple[int, Group, Tensor]], device: torch.device | None
) -> bool:
    """Whether replicas started from the same and have gradients of their own; False where these are zero, and so say
    nothing yet. Raises RuntimeError if it is not so."""
    parameters, sampling, seed = optimizer.parameters, optimizer.sampling, optimizer.seed
    hessians = [parameters.state_of(p, group)["hess"] for _, group, p in items]
    own = [p.grad for _, _, p in items if p.grad is not None] + [grad for grad, _ in sampling.banked.values()]
    same = [len(items), checksum([parameters.mean_of(p) for _, _, p in items]), checksum(hessians)]
    same += [optimizer.completed_steps, seed & MASK, seed >> 32]
    noisy = any(batch.hyper.is_noisy for batch in parameters.batches(items, sampling.hyper()))
    gradients = checksum(own) if noisy else 0  # without noise, equal batches have equal gradients
    rows = replicas.gather([*same, gradients], device)
    if any(row[:-1] != rows[0][:-1] for row in rows):
        raise RuntimeError(
            "sync=True: the replicas differ in weights, state, seed or number of steps; give all of them the same "
            "(wrap the model in DistributedDataParallel, or broadcast its weights, before the first step)"
        )
    if len({row[-1] for row in rows}) == 1 and gradients:
        raise RuntimeError(f"sync=True: all replicas hold the same gradient, so it has been averaged already: {REMEDY}")
    return len({row[-1] for row in rows}) > 1


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


#: instances of DistributedDataParallel that leave gradients as they are
_local: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def prepare_ddp(module: nn.Module, groups: Sequence[Group]) -> None:
    """Prepare the DistributedDataParallel that ``module`` is, or that runs it now, for a step; none without one.

    Raises:
        RuntimeError: it is inside `join`, or ``sync=True`` and it has a communication hook of its own.
    """
    if find_replicas() is None:
        return
    from torch.nn.parallel import DistributedDataParallel

    is_ddp = isinstance(module, DistributedDataParallel)
    ddp: Any = module if is_ddp else DistributedDataParallel._get_active_ddp_module()
    own_noise = any(group["sync"] for group in groups)
    if ddp is None:
        return
    if ddp._join_config.enable and (own_noise or any(group["batch_size"] is not None for group in groups)):
        raise RuntimeError(JOIN)
    if own_noise and ddp not in _local:
        from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

        try:
            ddp.register_comm_hook(None, noop_hook)
        except RuntimeError as error:
            raise RuntimeError(
                f"sync=True cannot set DistributedDataParallel's communication hook ({error})"
            ) from error
        _local.add(ddp)
