"""How many dimensions a cloud of points has: the two-nearest-neighbours estimator (TwoNN).

Facco, d'Errico, Rodriguez & Laio 2017, Scientific Reports 7:12140. Where the density hardly changes between a point and
its second neighbour, mu = r2 / r1 (distances to the second and to the first neighbour) has P(mu > m) = m^-d whatever
the density is: ln mu is exponential with rate d. That is all the estimator uses, so neither labels nor gradients nor a
length scale is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["IntrinsicDimension", "intrinsic_dimension"]

METHODS = ("mle", "regression")
MIN_POINTS = 3  # a point needs two neighbours
CANDIDATES = 8  # neighbours by approximate distance, of which the two nearest are found exactly
BLOCK_ELEMENTS = 1 << 25  # of the distance matrix at a time, unless `block_size` says otherwise
SHARED_NEIGHBOURS = 1.6  # variance / that of independent ratios; measured on flat tori, d = 1 to 10: 1.4 to 1.65
STRIPS = 8  # blocks, at least; what lies below the diagonal of the distance matrix is not computed again
EXACT_ELEMENTS = 1 << 22  # differences in float64 at a time


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
    x: Tensor, method: str = "mle", trim: float = 0.1, *, confidence: float = 0.95, block_size: int | None = None
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
        block_size: rows of the distance matrix that are in memory at a time; None chooses. The result is the same.

    Distances are searched as one matrix product per block on the device of ``x``, with a rigorous bound of its rounding
    error; the two nearest neighbours of every point are then settled by float64 differences. Nothing of size n x n is
    stored. 1e5 points of 4096 features, fp32: 3.4 GiB beyond the 1.5 GiB of ``x`` (the distances would be 37 GiB), and
    17 minutes of one processor core (``benchmarks/results/intrinsic_dimension.csv``).

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
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size={block_size} is too small: give 1 or more, or None")
    points = _distinct_points(x)
    log_ratios = _log_ratios(points, block_size)
    n = len(log_ratios)
    kept = min(n, max(MIN_POINTS - 1, math.ceil(n * (1 - trim) - 1e-9)))
    smallest = log_ratios[:kept]
    if not smallest[-1] > 0:
        raise ValueError(
            f"x: the two nearest neighbours of {n - int((log_ratios > 0).sum())} of {n} points are equally far away, "
            "as on a regular grid, so TwoNN has nothing to measure: give data that is not quantised, or lower trim"
        )
    fit = _maximum_likelihood if method == "mle" else _regression
    estimate, low, high = fit(smallest, n, confidence)
    return IntrinsicDimension(
        estimate=estimate,
        low=low,
        high=_cube_with_estimate(high, n),
        n_points=n,
        n_duplicates=len(x) - n,
        method=method,
        trim=trim,
        confidence=confidence,
    )


def _distinct_points(x: Tensor) -> Tensor:
    """The different rows of x, float32 or float64; sorted, so the result does not depend on the order of x."""
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: give points as (n, features), e.g. hidden.flatten(0, -2)")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: give floating-point values, e.g. x.float()")
    points = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
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


def _log_ratios(points: Tensor, block_size: int | None) -> Tensor:
    """ln(r2 / r1) of distinct points, sorted, float64."""
    scale = _power_of_two_below(points)
    centred = points * scale
    centred -= centred.mean(0)
    zoom = _power_of_two_below(centred)
    centred *= zoom
    with _full_precision(points.device):
        squared = _two_nearest(points, centred, scale * zoom, block_size)
    squared = squared[squared[:, 0] > 0]  # closer than float64 can square: equal for our purpose
    if len(squared) < MIN_POINTS:
        raise ValueError(f"x has {len(squared)} points that float64 can tell apart: give {MIN_POINTS} or more")
    return (0.5 * (squared[:, 1] / squared[:, 0]).log()).sort().values


def _power_of_two_below(x: Tensor) -> float:
    """A factor that takes the largest element of x to [1/2, 1) and rounds nothing."""
    low, high = x.aminmax()
    return 2.0 ** min(500, -math.frexp(max(-float(low), float(high)))[1])


def _two_nearest(points: Tensor, centred: Tensor, scale: float, block_size: int | None) -> Tensor:
    """Squared distances of every point to its two nearest, shape (n, 2), float64, of ``scale * points``.

    Args:
        points: distinct points, shape (n, features).
        centred: about ``scale * (points - mean)``: matrix products of it cancel little.
    """
    n = len(points)
    found = torch.empty((n, 2), dtype=torch.float64, device=points.device)
    todo = torch.arange(n, device=points.device)
    for dtype in (torch.float32, torch.float64):  # the second pass is for the rows where the first cannot be sure
        if not len(todo):
            break
        candidates, bound = _candidates(centred, todo, dtype, block_size)
        nearest = _exact_distances(points, todo, candidates, scale).sort(dim=1).values[:, :2]
        found[todo] = nearest
        todo = todo[nearest[:, 1] > bound]
    everyone = torch.arange(n, device=points.device)
    for row in todo.tolist():  # differences below the resolution of float64 products: compare with every point
        others = everyone[everyone != row].unsqueeze(0)
        found[row] = _exact_distances(points, everyone[row : row + 1], others, scale)[0].sort().values[:2]
    return found


def _candidates(centred: Tensor, rows: Tensor, dtype: torch.dtype, block_size: int | None) -> tuple[Tensor, Tensor]:
    """For each of ``rows``: the other points that may be nearest, and a squared distance no further point is below.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x.y is wrong by at most g (|x| + |y|)^2 <= 2 g (|x|^2 + |y|^2), where
    g = (features + 16) eps covers dot products in any order and the centring, with a factor 2 to spare. Scaling both
    norms by 1 - 2 g therefore gives a lower bound of the true squared distance, and the points are ranked by it.

    Args:
        rows: increasing indices. If they are all points, each product serves both of its points.
        dtype: of the products.

    Returns:
        indices, int64 (len(rows), k), and bounds, (len(rows),).
    """
    n, features = centred.shape
    k = min(CANDIDATES, n - 1)
    numbers = torch.finfo(dtype)
    shrink = 1 - 2 * (features + 16) * numbers.eps
    height = block_size or min(math.isqrt(BLOCK_ELEMENTS), math.ceil(n / STRIPS))
    width = max(1, BLOCK_ELEMENTS // height)
    norms = torch.cat([part.to(dtype).square().sum(1) for part in centred.split(height)]) * shrink
    lowest = torch.full((len(rows), k), math.inf, dtype=dtype, device=rows.device)
    indices = torch.zeros((len(rows), k), dtype=torch.int64, device=rows.device)
    mirrored = len(rows) == n
    for top in range(0, len(rows), height):
        block = rows[top : top + height]
        bottom = top + len(block)
        ours = centred[block].to(dtype)
        for left in range(top if mirrored else 0, n, width):
            right = min(left + width, n)
            lower = torch.addmm(norms[left:right], ours, centred[left:right].to(dtype).T, alpha=-2)
            lower.add_(norms[block].unsqueeze(1))
            own = ((left <= block) & (block < right)).nonzero().squeeze(1)
            lower[own, block[own] - left] = math.inf
            _keep_lowest(lowest[top:bottom], indices[top:bottom], lower, left)
            if mirrored and right > bottom:
                first = max(left, bottom)
                _keep_lowest(lowest[first:right], indices[first:right], lower[:, first - left :].T.contiguous(), top)
    if k == n - 1:  # there is no further point
        return indices, torch.full((len(rows),), math.inf, dtype=torch.float64, device=rows.device)
    return indices, lowest.max(1).values.double() - features * numbers.tiny


def _keep_lowest(lowest: Tensor, indices: Tensor, offered: Tensor, first: int) -> None:
    """Replace ``lowest`` and ``indices`` (m, k) by the k lowest of them and ``offered`` (m, w): points ``first`` on."""
    k = lowest.shape[1]
    found = offered.topk(min(k, offered.shape[1]), largest=False)
    best = torch.cat([lowest, found.values], 1).topk(k, largest=False)
    indices.copy_(torch.cat([indices, found.indices + first], 1).gather(1, best.indices))
    lowest.copy_(best.values)


def _exact_distances(points: Tensor, rows: Tensor, others: Tensor, scale: float) -> Tensor:
    """Squared distances of ``rows`` to ``others`` (len(rows), k), from float64 differences. The same for any blocks."""
    result = torch.empty(others.shape, dtype=torch.float64, device=points.device)
    height = max(1, EXACT_ELEMENTS // (others.shape[1] * points.shape[1]))
    for start in range(0, len(rows), height):
        part = slice(start, start + height)
        there = points[others[part]].double().mul_(scale)
        there -= points[rows[part]].double().mul_(scale).unsqueeze(1)
        result[part] = there.square_().sum(-1)
    return result


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32: the error bound of `_candidates` is that of the dtype."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _maximum_likelihood(smallest: Tensor, n: int, confidence: float) -> tuple[float, float, float]:
    """Rate of n exponentials of which only the ``smallest`` are seen, and its interval.

    With independent ratios 2 d total ~ chi^2(2 kept); sharing neighbours leaves fewer degrees of freedom.
    """
    kept = len(smallest)
    rate = kept / float(smallest.sum() + (n - kept) * smallest[-1])
    freedom = 2 * kept / SHARED_NEIGHBOURS
    tail = (1 - confidence) / 2
    return rate, rate * _chi2_quantile(tail, freedom) / freedom, rate * _chi2_quantile(1 - tail, freedom) / freedom


def _regression(smallest: Tensor, n: int, confidence: float) -> tuple[float, float, float]:
    """Slope through the origin of Exp(1)'s expected order statistics over the ``smallest`` ln mu, and its interval.

    By Renyi's representation order statistic i is a sum of z_j / (n - j) over j < i with z_j ~ Exp(1), so the variance
    of the slope is a sum over j (first order in 1/n); the interval is that of its logarithm.
    """
    kept = len(smallest)
    weights = 1 / torch.arange(n, n - kept, -1, dtype=torch.float64, device=smallest.device)
    expected = weights.cumsum(0)
    slope = float((expected * smallest).sum() / smallest.square().sum())
    influence = weights * expected.flip(0).cumsum(0).flip(0) / expected.square().sum()
    error = math.sqrt(SHARED_NEIGHBOURS * float(influence.square().sum()))
    spread = math.exp(NormalDist().inv_cdf((1 + confidence) / 2) * error)
    return slope, slope / spread, slope * spread


def _chi2_quantile(p: float, freedom: float) -> float:
    """Wilson & Hilferty 1931: within 0.1 % from 40 degrees of freedom on, 3 % at 6."""
    c = 2 / (9 * freedom)
    return freedom * max(0.0, 1 - c + NormalDist().inv_cdf(p) * math.sqrt(c)) ** 3


def _cube_with_estimate(estimate: float, n: int) -> float:
    """Dimension of the uniform cube in which n points are expected to give ``estimate``."""
    low, high = estimate, 2 * estimate
    while high * _cube_shrink(high, n) < estimate:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * _cube_shrink(middle, n) < estimate else (low, middle)
    return high


def _cube_shrink(d: float, n: int) -> float:
    """TwoNN's expected estimate / d in the uniform cube [0, 1]^d.

    The number of points within r of a point is n P(sum of d squared differences <= r^2), and TwoNN measures its slope
    d ln P / d ln r where n P = 1. By large deviations (Chernoff) the slope is d f(t), t = ln(n) / d; this is a fit of
    f, within 2 % of d of what samples of n >= 500 give.
    """
    t = math.log(n) / d
    return 1 - math.exp(-t) * (0.24 + 0.76 * math.exp(-3.5 * math.sqrt(t)))
