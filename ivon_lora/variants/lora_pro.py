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
from ivon_lora.variants.checks import at_least, choice
from ivon_lora.variants.gradients import mean_gradients, step_sizes
from ivon_lora.variants.minimum_norm import minimum_norm
from ivon_lora.variants.variant import Variant


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
        betas, eps: of the moments of the mode "full".
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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adapter_name: str = "default",
        seed: int = 0,
    ) -> None:
        super().__init__(model, adapter_name=adapter_name, seed=seed)
        self.mode = choice("mode", mode, ("efficient", "full"))
        self.damping = damping if damping == "prior" else at_least("damping", float(damping), 0.0)
        self.coupling, self.betas, self.eps = bool(coupling), betas, at_least("eps", eps, 0.0)
        self.keep_norm = keep_norm if isinstance(keep_norm, bool) else choice("keep_norm", keep_norm, ("auto",))
        for layer in lora_layers(model, adapter_name):
            if layer.E is not None or adapter_name in getattr(layer.module, "lora_variant", {}):
                raise ValueError(
                    f"the update of layer {layer.name!r} is not B A alone; take LoraConfig(use_dora=False)"
                )
        self.moments: dict[str, list[Tensor]] = {}  # of the mode "full", by adapter: (m, n) each

    def check(self, optimizer: Optimizer) -> None:
        """See `Variant.check`."""
        if self.mode == "full" and not _is_plain_sgd(optimizer):
            raise ValueError("mode='full' has Adam's moments itself; take torch.optim.SGD without momentum")
        if self.damping == "prior" and not isinstance(optimizer, IVON):
            raise ValueError("damping='prior' reads the posterior's curvature; take IVON or VAdam, or a number")

    def before_step(self) -> None:
        """Change the gradients."""
        pairs = [(adapter.A, adapter.B) for adapter in self.adapters]
        sampling = self.optimizer.sampling if isinstance(self.optimizer, IVON) else None
        taken_here = sampling is None or not sampling.n_banked  # else the mean of several samples, at the mean
        weights = [tuple(whole(p.detach()).clone() for p in pair) for pair in pairs] if taken_here else None
        with mean_gradients(self.optimizer, [p for pair in pairs for p in pair]) as gradients:
            for index, adapter in enumerate(self.adapters):
                if adapter.A in gradients and adapter.B in gradients:
                    at = weights[index] if weights else tuple(whole(p.detach()) for p in pairs[index])
                    self._change(index, adapter, at, gradients)

    def _change(
        self, index: int, adapter: LoraAdapter, at: tuple[Tensor, ...], gradients: Mapping[Tensor, Tensor]
    ) -> None:
        damping = self._prior_damping(adapter) if self.damping == "prior" else float(self.damping)
        if damping is None:
            return
        pair = adapter.A, adapter.B
        a, b = (x.flatten(1) for x in at)
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
        moments = [m.to(x).lerp(x, 1 - beta) for m, x, beta in zip(moments, values, self.betas, strict=True)]
        self.moments[name] = moments
        first, second = (m / (1 - beta**t) for m, beta in zip(moments, self.betas, strict=True))
        return first / (second.sqrt() + self.eps)

    def _prior_damping(self, adapter: LoraAdapter) -> float | None:
        """weight_decay / c, with ``mean h(B) = c s^2 mean_k ||A_k||^2``; None before there is a curvature."""
        assert isinstance(self.optimizer, IVON)
        state, (_, group) = self.optimizer.state.get(adapter.B, {}), self.optimizer.parameters.place(adapter.B)
        hess = float(whole(state["hess"]).mean()) if "hess" in state else 0.0
        rows = float(whole(self.optimizer.posterior(adapter.A).mean).flatten(1).square().sum(1).mean())
        decay = float(group["weight_decay"])
        return decay * adapter.scaling**2 * rows / hess if hess > 0 else None


def _is_plain_sgd(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups)
