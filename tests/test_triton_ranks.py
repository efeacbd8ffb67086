"""Scores, selection and masks of the Triton backend: exact sums, the eager backend's masks, at most three launches."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from ivon_lora import IVON, LoraAdapter, RankPruner
from ivon_lora.backends import RankedTensor, Ranking, Work
from ivon_lora.functional.importance import rank_mean
from ivon_lora.functional.ivon import Hyper
from ivon_lora.kernels.launch import LaunchConfig, TritonBackend
from ivon_lora.lora.rank_pruner import select_top
from tests.optimizer_problem import assert_same_state

WINDOW_BITS, SPECIAL = 16, 18


@pytest.fixture(autouse=True)
def _numpy_may_meet_nan() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where a GPU is silent."""
    with np.errstate(all="ignore"):
        yield


def ranking_of(adapters: list[list[tuple[tuple[int, ...], int]]], device: str, **options: Any) -> Ranking:
    """A ranking of tensors of the given shapes and rank dimensions; the last tensor of an adapter is the gate."""
    index = -1
    out = []
    for adapter in adapters:
        tensors = []
        for shape, dim in adapter:
            index += 1
            scores = torch.full((shape[dim],), -1.0, device=device)
            mask = torch.ones(shape[dim], dtype=torch.bool, device=device)
            tensors.append(RankedTensor(index, shape, dim, shape is adapter[-1][0], scores, mask))
        out.append(tensors)
    arguments: dict[str, Any] = {
        "criterion": "magnitude",
        "frozen": False,
        "budget": None,
        "min_rank": 0,
        "hard": False,
    } | options
    return Ranking(adapters=out, **arguments)


# ---------------------------------------------------------------- sums


def scores_of(values: list[tuple[Tensor, int]], device: str, config: LaunchConfig) -> list[Tensor]:
    """Rank means as the kernels compute them: a step at learning rate 0 that scores |mean|."""
    backend = TritonBackend(torch.device(device), config)
    ranking = ranking_of([[(tuple(v.shape), dim)] for v, dim in values], device)
    works = [
        Work(
            index=i,
            param=(mean := v.to(device)),
            mean=mean,
            momentum=torch.zeros_like(mean),
            hess=torch.ones_like(mean),
            grad=torch.zeros_like(mean),
        )
        for i, (v, _) in enumerate(values)
    ]
    hyper = Hyper(1.0, 0.0, 0.0, 0.5, 0.5, 0.5, float("inf"), 1.0, 1.0, 1.0, 1.0, "price", "newton")
    backend.begin_ranking(ranking)
    backend.step(works, hyper, None, 1)
    backend.finish_ranking()
    assert backend._layout is not None
    assert not backend._layout.sums.any(), "cleared for the next step"
    return [adapter[0].scores.cpu() for adapter in ranking.adapters]


def test_rank_means_are_the_true_means_rounded_once_whatever_the_magnitudes(triton_device: str) -> None:
    generator = np.random.default_rng(0)

    def values(*shape: int, low: int, high: int) -> Tensor:
        """Every bit pattern between two is as likely: the exponents are uniform."""
        return torch.from_numpy(generator.integers(low, high, shape, dtype=np.int32).view(np.float32))

    one, top = 0x3F800000, 0x7F800000
    cases = [
        (values(6, 98, low=0, high=top), 0),  # not a multiple of 4: scattered
        (values(3, 700, low=one, high=one + 9), 0),  # runs; near ties
        (values(33, 6, low=0, high=1 << 25), 1),  # subnormal numbers
        (values(100, 16, low=0, high=top), 1),
        (values(40, 96, low=one, high=one + 2), 1),  # exact ties
        (values(9, 160, low=0, high=top), 1),  # a long period
        (values(4, 1, low=0, high=7), 0),
        (values(5, 2, 3, 3, low=0, high=top), 0),
        (torch.zeros(2, 8), 0),
        (torch.full((3, 500), 3.4e38), 0),
    ]
    found = scores_of(cases, triton_device, LaunchConfig(tile=1024, score_block=32))
    for (v, dim), scores in zip(cases, found, strict=True):
        assert torch.equal(scores, rank_mean(v, dim)), tuple(v.shape)
        exact = [sum(map(Fraction, row.reshape(-1).tolist()), Fraction(0)) / row.numel() for row in v.unbind(dim)]
        assert scores.tolist() == [nearest_fp32(x) for x in exact]


