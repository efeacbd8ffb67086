"""COLA, Chain of LoRA: several low-rank updates, one after the other (arXiv:2401.04151)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.param_groups import WARM_UP
from ivon_lora.optim.sharding import is_sharded
from ivon_lora.variants.chain import Chain
from ivon_lora.variants.options import choice, integer, state
from ivon_lora.variants.resting import Ranks


@dataclass(eq=False, repr=False)
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
        model, total_steps, adapter_name, seed: see `Variant`; warmup, store: see `Chain`.
        links: at least 1; with 1 it is LoRA.
        ranks: of each link, at most the adapters' rank, e.g. [8, 4, 2]; the other ranks rest. None: all.
        carry: "nothing" or "curvature".
    """

    total_steps: int = integer()
    _: KW_ONLY
    links: int = integer(3)
    ranks: Sequence[int] | None = None
    carry: str = choice("nothing", needs={"curvature": IVON})
    finished: int = state(int)  # links

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.links > self.total_steps:
            bound = f"total_steps={self.total_steps}"
            raise ValueError(f"links must be at most {bound}, got {self.links}: a link takes a step or more")
        rank = min(adapter.rank for adapter in self.adapters)
        fits = isinstance(self.ranks, Sequence) and all(isinstance(r, int) and 1 <= r <= rank for r in self.ranks)
        if self.ranks is not None and not (fits and len(self.ranks) == self.links):
            numbers = f"{self.links} numbers from 1 to {rank}"
            raise ValueError(f"ranks must be {numbers}, one for each link, got {self.ranks!r}")

    def prepare(self, optimizer: Optimizer) -> None:
        if self.carry == "curvature" and any(is_sharded(a.A) or a.A.dim() > 2 for a in self.adapters):
            raise ValueError("carry='curvature' takes whole linear layers; take carry='nothing'")

    @property
    def knots(self) -> list[int]:
        """Steps after which a new link starts."""
        return [self.total_steps * k // self.links for k in range(1, self.links)]

    def after_step(self) -> None:
        """Finish the link if its part of the run is over."""
        super().after_step()
        if self.step in self.knots:
            self.finish()

    def finish(self) -> None:
        """Make the live pairs links, and start new ones."""
        self.finished += 1
        self.history.append({"step": self.step, "links": self.finished, "lost": self.link(self.by_layer)})

    def restart(self, a: Tensor, b: Tensor, index: int) -> Tensor:
        """See `Variant.restart`; B may have a curvature at once."""
        hess_a, hess_b = (self.optimizer.state.get(p, {}).get("hess") for p in (a, b))
        old = a.detach().clone()
        fresh = super().restart(a, b, index)
        if self.carry == "curvature" and hess_a is not None and hess_b is not None:
            parameters = self.optimizer.parameters
            of_b = parameters.state_of(b, parameters.place(b)[1])
            of_b["hess"].copy_(carried(hess_a, hess_b, old, fresh))
            of_b["step"].fill_(WARM_UP)
        return fresh

    def at_rest(self) -> list[Ranks]:
        """Ranks beyond the link's."""
        if self.ranks is None:
            return []
        live = self.ranks[min(self.finished, self.links - 1)]
        return [(p, dim, torch.arange(a.rank) >= live) for a in self.adapters for _, p, dim in a.tensors()]


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
