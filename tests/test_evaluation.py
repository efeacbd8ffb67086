"""Metrics of predicted probabilities, against numbers worked out by hand and an independent formula."""

import math

import numpy as np
import pytest
import torch

from ivon_lora.posterior.metrics import BINS, nll, reliability, score_probabilities


def random_predictions(classes, n=2000, sharpness=2.0):
    generator = torch.Generator().manual_seed(classes)
    p = (sharpness * torch.randn(n, classes, generator=generator, dtype=torch.float64)).softmax(-1)
    return p, torch.randint(classes, (n,), generator=generator)


def test_metrics_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])
    scores = score_probabilities(p, torch.tensor([0, 1, 0, 0]))
    assert scores.n == 4
    assert scores.accuracy == 0.75
    assert scores.nll == pytest.approx(-(math.log(0.9) + math.log(0.6) + math.log(0.2) + math.log(0.7)) / 4, rel=1e-6)
    # p(class 1) against the label
    assert scores.brier == pytest.approx((0.1**2 + 0.4**2 + 0.8**2 + 0.3**2) / 4, rel=1e-6)
    # four bins of one example each
    assert scores.ece == pytest.approx((0.1 + 0.4 + 0.8 + 0.3) / 4, rel=1e-6)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("sharpness", [2.0, 60.0], ids=["soft", "saturated"])
def test_the_calibration_error_is_that_of_its_definition(classes, sharpness):
    p, labels = random_predictions(classes, sharpness=sharpness)
    sure, right = p.max(-1).values.numpy().astype(np.float32), (p.argmax(-1) == labels).numpy()
    index = np.minimum((sure * BINS).astype(int), BINS - 1)  # a bin has its lower end, the last one both
    want = sum(abs(right[index == b].mean() - sure[index == b].mean()) * (index == b).mean() for b in np.unique(index))
    assert score_probabilities(p, labels).ece == pytest.approx(want, abs=2e-6)
    bins = reliability(p, labels)
    assert bins.gap == pytest.approx(want, abs=2e-6)
    assert sum(bins.count) == len(labels)


def test_the_number_of_bins_is_used():
    p, labels = random_predictions(3)
    one = abs(score_probabilities(p, labels).accuracy - float(p.max(-1).values.mean()))
    assert reliability(p, labels, bins=1).gap == pytest.approx(one, abs=1e-6)
    assert len(reliability(p, labels, bins=7).count) == 7
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        reliability(p, labels, bins=0)


def test_certain_and_wrong_is_finite():
    assert math.isfinite(nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])))


def test_brier_for_more_classes_is_half_the_squared_distance():
    scores = score_probabilities(torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64), torch.tensor([1]))
    assert scores.brier == pytest.approx((0.25 + 0.49 + 0.04) / 2)


def test_probabilities_that_carry_gradients_or_16_bits():
    p, labels = random_predictions(3)
    exact = score_probabilities(p, labels)
    assert score_probabilities(p.requires_grad_(), labels) == exact
    assert score_probabilities(p.bfloat16(), labels).nll == pytest.approx(exact.nll, rel=0.02)


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        (torch.ones(3), torch.zeros(3).long(), r"probabilities must have the shape \(n, classes\)"),
        (torch.ones(3, 1), torch.zeros(3).long(), "two classes or more"),
        (torch.ones(0, 2), torch.zeros(0).long(), "one example"),
        (torch.ones(3, 2), torch.zeros(2).long(), r"labels must be integers of shape \(3,\)"),
        (torch.ones(3, 2), torch.zeros(3), "torch.float32"),
        (torch.ones(3, 2), torch.tensor([0, 1, 2]), r"labels must lie in \[0, 1\]"),
        (torch.ones(3, 2), torch.tensor([0, 1, -1]), "-1 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(p, labels, message):
    for metric in (nll, reliability, score_probabilities):
        with pytest.raises(ValueError, match=message):
            metric(p, labels)
