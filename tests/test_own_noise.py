"""``sync=True``: replicas draw noise of their own and exchange gradients and curvatures, in two real processes."""

import re
from typing import Any

import pytest
import torch

from tests import replicated
from tests.optimizer_problem import differing, photo
from tests.replicated import ROWS, batch, loss_of, make_model, make_optimizer, train
from tests.two_processes import WORLD, Pool

STEPS = 12


def two_samples_in_one_process(steps: int, **options: Any) -> dict[str, torch.Tensor]:
    model = make_model()
    optimizer = make_optimizer(model, mc_samples=WORLD, **options)
    for step in range(steps):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            losses = []
            for micro in range(2):
                losses.append(loss_of(model, *batch(2 * step + micro, 0)) / 2)
                losses[-1].backward()
            return torch.stack(losses).sum()

        optimizer.step(closure)
    return photo(optimizer)


#: learning rate 0: Adam's second moment is that of 2 B examples for the replicas, and of B for the samples
FISHER = {"num_examples": 40, "noise_warmup": 0, "criterion": None, "lr": 0.0}


@pytest.mark.parametrize(
    ("options", "of_samples"),
    [
        ({}, {}),
        ({"maximize": True}, {}),
        ({"hess_approx": "gradsq", "criterion": None, "backend": "compile"}, {}),
        ({**FISHER, "batch_size": 4 * ROWS}, {"batch_size": 2 * ROWS}),
        ({**FISHER, "batch_size": "auto"}, {"batch_size": 2 * ROWS}),
    ],
)
def test_two_replicas_are_one_process_with_two_samples(
    options: dict[str, Any], of_samples: dict[str, Any], two_processes: Pool
) -> None:
    """Bit for bit: replica r draws what one process draws as its r-th sample, and sums of two have one order.

    VAdam's curvature is that of the batch of one replica: two replicas with B examples each are two samples with B.
    """
    steps = 14 if "num_examples" in options else STEPS  # VAdam draws no noise in the first ten
    first, second = two_processes(replicated.train_with_own_noise, steps, "same batch", options)
    assert differing(first, second) == []
    assert differing(first, two_samples_in_one_process(steps, **{**options, **of_samples})) == []


def test_every_way_to_keep_local_gradients_gives_the_same_bits(two_processes: Pool) -> None:
    ways = ["without", "attached before ddp", "attached after ddp", "no_sync of ddp"]
    runs = [two_processes(replicated.train_with_own_noise, STEPS, way, {}) for way in ways]
    for first, second in runs:
        assert differing(first, second) == []
        assert differing(first, runs[0][0]) == []


def test_curvature_is_unbiased_and_of_less_variance(two_processes: Pool) -> None:
    """E f = mean of c_r = 1.5. With f_r = c_r (m + sigma eps_r) eps_r / sigma, var f_r = c_r^2 (2 + m^2 / sigma^2)."""
    snr_squared = 0.1**2 * 10.0  # m^2 / sigma^2
    variance = {False: 1.5**2 * (2 + snr_squared), True: (1.0**2 + 2.0**2) / 4 * (2 + snr_squared)}
    for sync in (False, True):
        first, second = two_processes(replicated.curvature_of_one_step, sync)
        assert torch.equal(first, second)
        assert first.mean().item() == pytest.approx(1.5, abs=5 * (variance[sync] / len(first)) ** 0.5)
        assert first.var().item() == pytest.approx(variance[sync], rel=0.1)  # 5 standard errors of a variance


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("averaged", r"averaged already: call optimizer\.attach\(model\)"),
        ("weights", "replicas differ in weights"),
        ("seed", "replicas differ in weights, state, seed"),
        ("samples", "some replicas drew 1 samples for this step, others 2"),
    ],
)
def test_misuse_is_refused_on_all_replicas_and_changes_nothing(fault: str, message: str, two_processes: Pool) -> None:
    for answer in two_processes(replicated.refusal, fault):
        assert not answer.startswith("changed")
        assert re.search(message, answer), answer


def test_gradients_missing_on_some_replicas(two_processes: Pool) -> None:
    first, second = two_processes(replicated.train_with_missing_gradients)
    assert differing(first, second) == []
    assert first["first.A/step"].item() == 3
    assert first["second.A/step"].item() == 2  # skipped in the step in which nobody had a gradient
    assert "head.weight/step" not in first or first["head.weight/step"].item() == 0


def test_without_a_process_group_it_changes_nothing() -> None:
    runs = []
    for sync in (False, True):
        model = make_model()
        optimizer = make_optimizer(model, sync=sync)
        train(model, optimizer, range(STEPS), range(WORLD))
        runs.append(photo(optimizer))
    assert differing(*runs) == []