@pytest.mark.parametrize(("tile", "reach"), [(512, 30), (1024, 24)])
@pytest.mark.parametrize("beyond", [0, 1])
def test_a_pass_over_a_tile_fits_into_63_bits(tile: int, reach: int, beyond: int, triton_device: str) -> None:
    """As many elements, and as far above the smallest, as one pass takes: 24 bits, `reach`, and those of the tile."""
    position = 112  # where a window begins: the sum of the others is shifted as far as it may be
    v = torch.full((2, tile), float(np.ldexp(2**24 - 1, position + reach + beyond - 149)))
    v[:, 0] = float(np.ldexp(2**23, position - 149))
    (scores,) = scores_of([(v, 0)], triton_device, LaunchConfig(tile=tile))
    exact = sum(map(Fraction, v[0].tolist()), Fraction(0)) / tile
    assert scores.tolist() == [nearest_fp32(exact)] * 2


def nearest_fp32(x: Fraction) -> float:
    """The fp32 number nearest to x >= 0, ties to even."""
    middle = np.float32(float(x))
    candidates = {middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))}
    finite = [c for c in candidates if np.isfinite(c)]
    return float(min(finite, key=lambda c: (abs(Fraction(float(c)) - x), int(np.float32(c).view(np.int32)) & 1)))


def test_scores_that_are_not_finite_stay_so(triton_device: str) -> None:
    v = torch.ones(4, 40)
    v[1, 3] = v[2, 5] = float("inf")
    v[2, 7] = v[3, 39] = float("nan")
    (scores,) = scores_of([(v, 0)], triton_device, LaunchConfig(tile=128))
    assert scores[:2].tolist() == [1.0, float("inf")]
    assert bool(scores[2:].isnan().all())


@pytest.mark.parametrize(
    ("shape", "dim", "cut"), [((6, 98), 0, 5), ((33, 6), 1, 5), ((60, 16), 1, 37), ((3, 256), 0, 1)]
)
def test_sums_over_the_pieces_of_a_tensor_are_those_of_the_whole(
    shape: tuple[int, int], dim: int, cut: int, triton_device: str
) -> None:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    backend = TritonBackend(torch.device(triton_device), LaunchConfig(tile=256))
    ranking = ranking_of([[(shape, dim)]], triton_device)
    works = []
    for first, rows in ((0, values[:cut]), (cut, values[cut:])):
        mean = rows.to(triton_device)
        zeros = torch.zeros_like(mean)
        works.append(Work(0, mean, mean, zeros, torch.ones_like(mean), zeros.clone(), offset=first * shape[1]))
    backend.begin_ranking(ranking)
    hyper = Hyper(1.0, 0.0, 0.0, 0.5, 0.5, 0.5, float("inf"), 1.0, 1.0, 1.0, 1.0, "price", "newton")
    backend.step(works, hyper, None, 1)
    backend.finish_ranking()
    assert torch.equal(ranking.adapters[0][0].scores.cpu(), rank_mean(values, dim))


# ---------------------------------------------------------------- selection


