"""Replicas of one model under DistributedDataParallel, in two real processes."""

from typing import Any

import pytest

from tests import replicated
from tests.replicated import differing, make_model, make_optimizer, snapshot, train
from tests.two_processes import WORLD, Pool

STEPS = 12


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hess_approx": "gradsq", "criterion": "sensitivity"},
        {"criterion": None, "backend": "compile"},
        {"num_examples": 40, "batch_size": "auto", "prior_std": 0.1},
    ],
    ids=["price", "gradsq", "compiled", "vadam"],
)
def test_replicas_equal_one_process_with_both_batches(options: dict[str, Any], two_processes: Pool) -> None:
    """Bit for bit: DDP halves and adds two gradients, and so does one process that accumulates two halved losses."""
    first, second = two_processes(replicated.train_in_ddp, STEPS, options)
    assert differing(first, second) == []
    if options.get("batch_size") == "auto":  # what the replicas count, stated
        options = {**options, "batch_size": WORLD * replicated.ROWS}
    model = make_model()
    optimizer = make_optimizer(model, **options)
    train(model, optimizer, range(STEPS), range(WORLD))
    assert differing(first, snapshot(optimizer)) == []
