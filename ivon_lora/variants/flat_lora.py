"""Flat-LoRA: noise on the whole weights while their low-rank update trains (arXiv:2409.14396)."""

from __future__ import annotations

import math
import warnings

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ivon_lora.lora.adapters import LoraLayer, lora_layers
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.param_groups import hyper_of, integer
from ivon_lora.optim.sharding import local, part_of, whole
from ivon_lora.variants.checks import at_least, choice, flag, refuse
from ivon_lora.variants.hook import Hook
from ivon_lora.variants.variant import Variant
from ivon_lora.variants.weight_noise import (
    PLACES,
    RESTORE,
    OutputNoise,
    WeightNoise,
    as_matrix,
    base_layer,
    dequantised,
    why_no_noise,
)


class FlatLora(Variant):
    r"""Flat-LoRA (arXiv:2409.14396): minimise ``E L(W + s B A + eps)`` over A and B, for a minimum flat in all weights.

    ``eps_ij ~ N(0, (c_t rho)^2 ||W'_i||^2 / n)``, W' = W + s B A, row i, n inputs; ``c_t = (1 - cos(pi t / T)) / 2``
    grows from 0 to 1 over the run. One draw for each optimizer step and all its micro-batches; the base weights are
    bit for bit themselves in every step, evaluation and checkpoint, and after an exception.

    Differs from the released code, which draws from the global generator by the clock, counts T in batches of one
    process, and adds and subtracts the noise in the base's dtype, so that 16-bit weights drift.

    IVON and VAdam average over A and B already: ``top_up=True`` adds only the variance that their noise does not give
    to a row of W', see `row_variance`.

    Args:
        model: with PEFT LoRA layers, no embeddings.
        total_steps: T, optimizer steps of the run.
        rho: the noise's size; the paper's are 0.05 (T5-base, Llama 2), 0.1 (SDXL) and 0.15 (CLIP). 0 is LoRA.
        where: "weights"; or "outputs", noise of the same variance on each output of a linear layer, drawn for each
            token: it needs no copy of the weights and takes quantised bases, but tokens do not share it.
        restore: "copy" or "cpu", see `WeightNoise`.
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
        self.where = choice("where", where, PLACES)
        self.restore = choice("restore", restore, RESTORE)
        self.replicas, self.top_up = choice("replicas", replicas, ("own", "same")), flag("top_up", top_up)
        self.layers = lora_layers(model, adapter_name)
        for layer in self.layers:
            refuse(layer, "takes no noise", why_no_noise(layer, where))
        self._on_weights, self._on_outputs = WeightNoise(self.restore), [OutputNoise(self) for _ in self.layers]

    def check(self, optimizer: Optimizer) -> None:
        """See `Variant.check`."""
        if self.top_up and not isinstance(optimizer, IVON):
            raise ValueError("top_up=True adds to the posterior's noise; take IVON or VAdam, or top_up=False")
        if self.where == "outputs":
            for layer, noise in zip(self.layers, self._on_outputs, strict=True):
                self._handles.append(base_layer(layer).register_forward_hook(Hook(noise.add)))

    def before_forward(self) -> None:
        """The noise of this step, drawn for the first time or again."""
        size = self.rho * (1 - math.cos(math.pi * min(self.step / self.total_steps, 1))) / 2
        replica = dist.get_rank() if dist.is_initialized() and self.replicas == "own" else 0
        for index, (layer, noise) in enumerate(zip(self.layers, self._on_outputs, strict=True)) if size else ():
            place = (self.seed, self.step, index, replica)
            if self.where == "weights":
                self._on_weights.add(layer, self._row_std(layer, size), place)
            else:
                noise.std, noise.place = self._row_std(layer, size), place

    def rest(self) -> None:
        """The model has no noise."""
        self._on_weights.remove()
        for noise in self._on_outputs:
            noise.std = None

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
        base, on_weights = base_layer(layer), self.where == "weights"
        matrix = as_matrix(layer, local(base.weight).detach() if on_weights else dequantised(base))
        a, b = (whole(p.detach()).flatten(1).float() for p in (layer.A, layer.B))
        change, known = layer.scaling * b @ a, self._known_variance(layer) if self.top_up else b.new_zeros(len(b))
        if on_weights:
            change, known = part_of(base.weight, change), part_of(base.weight, known)
        return (size**2 * (matrix + change).square().mean(1) - known).clamp(min=0).sqrt()

    def _known_variance(self, layer: LoraLayer) -> Tensor:
        """What the noise in A and B gives to each row already."""
        (a, std_a), (b, std_b) = (self._training_noise(p) for p in (layer.A, layer.B))
        return row_variance(a, b, std_a, std_b, layer.scaling)

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
