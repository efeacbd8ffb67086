"""Runs that version 0.1.0 (commit 273d074) has begun, saved, and gone on with: state_0_1_0.pt.

Where "vadam" ends is what commit 0e6f883 made of it under the prior of the group: in 0.1.0 the data narrowed it.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora import IVON, LoraAdapter, RankPruner

FILE = Path(__file__).with_name("state_0_1_0.pt")
#: A and B of LoRA; a head of 16 bits; a bias
SHAPES = ((3, 11), (7, 3), (4, 5), (6,))
#: saved after 13 steps, which is before the last allocation for "vadam" and after it for "price"; "gradsq" has no ranks
FINAL = {"vadam": 10, "price": 20}
KINDS = ("vadam", "price", "gradsq")
SAVED, END = 13, 22


def fractions(shape: tuple[int, ...], salt: int) -> Tensor:
    """Multiples of 2^-10 in [-1/16, 1/16), in no order."""
    words = torch.arange(math.prod(shape)) * 2654435761 + salt * 40503
    return (words // 512 % 128 / 1024 - 0.0625).view(shape)


def make(kind: str, backend: str = "eager", seed: int = 2**33 + 7) -> tuple[list[nn.Parameter], IVON]:
    """Parameters and optimizer before the first step."""
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float32)
    params = [nn.Parameter(fractions(SHAPES[i], i).to(dtype)) for i, dtype in enumerate(dtypes)]
    groups: list[dict[str, Any]] = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]
    pruner = None
    if kind in FINAL:
        adapters = [LoraAdapter("layer", params[0], params[1])]
        pruner = RankPruner(adapters, 2, total_steps=30, warmup=2, final=FINAL[kind], interval=3)
    if kind == "vadam":
        return params, IVON.from_adamw(groups, 0.01, num_examples=90, seed=seed, backend=backend, pruner=pruner)
    options: dict[str, Any] = {"hess_init": 0.7, "beta2": 0.9, "weight_decay": 0.01, "hess_approx": kind}
    return params, IVON(groups, 0.05, 200.0, **options, seed=seed, backend=backend, pruner=pruner)


def advance(params: list[nn.Parameter], optimizer: IVON, steps: Iterable[int]) -> None:
    """Train on eight examples in a step."""
    for step in steps:
        optimizer.train()
        for i, p in enumerate(params):
            grad = p.detach().float() * (fractions(p.shape, 10 + i) * 8 + 1.25)
            p.grad = (grad + fractions(p.shape, 20 + i) * (1.0, -0.5, 0.25, -2.0)[step % 4]).to(p.dtype)
        optimizer.count_examples(8)
        optimizer.step()


def snapshot(params: list[nn.Parameter], optimizer: IVON) -> list[dict[str, Tensor]]:
    """Everything that must go on as it was, of every parameter."""
    names = ("momentum", "hess", "mean", "rank_mask")
    states = [{"param": p.detach(), **optimizer.state[p]} for p in params]
    return [{name: state[name].clone() for name in ("param", *names) if name in state} for state in states]
