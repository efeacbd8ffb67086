"""How many dimensions a cloud of points has: the two-nearest-neighbours estimator (TwoNN).

Facco, d'Errico, Rodriguez & Laio 2017, Scientific Reports 7:12140. Where the density hardly changes between a point and
its second neighbour, mu = r2 / r1 (distances to the second and to the first neighbour) has P(mu > m) = m^-d whatever
the density is: ln mu is exponential with rate d. That is all the estimator uses, so neither labels nor gradients nor a
length scale is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["IntrinsicDimension", "intrinsic_dimension"]

METHODS = ("mle", "regression")
MIN_POINTS = 3  # a point needs two neighbours
CANDIDATES = 8  # neighbours by approximate distance, of which the two nearest are found exactly
BLOCK_ELEMENTS = 1 << 24  # in memory at a time; the result does not depend on it
SHARED_NEIGHBOURS = 1.6  # variance / that of independent ratios; measured on flat tori, d = 1 to 10: 1.4 to 1.65


@dataclass(frozen=True)
class IntrinsicDimension:
    """An estimate of :func:`intrinsic_dimension`; ``float(result)`` is the estimate.

    Attributes:
        estimate: TwoNN's estimate, not corrected for anything.
        low: lower end of the confidence interval.
        high: upper end of the confidence interval, raised by the finite-sample bias (below): the interval is lopsided.
        n_points: distinct points, the sample that was used.
        n_duplicates: points dropped because an equal one was kept.
        method: "mle" or "regression".
        trim: share of the points, those with the largest ratios, whose ratio was not used.
        confidence: nominal coverage of the interval.

    Finite-sample bias: in high dimensions even the nearest neighbours are far away, feel the edge and the curvature of
    the data, and TwoNN comes out too low. By how much depends, to leading order, on ln(n) / d alone. Measured at
    n = 5000 (six samples each):

    ==============  ======  ======  ======  ======  ======
    d                    4       8      12      20      40
    ==============  ======  ======  ======  ======  ======
    sphere S^d       -0 %    -4 %    -7 %   -13 %   -27 %
    Gaussian         +0 %    +0 %    -3 %   -13 %   -28 %
    cube [0, 1]^d    -2 %   -10 %   -15 %   -21 %   -31 %
    ==============  ======  ======  ======  ======  ======

    More points hardly help: ten times as many take the cube of d = 20 to -18 %. The estimate is not corrected, because
    the bias depends on a shape that nobody knows. Instead ``high`` is the dimension of the uniform cube, the worst of
    these shapes, in which the upper end of the sampling interval would be expected; at n = 5000 that raises it by 4 %
    at d = 4, 12 % at 8 and 29 % at 20. ``low`` is the end of the sampling interval. Strong curvature can also make the
    estimate too high (a product of five circles, n = 1000: +5 %), and no interval knows of it.
    """

    estimate: float
    low: float
    high: float
    n_points: int
    n_duplicates: int
    method: str
    trim: float
    confidence: float

    def __float__(self) -> float:
        return self.estimate


def intrinsic_dimension(
    x: Tensor, method: str = "mle", trim: float = 0.1, *, confidence: float = 0.95
) -> IntrinsicDimension:
    """TwoNN estimate of the intrinsic dimension of points (Facco et al. 2017).

    Args:
        x: points, shape (n, features), any floating-point dtype and device. Equal points count once.
        method: "mle", the maximum of the likelihood of the n * (1 - trim) smallest ratios (type II censoring: of the
            others it is known that they are larger); trim = 0 gives n / sum(ln mu). "regression", the slope through the
            origin of -ln(1 - F) over ln mu, the form of the paper, with F's expected order statistics.
        trim: share of the points, in [0, 1), with the largest ratios that is cut off; these suffer most from noise and
            outliers.
        confidence: nominal coverage of the interval, in (0, 1); untrimmed regression covers a few percent less.

    Distances are searched by float64 matrix products on the device of ``x``, whose rounding error is bounded; the two
    nearest neighbours of every point are then settled by differences. Nothing of size n x n is stored.

    Returns:
        estimate, confidence interval and counts. See `IntrinsicDimension` for the bias above about ten dimensions.

    Raises:
        ValueError: x is not (n, features), not floating point or not finite, has fewer than 3 distinct points, or its
            points have both neighbours equally far away (a regular grid); an argument is outside its bounds.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: choose {' or '.join(map(repr, METHODS))}")
    if not 0 <= trim < 1:
        raise ValueError(f"trim={trim} is outside [0, 1): give the share of points to cut off, e.g. 0.1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is outside (0, 1): give e.g. 0.95")
    points = _distinct_points(x)
    n = len(points)
    squared = _two_nearest(points).clamp(min=torch.finfo(torch.float64).tiny)
    log_ratios = (0.5 * (squared[:, 1] / squared[:, 0]).log()).sort().values
    smallest = log_ratios[: min(n, max(MIN_POINTS - 1, math.ceil(n * (1 - trim) - 1e-9)))]
    if not smallest[-1] > 0:
        raise ValueError(
            f"x: the two nearest neighbours of {n - int((log_ratios > 0).sum())} of {n} points are equally far away, "
            "as on a regular grid, so TwoNN has nothing to measure: give data that is not quantised, or lower trim"
        )
    estimate, error = (_maximum_likelihood if method == "mle" else _regression)(smallest, n)
    spread = math.exp(NormalDist().inv_cdf((1 + confidence) / 2) * error)
    high = _cube_with_estimate(estimate * spread, n)
    return IntrinsicDimension(estimate, estimate / spread, high, n, len(x) - n, method, trim, confidence)


