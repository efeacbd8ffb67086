"""LoRA-Pro: gradients of A and B that move their product as full fine-tuning would (arXiv:2407.18242)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ivon_lora.lora.adapters import LoraAdapter
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import like, part_of, whole
from ivon_lora.variants.gradients import group_of, mean_gradients, step_sizes
from ivon_lora.variants.layers import checked_layers, not_a_product
from ivon_lora.variants.options import choice, number, state
from ivon_lora.variants.variant import Variant

BETAS, EPS = (0.9, 0.999), 1e-8  # of the moments of the mode "full"

#: eigenvalues below this share of the largest are rounding: their inverse is 0 (16-bit gradients: 1e-4)
SMALLEST = {torch.float64: 1e-12, torch.float32: 1e-6}


@dataclass(eq=False, repr=False)
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
        model, adapter_name, seed: see `Variant`.
        mode, keep_norm: see above; "auto" is True under IVON and VAdam.
        damping, coupling: see `minimum_norm`; a damping of 0 is the paper's, 0.01 is robust; or "prior".
    """

    claims = frozenset({"gradients"})

    _: KW_ONLY
    mode: str = choice("efficient", "full")
    damping: float | str = number(0.0, needs={"prior": IVON})
    coupling: bool = choice(True, False)
    keep_norm: bool | str = choice("auto", True, False)
    moments: dict[str, list[Tensor]] = state(dict)  # of the mode "full", by adapter: (m, n) each

    def __post_init__(self) -> None:
        super().__post_init__()
        reason = functools.partial(not_a_product, adapter_name=self.adapter_name)
        checked_layers(self.model, self.adapter_name, "has no such gradients", reason)

    def prepare(self, optimizer: Optimizer) -> None:
        is_sgd = isinstance(optimizer, torch.optim.SGD) and not any(g["momentum"] for g in optimizer.param_groups)
        if self.mode == "full" and not is_sgd:
            raise ValueError("mode='full' has Adam's moments itself; take torch.optim.SGD without momentum")

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
        hess = self.optimizer.state.get(adapter.B, {}).get("hess")
        if hess is None or not (mean := float(whole(hess).mean())) > 0:
            return None
        rows = float(whole(self.optimizer.posterior(adapter.A).mean).flatten(1).square().sum(1).mean())
        return float(group_of(self.optimizer, adapter.B)["weight_decay"]) * adapter.scaling**2 * rows / mean


def minimum_norm(
    a: Tensor,
    b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    scaling: float,
    damping: float = 0.0,
    coupling: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""The smallest (dA, dB) for which s (B dA + dB A) comes closest to the gradient G of the whole weight.

    With J the Jacobian of (A, B) -> s B A, LoRA's gradients are J^T G, and these are J^+ G, or with damping l
    (J^T J + l)^-1 J^T G. In the eigenbases U of s^2 B^T B (eigenvalues p) and V of s^2 A A^T (q), and with
    C = U^T (gA A^T + B^T gB) V / 2, whose two terms are equal in exact arithmetic::

        dA = U [(U^T gA)_i / (p_i + l) + C_ij (1 / (p_i + q_j + l) - 1 / (p_i + l)) (s^2 / q_j) (V^T A)_j]
        dB = [(gB V)_j / (q_j + l) + (B U)_i (s^2 / p_i) C_ij (1 / (p_i + q_j + l) - 1 / (q_j + l))] V^T

    This solves the paper's Sylvester equation on the way. A direction in which A or B is zero stays at rest.

    Args:
        a, grad_a: (r, n), A and its gradient.
        b, grad_b: (m, r), B and its gradient.
        scaling: s, the factor of B A.
        damping: l >= 0, in the units of s^2 B^T B.
        coupling: False leaves out the terms with C: the block diagonal of the same system, which is Riemannian
            preconditioned LoRA (arXiv:2402.02347).

    Returns dA (r, n) and dB (m, r), in the gradients' dtype.
    """
    dtype = grad_a.dtype
    wide = torch.promote_types(dtype, torch.float32)
    smallest = SMALLEST.get(dtype, 1e-4)
    a, b, grad_a, grad_b = (x.to(wide) for x in (a, b, grad_a, grad_b))
    p, u = torch.linalg.eigh(scaling**2 * (b.T @ b))
    q, v = torch.linalg.eigh(scaling**2 * (a @ a.T))
    of_p, of_q = _inverse(p + damping, smallest), _inverse(q + damping, smallest)
    new_a, new_b = of_p[:, None] * (u.T @ grad_a), of_q * (grad_b @ v)
    if coupling:
        c = u.T @ (grad_a @ a.T + b.T @ grad_b) @ v / 2
        of_both = _inverse(p[:, None] + q + damping, smallest)
        new_a += (c * (of_both - of_p[:, None]) * scaling**2 * _inverse(q, smallest)) @ (v.T @ a)
        new_b += (b @ u * scaling**2 * _inverse(p, smallest)) @ (c * (of_both - of_q))
    return (u @ new_a).to(dtype), (new_b @ v.T).to(dtype)


def _inverse(x: Tensor, smallest: float) -> Tensor:
    """1 / x, and 0 where x is not above a share of the largest."""
    return torch.where(x > smallest * x.max(), 1 / x, 0.0)
