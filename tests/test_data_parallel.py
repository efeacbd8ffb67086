"""DDP and FSDP2 in two real processes: the numbers are those of one process with both batches."""

import re
import sys
import types
from typing import Any

import pytest
import torch

from tests import replicated
from tests.optimizer_problem import differing, photo
from tests.replicated import make_model, make_optimizer, train
from tests.two_processes import WORLD, Pool

STEPS = 12
VADAM = {"num_examples": 80, "batch_size": WORLD * replicated.ROWS}


@pytest.mark.parametrize(
    ("options", "mesh", "steps", "samples"),
    [
        ({}, None, STEPS, 0),
        ({"hess_approx": "gradsq", "criterion": "sensitivity"}, None, STEPS, 0),
        ({"criterion": None, "backend": "compile"}, None, STEPS, 0),
        ({"num_examples": 40, "batch_size": "auto", "prior_std": 0.1}, None, STEPS, 0),
        ({}, (WORLD,), STEPS, 0),
        ({"hess_approx": "gradsq", "criterion": "sensitivity"}, (WORLD,), STEPS, 2),
        ({"criterion": "magnitude", "backend": "eager"}, (WORLD,), STEPS, 2),
        ({"backend": "triton", "criterion": None}, (WORLD,), 1, 0),
        ({"criterion": "inverse_std"}, (WORLD, 1), STEPS, 0),
        ({"criterion": "snr"}, (1, WORLD), STEPS, 0),
        ({"criterion": "snr", **VADAM}, (WORLD,), STEPS, 0),
    ],
    ids=[f"ddp {x}" for x in ("price", "gradsq", "compiled", "vadam")]
    + [f"fsdp {x}" for x in ("price", "gradsq", "eager", "triton", "copies", "hybrid", "vadam")],
)
def test_processes_equal_one_with_both_batches(
    options: dict[str, Any], mesh: tuple[int, ...] | None, steps: int, samples: int, two_processes: Pool
) -> None:
    """Bit for bit, masks too: DDP halves and adds two gradients, and so does one process that adds two halved losses.

    Shards are uneven, most begin at no multiple of four, and one of a bias is empty.
    """
    if options.get("backend") == "triton":
        pytest.importorskip("triton")
    first, second = two_processes(replicated.train_in_two, steps, mesh, options, samples)
    assert differing(first, second) == []
    if options.get("batch_size") == "auto":  # what the replicas count, stated
        options = {**options, "batch_size": WORLD * replicated.ROWS}
    model = make_model()
    optimizer = make_optimizer(model, **options)
    train(model, optimizer, range(steps), range(WORLD), samples)
    expected = photo(optimizer)
    assert differing(first, expected) == []
    pruned = [key for key, mask in expected.items() if key.endswith("rank_mask") and not mask.all()]
    assert pruned or options["criterion"] is None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "fsdp1",
            r"_fsdp_wrapped_module\S+ belongs to FSDP1 .* use FSDP2, torch\.distributed\.fsdp\.fully_shard\(model\)",
        ),
        ("fsdp1 views", "belongs to FSDP1 .* use FSDP2"),
        ("columns", r"parameter A is distributed as \(Shard\(dim=1\),\); IVON takes DTensors that are sharded along"),
        ("zero redundancy", "ZeroRedundancyOptimizer leaves each process a part of the parameters"),
        ("own noise", "sync=True needs whole parameters, and first.A is sharded; take sync=False"),
    ],
)
def test_what_cannot_be_trained_is_refused(how: str, message: str, two_processes: Pool) -> None:
    for answer in two_processes(replicated.refused, how):
        assert re.search(message, answer), answer


def test_parameters_replaced_by_deepspeed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO 1 and 2 put one flat partition per group in the place of its parameters; others may put what they like."""
    model = make_model()
    optimizer = make_optimizer(model, criterion=None)
    train(model, optimizer, [0], [0])
    group = optimizer.param_groups[0]
    flat = torch.cat([p.detach().reshape(-1) for p in group["params"]]).requires_grad_()
    group["params"], group["param_names"] = [flat], ["flat"]
    flat.grad = torch.zeros_like(flat)
    before = flat.detach().clone()
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    for use in (optimizer.train, optimizer.step):
        with pytest.raises(RuntimeError, match=r"DeepSpeed has replaced the optimizer's parameters .* use FSDP2"):
            use()
    assert torch.equal(flat, before)
    monkeypatch.delitem(sys.modules, "deepspeed")
    optimizer.train()
    assert not torch.equal(flat, before)
