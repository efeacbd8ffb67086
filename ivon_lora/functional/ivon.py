"""IVON in full, as pure functions: what every backend computes, written beside the paper's letters.

Source: "Variational Learning is Effective for Large Deep Networks" (arXiv:2402.17641), Algorithm 1, with the Hessian
line in the factored form that stays positive in fp32. Letters: m mean, g momentum, h Hessian diagonal, lambda ``ess``,
delta ``weight_decay``, rho = 1 - ``beta2``, xi ``clip_radius``, t step from 1, eps standard normal.

VAdam (Khan et al., "Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam", arXiv:1806.04854)
differs in two lines. Its curvature "fisher", B ghat^2 with B the examples that ghat averages over, estimates the
diagonal of the empirical Fisher matrix; it is never negative, so its Hessian line is the plain running mean. And it
divides the mean's step by the root of the curvature, as Adam does.

The functions take numpy arrays or torch tensors of any shape and return new ones; they use only operations that round
the same everywhere, in a fixed order, so two backends that call them on the same state give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ivon_lora.functional._arrays import Array, keep, library_of, sqrt


@dataclass(frozen=True)
class Hyper:
    """The scalars of one step, all derived once in double precision.

    Attributes:
        ess: lambda, effective sample size, in examples.
        weight_decay: delta, precision of the prior per effective example.
        lr: lr', the learning rate after ``rescale_lr``.
        beta1: decay of the momentum.
        rho: 1 - beta2, weight of the new curvature estimate.
        clip_radius: xi, bound of one element of the preconditioned step, before the learning rate.
        debias: 1 - beta1^t, or 1 without bias correction.
        curvature: "price" or "gradsq" for IVON, "fisher" for VAdam.
        square_scale: factor of ghat^2 in a squared curvature: lambda for "gradsq", B for "fisher".
        inverse_batch: 1 / B, for VAdam.
        noise_ess: lambda of the noise of a sample; infinite while none is drawn.
        prior_weight: factor of the prior's pull, for VAdam; less than 1 while the KL term is annealed.
        grad_scale: factor of every gradient: the labels of an example, negative where the objective is maximised.
    """

    ess: float
    weight_decay: float
    lr: float
    beta1: float
    rho: float
    clip_radius: float
    debias: float
    curvature: str
    square_scale: float = 1.0
    inverse_batch: float = 1.0
    noise_ess: float = math.inf
    prior_weight: float = 1.0
    grad_scale: float = 1.0

    def scalars(self, n_samples: float) -> list[float]:
        """All of them as the kernels of C++ and Triton take them."""
        return [
            self.ess, self.weight_decay, self.lr, self.beta1, 1.0 - self.beta1, self.rho, self.clip_radius, self.debias,
            self.square_scale, self.inverse_batch, self.noise_ess, self.prior_weight, self.grad_scale, n_samples,
        ]  # fmt: skip

    @property
    def needs_noise(self) -> bool:
        """Whether the curvature of a sample depends on its eps."""
        return self.curvature == "price"

    @property
    def needs_sample(self) -> bool:
        """Whether there is no curvature without a sample: VAdam's, the squared gradient, is one at the mean too."""
        return self.curvature != "fisher"

    @property
    def is_noisy(self) -> bool:
        """Whether a sample has noise."""
        return self.noise_ess < math.inf


#: added to the divisor of VAdam's step, as in Adam (arXiv:1412.6980)
ADAM_EPSILON = 1e-8


def root_precision(hess: Array, ess: float, weight_decay: float) -> Array:
    """1 / sigma = sqrt(lambda (h + delta)), the inverse standard deviation of the posterior."""
    return sqrt((hess + weight_decay) * ess)


def draw_sample(mean: Array, hess: Array, eps: Array, ess: float, weight_decay: float) -> Array:
    """theta = m + sigma eps (Alg. 1, line 1)."""
    return mean + eps / root_precision(hess, ess, weight_decay)


def estimate_curvature(grad: Array, hess: Array, eps: Array | None, hyper: Hyper) -> Array:
    r"""One sample's estimate f of the Hessian's diagonal H, from ghat, the mean gradient of B examples at the sample.

    "price": ``ghat eps / sigma`` (Price's theorem; Alg. 1, line 3). Unbiased for H averaged over the posterior. Its
    standard deviation is about ``sqrt(lambda / B) H``: the smaller the posterior, the more noise.

    "gradsq": ``lambda ghat^2``, as ivon-opt has it. Since ``E[ghat^2]`` is about ``H / B`` where the mean gradient
    vanishes, this is ``lambda / B`` times too large, and the posterior as many times too narrow.

    "fisher": ``B ghat^2``. With g one example's gradient and B examples drawn independently,
    ``E[f] = E[g^2] + (B - 1) E[g]^2``. The first term is the diagonal of the empirical Fisher matrix, which is H where
    the model fits (the labels are as spread as it says they are). In the second, the mean gradient at a sample is about
    ``H sigma eps``, whose square is ``H / lambda``: a relative bias of ``(B - 1) / lambda``, less than B / N for
    temperatures up to 1. The standard deviation is ``sqrt(2) f``, since a mean of many gradients is nearly Gaussian; a
    running mean with weight rho reduces it to ``sqrt(rho) f``.
    """
    if not hyper.needs_noise:
        return (grad * grad) * hyper.square_scale
    assert eps is not None
    return grad * (eps * root_precision(hess, hyper.ess, hyper.weight_decay))


