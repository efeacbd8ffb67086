"""Parameters of which this process holds a part: the DTensors of FSDP2, sharded along dimension 0.

An optimizer works on the local parts. What a part must know of the whole is where it begins: its elements are
neighbours (C order), so one number gives them their place in the noise. What is ordinary passes through untouched.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

R = TypeVar("R")

INSTEAD = (
    "use FSDP2, torch.distributed.fsdp.fully_shard(model), which keeps every parameter a tensor of its own, or DDP, "
    "and create IVON after it"
)


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor: spread over processes, or copied to all of them."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor in this process, sharing its memory; an ordinary tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return part


def like(p: Tensor, part: Tensor) -> Tensor:
    """``part``, of this process, as a tensor that is spread over processes as the parameter is."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    spec: Any = p
    stride = torch.empty(p.shape, device="meta").stride()
    return DTensor.from_local(
        part, spec.device_mesh, spec.placements, run_check=False, shape=torch.Size(p.shape), stride=stride
    )


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts, which all processes must ask for; an ordinary tensor itself."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def by_first(sharded: bool, work: Callable[[], R]) -> R:
    """What ``work()`` returns; if ``sharded``, only the first process does it, and all get its result or its error."""
    if not sharded:
        return work()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: R = outcome[0]
    return result


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without what FSDP2 made of it."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return type(module)
    return next(c for c in type(module).__mro__ if issubclass(c, nn.Module) and not issubclass(c, fsdp.FSDPModule))


def local_grad(p: Tensor) -> Tensor | None:
    """The part of ``p.grad`` that belongs to the local part of ``p``."""
    grad: Any = p.grad
    if grad is None or not is_sharded(p):
        return grad
    if grad.placements != p.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return local(grad)


def first_row(p: Tensor) -> int:
    """Index, along dimension 0 of the whole parameter, of the first row of the local part."""
    if not is_sharded(p):
        return 0
    spec: Any = p
    first, size = 0, p.shape[0] if p.dim() else 0
    for dim, placement in enumerate(spec.placements):
        if placement.is_shard():  # a shard of a shard of ...; each dimension of the mesh cuts as torch.chunk does
            chunk = -(-size // spec.device_mesh.size(dim))
            begin = min(spec.device_mesh.get_local_rank(dim) * chunk, size)
            first, size = first + begin, min(chunk, size - begin)
    return first


def first_element(p: Tensor) -> int:
    """Index (C order), in the whole parameter, of the first element of the local part."""
    return first_row(p) * math.prod(p.shape[1:])


def part_of(p: Tensor, whole: Tensor) -> Tensor:
    """The local part of ``whole``, an ordinary tensor of the shape of the parameter ``p``."""
    if not is_sharded(p) or not p.dim():
        return whole
    return whole.narrow(0, first_row(p), local(p).shape[0])


def mask_part(p: Tensor, mask: Tensor, rank_dim: int) -> Tensor:
    """A rank mask (r,) of a whole parameter, for the ranks along ``rank_dim`` of the local part."""
    return part_of(p, mask) if rank_dim == 0 else mask


# ---------------------------------------------------------------- what cannot be trained, and FSDP2's copies


def check_layout(name: str, p: Tensor) -> None:
    """ValueError for pieces of something else: FSDP1's flat parameters, DeepSpeed's ZeRO partitions, DTensors that are
    not sharded along dimension 0."""
    if getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False):
        raise ValueError(
            f"parameter {name} belongs to FSDP1 (FullyShardedDataParallel), which flattens parameters, so that neither "
            f"their place in the noise nor their ranks are known: {INSTEAD}"
        )
    if hasattr(p, "ds_id"):
        raise ValueError(f"parameter {name} is partitioned by DeepSpeed's ZeRO stage 3: {INSTEAD}")
    if is_sharded(p):
        from torch.distributed.tensor import Replicate, Shard

        placements: Any = p.placements  # type: ignore[attr-defined]
        if any(type(x) not in (Replicate, Shard) or (type(x) is Shard and x.dim != 0) for x in placements):
            raise ValueError(
                f"parameter {name} is distributed as {placements}; IVON takes DTensors that are sharded along "
                "dimension 0, as fully_shard does by default, or replicated"
            )


def check_replaced(params: Iterable[Tensor], given: Collection[Tensor]) -> None:
    """RuntimeError where DeepSpeed (ZeRO stages 1 and 2, or its bf16 optimizer) has put flat partitions in the place of
    the parameters that were ``given``; others may replace them."""
    if "deepspeed" in sys.modules and any(p.dim() == 1 and p not in given for p in params):
        raise RuntimeError(
            "DeepSpeed has replaced the optimizer's parameters by flat partitions of them, so that neither their place "
            f"in the noise nor their ranks are known: {INSTEAD}; or ZeRO stage 0"
        )


def forget_copies(params: Iterable[Tensor]) -> None:
    """Make FSDP2 gather sharded parameters anew before their next use, for they have been written.

    After a forward pass without gradients its root keeps what it has gathered. Nobody else writes parameters between
    such a pass and the next one, so FSDP2 does not look.
    """
    if not any(is_sharded(p) for p in params):
        return
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule):
            module.reshard()
