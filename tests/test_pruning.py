"""Rank pruning: the schedule of budgets, selection, soft and hard masks, and what they do to the forward pass."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ivon_lora import IVON, LoraAdapter, RankPruner
from ivon_lora.functional.importance import CRITERIA, select_top
from ivon_lora.lora.rank_pruner import cubic_budget
from tests.compiler import BACKENDS
from tests.test_scores import snr_abs_float64

# ---------------------------------------------------------------- budget

RUN = {"initial": 432, "target": 144, "begin": 20, "end": 120}


def test_budgets_are_those_that_adalora_logged_on_the_real_task():
    assert [cubic_budget(t, **RUN) for t in (0, 1, 20, 120, 121, 200, 10_000)] == [432, 432, 432, 144, 144, 144, 144]
    assert [cubic_budget(t, **RUN) for t in range(30, 121, 10)] == [353, 291, 242, 206, 180, 162, 151, 146, 144, 144]


@given(*(st.integers(low, high) for low, high in ((0, 500), (0, 500), (0, 40), (1, 100), (0, 300))))
def test_the_budget_falls_as_a_cube_from_initial_to_target(a, b, begin, annealing, step):
    initial, target = max(a, b), min(a, b)
    run = {"initial": initial, "target": target, "begin": begin, "end": begin + annealing}
    now, then = cubic_budget(step, **run), cubic_budget(step + 1, **run)
    assert target <= then <= now <= initial
    s = min(max((step - begin) / annealing, 0.0), 1.0)
    exact = target + (initial - target) * (1 - s) ** 3
    assert exact - 1 - 1e-9 <= now <= exact + 1e-9


def test_the_schedule_of_a_run():
    """A pruner is a plain schedule: it knows no optimizer, and one may serve several."""
    bed = Bed(total_steps=200, warmup=0.1, final=0.4, interval=25)
    pruner = bed.pruner
    assert (pruner.warmup, pruner.final) == (20, 80)  # fractions of the total
    assert (pruner.initial_budget, pruner.target_budget) == (15, 6)
    assert [t for t in range(1, 201) if pruner.is_due(t)] == [25, 50, 75, 100, 120]
    assert [t for t in range(1, 201) if pruner.is_scored(t)] == [25, 50, 75, 100, 120, 125, 150, 175, 200]
    assert [pruner.is_hard(t) for t in (119, 120, 200)] == [False, True, True]
    assert [pruner.budget(t) for t in (0, 20, 50, 120, 200)] == [15, 15, 9, 6, 6]
    assert pruner.rank_dims[bed.adapters[2].B] == 1
    IVON(bed.params, lr=0.1, ess=10, pruner=pruner)


# ---------------------------------------------------------------- selection


def brute_force(scores, budget, owners, min_rank, max_rank):
    """Sort by (granted, score, index) in plain Python."""
    granted, refused = set(), set()
    for owner in set(owners):
        mine = sorted((i for i in range(len(scores)) if owners[i] == owner), key=lambda i: (-scores[i], i))
        granted |= set(mine[:min_rank])
        refused |= set() if max_rank is None else set(mine[max_rank:])
    order = sorted(range(len(scores)), key=lambda i: (i not in granted, -scores[i], i))
    keep = set([i for i in order if i not in refused][:budget])
    return [i in keep for i in range(len(scores))]


@given(st.data())
def test_select_top_is_exact_and_breaks_ties_by_index(data):
    ranks = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    owners = [i for i, r in enumerate(ranks) for _ in range(r)]
    values = st.sampled_from([0.0, 0.5, 1.0, 1e8, float("inf")])
    scores = data.draw(st.lists(values, min_size=len(owners), max_size=len(owners)))
    min_rank = data.draw(st.integers(0, min(ranks)))
    budget = data.draw(st.integers(min_rank * len(ranks), len(owners)))
    max_rank = data.draw(st.none() | st.integers(max(1, min_rank), 6))
    mask = select_top(torch.tensor(scores), budget, torch.tensor(owners), min_rank, max_rank)
    assert int(mask.sum()) == min(budget, sum(min(r, max_rank or r) for r in ranks))
    assert mask.tolist() == brute_force(scores, budget, owners, min_rank, max_rank)


def test_a_rank_of_unknown_score_is_kept_and_of_fifty_thousand_tied_ones_the_first():
    assert select_top(torch.tensor([1.0, float("nan"), 2.0]), 1).tolist() == [False, True, False]
    assert select_top(torch.zeros(50_000), 12_345).nonzero().flatten().tolist() == list(range(12_345))


# ---------------------------------------------------------------- a small model with several kinds of adapters


class Bed:
    """Three adapters (plain, triplet, convolution-shaped), a head that is no adapter, and a random quadratic loss."""

    def __init__(
        self, criterion="snr_abs", dtype=torch.float32, target_rank=2, seed=0, lr=0.02, backend="auto", **schedule
    ):
        g = torch.Generator().manual_seed(seed)

        def new(*shape):
            return (torch.randn(*shape, generator=g) * 0.3).to(dtype).requires_grad_()

        self.adapters = [
            LoraAdapter("plain", new(6, 9), new(5, 6)),
            LoraAdapter("triplet", new(4, 7), new(3, 4), new(4, 1)),
            LoraAdapter("conv", new(5, 2, 3, 3), new(4, 5, 1, 1)),
        ]
        self.head = new(3, 3)
        self.params = [t for a in self.adapters for _, t, _ in a.tensors()] + [self.head]
        self.targets = [torch.randn(p.shape, generator=g).to(dtype) for p in self.params]
        schedule = {"total_steps": 40, "warmup": 5, "final": 15, "interval": 7} | schedule
        self.pruner = RankPruner(self.adapters, target_rank, criterion, **schedule)
        hyper = {"lr": lr, "ess": 50, "hess_init": 0.5, "beta2": 0.9, "weight_decay": 1e-3}
        self.optimizer = IVON(self.params, **hyper, seed=seed, backend=backend, pruner=self.pruner)

    def loss(self):
        return sum(((p - t) ** 2).mean() for p, t in zip(self.params, self.targets, strict=True))

    def step(self, n=1):
        for _ in range(n):
            self.optimizer.train()
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()

    def deltas(self):
        """What each rank adds to the forward pass: outer(B_k, A_k) E_k, shape (r, out, in)."""
        out = []
        for a in self.adapters:
            e = torch.ones(a.rank) if a.E is None else a.E.detach().reshape(-1).float()
            b, down = a.B.detach().float().flatten(1), a.A.detach().float().flatten(1)
            out.append(torch.einsum("or,ri,r->roi", b, down, e))
        return out

    def masks(self):
        return [self.optimizer.state[a.A]["rank_mask"].clone() for a in self.adapters]


def test_exactly_the_budget_lives_after_every_allocation_and_masks_stay_between():
    bed = Bed()
    previous = [torch.ones(a.rank, dtype=torch.bool) for a in bed.adapters]
    allocations = []
    for t in range(1, 41):
        bed.step()
        masks = bed.masks()
        if bed.pruner.is_due(t):
            allocations.append(t)
            assert sum(int(m.sum()) for m in masks) == bed.pruner.budget(t)
            scores = torch.cat([bed.optimizer.state[a.A]["rank_snr"] for a in bed.adapters])
            live = torch.cat(masks)
            assert scores[live].min() >= scores[~live].max(), "the worst go"
        else:
            assert all(torch.equal(m, p) for m, p in zip(masks, previous, strict=True))
        previous = masks
    # every 7 steps within (5, 25), and at the end of annealing, which 7 does not divide
    assert allocations == [7, 14, 21, 25]
    assert sum(int(m.sum()) for m in previous) == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_equal_a_float64_oracle(backend):
    """The table's are fresh, the state's are those of the last scoring step, which decided."""
    bed = Bed(backend=backend)
    kept = [torch.zeros(a.rank) for a in bed.adapters]
    for t in range(1, 41):
        masks = bed.masks() if t > 1 else []
        bed.step()
        table = bed.optimizer.rank_table()
        for i, adapter in enumerate(bed.adapters):
            scores = [bed.optimizer.state[p]["rank_snr"] for _, p, _ in adapter.tensors()]
            assert all(torch.equal(x, scores[0]) for x in scores)
            if bed.pruner.is_due(t):  # of the update, before ranks were set to zero
                kept[i] = scores[0].clone()
                continue
            want = 0
            for _, p, dim in adapter.tensors():
                hess = bed.optimizer.state[p]["hess"].double().numpy()
                a = np.abs(p.detach().double().numpy()) * np.sqrt(50 * (hess + 1e-3))
                want = want + snr_abs_float64(a).mean(axis=tuple(d for d in range(p.dim()) if d != dim))
            want = want * masks[i].numpy() if bed.pruner.is_hard(t) else want
            np.testing.assert_allclose(table[i]["scores"], want, rtol=1e-5)
            if bed.pruner.is_scored(t):
                assert scores[0].tolist() == table[i]["scores"]
                kept[i] = scores[0].clone()
            assert torch.equal(scores[0], kept[i]), "between scoring steps nothing is computed"


def test_soft_masks_zero_the_gate_then_learning_goes_on():
    for seed in range(4):
        bed = Bed(interval=2, seed=seed, lr=0.5)
        for t in range(1, 25):
            bed.step()
            masks = bed.masks()
            for adapter, mask in zip(bed.adapters, masks, strict=True):
                p, dim = (adapter.B, 1) if adapter.E is None else (adapter.E, 0)
                gate, momentum = (x.transpose(0, dim) for x in (p.detach(), bed.optimizer.state[p]["momentum"]))
                if bed.pruner.is_due(t):
                    assert not gate[~mask].any()
                    assert not momentum[~mask].any()
                    assert (adapter.A.detach()[~mask] != 0).all(), "A learns on"
                elif t > 7:
                    assert (gate[~mask] != 0).all(), "after one more step the gate has moved"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hard_masked_ranks_contribute_exactly_nothing(dtype):
    bed = Bed(dtype=dtype)
    bed.step(25)
    masks = bed.masks()
    frozen = copy.deepcopy(masks)
    assert not all(m.all() for m in masks)
    hess_before = {p: bed.optimizer.state[p]["hess"].clone() for p in bed.params}
    for _ in range(10):
        bed.optimizer.train()
        for delta, mask in zip(bed.deltas(), masks, strict=True):
            assert torch.equal(delta.flatten(1).any(1), mask), "a sample"
        bed.step()
        with bed.optimizer.sampled_params():
            for delta, mask in zip(bed.deltas(), masks, strict=True):
                assert torch.equal(delta.flatten(1).any(1), mask), "a prediction sample"
    assert all(torch.equal(m, f) for m, f in zip(bed.masks(), frozen, strict=True))
    for adapter, mask in zip(bed.adapters, masks, strict=True):
        for _, p, dim in adapter.tensors():
            state = bed.optimizer.state[p]
            posterior = bed.optimizer.posterior(p)
            dead = (~mask).nonzero().flatten()
            live = mask.nonzero().flatten()
            for tensor in (p.detach(), state["momentum"], posterior.mean, posterior.stddev, posterior.sample()):
                assert not tensor.index_select(dim, dead).any()
            assert (posterior.stddev.index_select(dim, live) > 0).all()
            assert torch.equal(state["hess"].index_select(dim, dead), hess_before[p].index_select(dim, dead)), "frozen"
            assert not bool((state["hess"].index_select(dim, live) == hess_before[p].index_select(dim, live)).any())
            assert not state["rank_snr"][dead].any()
            assert bool((state["rank_snr"][live] > 0).all())


@pytest.mark.parametrize(
    ("options", "live"),
    [
        *[({"criterion": criterion}, None) for criterion in CRITERIA],
        ({"target_rank": 0}, [0, 0, 0]),
        ({"target_rank": 2, "min_rank": 2}, [2, 2, 2]),
        ({"target_rank": 3, "max_rank": 3}, [3, 3, 3]),
    ],
    ids=str,
)
def test_the_target_is_met(options, live):
    bed = Bed(**options)
    bed.step(40)
    found = [int(m.sum()) for m in bed.masks()]
    assert sum(found) == bed.pruner.target_budget
    assert live in (None, found)
    assert [int(d.flatten(1).any(1).sum()) for d in bed.deltas()] == found
    assert all(torch.isfinite(bed.optimizer.state[a.A]["rank_snr"]).all() for a in bed.adapters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_layer_keeps_more_than_max_rank(backend):
    """Without the bound the adapter whose weights are ten times larger keeps all of its six ranks of nine."""
    found = []
    for options in ({}, {"max_rank": 4}):
        bed = Bed("magnitude", target_rank=3, backend=backend, **options)
        with torch.no_grad():
            for p in (bed.adapters[0].A, bed.adapters[0].B):
                p.mul_(10)
        bed.step(40)
        found.append([int(m.sum()) for m in bed.masks()])
    assert found[0][0] == 6
    assert found[1][0] == 4
    assert sum(found[0]) == sum(found[1]) == 9
    bounds = [bed.pruner.rank_bound(step) for step in range(41)]
    assert bounds[:6] == [6] * 6
    assert bounds == sorted(bounds, reverse=True)
    assert set(bounds[25:]) == {4}


def test_sensitivity_follows_adalora_and_other_criteria_carry_no_buffers():
    bed, other = Bed("sensitivity", warmup=30, final=5), Bed()
    p = bed.adapters[1].E
    i_bar = u_bar = np.zeros((4, 1))
    for _ in range(12):
        bed.step()
        i = np.abs(p.detach().double().numpy() * p.grad.double().numpy())
        i_bar = 0.85 * i_bar + 0.15 * i
        u_bar = 0.85 * u_bar + 0.15 * np.abs(i - i_bar)
    np.testing.assert_allclose(bed.optimizer.snr(p, "sensitivity").numpy(), i_bar * u_bar, rtol=1e-5)
    other.step()
    assert set(other.optimizer.state[other.params[0]]) == {"step", "momentum", "hess", "rank_snr", "rank_mask"}
    for each in (bed, other):
        assert set(each.optimizer.state[each.head]) == {"step", "momentum", "hess"}


def test_a_rehearsal_step_at_lr_zero_prunes_nothing():
    bed = Bed(total_steps=4, warmup=0, final=3, interval=1, lr=0.0)
    before = [p.detach().clone() for p in bed.params]
    for p in bed.params:
        p.grad = torch.zeros_like(p)
    bed.optimizer.step()
    assert all(m.all() for m in bed.masks())
    assert all(torch.equal(p, b) for p, b in zip(bed.params, before, strict=True))


def test_rank_table_and_metrics():
    """Without ranks pruned for good, which have no noise and would pull every quantile to zero."""
    bed = Bed(target_rank=1)
    bed.step(30)
    rows, metrics, masks = bed.optimizer.rank_table(), bed.optimizer.metrics(), bed.masks()
    assert [(r["name"], r["rank"], r["live"]) for r in rows] == [
        (a.name, a.rank, int(m.sum())) for a, m in zip(bed.adapters, masks, strict=True)
    ]
    assert [r["mask"] for r in rows] == [m.tolist() for m in masks]
    assert all(r["snr_min"] <= r["snr_mean"] <= r["snr_max"] == max(r["scores"]) for r in rows)
    assert (metrics["rank/live"], metrics["rank/budget"], metrics["rank/total"], metrics["rank/mean"]) == (3, 3, 15, 1)
    assert all(isinstance(v, float) and np.isfinite(v) for v in metrics.values())
    live = [bed.optimizer.snr(bed.head)]
    for adapter, mask in zip(bed.adapters, masks, strict=True):
        live += [bed.optimizer.snr(p).index_select(d, mask.nonzero().flatten()) for _, p, d in adapter.tensors()]
    values = torch.cat([x.flatten() for x in live]).double().numpy()
    assert [metrics[f"snr/p{q}"] for q in (10, 50, 90)] == [np.quantile(values, q) for q in (0.1, 0.5, 0.9)]
    assert metrics["snr/p10"] > 0
    scores = [bed.optimizer.state[a.A]["rank_snr"][mask] for a, mask in zip(bed.adapters, masks, strict=True)]
    assert metrics["rank/snr_p50"] == float(torch.cat(scores).double().median())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "snr_mean"}, "criterion must be one of"),
        ({"total_steps": 0}, "total_steps must be an integer of at least 1, got 0"),
        ({"interval": 0}, "interval must be an integer of at least 1"),
        ({"warmup": 30, "final": 10}, r"warmup \(30\) \+ final \(10\) must be less than total_steps \(40\)"),
        ({"warmup": 1.5}, r"warmup as a fraction of total_steps must lie in \[0, 1\), got 1.5"),
        ({"final": -1}, "final must be an integer of at least 0, got -1"),
        ({"min_rank": 5}, r"min_rank must be at most 4 \(the smallest adapter's rank\), got 5"),
        ({"min_rank": 3}, r"target_rank \(2\) must be at least min_rank \(3\)"),
        ({"max_rank": 0}, "max_rank must be an integer of at least 1, got 0"),
        ({"target_rank": 3, "max_rank": 2}, r"target_rank \(3\) must be at most max_rank \(2\), with which 6 ranks"),
        ({"target_rank": float("nan")}, "target_rank must be a finite number"),
        ({"target_rank": -1}, "target_rank must be a finite number of at least 0, got -1"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_with_name_value_and_bound(change, message):
    with pytest.raises(ValueError, match=message):
        Bed(**change)


def test_adapters_that_do_not_fit_are_refused():
    bed = Bed()
    with pytest.raises(ValueError, match="at least one adapter"):
        RankPruner([], 2, total_steps=10)
    with pytest.raises(ValueError, match="B of adapter 'plain' is not among the optimizer's parameters"):
        IVON([bed.params[0]], lr=0.1, ess=10, pruner=bed.pruner)
    with pytest.raises(ValueError, match="share a tensor"):
        RankPruner([bed.adapters[0], bed.adapters[0]], 2, total_steps=10)
    with pytest.warns(UserWarning, match="target_rank=50 is above the mean rank, 5: nothing is pruned"):
        assert RankPruner(bed.adapters, 50, total_steps=10).budget(10) == bed.pruner.initial_budget
    with pytest.raises(ValueError, match="rank_table\\(\\) needs ranks: give the optimizer one, pruner=RankPruner"):
        IVON(bed.params, lr=0.1, ess=10).rank_table()
