"""SoRA: sparse gates between A and B (arXiv:2311.11696)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ivon_lora.lora.adapters import LoraLayer, find_adapters
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.param_groups import integer
from ivon_lora.optim.sharding import local
from ivon_lora.variants.gates import Gates
from ivon_lora.variants.gradients import is_adaptive, step_sizes
from ivon_lora.variants.resting import Ranks, without_noise
from ivon_lora.variants.variant import Variant, at_least, choice, fraction

SCHEDULES, METRICS, INITIAL = ("constant", "linear", "log", "exp"), ("optimizer", "lr", "none"), ("normal", "ones")

#: steps between two estimates of ``strength="auto"``
INTERVAL = 10


class Sora(Variant):
    r"""SoRA (arXiv:2311.11696): ``y = W x + s B (g * (A x))`` with an l1 penalty on the gates g, by proximal steps.

    After each step ``g <- soft(g, strength eta)``, ``soft(x, t) = sign(x) max(|x| - t, 0)``, where eta is how far the
    optimizer moves g per unit of gradient: then the fixed points are those of the l1 problem. Ranks whose gate is 0 are
    dropped at the end.

    Differs from the released code, whose dead zone is twice as wide and whose threshold is not multiplied by a step
    size (``metric="none"``), so that its fixed points are not those of its objective; its second l1 term, in the loss,
    is left out. Only the abstract and the code were at hand, so `init` and the stages of `schedule` follow the code.

    Under IVON and VAdam eta is 1 / (h + delta), or its root: flat, unimportant gates shrink most. ``strength="auto"``
    is then an empirical Laplace prior of the gates: ``1 / (ess b)``, b the posterior mean of |g|.

    Args:
        model: with PEFT LoRA layers; each gets a gate per rank, fp32, which `find_adapters` lists as E.
        total_steps: optimizer steps of the run.
        strength: of the penalty, per unit of the mean loss; or "auto".
        schedule: how it grows over ``stages``, from 0 in the first to its whole: "constant" (always whole), "linear",
            "log" or "exp".
        stages: at least 2, of equal length.
        init: gates start as standard normals, or as ones.
        metric: eta: "optimizer"; "lr", the equation of the paper, whose optimizer is SGD; or "none", which is 1. No
            Adam-like step shrinks a gate by more than lr: while B is zero, v is too.
        final: share of the steps, at the end, in which gates that are zero stay so and the others are not shrunk.
        gates: False for no gates: the same on the columns of B, ``b <- b max(0, 1 - t / ||b||)``, a group penalty.
        adapter_name, seed: see `Variant`.

    Raises:
        ValueError: an argument outside its bounds, a layer that cannot have gates.
    """

    claims = frozenset({"gates"})
    saved = (*Variant.saved, "dead", "automatic")

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        strength: float | str = 1e-3,
        schedule: str = "constant",
        stages: int = 7,
        init: str = "normal",
        metric: str = "optimizer",
        final: float = 0.2,
        gates: bool = True,
        adapter_name: str = "default",
        seed: int = 0,
    ) -> None:
        super().__init__(model, adapter_name=adapter_name, seed=seed)
        self.total_steps = integer("total_steps", total_steps)
        self.strength = strength if strength == "auto" else at_least("strength", float(strength), 0.0)
        self.schedule, self.metric = choice("schedule", schedule, SCHEDULES), choice("metric", metric, METRICS)
        self.stages, self.init = integer("stages", stages, low=2), choice("init", init, INITIAL)
        self.final = round(fraction("final", final, low_is_allowed=True) * total_steps)
        self.dead: list[Tensor] = []  # per adapter, once the pattern is frozen
        self.automatic = 0.0
        self.gates = Gates(model, adapter_name, self._initial) if gates else None
        self.adapters = find_adapters(model, adapter_name)

    def _initial(self, index: int, layer: LoraLayer) -> Tensor:
        shape = (layer.A.shape[0], 1)
        return torch.ones(shape) if self.init == "ones" else self.normals(shape, index)

    def param_groups(self) -> list[dict[str, Any]]:
        """The gates in a group of their own, without decay."""
        return super().param_groups() if self.gates is None else self.gates.param_groups(self.model)

    def check(self, optimizer: Optimizer) -> None:
        """See `Variant.check`."""
        if self.strength == "auto" and not isinstance(optimizer, IVON):
            raise ValueError("strength='auto' reads the posterior of the gates; take IVON or VAdam, or give a number")
        if self.strength == "auto" and self.gates is None:
            raise ValueError("strength='auto' is for gates; give a number, or gates=True")

    def before_forward(self) -> None:
        """Gates that are zero for good have no noise."""
        if self.optimizer is not None and self.dead:
            without_noise(self.optimizer, self._dead_ranks())

    rest = before_forward

    def after_step(self) -> None:
        """The proximal step."""
        assert self.optimizer is not None
        if self.dead:
            for p, dim, dead in self._dead_ranks():
                local(p).detach().index_fill_(dim, dead.nonzero().flatten().to(p.device), 0.0)
            return
        strength = self.current_strength()
        if strength:
            for p, dim, _ in self._shrunk():
                self._shrink(p, dim, strength)
        if self.final and self.step >= self.total_steps - self.final:
            self.dead = [_is_zero(p, dim).cpu() for p, dim, _ in self._shrunk()]
            self.history.append({"step": self.step, "kept": sum(self.kept().values())})

    def current_strength(self) -> float:
        """Of the penalty, after this step."""
        if self.strength == "auto":
            if self.step % INTERVAL == 0 or not self.automatic:
                self.automatic = self._laplace_strength()
            whole = self.automatic
        else:
            whole = float(self.strength)
        stage = min(self.step * self.stages // max(self.total_steps - self.final, 1), self.stages - 1)
        last = self.stages - 1
        shares = {"constant": 1.0, "linear": stage / last, "log": math.log1p(stage) / math.log1p(last)}
        return whole * (shares[self.schedule] if self.schedule in shares else (2**stage - 1) / (2**last - 1))

    def kept(self) -> dict[str, int]:
        """Ranks of each layer that are not zero."""
        return {
            a.name: int((~_is_zero(p, dim)).sum()) for a, (p, dim, _) in zip(self.adapters, self._shrunk(), strict=True)
        }

    def fold(self) -> None:
        """See `Variant.fold`."""
        if self.gates is not None:
            self.gates.fold(self.optimizer)

    # ---------------------------------------------------------------- the step

    def _shrunk(self) -> list[tuple[Tensor, int, int]]:
        """The tensor that is shrunk of each adapter, its rank dimension and its rank."""
        return [(a.B, 1, a.rank) if a.E is None else (a.E, 0, a.rank) for a in self.adapters]

    def _dead_ranks(self) -> list[Ranks]:
        return [(p, dim, dead) for (p, dim, _), dead in zip(self._shrunk(), self.dead, strict=True)]

    def _shrink(self, p: Tensor, dim: int, strength: float) -> None:
        assert self.optimizer is not None
        group = next(g for g in self.optimizer.param_groups if any(q is p for q in g["params"]))
        size = {"lr": torch.tensor(float(group["lr"])), "none": torch.tensor(1.0)}.get(self.metric)
        size = step_sizes(self.optimizer, p) if size is None else size
        threshold = strength * size
        if self.metric == "optimizer" and is_adaptive(self.optimizer, p):
            threshold = threshold.clamp(max=float(group["lr"]))
        values = local(p).detach()
        if self.gates is not None:
            values.copy_(soft(values, threshold.to(values)))
            return
        others = [d for d in range(values.dim()) if d != dim]
        mean_size = threshold.mean(dim=others, keepdim=True) if threshold.dim() else threshold
        norm = values.float().norm(dim=others, keepdim=True)
        values.mul_((1 - mean_size / norm.clamp(min=1e-30)).clamp(min=0.0).to(values.dtype))

    def _laplace_strength(self) -> float:
        optimizer = self.optimizer
        assert isinstance(optimizer, IVON) and self.gates is not None
        posteriors = [optimizer.posterior(p) for p, _, _ in self._shrunk()]
        size = torch.cat([mean_absolute(q.mean, q.stddev).flatten() for q in posteriors]).mean()
        return 1.0 / (float(optimizer.param_groups[0]["ess"]) * max(float(size), 1e-12))


def soft(x: Tensor, threshold: Tensor) -> Tensor:
    """sign(x) max(|x| - t, 0), elementwise."""
    return x.sign() * (x.abs() - threshold).clamp(min=0.0)


def mean_absolute(mean: Tensor, std: Tensor) -> Tensor:
    """E|x| of normals: ``sigma sqrt(2/pi) exp(-a^2/2) + |m| erf(a / sqrt 2)``, ``a = |m| / sigma``."""
    a = mean.abs() / std
    return std * math.sqrt(2 / math.pi) * torch.exp(-a.square() / 2) + mean.abs() * torch.erf(a / math.sqrt(2))


def _is_zero(p: Tensor, dim: int) -> Tensor:
    values = local(p).detach()
    return (values == 0).movedim(dim, 0).flatten(1).all(1)