def launch_select(
    scores: list[float], ranks: list[int], budget: int, min_rank: int, device: str, config: LaunchConfig
) -> Tensor:
    """`select_kernel` on given scores; the sums are made here, in Python integers."""
    ranking = ranking_of([[((r, 1), 0)] for r in ranks], device, budget=budget, min_rank=min_rank)
    backend = TritonBackend(torch.device(device), config)
    backend.begin_ranking(ranking)
    layout = backend._layout
    assert layout is not None
    sums = torch.zeros(layout.sums.shape, dtype=torch.int64)
    for slot, value in enumerate(np.array(scores, np.float32)):
        pattern = int(value.view(np.int32))
        exponent, fraction = pattern >> 23 & 0xFF, pattern & 0x7FFFFF
        if exponent == 255:
            sums[SPECIAL, slot] = 1 << 32 if fraction else 1
        else:
            total = (fraction | (1 << 23 if exponent else 0)) << max(exponent - 1, 0)
            for window in range(SPECIAL):
                sums[window, slot] = total >> WINDOW_BITS * window & 0xFFFF
    layout.sums.copy_(sums)
    backend.finish_ranking()
    got = torch.cat([adapter[0].scores for adapter in ranking.adapters]).cpu()
    torch.testing.assert_close(got, torch.tensor(scores), rtol=0, atol=0, equal_nan=True)
    return torch.cat([adapter[0].mask for adapter in ranking.adapters]).cpu()


def owners_of(ranks: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))


@settings(max_examples=8)
@given(data=st.data())
def test_selection_is_exact_and_breaks_ties_by_index(data: st.DataObject, triton_device: str) -> None:
    ranks = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    total = sum(ranks)
    values = st.sampled_from([0.0, 0.5, 1.0, 1e-42, 1e8, float("inf"), float("nan")])
    scores = data.draw(st.lists(values, min_size=total, max_size=total))
    min_rank = data.draw(st.integers(0, min(ranks)))
    budget = data.draw(st.integers(min_rank * len(ranks), total))
    mask = launch_select(scores, ranks, budget, min_rank, triton_device, LaunchConfig(score_block=32, select_block=32))
    assert mask.tolist() == select_top(torch.tensor(scores), budget, owners_of(ranks), min_rank).tolist()


@pytest.mark.parametrize("budget", [0, 1, 29, 30])
def test_no_rank_one_rank_all_but_one_and_all_of_one_adapter(budget: int, triton_device: str) -> None:
    scores = [float(7 * i % 30) for i in range(30)]
    mask = launch_select(scores, [30], budget, 0, triton_device, LaunchConfig(score_block=16, select_block=16))
    assert mask.tolist() == [score >= 30 - budget for score in scores]


@pytest.mark.parametrize("tied", [False, True])
def test_fifty_thousand_ranks(tied: bool, triton_device: str) -> None:
    ranks = [16] * 3125
    scores = torch.zeros(50_000) if tied else torch.from_numpy(np.random.default_rng(0).random(50_000, np.float32))
    config = LaunchConfig(score_block=128, select_block=1024)
    if triton_device == "cpu":
        config = LaunchConfig(score_block=1 << 16, select_block=1 << 15)
    mask = launch_select(scores.tolist(), ranks, 12_345, 1, triton_device, config)
    assert torch.equal(mask, select_top(scores, 12_345, owners_of(ranks), 1))


# ---------------------------------------------------------------- the whole step


class Bed:
    """Adapters with and without E, one of a rank that is no power of two, and a head that is no adapter."""

    def __init__(self, backend: str, device: str, dtype: torch.dtype, criterion: str, two_groups: bool, **options: Any):
        generator = torch.Generator().manual_seed(3)

        def new(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * 0.3).to(dtype)

        def there(x: Tensor) -> Tensor:
            return x.to(device).requires_grad_()

        shapes = [((6, 9), (6, 6), None), ((4, 8), (40, 4), (4, 1))]
        self.adapters = [
            LoraAdapter(f"a{i}", there(new(*a)), there(new(*b)), None if e is None else there(new(*e)))
            for i, (a, b, e) in enumerate(shapes)
        ]
        self.params = [t for a in self.adapters for _, t, _ in a.tensors()] + [there(new(3, 3))]
        self.targets = [new(*p.shape) for p in self.params]
        schedule = {"total_steps": 4, "warmup": 0, "final": 1, "interval": 2} | options
        self.pruner = RankPruner(self.adapters, 2, criterion, **schedule)
        groups: list[dict[str, Any]] = [{"params": self.params}]
        if two_groups:
            groups = [{"params": self.params[:1]}, {"params": self.params[1:], "weight_decay": 0.1}]
        self.optimizer = IVON(groups, lr=0.02, ess=50, hess_init=0.5, beta2=0.9, pruner=self.pruner, backend=backend)

    def step(self) -> None:
        self.optimizer.train()
        for p, t in zip(self.params, self.targets, strict=True):
            p.grad = ((p.detach().cpu() - t) * 0.5).to(p.device)
        self.optimizer.step()