def _distinct_points(x: Tensor) -> Tensor:
    """The different rows of x, float32 or float64; sorted, so the result does not depend on the order of x."""
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: give points as (n, features), e.g. hidden.flatten(0, -2)")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: give floating-point values, e.g. x.float()")
    points = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    finite = torch.isfinite(points).all(1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise ValueError(
            f"x has NaN or infinity in {int((~finite).sum())} of {len(x)} points, first in point {first}: remove them"
        )
    points = torch.unique(points, dim=0) if len(points) > 1 else points
    if len(points) < MIN_POINTS:
        raise ValueError(f"x has {len(points)} distinct points of {len(x)}: give {MIN_POINTS} or more")
    return points


def _two_nearest(points: Tensor) -> Tensor:
    """Squared distances of every point to its two nearest, shape (n, 2), float64, times a constant.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x.y is wrong by at most g (|x| + |y|)^2 <= 2 g (|x|^2 + |y|^2), where
    g = (features + 16) eps covers dot products in any order and the centring, with a factor 2 to spare. Scaling both
    norms by 1 - 2 g therefore gives a lower bound of the true squared distance, and the points are ranked by it.
    """
    n, features = points.shape
    low, high = points.aminmax()
    exponent = math.frexp(max(-float(low), float(high)))[1]
    scale = 2.0 ** max(-1000, min(1000, -exponent))  # a power of two rounds nothing; now no square overflows
    centred = points.to(torch.float64, copy=True).mul_(scale)
    centred -= centred.mean(0)
    norms = torch.linalg.vector_norm(centred, dim=1).square_()
    norms *= 1 - 2 * (features + 16) * torch.finfo(torch.float64).eps
    everyone = torch.arange(n, device=points.device)
    found = []
    for rows in everyone.split(max(1, BLOCK_ELEMENTS // max(n, CANDIDATES * features))):
        bounds = torch.addmm(norms, centred[rows], centred.T, alpha=-2).add_(norms[rows, None])
        bounds[everyone[: len(rows)], rows] = math.inf
        lowest, candidates = bounds.topk(min(CANDIDATES, n - 1), largest=False)
        nearest = _exactly(points, scale, rows, candidates)
        if n - 1 > CANDIDATES:
            for i in (nearest[:, 1] > lowest[:, -1]).nonzero().flatten().tolist():  # a further point may be nearer
                others = everyone[everyone != rows[i]]
                nearest[i] = _exactly(points, scale, rows[i : i + 1], others[None])[0]
        found.append(nearest)
    return torch.cat(found)


def _exactly(points: Tensor, scale: float, rows: Tensor, others: Tensor) -> Tensor:
    """The two smallest squared distances of ``rows`` to ``others`` (len(rows), k), from differences."""
    differences = points[others].double().mul_(scale)
    differences -= points[rows].double().mul_(scale).unsqueeze(1)
    return differences.square_().sum(-1).sort(dim=1).values[:, :2]


def _maximum_likelihood(smallest: Tensor, n: int) -> tuple[float, float]:
    """Rate of n exponentials of which only the ``smallest`` are seen, and the standard deviation of its logarithm."""
    kept = len(smallest)
    rate = kept / float(smallest.sum() + (n - kept) * smallest[-1])
    return rate, math.sqrt(SHARED_NEIGHBOURS / kept)


def _regression(smallest: Tensor, n: int) -> tuple[float, float]:
    """Slope through the origin of Exp(1)'s expected order statistics over the ``smallest`` ln mu, and the same of it.

    By Renyi's representation order statistic i is a sum of z_j / (n - j) over j < i with z_j ~ Exp(1), so the variance
    of the slope is a sum over j (first order in 1/n).
    """
    weights = 1 / torch.arange(n, n - len(smallest), -1, dtype=torch.float64, device=smallest.device)
    expected = weights.cumsum(0)
    slope = float((expected * smallest).sum() / smallest.square().sum())
    influence = weights * expected.flip(0).cumsum(0).flip(0) / expected.square().sum()
    return slope, math.sqrt(SHARED_NEIGHBOURS * float(influence.square().sum()))


def _cube_with_estimate(estimate: float, n: int) -> float:
    """Dimension of the uniform cube in which n points are expected to give ``estimate``."""
    d = estimate
    for _ in range(60):  # the error at least halves each time
        d = estimate / _cube_shrink(d, n)
    return d


def _cube_shrink(d: float, n: int) -> float:
    """TwoNN's expected estimate / d in the uniform cube [0, 1]^d.

    The number of points within r of a point is n P(sum of d squared differences <= r^2), and TwoNN measures its slope
    d ln P / d ln r where n P = 1. By large deviations (Chernoff) the slope is d f(t), t = ln(n) / d; this is a fit of
    f, within 2 % of d of what samples of n >= 500 give.
    """
    t = math.log(n) / d
    return 1 - math.exp(-t) * (0.24 + 0.76 * math.exp(-3.5 * math.sqrt(t)))
