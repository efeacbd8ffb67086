"""The equations of `functional.ivon` and `functional.importance` as Triton device functions, operation by operation.

Every function takes fp32 blocks (and fp32 scalars) and rounds after each operation, in the order of its namesake there;
that gives the same bits as long as kernels are launched with `enable_fp_fusion=False`.
"""

import triton
import triton.language as tl

#: names of the criteria, as the constexpr argument `CRITERION` of the kernels takes them; 0: no scores
CRITERIA = {"snr_abs": 1, "snr": 2, "magnitude": 3, "inverse_std": 4, "sensitivity": 5}


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
def update_hessian(hess, curvature, weight_decay, rho):
    """h + (h + delta)(u + u^2 / 2) with u = rho (f - h) / (h + delta)."""
    precision = hess + weight_decay
    u = tl.div_rn((curvature - hess) * rho, precision)
    new = hess + precision * (u + (u * 0.5) * u)
    new_precision = new + weight_decay
    return tl.where((new_precision > 0.0) & is_finite(new_precision), new, hess)


@triton.jit
def average_curvature(hess, curvature, rho):
    """h + rho (f - h)."""
    new = hess + (curvature - hess) * rho
    return tl.where(is_finite(new), new, hess)


@triton.jit
def update_mean(
    mean, momentum, hess, weight_decay, lr, clip_radius, debias, inverse_batch, prior_weight, ADAM: tl.constexpr
):  # fmt: skip
    """m - lr' clip((g / debias + w delta m) / (h + delta), -xi, xi).

    For ADAM the divisor is d = sqrt(h / B) + 1e-8, and the prior's pull w min(delta, d) m.
    """
    if ADAM:
        divisor = tl.sqrt_rn(hess * inverse_batch) + 1e-8
        pull = mean * tl.where(divisor > weight_decay, weight_decay, divisor)
    else:
        divisor = hess + weight_decay
        pull = mean * weight_decay
    pull = pull * prior_weight  # 1 for curvatures other than "fisher": the same bits as without it
    if debias != 1.0:  # not for long: 1 - 0.9^t rounds to 1 from the 165th update on
        momentum = tl.div_rn(momentum, tl.zeros_like(momentum) + debias)
    direction = tl.div_rn(momentum + pull, divisor)
    # Comparisons, not minimum and maximum: a NaN must stay one.
    direction = tl.where(direction > clip_radius, clip_radius, direction)
    direction = tl.where(direction < -clip_radius, -clip_radius, direction)
    return mean - direction * lr


@triton.jit
def second_moment(mean, hess, ess, weight_decay):
    """m^2 + sigma^2, where h > 0; sigma^2 elsewhere. Of `ivon_lora.prior`, as the next one."""
    precision = (hess + weight_decay) * ess
    return tl.where(hess > 0.0, mean * mean, 0.0) + tl.div_rn(tl.zeros_like(precision) + 1.0, precision)


@triton.jit
def next_weight_decay(moment, ess, lowest, highest):
    """1 / (lambda moment), within bounds."""
    decay = tl.div_rn(ess * 0.0 + 1.0, moment * ess)  # a moment may be infinite, lambda is not
    decay = tl.where(decay < lowest, lowest, decay)
    return tl.where(decay > highest, highest, decay)


@triton.jit
def snr_abs(a):
    """SNR of the folded normal as a function of a = |m| / sigma."""
    x = tl.where(a < 6.0, a, 6.0)  # a >= 0; for a NaN either polynomial is as good, the last line keeps it
    p = x * 0.018016662448644638 + -0.022468378767371178
    p = p * x + 0.021922320127487183
    p = p * x + 0.4326359033584595
    p = p * x + -0.2552284300327301
    p = p * x + 1.8665770292282104
    p = p * x + -0.25040578842163086
    p = p * x + 1.3236068487167358
    q = x * 0.01852859929203987 + -0.03520124778151512
    q = q * x + 0.14897313714027405
    q = q * x + -0.20743189752101898
    q = q * x + 1.4122387170791626
    q = q * x + -0.18929044902324677
    q = q * x + 1.0
    return tl.where(a < 6.0, tl.div_rn(p, q), a)


@triton.jit
def importance(CRITERION: tl.constexpr, mean, hess, ess, weight_decay):
    """Importance of each element under a criterion that needs no gradient (1 to 4)."""
    if CRITERION == 3:
        score = tl.abs(mean)
    else:
        score = root_precision(hess, ess, weight_decay)
        if CRITERION != 4:
            score = tl.abs(mean) * score
        if CRITERION == 1:
            score = snr_abs(score)
    return score


@triton.jit
def update_sensitivity(mean, grad, sensitivity, uncertainty):
    """Both running means of AdaLoRA's importance."""
    instant = tl.abs(mean * grad)
    sensitivity = sensitivity * 0.85 + instant * 0.15
    uncertainty = uncertainty * 0.85 + tl.abs(instant - sensitivity) * 0.15
    return sensitivity, uncertainty
