"""How each peer does one whole optimizer step: everything between `backward()` and the next forward pass.

A new peer is one more function and one more line in `make_peers`. Gradients lie in ``p.grad`` before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, Trainable, build
from ivon_lora import IVON, RankPruner

#: steps between two allocations that the results stand for
INTERVAL = 10
#: steps between two allocations while measuring: every other step, so that both kinds are seen equally often
MEASURED_INTERVAL = 2
BASELINE = "adamw[fused]"
REFERENCE = "ivon-opt"

_IVON_OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 1e4, "hess_init": 0.01, "clip_radius": 1e-3, "weight_decay": 1e-4}


@dataclass(frozen=True)
class Peer:
    """One way to step.

    Args:
        name: key in the results.
        tensors: what it updates.
        step: one whole step.
        allocates_next: whether the next step also allocates ranks; None for a peer that never does.
    """

    name: str
    tensors: list[Tensor]
    step: Callable[[], None]
    allocates_next: Callable[[], bool] | None = None


def make_peers(case: Case, n_steps: int, backends: Sequence[str]) -> list[Peer]:
    """Every peer that can do the case, each with tensors of its own.

    Args:
        n_steps: steps that will be done; the rank budgets fall from all ranks to about the target meanwhile.
        backends: of IVON.

    Raises:
        ModuleNotFoundError: ivon-opt or peft is missing.
    """
    peers = []
    for backend in backends:
        peers.append(_ivon(f"ivon-lora[{backend}]", build(case), backend))
        if case.linears:
            peers.append(_ivon_pruned(f"ivon-lora[{backend}]+prune", build(case), backend, case.target_rank, n_steps))
    peers.append(_ivon_opt(REFERENCE, build(case)))
    peers.append(_adamw(BASELINE, build(case), fused=True))
    peers.append(_adamw("adamw[foreach]", build(case), foreach=True))
    peers.append(_adamw("adamw[for-loop]", build(case), foreach=False))
    if case.linears:
        peers.append(_adalora("adalora+adamw[fused]", build(case, triplets=True), case, n_steps))
    return peers


def annealing_steps(n_steps: int) -> tuple[int, int]:
    """(total, final) steps of a schedule without warm-up whose annealing ends a little after ``n_steps``."""
    annealing = n_steps + n_steps // 5 + 1
    return annealing + 1, 1


def _ivon(name: str, trainable: Trainable, backend: str) -> Peer:
    optimizer = IVON(trainable.tensors, backend=backend, **_IVON_OPTIONS)

    def step() -> None:
        optimizer.train()
        optimizer.step()

    return Peer(name, trainable.tensors, step)


def _ivon_pruned(name: str, trainable: Trainable, backend: str, target_rank: int, n_steps: int) -> Peer:
    total, final = annealing_steps(n_steps)
    pruner = RankPruner(
        trainable.adapters, target_rank, total_steps=total, warmup=0, final=final, interval=MEASURED_INTERVAL
    )
    optimizer = IVON(trainable.tensors, backend=backend, pruner=pruner, **_IVON_OPTIONS)

    def step() -> None:
        optimizer.train()
        optimizer.step()

    return Peer(name, trainable.tensors, step, lambda: pruner.is_due(optimizer.completed_steps + 1))


def _ivon_opt(name: str, trainable: Trainable) -> Peer:
    import ivon

    optimizer = ivon.IVON(trainable.tensors, **_IVON_OPTIONS)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            pass  # forward and backward would be here
        optimizer.step()

    return Peer(name, trainable.tensors, step)


def _adamw(name: str, trainable: Trainable, *, fused: bool = False, foreach: bool = False) -> Peer:
    optimizer = torch.optim.AdamW(trainable.tensors, lr=1e-3, fused=fused, foreach=foreach)

    def step() -> None:
        optimizer.step()

    return Peer(name, trainable.tensors, step)


def _adalora(name: str, trainable: Trainable, case: Case, n_steps: int) -> Peer:
    """AdamW, then what AdaLoraModel.update_and_allocate does while annealing: importance every step, mask when due."""
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    adapter_name = "default"
    total, final = annealing_steps(n_steps)
    config = AdaLoraConfig(
        init_r=case.rank, target_r=case.target_rank, tinit=0, tfinal=final, deltaT=MEASURED_INTERVAL, total_step=total
    )
    model = nn.ModuleList(_AdaLoraTensors(a.A, a.B, a.E, adapter_name) for a in trainable.adapters)
    allocator = RankAllocator(model, config, adapter_name)
    tensors: list[Tensor] = list(model.parameters())
    optimizer = torch.optim.AdamW(tensors, lr=1e-3, fused=True)
    completed = 0

    def step() -> None:
        nonlocal completed
        completed += 1
        optimizer.step()
        allocator.update_and_allocate(model, completed)

    return Peer(name, tensors, step, lambda: bool(allocator.budget_schedule(completed + 1)[1]))


class _AdaLoraTensors(nn.Module):
    """The tensors of one AdaLoRA layer under PEFT's names, which are all its allocator looks at."""

    def __init__(self, a: Tensor, b: Tensor, e: Tensor | None, adapter_name: str) -> None:
        super().__init__()
        assert e is not None
        self.lora_A = nn.ParameterDict({adapter_name: _parameter(a)})
        self.lora_B = nn.ParameterDict({adapter_name: _parameter(b)})
        self.lora_E = nn.ParameterDict({adapter_name: _parameter(e)})


def _parameter(tensor: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(tensor.detach())
    parameter.grad = tensor.grad
    return parameter