@pytest.mark.parametrize(
    ("criterion", "dtype", "two_groups", "options"),
    [
        ("snr_abs", torch.float32, False, {}),
        ("sensitivity", torch.bfloat16, True, {"min_rank": 1}),
        ("inverse_std", torch.float16, False, {"total_steps": 3}),
        ("snr", torch.float32, False, {"total_steps": 2}),
    ],
    ids=str,
)
def test_scores_masks_and_all_state_have_the_bits_of_the_eager_backend(
    criterion: str, dtype: torch.dtype, two_groups: bool, options: dict[str, Any], triton_device: str
) -> None:
    eager = Bed("eager", "cpu", dtype, criterion, two_groups, **options)
    ours = Bed("triton", triton_device, dtype, criterion, two_groups, **options)
    for step in range(eager.pruner.total_steps):
        eager.step()
        ours.step()
        assert_same_state(eager.optimizer, ours.optimizer, step)
        live = sum(int(ours.pruner.mask(a).sum()) for a in ours.adapters)
        if ours.pruner.is_due(step + 1):
            assert live == ours.pruner.budget(step + 1)
    assert live == ours.pruner.target_budget < ours.pruner.initial_budget


def test_what_is_kept_of_the_adapters_follows_the_state(triton_device: str) -> None:
    """State replaced, moved, loaded, and a tensor frozen and thawed between two steps: the bits are the eager ones."""
    beds = [Bed(backend, d, torch.float32, "snr_abs", False, total_steps=12) for backend, d in (
        ("eager", "cpu"), ("triton", triton_device)
    )]  # fmt: skip

    def nothing(bed: Bed) -> None:
        pass

    def replace(bed: Bed) -> None:
        state = bed.optimizer.state[bed.params[0]]
        state["rank_snr"], state["rank_mask"] = state["rank_snr"].clone(), state["rank_mask"].clone()

    def move(bed: Bed) -> None:
        snr = bed.optimizer.state[bed.params[1]]["rank_snr"]
        snr.data = snr.data.clone()

    def load(bed: Bed) -> None:
        bed.optimizer.load_state_dict(copy.deepcopy(bed.optimizer.state_dict()))

    def freeze(bed: Bed) -> None:
        bed.params[0].requires_grad_(False)

    def thaw(bed: Bed) -> None:
        bed.params[0].requires_grad_(True)

    for change in (nothing, nothing, replace, move, load, freeze, thaw):
        for bed in beds:
            change(bed)
            bed.step()
        assert_same_state(beds[0].optimizer, beds[1].optimizer, change.__name__)


