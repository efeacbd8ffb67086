"""A prior whose width the data choose, one for each parameter tensor: empirical Bayes, ``prior_std="empirical"``.

Of the prior N(0, 1 / (lambda delta)) of a tensor, the variational objective lambda E_q[L] + KL(q | prior) sees

    -n/2 log(lambda delta) + lambda delta / 2 sum_j (m_j^2 + sigma_j^2),

which is smallest at ``delta = 1 / (lambda mean_j(m_j^2 + sigma_j^2))`` (Graves 2011, eq. 15; per matrix of LoRA in
arXiv:2506.14280). sigma depends on delta, so this is repeated: expectation maximisation for the evidence. Each
repetition moves delta the less the less the data say, so it is safe long before mean and curvature have settled.

The prior only narrows. Where the data say little of a tensor, the fixed point is far out, at m^2 divided by the share
that the data have in the precision; and its m are initial values (A of LoRA), which are no news at all. The width
that it starts with stays what a user can rely on: the largest noise of a weight.

The mean keeps its pull delta m (arXiv:2506.14280 switches it off): the derivative of ``n/2 log mean_j(m_j^2 +
sigma_j^2)`` by m_j is ``lambda delta m_j``, so it is the gradient of the same objective at the best delta.
"""

from __future__ import annotations

from ivon_lora.functional._arrays import Array, clamp, ones_like, where

#: Updates of a parameter between two of its prior's: a mean that moves by a learning rate says little new in one.
INTERVAL = 10

#: How far the standard deviation of a prior may fall below where it starts, as a factor. Tensors of which the data say
#: almost nothing and whose mean is zero (B of LoRA, before it moves) have no other bound.
RANGE = 10.0


def second_moment(mean: Array, hess: Array, ess: float, weight_decay: Array) -> Array:
    """m^2 + sigma^2 of each element under the posterior, sigma^2 = 1 / (lambda (h + delta)).

    Where h = 0 the data have said nothing of the element, whose own optimum is m = 0 and sigma = the prior's: it counts
    as if it were there. That does not move the fixed point, and keeps initial values (A of LoRA, while B is zero) out
    of it.
    """
    precision = (hess + weight_decay) * ess
    return where(hess > 0.0, mean * mean, 0.0) + ones_like(precision) / precision


def next_weight_decay(moment: Array, ess: float, initial: float) -> Array:
    """delta = 1 / (lambda moment), for a mean of :func:`second_moment`, from ``initial`` to ``initial RANGE^2``."""
    precision = moment * ess
    return clamp(ones_like(precision) / precision, initial, initial * RANGE**2)
