"""Scores and masks of the Triton backend are those of the eager one, in at most four launches per step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ivon_lora import IVON
from ivon_lora.backends.eager import EagerBackend
from ivon_lora.backends.ranking import Ranking
from ivon_lora.functional.importance import CRITERIA
from ivon_lora.kernels import runtime
from ivon_lora.kernels.launch import TritonBackend
from ivon_lora.kernels.runtime import LaunchConfig
from tests.batches import KEY, assert_same_bits, make_batch, means_of, moved, ranking_of
from tests.triton_runs import IVON_OPTIONS, Make, assert_equal_runs, ivon, make_params, make_pruner, run, vadam

#: A, B and E; a convolution's; B whose period is no multiple of four
LORA = ((4, 12), (8, 4), (4, 1), (5, 2, 3, 3), (7, 5, 1, 1))


def pruned(make: Callable[..., Make] = ivon, **options: Any) -> Make:
    return lambda params, backend: make(pruner=make_pruner(params, **options))(params, backend)


@pytest.mark.parametrize(("make", "criterion"), [*((ivon, c) for c in CRITERIA), (vadam, "snr_abs")])
def test_allocations_within_steps_are_those_of_the_eager_backend(
    make: Callable[..., Make], criterion: str, triton_device: str
) -> None:
    """Soft after the first step, hard after the second."""
    made = pruned(make, criterion=criterion, total_steps=4, warmup=0, final=2, interval=1, min_rank=1)
    dtype = torch.bfloat16 if make is vadam else torch.float32
    optimizer, params = assert_equal_runs(made, LORA, triton_device, dtype, steps=2)
    masks = [optimizer.state[p]["rank_mask"] for p in (params[0], params[3])]
    assert sum(int(mask.sum()) for mask in masks) == 4
    assert all(int(mask.sum()) >= 1 for mask in masks)
    assert all(bool(optimizer.state[p]["rank_snr"].any()) for p in params)


# ---------------------------------------------------------------- a ranking made by hand


def masks_of(ranking: Ranking) -> list[bool]:
    return [x for adapter in ranking.adapters for x in adapter[0].mask.tolist()]


@pytest.mark.parametrize(
    ("values", "budget", "min_rank", "expected"),
    [
        (([np.nan, np.nan], [1.0, 0.5]), 2, 1, "10 10"),
        (([1.0, 2.0], [np.nan, 0.5]), 2, 0, "01 10"),  # NaN is first, as torch sorts it
        (([1.0, 1.0, 1.0], [1.0, 1.0]), 3, 0, "111 00"),  # of equal ones the first
        (([0.0, -0.0], [0.0, 1e-45]), 2, 0, "10 01"),
        (([5.0, 4.0, 3.0], [0.1, 0.2]), 3, 1, "110 01"),
        (([float("inf"), 1.0], [3e38, 2.0]), 2, 0, "10 10"),
        (([1.0, 2.0], [3.0, 4.0]), 0, 0, "00 00"),
        (([1.0, 2.0], [3.0, 4.0]), 4, 0, "11 11"),
    ],
)
def test_who_stays(
    values: Sequence[Sequence[float]], budget: int, min_rank: int, expected: str, triton_device: str
) -> None:
    batch = moved(means_of(*values), triton_device)
    ranking = ranking_of(batch, [[n] for n in range(len(values))], budget=budget, min_rank=min_rank)
    TritonBackend(torch.device(triton_device)).rank([batch], ranking)
    assert masks_of(ranking) == [x == "1" for x in expected.replace(" ", "")]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_added_up_by_a_step_are_those_of_the_posterior_and_losers_become_zero(
    hard: bool, dtype: torch.dtype, triton_device: str
) -> None:
    layout = [((6, 98), 0), ((33, 6), 1), ((12, 40), 0), ((50, 12), 1), ((12, 1), 0)]
    batch, adapters = make_batch(layout, dtype), [[0, 1], [2, 3, 4]]
    ours = moved(batch, triton_device)
    ranking = ranking_of(ours, adapters, criterion="snr_abs", budget=7, hard=hard)
    triton = TritonBackend(torch.device(triton_device), LaunchConfig(tile=1024))
    triton.step([ours], KEY, 1, ranking)
    triton.rank([ours], ranking)

    eager = EagerBackend()
    eager.step([batch], KEY)
    means = eager.rank_means([batch], "snr_abs")
    scores = [sum((means[n] for n in adapter[1:]), means[adapter[0]]) for adapter in adapters]
    least = torch.cat(scores).sort(descending=True).values[6]
    assert batch.rank_mask is not None
    for adapter, score in zip(adapters, scores, strict=True):
        for n in adapter:
            batch.rank_mask[n] = mask = score >= least
            if hard or n == adapter[-1]:
                for role in ("param", "mean", "momentum"):
                    getattr(batch, role)[n].movedim(layout[n][1], 0)[~mask] = 0
    for theirs, mine in zip(scores, ranking.adapters, strict=True):
        assert all(torch.equal(theirs, t.scores.cpu()) for t in mine)
    assert_same_bits(batch, ours)
    assert sum(masks_of(ranking)) == 7


@pytest.mark.parametrize("criterion", ["snr", "sensitivity"])
def test_means_of_ranks_of_any_size(criterion: str, triton_device: str) -> None:
    """Of exponents from the smallest number to the largest."""
    layout = [((3, 98), 0), ((33, 6), 1), ((1, 700), 0)]
    batch = make_batch(layout, sensitivity=True)
    for tensor in [*batch.param, *(batch.sensitivity or [])]:
        assert tensor is not None
        tensor.mul_(torch.exp2(torch.randint(-100, 40, tensor.shape).float()))
    ours = moved(batch, triton_device)
    expected = EagerBackend().rank_means([batch], criterion)
    found = TritonBackend(torch.device(triton_device), LaunchConfig(tile=1024)).rank_means([ours], criterion)
    assert [len(x) for x in found] == [3, 6, 1]
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b.cpu())


# ---------------------------------------------------------------- launches


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched; none runs."""
    names: list[str] = []

    def note(kernel: Any, grid: tuple[int, ...], *_: Any, **__: Any) -> None:
        if 0 not in grid:
            names.append(kernel.__name__)

    monkeypatch.setattr(runtime, "run", note)
    return names


