"""Importance of a parameter and of a rank.

Elementwise criteria of Bayesian AdaLoRA (arXiv:2409.10673) and AdaLoRA (arXiv:2303.10512), all functions of
a = |m| / sigma, of |m| or of sigma alone, and their reduction to one number per rank. Written for numpy arrays and
torch tensors alike, from operations that round the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from ivon_lora.functional._arrays import Array, horner, library_of

CRITERIA = ("snr_abs", "snr", "magnitude", "inverse_std", "sensitivity")

#: SNR(|theta|) = P(a) / Q(a) for a <= 6 (Q's constant term is 1), relative error 1.4e-6 in fp32; = a beyond (2e-9 at 6)
SNR_ABS_P = (
    1.3236068487167358,
    -0.25040578842163086,
    1.8665770292282104,
    -0.2552284300327301,
    0.4326359033584595,
    0.021922320127487183,
    -0.022468378767371178,
    0.018016662448644638,
)
SNR_ABS_Q = (
    1.0,
    -0.18929044902324677,
    1.4122387170791626,
    -0.20743189752101898,
    0.14897313714027405,
    -0.03520124778151512,
    0.01852859929203987,
)
SNR_ABS_LIMIT = 6.0

#: decay of both running means of AdaLoRA's sensitivity (arXiv:2303.10512, section 4.1; beta1 = beta2)
SENSITIVITY_DECAY = 0.85


def snr_abs(a: Array) -> Array:
    """SNR of the folded normal |theta|, theta ~ N(m, sigma^2), as a function of ``a = |m| / sigma >= 0``.

    With d = sqrt(2/pi) exp(-a^2/2) - a erfc(a/sqrt 2) it is (a + d) / sqrt(1 - 2 a d - d^2); the usual form
    E / sqrt(sigma^2 + m^2 - E^2) cancels: it is infinite or NaN for the most certain parameters. Here it is one
    rational function, cheaper than exp and erfc and of the same bits on every machine. Rises from 1.3236 at 0.
    """
    library = library_of(a)
    small = library.clip(a, 0.0, SNR_ABS_LIMIT)
    return library.where(a < SNR_ABS_LIMIT, horner(small, SNR_ABS_P) / horner(small, SNR_ABS_Q), a)


def importance(criterion: str, mean: Array, root_precision: Array) -> Array:
    """Importance of each element under a criterion that needs no gradient.

    Args:
        criterion: "snr_abs", "snr", "magnitude" or "inverse_std".
        mean: m, any shape.
        root_precision: 1 / sigma, same shape.

    Returns:
        non-negative importance, same shape; never NaN for finite input.
    """
    match criterion:
        case "magnitude":
            return abs(mean)
        case "inverse_std":
            return root_precision
        case "snr":
            return abs(mean) * root_precision
        case "snr_abs":
            return snr_abs(abs(mean) * root_precision)
    raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")


def update_sensitivity(mean: Array, grad: Array, sensitivity: Array, uncertainty: Array) -> tuple[Array, Array]:
    """AdaLoRA, eqs. 10-12: I = |m ghat|, Ibar <- 0.85 Ibar + 0.15 I, U <- 0.85 U + 0.15 |I - Ibar|.

    The importance is the product Ibar U of what is returned.
    """
    instant = abs(mean * grad)
    sensitivity = sensitivity * SENSITIVITY_DECAY + instant * (1.0 - SENSITIVITY_DECAY)
    uncertainty = uncertainty * SENSITIVITY_DECAY + abs(instant - sensitivity) * (1.0 - SENSITIVITY_DECAY)
    return sensitivity, uncertainty


def spread(mask: Tensor, rank_dim: int, shape: tuple[int, ...]) -> Tensor:
    """A rank mask (r,) as a view of a tensor's ``shape``, whose dimension ``rank_dim`` is r."""
    return mask.view([-1 if d == rank_dim else 1 for d in range(len(shape))]).expand(shape)


