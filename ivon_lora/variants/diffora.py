"""DiffoRA: a differentiable search for the layers to adapt (arXiv:2502.08905)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.param_groups import integer
from ivon_lora.optim.sharding import local
from ivon_lora.optim.vadam import VAdam
from ivon_lora.variants.checks import at_least, choice, fraction, steps
from ivon_lora.variants.gates import Gates
from ivon_lora.variants.layer_choice import LayerChoice, choose_layers
from ivon_lora.variants.resting import Ranks
from ivon_lora.variants.scores import gain_of, rank_snr
from ivon_lora.variants.variant import Variant

SCORES, OPEN = ("gate", "snr", "gain"), 40.0  # whose sigmoid is 1 in fp32


class Diffora(Variant):
    r"""In the spirit of DiffoRA (arXiv:2502.08905): ``W = W0 + Gamma B A``, one gate Gamma in (0, 1) for each layer.

    Search: A and B train on training batches, and Gamma = sigmoid(a), a = 0 at the start, on held-out ones::

        with variant.architecture():                       # once for each step; without it, on the training batches
            loss(model, held_out_batch).backward()

    Then the ``round(share L)`` layers with the largest Gamma (equal ones by their order) train from scratch, with
    Gamma = 1; the others rest, and are zero. Or build a new model from `choose`.

    The paper's text was not available, and there is no code. The abstract names a continuous relaxation, two levels, a
    selection ratio and weight sharing; the form of the first two is that of its nearest relative with code, AutoLoRA
    (arXiv:2403.09113), with steps of first order, and the last is left out. ``score`` is the switch.

    Under VAdam (SNR also under IVON) no gates and no second stream of batches are needed: "snr" is the mean SNR of a
    layer's elements, "gain" the fall of the loss that the state of B predicts (see `gain`; for a short search).

    Args:
        model: with PEFT LoRA layers.
        total_steps: optimizer steps of the run.
        share: of the layers, in (0, 1], that are kept.
        search: share of ``total_steps``, or steps, of the search.
        score: "gate", "snr" or "gain".
        gate_lr: of Adam on the gates.
        adapter_name, seed: see `Variant`.

    Raises:
        ValueError: an argument outside its bounds, a layer that cannot have gates.
    """

    claims = frozenset({"gates", "masks"})
    saved = (*Variant.saved, "chosen", "two_levels", "adam")

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        share: float = 0.5,
        search: int | float = 0.2,
        score: str = "gate",
        gate_lr: float = 1e-3,
        adapter_name: str = "default",
        seed: int = 0,
    ) -> None:
        super().__init__(model, adapter_name=adapter_name, seed=seed)
        self.search = steps("search", search, integer("total_steps", total_steps), low=1)
        if self.search >= total_steps:
            raise ValueError(
                f"search must be less than total_steps={total_steps}, got {search}: what it chooses trains"
            )
        self.share, self.gate_lr = fraction("share", share), at_least("gate_lr", gate_lr, 0.0)
        self.score = choice("score", score, SCORES)
        self.two_levels, self.chosen = False, list[str]()
        self.adam: Optimizer | None = None
        if score == "gate":
            self.gates = Gates(model, adapter_name, [torch.zeros(1) for _ in self.adapters], torch.sigmoid)

    def param_groups(self) -> list[dict[str, Any]]:
        """What trains in the model, but for the gates, which have an optimizer of their own."""
        return super().param_groups()[:1]

    def check(self, optimizer: Optimizer) -> None:
        """See `Variant.check`."""
        if self.score == "snr" and not isinstance(optimizer, IVON):
            raise ValueError("score='snr' reads a posterior; take IVON or VAdam, or score='gate'")
        if self.score == "gain" and not isinstance(optimizer, VAdam):
            raise ValueError("score='gain' reads the curvature and prior of VAdam; take that, or score='gate'")
        if self.gates is not None:
            self.adam = torch.optim.Adam(self.gates, lr=self.gate_lr)

    # ---------------------------------------------------------------- the search

    @contextmanager
    def architecture(self) -> Iterator[None]:
        """Inside, gradients are for the gates alone, which are stepped at the end; all others stay as they were.

        The batch's loss is a mean over examples that no training batch has; replicas each take a part of them.
        """
        if self.gates is None or self.adam is None:
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

    def choose(self) -> LayerChoice:
        """What the scores say now."""
        return choose_layers(self.scores(), self.share, self.adapters[0])

    # ---------------------------------------------------------------- moments

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
        found = self.choose()
        self.chosen = list(found.layers)
        self.history.append({"step": self.step, "layers": self.chosen, "scores": found.scores})
        for index, adapter in enumerate(self.adapters):
            self.restart(adapter.A, adapter.B, index)
        for gate in self.gates or ():
            local(gate.detach()).fill_(OPEN)

    def at_rest(self) -> list[Ranks]:
        """See `Variant.at_rest`: layers that were left out."""
        left_out = [a for a in self.adapters if self.chosen and a.name not in self.chosen]
        return [(p, dim, torch.ones(a.rank, dtype=torch.bool)) for a in left_out for _, p, dim in a.tensors()]
