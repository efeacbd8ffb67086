"""Importance criteria and rank scores against float64 oracles."""

import numpy as np
import pytest
import torch
from scipy.special import erfc

from ivon_lora.functional import importance as scores


def snr_abs_float64(a):
    """SNR of the folded normal, in the form without cancellation, with libm's exp and erfc in double precision."""
    d = np.sqrt(2 / np.pi) * np.exp(-a * a / 2) - a * erfc(a / np.sqrt(2))
    return (a + d) / np.sqrt(1 - 2 * a * d - d * d)


def test_snr_abs_from_0_to_1e8():
    a = np.concatenate([[0.0], np.linspace(1e-6, 12, 400_001), np.logspace(1, 8, 10_001)]).astype(np.float32)
    want = snr_abs_float64(a.astype(np.float64))
    for got in (scores.snr_abs(a), scores.snr_abs(torch.from_numpy(a)).numpy()):
        assert got.dtype == np.float32
        assert np.abs(got / want - 1).max() < 2e-6  # required: 1e-5
    assert scores.snr_abs(np.float64([0.0]))[0] == pytest.approx(1.3236, abs=1e-4)


def test_snr_abs_rises_to_infinity_and_never_hides_a_nan():
    np.testing.assert_array_equal(
        scores.snr_abs(np.float32([np.inf, np.nan, 3e38])), np.float32([np.inf, np.nan, 3e38])
    )
    s = scores.snr_abs(np.linspace(0, 12, 2001, dtype=np.float32))
    # neighbours are 6e-3 apart; the slope is 0.02 at a = 0.006, so the step there exceeds the error of 2e-6
    assert (np.diff(s)[2:] > 0).all()


@pytest.mark.parametrize("criterion", ["snr_abs", "snr", "magnitude", "inverse_std"])
def test_criteria(criterion):
    rng = np.random.default_rng(0)
    mean = rng.standard_normal(1000).astype(np.float32)
    root = rng.uniform(0.1, 1e4, 1000).astype(np.float32)
    m, r = mean.astype(np.float64), root.astype(np.float64)
    want = {"snr_abs": snr_abs_float64(abs(m) * r), "snr": abs(m) * r, "magnitude": abs(m), "inverse_std": r}[criterion]
    np.testing.assert_allclose(scores.importance(criterion, mean, root), want, rtol=1e-5)
    got = scores.importance(criterion, torch.from_numpy(mean), torch.from_numpy(root))
    np.testing.assert_array_equal(got.numpy(), scores.importance(criterion, mean, root))


@pytest.mark.parametrize(
    ("shape", "rank_dim"), [((6, 98), 0), ((33, 6), 1), ((6, 1), 0), ((6,), 0), ((6, 3, 5, 5), 0), ((7, 6, 1, 1), 1)]
)
def test_rank_mean(shape, rank_dim):
    x = torch.rand(shape)
    other = tuple(d for d in range(len(shape)) if d != rank_dim)
    want = x.double().numpy().mean(axis=other)
    got = scores.rank_mean(x, rank_dim)
    assert got.dtype == torch.float32
    assert got.shape == (6,)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-7)
    np.testing.assert_allclose(scores.rank_mean(x.double(), rank_dim).numpy(), want, rtol=1e-7)
    equal = torch.full((2, 1_000_001), 0.1)
    assert scores.rank_mean(equal, 0).tolist() == [np.float32(0.1)] * 2, "sums do not drift"