def update_momentum(momentum: Array, grad: Array, hyper: Hyper) -> Array:
    """g <- beta1 g + (1 - beta1) ghat (Alg. 1, line 4)."""
    return momentum * hyper.beta1 + grad * (1.0 - hyper.beta1)


def update_hessian(hess: Array, curvature: Array, hyper: Hyper) -> Array:
    """h <- h + (h + delta)(u + u^2 / 2) with u = rho (f - h) / (h + delta) (Alg. 1, line 5, factored).

    Equal to ``beta2 h + rho f + rho^2/2 (h - f)^2 / (h + delta)``. Since u + u^2/2 >= -1/2, h + delta at most halves.
    Where even that rounds to zero, or f^2 overflows, h stays as it is: h + delta is positive and finite, always.

    The price of staying positive is a bias, E[(h + delta) u^2 / 2] > 0: where f is "price", h settles at
    ``H (1 + rho lambda / (2 B))``.

    For the curvature "fisher", which is not negative, it is the running mean h <- h + rho (f - h).
    """
    if hyper.curvature == "fisher":
        new = hess + (curvature - hess) * hyper.rho
        return keep(library_of(new).isfinite(new), new, hess)
    precision = hess + hyper.weight_decay
    u = ((curvature - hess) * hyper.rho) / precision
    new = hess + precision * (u + (u * 0.5) * u)
    new_precision = new + hyper.weight_decay
    return keep((new_precision > 0.0) & library_of(new).isfinite(new_precision), new, hess)


def update_mean(mean: Array, momentum: Array, hess: Array, hyper: Hyper) -> Array:
    """m <- m - lr' clip((g / (1 - beta1^t) + delta m) / (h + delta), -xi, xi) (Alg. 1, lines 6 and 7).

    For the curvature "fisher" the prior's pull delta m has a weight w, 1 but for the time in which the KL term grows.

    For VAdam the divisor is ``d = sqrt(h / B) + 1e-8``. A positive divisor does not move the point where
    the expected step is zero, ``E[ghat] + delta m = 0``, so the posterior mean is the same. h / B is Adam's second
    moment of ghat, so the step has AdamW's size (at most about lr in root mean square), whatever factor is wrong in B.
    The prior's pull is min(delta, d) m: where the gradient is zero (A of LoRA, while B is), or was so by chance in the
    first update, the prior shrinks the mean by a fraction lr instead of dividing by nearly nothing. Elsewhere, that is
    for h > B delta^2, which is far below delta, the minimum is delta.
    """
    clip = library_of(mean).clip
    if hyper.curvature == "fisher":
        divisor = sqrt(hess * hyper.inverse_batch) + ADAM_EPSILON
        pull = mean * clip(divisor, 0.0, hyper.weight_decay) * hyper.prior_weight
    else:
        divisor = hess + hyper.weight_decay
        pull = mean * hyper.weight_decay
    direction = (momentum / hyper.debias + pull) / divisor
    return mean - clip(direction, -hyper.clip_radius, hyper.clip_radius) * hyper.lr


def ivon_step(
    mean: Array, momentum: Array, hess: Array, grad: Array, curvature: Array | None, hyper: Hyper, active: Array | None
) -> tuple[Array, Array, Array, Array]:
    """One step of Algorithm 1 after the gradient is known.

    Args:
        mean, momentum, hess, grad: arrays of one shape.
        curvature: f of :func:`estimate_curvature`, or None when no sample was drawn: then h stays.
        hyper: the scalars.
        active: False where a pruned rank must not move, or None.

    Returns:
        new mean, momentum and hess, and where they are finite. An element that is not active, or whose update is not
        finite (its gradient was not), keeps its mean, momentum and Hessian.
    """
    new_momentum = update_momentum(momentum, grad, hyper)
    new_hess = hess if curvature is None else update_hessian(hess, curvature, hyper)
    new_mean = update_mean(mean, new_momentum, new_hess, hyper)
    isfinite = library_of(mean).isfinite
    finite = isfinite(new_momentum) & isfinite(new_mean)
    moved = finite if active is None else finite & active
    return keep(moved, new_mean, mean), keep(moved, new_momentum, momentum), keep(moved, new_hess, hess), finite


def posterior_std(hess: Array, ess: float, weight_decay: float) -> Array:
    """sigma = 1 / sqrt(lambda (h + delta))."""
    root = root_precision(hess, ess, weight_decay)
    return library_of(root).ones_like(root) / root  # array over array: torch rounds scalar over array differently
