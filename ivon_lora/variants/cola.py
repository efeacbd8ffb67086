"""COLA, Chain of LoRA: several low-rank updates, one after the other (arXiv:2401.04151)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.param_groups import WARM_UP, integer
from ivon_lora.optim.sharding import is_sharded
from ivon_lora.variants.chain import Chain
from ivon_lora.variants.checks import choice
from ivon_lora.variants.resting import Ranks


class Cola(Chain):
    r"""COLA (arXiv:2401.04151): train (A, B), add s B A to the weights for good, start again from a new pair.

    ``W <- W + s B_t A_t`` after each of ``links`` equal parts of the run, with A drawn anew, B = 0, and the optimizer's
    state of both forgotten: the Frank-Wolfe method, whose steps here have rank r. Their sum has rank links x r.

    The paper was at hand in a condensed form, without code. Its links are merged into the base weights
    (``store="base"``), where 16-bit weights round most of a link away; by default they stay beside the base, which is
    exact. Whether its learning-rate schedule starts again with each link it does not say: here the scheduler goes on,
    and ``warmup`` softens the first steps of a link, which a new Adam takes at full size.

    Under IVON and VAdam a link is the posterior mean. A new link has no curvature, so its first updates have no noise
    (VAdam) or that of ``hess_init``; ``carry="curvature"`` gives its B at once the curvature that the old pair has
    learned, see `carried`. A learns its own, which goes with B squared.

    Args:
        model: with PEFT LoRA layers.
        total_steps: optimizer steps of the run.
        links: at least 1; with 1 it is LoRA.
        ranks: of each link, at most the adapters' rank, e.g. [8, 4, 2]; the other ranks rest. None: all.
        warmup: steps of each link but the first over which the learning rate grows to the scheduler's.
        store: "adapter" or "base", see `links`.
        carry: "nothing" or "curvature".
        adapter_name, seed: see `Variant`.

    Raises:
        ValueError: an argument outside its bounds, a layer that takes no links.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        links: int = 3,
        ranks: Sequence[int] | None = None,
        warmup: int = 0,
        store: str = "adapter",
        carry: str = "nothing",
        adapter_name: str = "default",
        seed: int = 0,
    ) -> None:
        super().__init__(model, store=store, warmup=warmup, adapter_name=adapter_name, seed=seed)
        self.total_steps, self.length = integer("total_steps", total_steps), integer("links", links)
        if self.length > self.total_steps:
            raise ValueError(
                f"links must be at most total_steps={total_steps}, got {links}: a link takes a step or more"
            )
        self.carry = choice("carry", carry, ("nothing", "curvature"))
        rank = min(adapter.rank for adapter in self.adapters)
        fits = isinstance(ranks, Sequence) and all(isinstance(r, int) and 1 <= r <= rank for r in ranks)
        if ranks is not None and not (fits and len(ranks) == links):
            raise ValueError(f"ranks must be {links} numbers from 1 to {rank}, one for each link, got {ranks!r}")
        self.ranks = ranks

    def check(self, optimizer: Optimizer) -> None:
        """See `Variant.check`."""
        plain = isinstance(optimizer, IVON) and not any(is_sharded(a.A) or a.A.dim() > 2 for a in self.adapters)
        if self.carry == "curvature" and not plain:
            raise ValueError("carry='curvature' takes IVON or VAdam, and whole linear layers; take carry='nothing'")

    @property
    def finished(self) -> int:
        """Links that are finished."""
        return sum(self.step >= knot for knot in self.knots)

    @property
    def knots(self) -> list[int]:
        """Steps after which a new link starts."""
        return [self.total_steps * k // self.length for k in range(1, self.length)]

    def age(self) -> int:
        """See `Chain.age`."""
        return self.step - max((knot for knot in self.knots if knot <= self.step), default=self.step - self.warmup)

    def after_step(self) -> None:
        """Finish the link if its part of the run is over."""
        super().after_step()
        if self.step in self.knots:
            self.finish()

    def finish(self) -> None:
        """Make the live pairs links, and start new ones."""
        lost = 0.0
        for index, links in enumerate(self.links):
            a, b = links.live()
            hess = [self.optimizer.state.get(p, {}).get("hess") for p in (a, b)]
            old = a.detach().clone()
            lost = max(lost, links.finish())
            fresh = self.restart(a, b, index)
            if self.carry == "curvature" and hess[0] is not None and hess[1] is not None:
                parameters = self.optimizer.parameters
                state = parameters.state_of(b, parameters.place(b)[1])
                state["hess"].copy_(carried(hess[0], hess[1], old, fresh))
                state["step"].fill_(WARM_UP)
        self.history.append({"step": self.step, "links": self.finished, "lost": lost})

    def at_rest(self) -> list[Ranks]:
        """See `Variant.at_rest`: those beyond the link's."""
        if self.ranks is None:
            return []
        live = self.ranks[self.finished]
        return [
            (p, dim, torch.arange(adapter.rank) >= live) for adapter in self.adapters for _, p, dim in adapter.tensors()
        ]


def carried(hess_a: Tensor, hess_b: Tensor, a: Tensor, fresh: Tensor) -> Tensor:
    r"""Curvature of a new B (m, r) beside a new A, from what the old pair has learned.

    If the entries G_ij of the weight's gradient have variances gamma_i omega_j, the curvatures are
    ``h(A)_kj = s^2 omega_j sum_i gamma_i B_ik^2`` and ``h(B)_ik = s^2 gamma_i sum_j omega_j A_kj^2``. So omega is
    ``sum_k h(A)_kj`` but for a factor, gamma follows from h(B), and both give h(B) for any other A; s cancels.

    Args:
        hess_a, a, fresh: (r, n), curvature of the old A, the old A and the new one.
        hess_b: (m, r), curvature of the old B.
    """
    omega = hess_a.sum(0)
    omega = omega / omega.mean() if omega.any() else torch.ones_like(omega)
    gamma = (hess_b / (a.to(omega).square() @ omega).clamp(min=1e-30)).mean(1)
    return gamma[:, None] * (fresh.to(omega).square() @ omega)
