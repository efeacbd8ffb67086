"""One softmax temperature of validation labels, or of probabilities."""

import pytest
import torch
from scipy import optimize

from ivon_lora import fit_temperature


def overconfident(n=400, classes=3, factor=2.5):
    """Logits ``factor`` times larger than those that the labels were drawn from."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return factor * logits, labels


def test_the_temperature_is_where_the_nll_is_least():
    logits, labels = overconfident()

    def loss(t):
        return float(torch.nn.functional.cross_entropy(logits / t, labels))

    found = fit_temperature(logits.softmax(-1), labels)
    assert found == pytest.approx(optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded").x, rel=1e-4)
    assert 2.1 < found < 2.9  # 2.5, but for the chance of 400 labels
    assert fit_temperature((logits / 5).float().softmax(-1), labels) == pytest.approx(found / 5, rel=1e-4)


def test_probabilities_as_targets_give_back_how_certain_they_are():
    logits, labels = overconfident()
    assert fit_temperature(logits.softmax(-1), (logits / 1.9).softmax(-1)) == pytest.approx(1.9)
    hard = torch.nn.functional.one_hot(labels, 3).double()
    assert fit_temperature(logits.softmax(-1), hard) == fit_temperature(logits.softmax(-1), labels)
    with pytest.raises(ValueError, match=r"of the shape of probabilities, \(400, 3\), got \(400, 2\)"):
        fit_temperature(logits.softmax(-1), hard[:, :2])


def test_certainty_without_errors_and_errors_without_end_stay_within_bounds():
    right = torch.eye(2)[[0, 1] * 30] * 0.8 + 0.1
    labels = torch.tensor([0, 1] * 30)
    assert 0.05 <= fit_temperature(right, labels) < 0.06
    assert fit_temperature(right.flip(1), labels) == pytest.approx(20)
    assert fit_temperature(torch.eye(2)[[0, 1] * 30], 1 - labels) == pytest.approx(20)  # p = 0 of what happens


def test_few_labels_bring_a_warning_and_wrong_ones_an_error():
    logits, labels = overconfident(49)
    with pytest.warns(UserWarning, match="a softmax temperature of 49 examples: below 50"):
        fit_temperature(logits.softmax(-1), labels)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\]"):
        fit_temperature(logits.softmax(-1), labels + 1)