def in_five_groups(params: Sequence[Tensor], backend: str) -> IVON:
    groups = [{"params": params[n::5], "lr": 0.1 / (1 + n)} for n in range(5)]
    return IVON(groups, backend=backend, **IVON_OPTIONS)


@pytest.mark.parametrize(
    ("make", "dtypes", "samples", "expected"),
    [
        (ivon(), [torch.float32], 1, "sample step"),
        (in_five_groups, [torch.float32], 1, "sample step"),
        (ivon(), [torch.float32, torch.bfloat16], 1, "sample sample step step"),
        (ivon(), [torch.float32], 2, "sample bank sample step"),
        (pruned(interval=1), [torch.float32], 1, "sample step score select"),
        (pruned(interval=2), [torch.float32], 1, "sample step"),
    ],
    ids=["one group", "five groups", "two dtypes", "two samples", "allocates", "has a pruner"],
)
def test_the_launches_of_a_step(
    make: Make, dtypes: list[torch.dtype], samples: int, expected: str, launched: list[str], triton_device: str
) -> None:
    """Their number does not depend on that of the parameters, or of their groups."""
    params = [p for dtype in dtypes for p in make_params(LORA, dtype, triton_device)]
    run(make(params, "triton"), params, 1, samples)
    assert launched == [f"{name}_kernel" for name in expected.split()]


def test_a_ranking_of_other_parameters_is_refused(triton_device: str) -> None:
    batch = moved(means_of([1.0, 2.0], [3.0]), triton_device)
    ranking = ranking_of(batch, [[0], [1]])
    other = dataclasses.replace(ranking, adapters=[[dataclasses.replace(ranking.adapters[0][0], index=7)]])
    with pytest.raises(ValueError, match=r"\[7\] of the ranking are in none of the batches"):
        TritonBackend(torch.device(triton_device)).rank([batch], other)
