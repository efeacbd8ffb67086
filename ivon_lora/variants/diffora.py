"""DiffoRA: a differentiable search for the layers to adapt (arXiv:2502.08905)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import local
from ivon_lora.optim.vadam import VAdam
from ivon_lora.variants.gates import Gates
from ivon_lora.variants.gradients import gain_of, rank_snr
from ivon_lora.variants.layers import best
from ivon_lora.variants.options import choice, fraction, integer, number, state, steps
from ivon_lora.variants.resting import Ranks, all_ranks
from ivon_lora.variants.variant import Variant

OPEN = 40.0  # whose sigmoid is 1 in fp32


@dataclass(eq=False, repr=False)
class Diffora(Variant):
    r"""In the spirit of DiffoRA (arXiv:2502.08905): ``W = W0 + Gamma B A``, one gate Gamma in (0, 1) for each layer.

    Search: A and B train on training batches, and Gamma = sigmoid(a), a = 0 at the start, on held-out ones::

        with variant.architecture():                       # once for each step; without it, on the training batches
            loss(model, held_out_batch).backward()

    Then the ``round(share L)`` layers with the largest Gamma (equal ones by their order) train from scratch, with
    Gamma = 1; the others rest, and are zero. Or build a new model with `lora_arguments`.

    The paper's text was not available, and there is no code. The abstract names a continuous relaxation, two levels, a
    selection ratio and weight sharing; the form of the first two is that of its nearest relative with code, AutoLoRA
    (arXiv:2403.09113), with steps of first order, and the last is left out. ``score`` is the switch.

    Under VAdam (SNR also under IVON) no gates and no second stream of batches are needed: "snr" is the mean SNR of a
    layer's elements, "gain" the fall of the loss that the state of B predicts (see `gain`; for a short search).

    Args:
        model, total_steps, adapter_name, seed: see `Variant`.
        share: of the layers, in (0, 1], that are kept.
        search: share of ``total_steps``, or steps, of the search.
        score: "gate", "snr" or "gain".
        gate_lr: of Adam on the gates.
    """

    claims = frozenset({"gates", "masks"})

    total_steps: int = integer()
    _: KW_ONLY
    share: float = fraction(0.5)
    search: int | float = steps(0.2, low=1)
    score: str = choice("gate", needs={"snr": IVON, "gain": VAdam})
    gate_lr: float = number(1e-3)
    chosen: list[str] = state(list)
    two_levels: bool = state(bool)
    adam: Optimizer | None = state(lambda: None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search >= self.total_steps:
            bound = f"total_steps={self.total_steps}"
            raise ValueError(f"search must be less than {bound}, got {self.search} steps: what it chooses trains")
        if self.score == "gate":
            values = [torch.zeros(1) for _ in self.adapters]
            self.gates = Gates(self.model, self.adapter_name, values, torch.sigmoid)

    def param_groups(self) -> list[dict[str, Any]]:
        """What trains in the model, but for the gates, which have an optimizer of their own."""
        return super().param_groups()[:1]

    def prepare(self, optimizer: Optimizer) -> None:
        if self.gates is not None:
            self.adam = torch.optim.Adam(self.gates, lr=self.gate_lr)

    @contextmanager
    def architecture(self) -> Iterator[None]:
        """Inside, gradients are for the gates alone, which are stepped at the end; all others stay as they were.

        The batch's loss is a mean over examples that no training batch has; replicas each take a part of them.
        """
        if self.adam is None:
            raise ValueError(f"score={self.score!r} has no gates to train; leave the block out, or take score='gate'")
        self.two_levels = True
        before = [(p, None if p.grad is None else p.grad.clone()) for p in self.model.parameters() if p.requires_grad]
        examples = copy.deepcopy(self.optimizer.examples) if isinstance(self.optimizer, IVON) else None
        self.adam.zero_grad()
        try:
            yield
            if not self.chosen:
                self.adam.step()
        finally:
            for p, gradient in before:
                p.grad = gradient
            if examples is not None:
                self.optimizer.examples = examples

    def scores(self) -> dict[str, float]:
        """Of each layer, as things are now."""
        if self.gates is not None:
            return {a.name: float(self.gates.factor(i)) for i, a in enumerate(self.adapters)}
        if self.score == "gain":
            return {a.name: gain_of(self.optimizer, a.B) for a in self.adapters}
        return {a.name: float(rank_snr(self.optimizer, a).mean()) for a in self.adapters}

    def lora_arguments(self) -> dict[str, Any]:
        """target_modules, r and lora_alpha of ``peft.LoraConfig`` for a new model, by the scores as they are now."""
        names = [name.removeprefix("base_model.model.") for name in best(self.scores(), self.share)]
        rank, scaling = self.adapters[0].rank, self.adapters[0].scaling
        return {"target_modules": names, "r": rank, "lora_alpha": scaling * rank}

    def before_step(self) -> None:
        """Step the gates, where they have no batches of their own."""
        if self.adam is not None:
            if not self.chosen and not self.two_levels:
                self.adam.step()
            self.adam.zero_grad()

    def after_step(self) -> None:
        """At the end of the search, choose, and start from scratch."""
        if self.step != self.search:
            return
        scores = self.scores()
        self.chosen = best(scores, self.share)
        self.history.append({"step": self.step, "layers": self.chosen, "scores": scores})
        for index, adapter in enumerate(self.adapters):
            self.restart(adapter.A, adapter.B, index)
        for gate in self.gates or ():
            local(gate.detach()).fill_(OPEN)

    def at_rest(self) -> list[Ranks]:
        """Layers that were left out."""
        return all_ranks(a for a in self.adapters if self.chosen and a.name not in self.chosen)
