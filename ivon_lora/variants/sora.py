"""SoRA: sparse gates between A and B (arXiv:2311.11696)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ivon_lora.lora.adapters import find_adapters
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.param_groups import integer
from ivon_lora.optim.sharding import is_sharded, local, whole
from ivon_lora.variants.checks import at_least, choice, flag, fraction
from ivon_lora.variants.gates import Gates
from ivon_lora.variants.gradients import group_of, step_sizes
from ivon_lora.variants.proximal import SCHEDULES, growth, mean_absolute, soft, soft_groups
from ivon_lora.variants.resting import Ranks, mean_of
from ivon_lora.variants.variant import Variant

METRICS, INITIAL = ("optimizer", "lr", "none"), ("normal", "ones")

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
        metric: eta: "optimizer", but no gate falls by more than lr in a step (of IVON times its ``clip_radius``),
            because Adam's v is zero while B is; "lr", the equation of the paper, whose optimizer is SGD; or "none",
            which is 1.
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
        self.strength = strength if strength == "auto" else at_least("strength", strength, 0.0)
        self.schedule, self.metric = choice("schedule", schedule, SCHEDULES), choice("metric", metric, METRICS)
        self.stages, self.init = integer("stages", stages, low=2), choice("init", init, INITIAL)
        self.final = round(fraction("final", final, low_is_allowed=True) * total_steps)
        self.dead: list[Tensor] = []  # per adapter, once the pattern is frozen
        self.automatic = 0.0
        if flag("gates", gates):
            shapes = [(adapter.rank, 1) for adapter in self.adapters]
            values = [torch.ones(s) if init == "ones" else self.normals(s, i) for i, s in enumerate(shapes)]
            self.gates = Gates(model, adapter_name, values)
            self.adapters = find_adapters(model, adapter_name)

    def check(self, optimizer: Optimizer) -> None:
        """See `Variant.check`."""
        if self.strength == "auto" and not isinstance(optimizer, IVON):
            raise ValueError("strength='auto' reads the posterior of the gates; take IVON or VAdam, or give a number")
        if self.gates is None and (self.strength == "auto" or any(is_sharded(p) for p, _ in self._shrunk())):
            raise ValueError("without gates strength must be a number, and B whole (no FSDP2); take gates=True")

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
        if self.final and self.step >= self.total_steps - self.final:
            self.dead = [_is_zero(p, dim).cpu() for p, dim in self._shrunk()]
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
        return whole * growth(self.schedule, stage, self.stages)

    def kept(self) -> dict[str, int]:
        """Ranks of each layer that are not zero."""
        zero = [_is_zero(p, dim) for p, dim in self._shrunk()]
        return {a.name: int((~dead).sum()) for a, dead in zip(self.adapters, zero, strict=True)}

    # ---------------------------------------------------------------- the step

    def _shrunk(self) -> list[tuple[Tensor, int]]:
        """The tensor that is shrunk of each adapter, and its rank dimension."""
        return [(a.B, 1) if a.E is None else (a.E, 0) for a in self.adapters]

    def at_rest(self) -> list[Ranks]:
        """See `Variant.at_rest`: gates that are zero for good."""
        return [(p, dim, dead) for (p, dim), dead in zip(self._shrunk(), self.dead, strict=False)]  # none until then

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


def _is_zero(p: Tensor, dim: int) -> Tensor:
    return (whole(p.detach()) == 0).movedim(dim, 0).flatten(1).all(1)
