"""Rank correlation, and intervals for means over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` independent values, and half the width of its 95 % interval (NaN for one value)."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.half:.4f}"

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half


def average_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1 of the elements of ``x`` (n,); equal elements share the mean of their ranks."""
    order = np.argsort(x, kind="stable")
    ordered = x[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ends = np.r_[starts[1:], len(x)]
    ranks = np.empty(len(x))
    ranks[order] = np.repeat((starts + 1 + ends) / 2, ends - starts)
    return ranks


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of two arrays (n,): Pearson's of their average ranks; NaN if one is constant."""
    a, b = average_ranks(x), average_ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval by Student's t: half width t(.975, n - 1) s / sqrt(n).

    Raises:
        ValueError: no values.
    """
    from scipy.stats import t

    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    if n == 1:
        return Interval(float(values[0]), math.nan, 1)
    half = float(t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(float(np.mean(values)), half, n)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval:
    """Interval of ours minus theirs over the seeds that both have.

    Raises:
        ValueError: they have no seed in common.
    """
    seeds = sorted(set(ours) & set(theirs))
    return interval([ours[seed] - theirs[seed] for seed in seeds])
