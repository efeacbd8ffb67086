"""Parameters sharded over two real processes by FSDP2: the numbers are those of whole parameters."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from typing import Any

import pytest
import torch

from ivon_lora.backends import Backend, Work
from ivon_lora.backends.compiled import Compiled
from ivon_lora.backends.eager import BlockedEager, TensorEager
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey
from tests import replicated
from tests.replicated import differing, make_model, make_optimizer, snapshot, train
from tests.two_processes import WORLD, Pool

STEPS = 12


@pytest.mark.parametrize(
    ("options", "mesh", "steps"),
    [
        ({}, (WORLD,), STEPS),
        ({"hess_approx": "gradsq", "criterion": "sensitivity"}, (WORLD,), STEPS),
        ({"criterion": "magnitude", "backend": "compile"}, (WORLD,), STEPS),
        ({"backend": "triton", "criterion": None}, (WORLD,), 1),
        ({"criterion": "inverse_std"}, (WORLD, 1), STEPS),
        ({"criterion": "snr"}, (1, WORLD), STEPS),
        ({"criterion": "snr", "num_examples": 40, "batch_size": 8}, (WORLD,), STEPS),
    ],
    ids=["price", "gradsq", "compiled", "triton", "copies", "hybrid", "priors"],
)
def test_sharded_training_equals_one_process(
    options: dict[str, Any], mesh: tuple[int, ...], steps: int, two_processes: Pool
) -> None:
    """Bit for bit, state and masks too: noise and scores know nothing of shards, which cut ranks of A and rows of B.

    The shards are uneven, most begin at no multiple of four, and one of the head's bias is empty.
    """
    first, second = two_processes(replicated.train_in_fsdp, steps, mesh, options)
    assert differing(first, second) == []
    model = make_model()
    optimizer = make_optimizer(model, **options)
    train(model, optimizer, range(steps), range(WORLD))
    expected = snapshot(optimizer)
    assert differing(first, expected) == []
    pruned = [key for key, mask in expected.items() if key.endswith("rank_mask") and not mask.all()]
    assert pruned or steps < STEPS


# ---------------------------------------------------------------- pieces, within one process

KEY = NoiseKey(seed=5, step=3)
NUMBERS = Hyper(
    ess=30.0, weight_decay=0.01, lr=0.1, beta1=0.9, beta1_complement=0.1, rho=0.2, clip_radius=0.7, debias=0.5,
    square_scale=30.0, inverse_batch=1 / 8, noise_ess=30.0, curvature="price", step_rule="newton",
)  # fmt: skip


def make_work(shape: tuple[int, ...], rank_dim: int) -> Work:
    generator = torch.Generator().manual_seed(0)
    new = [torch.randn(shape, generator=generator) for _ in range(4)]
    mask = torch.rand(shape[rank_dim], generator=generator) < 0.5
    return Work(
        7, new[0], new[1], new[2], new[3].abs() + 0.5, new[0].clone(), rank_mask=mask, rank_dim=rank_dim,
        banked_grad=torch.zeros(shape), banked_curvature=torch.zeros(shape),
    )  # fmt: skip


def piece(work: Work, first: int, last: int) -> Work:
    """Rows ``first..last-1``, in the same memory."""
    names = ("param", "mean", "momentum", "hess", "grad", "banked_grad", "banked_curvature")
    cut = {name: getattr(work, name)[first:last] for name in names}
    return dataclasses.replace(work, **cut, offset=first * work.param[0].numel())


@pytest.mark.parametrize("backend", [BlockedEager, TensorEager, Compiled])
@pytest.mark.parametrize(("shape", "rank_dim"), [((9, 7), 0), ((9, 5), 1), ((3, 5, 3), 1), ((4, 1501), 0), ((5, 1), 0)])
def test_pieces_equal_the_whole(backend: type[Backend], shape: tuple[int, ...], rank_dim: int) -> None:
    whole, cut = make_work(shape, rank_dim), make_work(shape, rank_dim)
    rows = shape[0]
    pieces = [piece(cut, *bounds) for bounds in ((0, 1), (1, 1), (1, rows - 1), (rows - 1, rows))]
    for works in ([whole], pieces):
        runner = backend()
        runner.bank(works, NUMBERS, KEY)
        runner.step(works, NUMBERS, KEY, 2)
        runner.sample(works, NUMBERS, NoiseKey(5, 4))
    for name in ("param", "momentum", "hess", "banked_curvature"):
        assert torch.equal(getattr(whole, name), getattr(cut, name)), name


def test_a_piece_of_a_huge_tensor_draws_the_noise_of_its_place() -> None:
    """Beyond 2^34 elements the number of a group of four fills more than one word of the counter."""
    from ivon_lora.functional.noise import normal_array

    first = (1 << 34) - 1030
    expected = normal_array(KEY, 7, first, first + 2060)
    for backend in (BlockedEager(), TensorEager(), Compiled()):
        work = make_work((2060, 1), 1)
        work.mean.zero_()
        work.hess.fill_(1 / 30.0 - 0.01)
        work.offset, work.rank_mask = first, None
        backend.sample([work], NUMBERS, KEY)
        torch.testing.assert_close(work.param[:, 0], torch.from_numpy(expected), rtol=1e-5, atol=0)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "fsdp1",
            r"_fsdp_wrapped_module\S+ belongs to FSDP1 .* use FSDP2, torch\.distributed\.fsdp\.fully_shard\(model\)",
        ),
        ("fsdp1 views", "belongs to FSDP1 .* use FSDP2"),
        ("columns", r"parameter A is distributed as \(Shard\(dim=1\),\); IVON takes DTensors that are sharded along"),
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
    own = list(group["params"])
    flat = torch.cat([p.detach().reshape(-1) for p in own]).requires_grad_()
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
