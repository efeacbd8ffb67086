"""How each peer does one whole optimizer step: everything between `backward()` and the next forward pass.

A new peer is one more function and one more line in `make_peers`. Gradients lie in ``p.grad`` before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, build
from ivon_lora import IVON, RankPruner

#: steps between two allocations that the results stand for
INTERVAL = 10
#: steps between two allocations while measuring: every other step, so that both kinds are seen equally often
MEASURED_INTERVAL = 2
BASELINE = "adamw[fused]"
REFERENCE = "ivon-opt"

#: of every IVON that is measured, ours and the peer
IVON_OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 1e4, "hess_init": 0.01, "clip_radius": 1e-3, "weight_decay": 1e-4}


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


def make_peers(
    case: Case, n_steps: int, backends: Sequence[str], wanted: Callable[[str], bool] = lambda name: True
) -> list[Peer]:
    """Every peer that can do the case, each with tensors of its own.

    Args:
        n_steps: steps that will be done; the rank budgets fall from all ranks to about the target meanwhile.
        backends: of IVON.
        wanted: whether a peer of this name is; the others are not even made.

    Raises:
        ModuleNotFoundError: ivon-opt or peft is missing.
    """
    makers: dict[str, Callable[[str, Case], Peer]] = {}
    for backend in backends:
        makers[f"ivon-lora[{backend}]"] = partial(_ivon, backend=backend)
        if case.linears:
            makers[f"ivon-lora[{backend}]+prune"] = partial(_ivon_pruned, backend=backend, n_steps=n_steps)
    makers[REFERENCE] = _ivon_opt
    makers[BASELINE] = partial(_adamw, fused=True)
    makers["adamw[foreach]"] = partial(_adamw, foreach=True)
    makers["adamw[for-loop]"] = partial(_adamw, foreach=False)
    if case.linears:
        makers["adalora+adamw[fused]"] = partial(_adalora, n_steps=n_steps)
    return [make(name, case) for name, make in makers.items() if wanted(name)]


def annealing_steps(n_steps: int) -> tuple[int, int]:
    """(total, final) steps of a schedule without warm-up whose annealing ends a little after ``n_steps``."""
    annealing = n_steps + n_steps // 5 + 1
    return annealing + 1, 1


def _ivon(name: str, case: Case, backend: str) -> Peer:
    trainable = build(case)
    optimizer = IVON(trainable.tensors, backend=backend, **IVON_OPTIONS)

    def step() -> None:
        optimizer.train()
        optimizer.step()

    return Peer(name, trainable.tensors, step)


def _ivon_pruned(name: str, case: Case, backend: str, n_steps: int) -> Peer:
    trainable = build(case)
    total, final = annealing_steps(n_steps)
    pruner = RankPruner(
        trainable.adapters, case.target_rank, total_steps=total, warmup=0, final=final, interval=MEASURED_INTERVAL
    )
    optimizer = IVON(trainable.tensors, backend=backend, pruner=pruner, **IVON_OPTIONS)

    def step() -> None:
        optimizer.train()
        optimizer.step()

    return Peer(name, trainable.tensors, step, lambda: pruner.is_due(optimizer.completed_steps + 1))


def _ivon_opt(name: str, case: Case) -> Peer:
    import ivon

    trainable = build(case)
    optimizer = ivon.IVON(trainable.tensors, **IVON_OPTIONS)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            pass  # forward and backward would be here
        optimizer.step()

    return Peer(name, trainable.tensors, step)


def _adamw(name: str, case: Case, *, fused: bool = False, foreach: bool = False) -> Peer:
    trainable = build(case)
    optimizer = torch.optim.AdamW(trainable.tensors, lr=1e-3, fused=fused, foreach=foreach)

    def step() -> None:
        optimizer.step()

    return Peer(name, trainable.tensors, step)


def _adalora(name: str, case: Case, n_steps: int) -> Peer:
    """AdamW, then what AdaLoraModel.update_and_allocate does while annealing: importance every step, mask when due."""
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    trainable, adapter_name = build(case, triplets=True), "default"
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
