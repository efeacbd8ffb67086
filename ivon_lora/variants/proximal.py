"""Proximal steps towards zero, and what they need: pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: how a strength may grow over stages
SCHEDULES = ("constant", "linear", "log", "exp")


def soft(x: Tensor, threshold: Tensor) -> Tensor:
    """sign(x) max(|x| - t, 0), elementwise."""
    return x.sign() * (x.abs() - threshold).clamp(min=0.0)


def soft_groups(x: Tensor, threshold: Tensor, dim: int) -> Tensor:
    """x max(0, 1 - t / ||x||) for each index of ``dim``, t the mean threshold there."""
    others = [d for d in range(x.dim()) if d != dim]
    norm = x.float().norm(dim=others, keepdim=True).clamp(min=1e-30)
    return x * (1 - threshold.mean(dim=others, keepdim=True) / norm).clamp(min=0.0).to(x.dtype)


def growth(schedule: str, stage: int, stages: int) -> float:
    """Share of the strength in a stage (from 0): 0 in the first, 1 in the last; always 1 if "constant"."""
    last = stages - 1
    match schedule:
        case "linear":
            return stage / last
        case "log":
            return math.log1p(stage) / math.log1p(last)
        case "exp":
            return (2.0**stage - 1) / (2.0**last - 1)
    return 1.0


def mean_absolute(mean: Tensor, std: Tensor) -> Tensor:
    """E|x| of normals: ``sigma sqrt(2/pi) exp(-a^2/2) + |m| erf(a / sqrt 2)``, ``a = |m| / sigma``."""
    a = mean.abs() / std
    return std * math.sqrt(2 / math.pi) * torch.exp(-a.square() / 2) + mean.abs() * torch.erf(a / math.sqrt(2))
