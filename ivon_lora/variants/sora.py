"""SoRA: sparse gates between A and B (arXiv:2311.11696)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ivon_lora.lora.adapters import find_adapters
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import is_sharded, local, whole
from ivon_lora.variants.gates import Gates
from ivon_lora.variants.gradients import group_of, step_sizes
from ivon_lora.variants.options import choice, integer, number, state
from ivon_lora.variants.resting import Ranks, mean_of
from ivon_lora.variants.variant import Variant

#: steps between two estimates of ``strength="auto"``
INTERVAL = 10

#: how a strength may grow over stages: its share in a stage, from 0, of which the last is number ``last``
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda stage, last: 1.0,
    "linear": lambda stage, last: stage / last,
    "log": lambda stage, last: math.log1p(stage) / math.log1p(last),
    "exp": lambda stage, last: (2.0**stage - 1) / (2.0**last - 1),
}


@dataclass(eq=False, repr=False)
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
        model, total_steps, adapter_name, seed: see `Variant`; `find_adapters` lists the gates, fp32, as E.
        strength: of the penalty, per unit of the mean loss; or "auto".
        schedule, stages: how it grows over at least 2 stages of equal length, from 0 in the first to its whole:
            "constant" (always whole), "linear", "log" or "exp".
        init: gates start as standard normals, or as ones.
        metric: eta: "optimizer", but no gate falls by more than lr in a step (of IVON times its ``clip_radius``),
            because Adam's v is zero while B is; "lr", the equation of the paper, whose optimizer is SGD; or "none",
            which is 1.
        final: share of the steps, at the end, in which gates that are zero stay so and the others are not shrunk.
        on: "gates"; or, without any, the "columns" of B, ``b <- b max(0, 1 - t / ||b||)``, a group penalty.
    """

    claims = frozenset({"gates"})

    total_steps: int = integer()
    _: KW_ONLY
    strength: float | str = number(1e-3, needs={"auto": IVON})
    schedule: str = choice(*SCHEDULES)
    stages: int = integer(7, low=2)
    init: str = choice("normal", "ones")
    metric: str = choice("optimizer", "lr", "none")
    final: float = number(0.2, high=1.0)
    on: str = choice("gates", "columns")
    dead: list[Tensor] = state(list)  # per adapter, once the pattern is frozen
    automatic: float = state(float)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._final_steps = round(self.final * self.total_steps)
        if self.on == "gates":
            shapes = [(adapter.rank, 1) for adapter in self.adapters]
            values = [torch.ones(s) if self.init == "ones" else self.normals(s, i) for i, s in enumerate(shapes)]
            self.gates = Gates(self.model, self.adapter_name, values)
            self.adapters = find_adapters(self.model, self.adapter_name)

    def prepare(self, optimizer: Optimizer) -> None:
        if self.gates is None and (self.strength == "auto" or any(is_sharded(p) for p, _ in self._shrunk())):
            raise ValueError("on='columns' takes a number as strength, and whole B (no FSDP2); take on='gates'")

    def before_step(self) -> None:
        """Remember where the optimizer's step starts."""
        self._before = [mean_of(self.optimizer, p).clone() for p, _ in self._shrunk()]

    def after_step(self) -> None:
        """The proximal step."""
        if self.dead:
            return
        strength = self.current_strength()
        if strength:
            for (p, dim), before in zip(self._shrunk(), self._before, strict=True):
                self._shrink(p, dim, strength, before)
        if self._final_steps and self.step >= self.total_steps - self._final_steps:
            self.dead = self._zero()
            self.history.append({"step": self.step, "kept": sum(self.kept().values())})

    def current_strength(self) -> float:
        """Of the penalty, after this step."""
        if self.strength == "auto" and (self.step % INTERVAL == 0 or not self.automatic):
            self.automatic = self._laplace_strength()
        strength = self.automatic if self.strength == "auto" else float(self.strength)
        stage = min(self.step * self.stages // max(self.total_steps - self._final_steps, 1), self.stages - 1)
        return strength * SCHEDULES[self.schedule](stage, self.stages - 1)

    def kept(self) -> dict[str, int]:
        """Ranks of each layer that are not zero."""
        return {a.name: int((~zero).sum()) for a, zero in zip(self.adapters, self._zero(), strict=True)}

    def at_rest(self) -> list[Ranks]:
        """Gates that are zero for good."""
        return [(p, dim, dead) for (p, dim), dead in zip(self._shrunk(), self.dead, strict=False)]  # none until then

    def _shrunk(self) -> list[tuple[Tensor, int]]:
        """The tensor that is shrunk of each adapter, and its rank dimension."""
        return [(a.B, 1) if a.E is None else (a.E, 0) for a in self.adapters]

    def _zero(self) -> list[Tensor]:
        """Which ranks are zero, (r,) for each adapter."""
        return [(whole(p.detach()) == 0).movedim(dim, 0).flatten(1).all(1).cpu() for p, dim in self._shrunk()]

    def _shrink(self, p: Tensor, dim: int, strength: float, before: Tensor) -> None:
        values = local(p).detach()
        group = group_of(self.optimizer, p)
        lr = float(group["lr"]) * min(1.0, float(group.get("clip_radius", 1.0)))
        if self.metric == "optimizer":
            # fixed points, where the step is as large as the threshold, stay where they are
            threshold = (strength * step_sizes(self.optimizer, p)).minimum((values - before).abs() + lr)
        else:
            threshold = torch.full_like(values, strength * (lr if self.metric == "lr" else 1.0))
        values.copy_(soft(values, threshold) if self.gates is not None else soft_groups(values, threshold, dim))

    def _laplace_strength(self) -> float:
        posteriors = [self.optimizer.posterior(p) for p, _ in self._shrunk()]
        size = torch.cat([mean_absolute(whole(q.mean), whole(q.stddev)).flatten() for q in posteriors]).mean()
        return 1.0 / (float(self.optimizer.param_groups[0]["ess"]) * max(float(size), 1e-12))


def soft(x: Tensor, threshold: Tensor) -> Tensor:
    """sign(x) max(|x| - t, 0), elementwise."""
    return x.sign() * (x.abs() - threshold).clamp(min=0.0)


def soft_groups(x: Tensor, threshold: Tensor, dim: int) -> Tensor:
    """x max(0, 1 - t / ||x||) for each index of ``dim``, t the mean threshold there."""
    others = [d for d in range(x.dim()) if d != dim]
    norm = x.float().norm(dim=others, keepdim=True).clamp(min=1e-30)
    return x * (1 - threshold.mean(dim=others, keepdim=True) / norm).clamp(min=0.0).to(x.dtype)


def mean_absolute(mean: Tensor, std: Tensor) -> Tensor:
    """E|x| of normals: ``sigma sqrt(2/pi) exp(-a^2/2) + |m| erf(a / sqrt 2)``, ``a = |m| / sigma``."""
    a = mean.abs() / std
    return std * math.sqrt(2 / math.pi) * torch.exp(-a.square() / 2) + mean.abs() * torch.erf(a / math.sqrt(2))