def count_launches(run_it: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    run = TritonBackend._run

    def counting(self: TritonBackend, kernel: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.__name__)
        run(self, kernel, *arguments, **constants)

    with monkeypatch.context() as patch:
        patch.setattr(TritonBackend, "_run", counting)
        run_it()
    return names


@pytest.mark.parametrize("criterion", ["snr_abs", "sensitivity"])
def test_a_step_is_three_launches_at_most_however_many_tensors(
    criterion: str, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are found for an allocation, in the launch of the step, and when somebody looks, in two of their own."""
    bed = Bed("triton", triton_device, torch.float32, criterion, False)
    for step in range(1, 3):
        due = bed.pruner.is_due(step)
        names = count_launches(bed.step, monkeypatch)
        assert names == ["sample_kernel", "step_kernel", *(["zero_kernel"] if due else [])]
        names = count_launches(lambda: bed.optimizer.state, monkeypatch)
        assert names == ([] if due else ["importance_kernel", "score_kernel"])
        assert count_launches(lambda: bed.optimizer.state, monkeypatch) == [], "they have been found"


def test_an_interrupted_step_leaves_nothing_in_the_sums(triton_device: str) -> None:
    mean = torch.rand(3, 8)
    there = mean.to(triton_device)
    zeros = torch.zeros_like(there)
    work = Work(0, there, there, zeros.clone(), torch.ones_like(there), zeros)
    hyper = Hyper(1.0, 0.0, 0.0, 0.5, 0.5, 0.5, float("inf"), 1.0, 1.0, 1.0, 1.0, "price", "newton")
    backend = TritonBackend(torch.device(triton_device))
    ranking = ranking_of([[((3, 8), 0)]], triton_device)
    for _ in range(2):
        backend.begin_ranking(ranking)
        backend.step([work], hyper, None, 1)
        backend.drop_ranking()
        backend.step([work], hyper, None, 1)  # one that does not rank
    backend.begin_ranking(ranking)
    backend.step([work], hyper, None, 1)
    backend.finish_ranking()
    assert torch.equal(ranking.adapters[0][0].scores.cpu(), rank_mean(mean, 0))


@pytest.mark.gpu
def test_ten_thousand_selections_by_the_last_program_equal_the_stand_alone_one() -> None:
    """The fused selection relies on the order of memory between programs: only repetition would show a race."""
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    shapes: list[list[tuple[tuple[int, ...], int]]] = [[((16, 3072), 0), ((1024, 16), 1)] for _ in range(40)]
    # Without gates nothing is set to zero, and at learning rate 0 nothing moves: both see the same parameters.
    fused, alone = (
        dataclasses.replace(r, adapters=[[dataclasses.replace(t, gate=False) for t in a] for a in r.adapters])
        for r in (ranking_of(shapes, "cuda", criterion="snr_abs", budget=200) for _ in range(2))
    )
    hyper = Hyper(100.0, 0.01, 0.0, 0.9, 0.1, 0.01, 1.0, 1.0, 1.0, 1.0, 100.0, "price", "newton")
    works = []
    for index, (shape, _) in enumerate(pair for adapter in shapes for pair in adapter):
        p = torch.randn(shape, generator=generator).to(device)
        works.append(Work(index, p, p, torch.zeros_like(p), torch.ones_like(p), torch.zeros_like(p)))
    one, other = TritonBackend(device), TritonBackend(device)
    differing = torch.zeros((), dtype=torch.int64, device=device)
    for i in range(10_000):
        works[i % len(works)].param.mul_(1.01 if i % 3 else 0.97)
        one.begin_ranking(fused)
        one.step(works, hyper, None, 1)
        one.finish_ranking()
        other.begin_ranking(alone)
        other.step(works[:7], hyper, None, 1)  # no launch holds all tensors, so none ends with the selection
        other.step(works[7:], hyper, None, 1)
        other.finish_ranking()
        for a, b in zip(fused.adapters, alone.adapters, strict=True):
            differing += (a[0].mask != b[0].mask).sum() + (a[0].scores != b[0].scores).sum()
    assert int(differing) == 0
    assert sum(int(a[0].mask.sum()) for a in fused.adapters) == 200


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu() -> None:
    bed = Bed("triton", "cuda", torch.float32, "snr_abs", False, total_steps=40)
    for _ in range(4):
        bed.step()  # creates state and tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):  # one of them allocates
            bed.optimizer.train()
            bed.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