def rank_mean(values: Tensor, rank_dim: int) -> Tensor:
    """Mean of ``values`` over all dimensions but the rank's.

    Args:
        values: importance of every element of A (rank_dim 0), B (rank_dim 1) or E (rank_dim 0); not negative.
        rank_dim: the dimension of size r.

    Returns:
        fp32 ``(r,)``: of fp32 values on CPU the true mean, rounded once, which no order of summation can change;
        otherwise summed in double precision, which differs from it only where a rounding tie is that close.
    """
    dims = tuple(d for d in range(values.dim()) if d != rank_dim)
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return values.mean(dim=dims, dtype=torch.float64).float() if dims else values.float()
    array = values.detach().numpy()
    n = array.size // max(array.shape[rank_dim], 1)
    sums = np.asarray(np.sum(array, axis=dims, dtype=np.float64))
    return torch.from_numpy(settled_means(sums, n, lambda rank: exact_sum(array.take(rank, rank_dim))))


def settled_means(sums: np.ndarray, n: int | np.ndarray, total: Callable[[int], int]) -> np.ndarray:
    """Means of non-negative numbers, each the true one rounded once, from sums in double precision.

    Args:
        sums: float64 (k,), each of at most ``n`` additions.
        n: how many numbers, at least 1; one for all sums or one for each.
        total: the :func:`exact_sum` behind a sum, by its position: asked for where the roundings of the sum leave more
            than one fp32 number possible.

    Returns:
        fp32 (k,).
    """
    with np.errstate(all="ignore"):
        mean = sums / n
        error = mean * ((n + 2) * 2.0**-53)
        means, upper = (mean - error).astype(np.float32), (mean + error).astype(np.float32)
        finite = np.isfinite(mean)
        means[~finite] = mean[~finite]
    counts = np.broadcast_to(n, sums.shape)
    for i in np.flatnonzero((means != upper) & finite).tolist():
        means[i] = rounded_mean(total(i), int(counts[i]))
    return means


def exact_sum(values: np.ndarray) -> int:
    """The sum of finite, non-negative fp32 numbers in units of 2^-172."""
    mantissas, exponents = np.frexp(values.reshape(-1))  # normalises subnormal numbers too
    integers = (mantissas * np.float32(1 << 24)).astype(np.int64)  # value = integer 2^(exponent - 24)
    return sum(int(integers[exponents == e].sum()) << (int(e) + 148) for e in np.unique(exponents[integers != 0]))


def rounded_mean(total: int, n: int) -> np.float32:
    """``total / n`` for a total of :func:`exact_sum`, rounded once to nearest even."""
    digits = total.bit_length() - n.bit_length()  # of the quotient before the point, or one less
    digits += total >= n << max(digits, 0)
    last_place = max(digits - 24, 172 - 149)  # of fp32
    return np.float32(math.ldexp(round(Fraction(total, n << last_place)), last_place - 172))


def select_top(
    scores: Tensor, budget: int, owners: Tensor | None = None, min_rank: int = 0, max_rank: int | None = None
) -> Tensor:
    """Mask of ``budget`` ranks: the best scores; of equal scores the one with the lower index.

    Args:
        scores: (R,) scores of all ranks of all adapters. A NaN counts as the highest score: an unknown rank is kept.
        budget: ranks to keep, 0..R.
        owners: int64 (R,), which adapter a rank belongs to; needed for ``min_rank`` and ``max_rank``.
        min_rank: the best ``min_rank`` ranks of every adapter are kept first.
        max_rank: no more of any adapter are kept, even where the budget is larger; None for no bound.

    Returns:
        bool (R,), on the device of ``scores``, without waiting for it.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    first = torch.zeros_like(order)  # 1 for ranks that are kept first, -1 for those that are not kept at all
    if (min_rank or max_rank is not None) and owners is not None:
        by_owner = order[torch.sort(owners[order], stable=True).indices]  # adapter by adapter, best rank first
        counts = torch.bincount(owners)
        place = torch.arange(len(order), device=scores.device) - (torch.cumsum(counts, 0) - counts)[owners[by_owner]]
        within = torch.empty_like(place)
        within[by_owner] = place  # 0 for the best rank of its adapter
        first = (within < min_rank).long()
        if max_rank is not None:
            first[within >= max_rank] = -1
        order = order[torch.sort(first[order], descending=True, stable=True).indices]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[:budget]] = True
    return mask & (first >= 0)
