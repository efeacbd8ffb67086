"""The equations of `functional.ivon` and `functional.importance` as Triton device functions, operation by operation.

Every function takes fp32 blocks and rounds after each operation, in the order of its namesake there; that gives the
same bits as long as kernels are launched with `enable_fp_fusion=False`. The argument `hyper_ptr` stands for `Hyper`: it
points to the fp32 scalars of the tensor's group.
"""

import triton
import triton.language as tl

from ivon_lora.functional import importance as criteria
from ivon_lora.kernels.noise import horner

SNR_ABS_P, SNR_ABS_Q = tl.constexpr(criteria.SNR_ABS_P), tl.constexpr(criteria.SNR_ABS_Q)

# Columns of the scalars: fp32 [n_groups, N_HYPER].
ESS = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
LR = tl.constexpr(2)
BETA1 = tl.constexpr(3)
BETA1_COMPLEMENT = tl.constexpr(4)
RHO = tl.constexpr(5)
CLIP_RADIUS = tl.constexpr(6)
DEBIAS = tl.constexpr(7)
SQUARE_SCALE = tl.constexpr(8)
INVERSE_BATCH = tl.constexpr(9)
NOISE_ESS = tl.constexpr(10)
PRIOR_WEIGHT = tl.constexpr(11)
GRAD_SCALE = tl.constexpr(12)
N_SAMPLES = tl.constexpr(13)
N_HYPER = tl.constexpr(16)  # a whole number of 16-byte vectors


@triton.jit
def is_finite(x):
    """True where neither infinite nor NaN."""
    return tl.abs(x) < float("inf")


@triton.jit
def root_precision(hess, ess, weight_decay):
    """1 / sigma = sqrt(lambda (h + delta))."""
    return tl.sqrt_rn((hess + weight_decay) * ess)


@triton.jit
def draw_sample(mean, hess, eps, ess, weight_decay):
    """theta = m + sigma eps."""
    return mean + tl.div_rn(eps, root_precision(hess, ess, weight_decay))


@triton.jit
def update_momentum(momentum, grad, hyper_ptr):
    """beta1 g + (1 - beta1) ghat."""
    return momentum * tl.load(hyper_ptr + BETA1) + grad * tl.load(hyper_ptr + BETA1_COMPLEMENT)


@triton.jit
def update_hessian(hess, curvature, weight_decay, hyper_ptr, CURVATURE: tl.constexpr):
    """h + (h + delta)(u + u^2 / 2) with u = rho (f - h) / (h + delta); "fisher": h + rho (f - h)."""
    rho = tl.load(hyper_ptr + RHO)
    if CURVATURE == "fisher":
        new = hess + (curvature - hess) * rho
        valid = is_finite(new)
    else:
        precision = hess + weight_decay
        u = tl.div_rn((curvature - hess) * rho, precision)
        new = hess + precision * (u + (u * 0.5) * u)
        new_precision = new + weight_decay
        valid = (new_precision > 0.0) & is_finite(new_precision)
    return tl.where(valid, new, hess)


@triton.jit
def update_mean(mean, momentum, hess, weight_decay, hyper_ptr, CURVATURE: tl.constexpr):
    """m - lr' clip((g / debias + delta m) / (h + delta), -xi, xi).

    "fisher": the divisor is d = sqrt(h / B) + 1e-8, and the prior's pull w min(delta, d) m.
    """
    if CURVATURE == "fisher":
        divisor = tl.sqrt_rn(hess * tl.load(hyper_ptr + INVERSE_BATCH)) + 1e-8
        pull = mean * tl.where(divisor > weight_decay, weight_decay, divisor)
        pull = pull * tl.load(hyper_ptr + PRIOR_WEIGHT)
    else:
        divisor = hess + weight_decay
        pull = mean * weight_decay
    debias = tl.load(hyper_ptr + DEBIAS)
    if debias != 1.0:  # not for long: 1 - 0.9^t rounds to 1 from the 165th update on
        momentum = tl.div_rn(momentum, tl.zeros_like(momentum) + debias)
    direction = tl.div_rn(momentum + pull, divisor)
    # Comparisons, not minimum and maximum: a NaN must stay one.
    radius = tl.load(hyper_ptr + CLIP_RADIUS)
    direction = tl.where(direction > radius, radius, direction)
    direction = tl.where(direction < -radius, -radius, direction)
    return mean - direction * tl.load(hyper_ptr + LR)


@triton.jit
def snr_abs(a):
    """SNR of the folded normal as a function of a = |m| / sigma."""
    x = tl.where(a < 6.0, a, 6.0)  # a >= 0; for a NaN either polynomial is as good, the last line keeps it
    return tl.where(a < 6.0, tl.div_rn(horner(x, SNR_ABS_P, 8), horner(x, SNR_ABS_Q, 7)), a)


@triton.jit
def importance(mean, hess, ess, weight_decay, CRITERION: tl.constexpr):
    """Importance of each element under a criterion that the posterior alone decides."""
    if CRITERION == "magnitude":
        score = tl.abs(mean)
    else:
        score = root_precision(hess, ess, weight_decay)
        if CRITERION != "inverse_std":
            score = tl.abs(mean) * score
        if CRITERION == "snr_abs":
            score = snr_abs(score)
    return score


@triton.jit
def update_sensitivity(mean, grad, sensitivity, uncertainty):
    """Both running means of AdaLoRA's importance; they stay where the gradient is not finite."""
    instant = tl.abs(mean * grad)
    new = sensitivity * 0.85 + instant * 0.15
    new_uncertainty = uncertainty * 0.85 + tl.abs(instant - new) * 0.15
    finite = is_finite(grad)
    return tl.where(finite, new, sensitivity), tl.where(finite, new_uncertainty, uncertainty)
