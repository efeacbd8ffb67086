"""Flat-LoRA: noise on the whole weights while their low-rank update trains (arXiv:2409.14396)."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import KW_ONLY, dataclass

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ivon_lora.lora.adapters import LoraLayer, lora_layers
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.param_groups import hyper_of
from ivon_lora.optim.sharding import local, part_of, whole
from ivon_lora.variants.hook import Hook
from ivon_lora.variants.layers import checked_layers
from ivon_lora.variants.options import choice, integer, number
from ivon_lora.variants.variant import Variant
from ivon_lora.variants.weight_noise import OutputNoise, WeightNoise, as_matrix, dequantised, why_no_noise


@dataclass(eq=False, repr=False)
class FlatLora(Variant):
    r"""Flat-LoRA (arXiv:2409.14396): minimise ``E L(W + s B A + eps)`` over A and B, for a minimum flat in all weights.

    ``eps_ij ~ N(0, (c_t rho)^2 ||W'_i||^2 / n)``, W' = W + s B A, row i, n inputs; ``c_t = (1 - cos(pi t / T)) / 2``
    grows from 0 to 1 over the run. One draw for each optimizer step and all its micro-batches; the base weights are
    bit for bit themselves in every step, evaluation and checkpoint, and after an exception. Between a training forward
    and its backward they must stay as they are: torch raises an error if a checkpoint or an evaluation comes between.

    Differs from the released code, which draws from the global generator by the clock, counts T in batches of one
    process, and adds and subtracts the noise in the base's dtype, so that 16-bit weights drift.

    IVON and VAdam average over A and B already: ``top_up=True`` adds only the variance that their noise does not give
    to a row of W', see `row_variance`.

    Args:
        model, total_steps (T), adapter_name, seed: see `Variant`.
        rho: the noise's size; the paper's are 0.05 (T5-base, Llama 2), 0.1 (SDXL) and 0.15 (CLIP). 0 is LoRA.
        where: "weights"; or "outputs", noise of the same variance on each output of a linear layer, drawn for each
            token: it needs no copy of the weights and takes quantised bases, but tokens do not share it.
        restore: the weights come back from a "copy", or from one in the memory of the "cpu".
        replicas: of DDP draw their "own" noise, as many samples as replicas, or the "same".
    """

    claims = frozenset({"base"})

    total_steps: int = integer()
    _: KW_ONLY
    rho: float = number(0.05)
    where: str = choice("weights", "outputs")
    restore: str = choice("copy", "cpu")
    replicas: str = choice("own", "same")
    top_up: bool = choice(False, needs={True: IVON})

    def __post_init__(self) -> None:
        super().__post_init__()
        reason = functools.partial(why_no_noise, where=self.where)
        checked_layers(self.model, self.adapter_name, "takes no noise", reason)
        self._noise = WeightNoise(self.restore) if self.where == "weights" else OutputNoise(self)

    def prepare(self, optimizer: Optimizer) -> None:
        self.layers = lora_layers(self.model, self.adapter_name)  # fully_shard has replaced their parameters
        if isinstance(self._noise, OutputNoise):
            bases = [layer.module.get_base_layer() for layer in self.layers]
            self._handles += [base.register_forward_hook(Hook(self._noise.hook)) for base in bases]

    def before_forward(self) -> None:
        """The noise of this step, drawn for the first time or again."""
        size = self.rho * (1 - math.cos(math.pi * min(self.step / self.total_steps, 1))) / 2
        replica = dist.get_rank() if dist.is_initialized() and self.replicas == "own" else 0
        for index, layer in enumerate(self.layers) if size else ():
            self._noise.add(layer, self._row_std(layer, size), (self.seed, self.step, index, replica))

    def rest(self) -> None:
        """The model has no noise."""
        self._noise.remove()

    def before_step(self) -> None:
        """The noise of this step is over."""
        if not self.forwards:
            warnings.warn(
                "this step had no noise, for the model that FlatLora was built on had no forward in training mode: "
                "call model.train(), and that model",
                stacklevel=2,
            )
        self.rest()

    def _row_std(self, layer: LoraLayer, size: float) -> Tensor:
        """Of the noise of an element of each row of the part of W in this process, or of each output: (m,)."""
        base, on_weights = layer.module.get_base_layer(), self.where == "weights"
        matrix = as_matrix(layer, local(base.weight).detach() if on_weights else dequantised(base))
        a, b = (whole(p.detach()).flatten(1).float() for p in (layer.A, layer.B))
        change, known = layer.scaling * b @ a, b.new_zeros(len(b))
        if self.top_up:
            (mean_a, std_a), (mean_b, std_b) = (self._training_noise(p) for p in (layer.A, layer.B))
            known = row_variance(mean_a, mean_b, std_a, std_b, layer.scaling)
        if on_weights:
            change, known = part_of(base.weight, change), part_of(base.weight, known)
        return (size**2 * (matrix + change).square().mean(1) - known).clamp(min=0).sqrt()

    def _training_noise(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the sample that a parameter holds, as matrices."""
        group, updates = self.optimizer.parameters.place(p)[1], self.optimizer.state.get(p, {}).get("step", 0)
        hyper, posterior = hyper_of(group, int(updates) + 1), self.optimizer.posterior(p)
        share = hyper.ess / hyper.noise_ess if self.optimizer.sampling.pending is not None else 0.0
        return whole(posterior.mean).flatten(1), whole(posterior.stddev).flatten(1) * math.sqrt(share)


def row_variance(a: Tensor, b: Tensor, std_a: Tensor, std_b: Tensor, scaling: float) -> Tensor:
    r"""Mean variance of the elements of each row of s B A, (m,), for independent A (r, n) and B (m, r).

    ``v_i = s^2 / n sum_k [B_ik^2 sum_j sA_kj^2 + sB_ik^2 sum_j (A_kj^2 + sA_kj^2)]``
    """
    noise = std_a.square().mean(1)
    return scaling**2 * (b.square() @ noise + std_b.square() @ (a.square().mean(1) + noise))
