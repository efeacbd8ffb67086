"""Flat-LoRA: noise on the whole weights while their low-rank update trains (arXiv:2409.14396)."""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ivon_lora.lora.adapters import LoraLayer, lora_layers
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.param_groups import hyper_of, integer
from ivon_lora.optim.sharding import first_row, forget_copies, is_sharded, local, part_of, whole
from ivon_lora.variants.variant import Variant, at_least, choice


class FlatLora(Variant):
    r"""Flat-LoRA (arXiv:2409.14396): minimise ``E L(W + s B A + eps)`` over A and B, for a minimum flat in all weights.

    ``eps_ij ~ N(0, (c_t rho)^2 ||W'_i||^2 / n)``, W' = W + s B A, row i, n inputs; ``c_t = (1 - cos(pi t / T)) / 2``
    grows from 0 to 1 over the run. One draw for each optimizer step and all its micro-batches; the base weights are
    bit for bit themselves in every step, evaluation and checkpoint, and after an exception.

    Differs from the released code, which draws from the global generator by the clock, counts T in batches of one
    process, and adds and subtracts the noise in the base's dtype (``restore="subtract"``), so that 16-bit weights drift.

    IVON and VAdam average over A and B already: ``top_up=True`` adds only the variance that their noise does not give
    to a row of W', see `row_variance`.

    Args:
        model: with PEFT LoRA layers, no embeddings.
        total_steps: T, optimizer steps of the run.
        rho: the noise's size; the paper's are 0.05 (T5-base, Llama 2), 0.1 (SDXL) and 0.15 (CLIP). 0 is LoRA.
        where: "weights"; or "outputs", noise of the same variance on each output of a linear layer, drawn for each
            token: it needs no copy of the weights and takes quantised bases, but tokens do not share it.
        restore: the weights come back from a "copy", from one in the memory of the "cpu", or are found by "subtract".
        replicas: of DDP draw their "own" noise, as many samples as replicas, or the "same".
        top_up: see above.
        adapter_name, seed: see `Variant`.

    Between a training forward and its backward the weights must stay as they are: torch raises an error if a
    checkpoint or an evaluation comes between.

    Raises:
        ValueError: an argument outside its bounds, a layer that takes no such noise.
    """

    claims = frozenset({"base"})

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        rho: float = 0.05,
        where: str = "weights",
        restore: str = "copy",
        replicas: str = "own",
        top_up: bool = False,
        adapter_name: str = "default",
        seed: int = 0,
    ) -> None:
        super().__init__(model, adapter_name=adapter_name, seed=seed)
        self.total_steps, self.rho = integer("total_steps", total_steps), at_least("rho", rho, 0.0)
        self.where = choice("where", where, ("weights", "outputs"))
        self.restore = choice("restore", restore, ("copy", "cpu", "subtract"))
        self.replicas, self.top_up = choice("replicas", replicas, ("own", "same")), bool(top_up)
        self.layers = [layer for layer in lora_layers(model, adapter_name) if not _refuse(layer, where)]
        self._noisy: list[tuple[Tensor, Tensor]] = []  # the weights that hold noise, and how they come back
        self._batches = 0  # micro-batches of this step
        self._hooks = [_OutputNoise() for _ in self.layers]

    def check(self, optimizer: Optimizer) -> None:
        """See `Variant.check`."""
        if self.top_up and not isinstance(optimizer, IVON):
            raise ValueError("top_up=True adds to the posterior's noise; take IVON or VAdam, or top_up=False")
        if self.where == "outputs":
            for layer, hook in zip(self.layers, self._hooks, strict=True):
                self._handles.append(_base(layer).register_forward_hook(hook))

    def before_forward(self) -> None:
        """Draw the noise of this step, or draw it again."""
        size = self.rho * (1 - math.cos(math.pi * min(self.step / self.total_steps, 1))) / 2
        if not size:
            return
        seen: set[int] = set()
        for index, layer in enumerate(self.layers):
            weight = _base(layer).weight
            if id(weight) in seen:  # tied
                continue
            seen.add(id(weight))
            std = self._row_std(layer, size)
            if self.where == "outputs":
                self._hooks[index].std = std
            else:
                self._perturb(weight, std, index)
        forget_copies(weight for weight, _ in self._noisy)
