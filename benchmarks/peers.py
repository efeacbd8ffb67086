"""How each peer does one whole optimizer step: everything between `backward()` and the next forward pass.

A new peer is one more function and one more line in `make_peers`. Gradients lie in ``p.grad`` before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from ivon_lora import IVON, LoraAdapter, RankPruner

#: steps between two allocations of ranks that the results stand for
INTERVAL = 10
#: while measuring, the second step of every round allocates, so that both kinds are seen equally often
MEASURED_INTERVAL = 2
BASELINE, REFERENCE, ADALORA = "adamw[fused]", "ivon-opt", "adalora+adamw[fused]"

#: of every IVON that is measured, ours and the peer
IVON_OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 1e4, "hess_init": 0.01, "clip_radius": 1e-3, "weight_decay": 1e-4}


@dataclass(frozen=True)
class Peer:
    """One way to step: what it updates, and one whole step."""

    name: str
    tensors: list[Tensor]
    step: Callable[[], object]


def ours(backend: str, pruned: bool = False) -> str:
    """Name of our optimizer with a backend, and with a pruner."""
    return f"ivon-lora[{backend}]" + ("+prune" if pruned else "")


def make_peers(case: Case, n_steps: int, backends: Sequence[str]) -> list[Peer]:
    """Every peer that can do the case, each with tensors of its own.

    Args:
        n_steps: steps that will be done; the rank budgets fall from all ranks to about a third meanwhile.
        backends: of IVON.

    Raises:
        ModuleNotFoundError: ivon-opt or peft is missing.
    """
    peers = [_adamw(case), _ivon_opt(case), *(_ivon(case, backend) for backend in backends)]
    if case.linears:
        peers += [_adalora(case, n_steps), *(_ivon(case, backend, n_steps) for backend in backends)]
    return peers


def schedule(n_steps: int) -> tuple[int, int]:
    """(total, final) steps of a schedule without warm-up whose annealing ends a little after ``n_steps``."""
    return n_steps + n_steps // 5 + 2, 1


def make_pruner(adapters: Sequence[LoraAdapter], target: int, n_steps: int) -> RankPruner:
    """Allocates at every `MEASURED_INTERVAL`-th of ``n_steps`` steps."""
    total, final = schedule(n_steps)
    return RankPruner(adapters, target, total_steps=total, warmup=0, final=final, interval=MEASURED_INTERVAL)


def _ivon(case: Case, backend: str, prune_steps: int = 0) -> Peer:
    tensors, adapters = case.build()
    pruner = make_pruner(adapters, max(1, case.rank // 3), prune_steps) if prune_steps else None
    optimizer = IVON(tensors, backend=backend, pruner=pruner, **IVON_OPTIONS)
    return Peer(ours(backend, bool(prune_steps)), tensors, step_of_ours(optimizer))


def _ivon_opt(case: Case) -> Peer:
    tensors, _ = case.build()
    return Peer(REFERENCE, tensors, step_of_ivon_opt(tensors))


def step_of_ours(optimizer: IVON) -> Callable[[], None]:
    """A draw and an update."""

    def step() -> None:
        optimizer.train()  # draws the sample; forward and backward would be next
        optimizer.step()

    return step


def step_of_ivon_opt(params: Iterable[Any]) -> Callable[[], None]:
    """The same of ivon-opt, for tensors or groups."""
    import ivon

    optimizer = ivon.IVON(params, **IVON_OPTIONS)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            pass  # forward and backward would be here
        optimizer.step()

    return step


def _adamw(case: Case) -> Peer:
    tensors, _ = case.build()
    return Peer(BASELINE, tensors, torch.optim.AdamW(tensors, lr=1e-3, fused=True).step)


def _adalora(case: Case, n_steps: int) -> Peer:
    """AdamW, then what AdaLoraModel.update_and_allocate does while annealing: importance every step, mask when due."""
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    total, final = schedule(n_steps)
    times: dict[str, Any] = {"tinit": 0, "tfinal": final, "deltaT": MEASURED_INTERVAL, "total_step": total}
    config = AdaLoraConfig(init_r=case.rank, target_r=max(1, case.rank // 3), **times)
    model = nn.ModuleList()
    for adapter in case.build(gates=True)[1]:  # under PEFT's names, which are all its allocator looks at
        layer = nn.Module()
        for name, tensor, _ in adapter.tensors():
            parameter = nn.Parameter(tensor.detach())
            parameter.grad = tensor.grad
            setattr(layer, f"lora_{name}", nn.ParameterDict({"default": parameter}))
        model.append(layer)
    allocator = RankAllocator(model, config, "default")
    tensors: list[Tensor] = list(model.parameters())
    optimizer = torch.optim.AdamW(tensors, lr=1e-3, fused=True)
    completed = 0

    def step() -> None:
        nonlocal completed
        completed += 1
        optimizer.step()
        allocator.update_and_allocate(model, completed)

    return Peer(ADALORA, tensors, step)
