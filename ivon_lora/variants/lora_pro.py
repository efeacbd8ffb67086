"""LoRA-Pro: gradients of A and B that move their product as full fine-tuning would (arXiv:2407.18242)."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ivon_lora.lora.adapters import LoraAdapter, lora_layers
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import like, part_of, whole
from ivon_lora.variants.checks import at_least, choice, flag, not_a_product, refuse
from ivon_lora.variants.gradients import mean_gradients, step_sizes
from ivon_lora.variants.minimum_norm import minimum_norm
from ivon_lora.variants.variant import Variant

BETAS, EPS = (0.9, 0.999), 1e-8  # of the moments of the mode "full"


class LoraPro(Variant):
    r"""LoRA-Pro (arXiv:2407.18242): the gradients of A and B become those of `minimum_norm`, before the step.

    ``mode="efficient"`` leaves the step to any optimizer. ``mode="full"`` keeps Adam's moments of the equivalent
    gradient ``s (B dA + dB A)`` of the whole weight, two numbers for each of its elements, and projects their quotient
    again; it wants plain SGD with the learning rate of full fine-tuning (the paper's is 2e-5).

    Differs from the released code, whose s is 2 whatever the adapter's, whose ridge drowns B in its first steps, and
    whose moments are off by a step. Gradients are clipped before, as published, so by the raw gradients' norm.

    Under IVON and VAdam the gradients of the momentum change, at the sample at which they were taken, and the curvature
    stays that of the loss. Since dA grows as 1 / ||B||, ``keep_norm`` gives each tensor the preconditioned norm that
    it had: LoRA-Pro's direction, LoRA's size and learning rate. ``damping="prior"`` is ``weight_decay / c`` with c the
    curvature of an element of the weight, as B's tells: a Gauss-Newton step under the optimizer's own prior.

    Args:
        model: with PEFT LoRA layers.
        mode: "efficient" or "full".
        damping: see `minimum_norm`; 0 is the paper, 0.01 is robust; or "prior".
        coupling: see `minimum_norm`.
        keep_norm: True, False, or "auto": under IVON and VAdam.
        adapter_name, seed: see `Variant`.

    Raises:
        ValueError: an argument outside its bounds, a layer whose update is not B A alone.
    """

    claims = frozenset({"gradients"})
    saved = (*Variant.saved, "moments")

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: str = "efficient",
        damping: float | str = 0.0,
        coupling: bool = True,
        keep_norm: bool | str = "auto",
        adapter_name: str = "default",
        seed: int = 0,
    ) -> None:
        super().__init__(model, adapter_name=adapter_name, seed=seed)
        self.mode = choice("mode", mode, ("efficient", "full"))
        self.damping = damping if damping == "prior" else at_least("damping", damping, 0.0)
        self.coupling = flag("coupling", coupling)
        self.keep_norm = keep_norm if isinstance(keep_norm, bool) else choice("keep_norm", keep_norm, ("auto",))
        for layer in lora_layers(model, adapter_name):
            refuse(layer, "has no such gradients", not_a_product(layer, adapter_name))
        self.moments: dict[str, list[Tensor]] = {}  # of the mode "full", by adapter: (m, n) each

    def check(self, optimizer: Optimizer) -> None:
        """See `Variant.check`."""
        is_sgd = isinstance(optimizer, torch.optim.SGD) and not any(g["momentum"] for g in optimizer.param_groups)
        if self.mode == "full" and not is_sgd:
            raise ValueError("mode='full' has Adam's moments itself; take torch.optim.SGD without momentum")
        if self.damping == "prior" and not isinstance(optimizer, IVON):
            raise ValueError("damping='prior' reads the posterior's curvature; take IVON or VAdam, or a number")

    def before_step(self) -> None:
        """Change the gradients."""
        params = [p for adapter in self.adapters for p in (adapter.A, adapter.B)]
        at_mean = isinstance(self.optimizer, IVON) and self.optimizer.sampling.n_banked  # the mean of several samples
        samples = {} if at_mean else {p: whole(p.detach()).clone() for p in params}
        with mean_gradients(self.optimizer, params) as gradients:
            for adapter in self.adapters:
                if adapter.A in gradients and adapter.B in gradients:
                    self._change(adapter, samples, gradients)

    def _change(
        self, adapter: LoraAdapter, samples: Mapping[Tensor, Tensor], gradients: Mapping[Tensor, Tensor]
    ) -> None:
        damping = self._prior_damping(adapter) if self.damping == "prior" else float(self.damping)
        if damping is None:
            return
        pair = adapter.A, adapter.B
        a, b = ((samples[p] if samples else whole(p.detach())).flatten(1) for p in pair)
        old = [whole(like(p, gradients[p])) for p in pair]
        adjust = functools.partial(minimum_norm, a, b, scaling=adapter.scaling, damping=damping, coupling=self.coupling)
        new = adjust(*(g.flatten(1) for g in old))
        if self.mode == "full":
            step = self._adam(adapter.name, adapter.scaling * (b @ new[0] + new[1] @ a))
            new = adjust(adapter.scaling * b.T @ step, adapter.scaling * step @ a.T)
        for p, was, now in zip(pair, old, new, strict=True):
            now = now.reshape(was.shape)
            if self.keep_norm is True or (self.keep_norm == "auto" and isinstance(self.optimizer, IVON)):
                sizes = step_sizes(self.optimizer, p)
                sizes = whole(like(p, sizes)) if sizes.dim() else sizes
                now = now * ((sizes * was).norm() / (sizes * now).norm().clamp(min=1e-30))
            gradients[p].copy_(part_of(p, now))

    def _adam(self, name: str, gradient: Tensor) -> Tensor:
        """Adam's direction for a whole weight."""
        moments = self.moments.get(name, [torch.zeros_like(gradient)] * 2)
        values, t = (gradient, gradient.square()), self.step + 1
        moments = [m.to(x).lerp(x, 1 - beta) for m, x, beta in zip(moments, values, BETAS, strict=True)]
        self.moments[name] = moments
        first, second = (m / (1 - beta**t) for m, beta in zip(moments, BETAS, strict=True))
        return first / (second.sqrt() + EPS)

    def _prior_damping(self, adapter: LoraAdapter) -> float | None:
        """weight_decay / c, with ``mean h(B) = c s^2 mean_k ||A_k||^2``; None before there is a curvature."""
        assert isinstance(self.optimizer, IVON)
        state, (_, group) = self.optimizer.state.get(adapter.B, {}), self.optimizer.parameters.place(adapter.B)
        hess = float(whole(state["hess"]).mean()) if "hess" in state else 0.0
        rows = float(whole(self.optimizer.posterior(adapter.A).mean).flatten(1).square().sum(1).mean())
        decay = float(group["weight_decay"])
        return decay * adapter.scaling**2 * rows / hess if hess > 0 else None
