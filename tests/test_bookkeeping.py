"""What users change between two calls is seen at the next one: replaced, moved, frozen, shown, written, or mistaken."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, LoraAdapter, RankPruner
from ivon_lora.backends import Work
from ivon_lora.functional.importance import CRITERIA, importance, rank_mean, rounded_means
from ivon_lora.functional.ivon import root_precision
from ivon_lora.layout import Look, Tensors, Values
from ivon_lora.rank_map import RankMap, SharedEntry
from tests.compiler import BACKENDS, needs_compiler


@pytest.fixture(autouse=True)
def _looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager optimizers look at their tensors in Python, even where an earlier test has compiled something quicker."""
    if getattr(request.node, "callspec", None) is not None and request.node.callspec.params.get("backend") == "eager":
        monkeypatch.setattr(Look, "tensors", Tensors)
        monkeypatch.setattr(Look, "values", Values)


SHAPES = ((3, 5), (7,), (4, 1200), (2, 3, 4), ())


class Twin:
    """Some parameters, an optimizer, and gradients that depend on the step only."""

    def __init__(self, backend: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        self.optimizer = IVON(self.params, lr=0.1, ess=20, beta2=0.9, hess_init=0.5, backend=backend)
        self.steps = 0

    def set_gradients(self) -> None:
        generator = torch.Generator().manual_seed(100 + self.steps)
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=generator)

    def step(self, between: Callable[[Twin], None] = lambda twin: None) -> None:
        self.optimizer.train()
        self.set_gradients()
        between(self)
        self.optimizer.step()
        self.steps += 1

    def bits(self) -> list[Tensor]:
        state = self.optimizer.state
        return [
            x.detach().clone()
            for p in self.params
            for x in (p, state[p]["momentum"], state[p]["hess"], state[p]["step"])
        ]


def assert_same(a: Twin, b: Twin) -> None:
    for x, y in zip(a.bits(), b.bits(), strict=True):
        assert torch.equal(x, y)


def replaced(name: str) -> Callable[[Twin], None]:
    def change(twin: Twin) -> None:
        for p in twin.params:
            twin.optimizer.state[p][name] = twin.optimizer.state[p][name] * 2

    return change


def moved(name: str) -> Callable[[Twin], None]:
    def change(twin: Twin) -> None:
        for p in twin.params:
            tensor = p if name == "param" else twin.optimizer.state[p][name]
            tensor.data = tensor.data * (1 if name == "param" else 2)

    return change


def exchanged(twin: Twin) -> None:
    """Python's objects stay, and lead to other tensors."""
    for p in twin.params:
        other = nn.Parameter(p.detach().clone())
        other.grad = p.grad
        torch.utils.swap_tensors(p, other)


def written(name: str) -> Callable[[Twin], None]:
    def change(twin: Twin) -> None:
        for p in twin.params:
            twin.optimizer.state[p][name].mul_(2)

    return change


def nothing(twin: Twin) -> None:
    """The other twin's parameters only move."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    ("change", "same_as"),
    [
        (replaced("hess"), written("hess")),
        (moved("hess"), written("hess")),
        (replaced("momentum"), written("momentum")),
        (moved("momentum"), written("momentum")),
        (moved("param"), nothing),
        (exchanged, nothing),
    ],
)
def test_tensors_may_be_replaced_or_moved(
    change: Callable[[Twin], None], same_as: Callable[[Twin], None], sampled: bool, backend: str
) -> None:
    twins = Twin(backend), Twin(backend)
    for twin, event in zip(twins, (change, same_as), strict=True):
        for _ in range(2):
            twin.step()
        if sampled:
            twin.step(event)
        else:
            event(twin)
        for _ in range(2):
            twin.step()
    assert_same(*twins)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [replaced("mean"), moved("mean")])
def test_a_replaced_mean_is_the_mean(change: Callable[[Twin], None], backend: str) -> None:
    """While a sample is live; what was replaced is nobody's afterwards, and is not written to any more."""
    twins = Twin(backend), Twin(backend)
    old: list[Tensor] = []

    def keep_and_change(twin: Twin) -> None:
        old.extend(twin.optimizer.state[p]["mean"].data for p in twin.params)
        change(twin)

    for twin, event in zip(twins, (keep_and_change, written("mean")), strict=True):
        twin.step()
        twin.step(event)
    assert_same(*twins)
    twins[0].step()
    twins[1].step()
    assert_same(*twins)
    assert len(old) == len(SHAPES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_means_are_shown_while_a_sample_is_live_to_those_who_look(backend: str) -> None:
    twin = Twin(backend)
    twin.step()
    means = [p.detach().clone() for p in twin.params]
    entries = [twin.optimizer.state[p] for p in twin.params]
    assert all("mean" not in entry for entry in entries)
    twin.optimizer.train()
    shown = [twin.optimizer.state[p]["mean"] for p in twin.params]
    assert all(map(torch.equal, shown, means))
    saved = twin.optimizer.state_dict()["state"]
    assert all(torch.equal(saved[i]["mean"], mean) for i, mean in enumerate(means))
    twin.optimizer.eval()
    assert all(map(torch.equal, twin.params, means))
    assert all("mean" not in entry for entry in entries)
    twin.optimizer.train()
    copied = copy.deepcopy(twin.optimizer)
    copied.eval()
    assert all(torch.equal(p, mean) for p, mean in zip(copied.param_groups[0]["params"], means, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_between_sample_and_step(backend: str) -> None:
    """It gets its mean back and keeps its state; the others do not notice."""
    frozen, free = Twin(backend), Twin(backend)
    for twin in (frozen, free):
        twin.step()
    before = frozen.bits()[:4]

    def freeze(twin: Twin) -> None:
        twin.params[0].requires_grad_(False)

    frozen.step(freeze)
    free.step()
    assert all(map(torch.equal, frozen.bits()[:4], before))
    assert all(map(torch.equal, frozen.bits()[4:], free.bits()[4:]))
    frozen.params[0].requires_grad_(True)
    frozen.step()
    assert frozen.optimizer.state[frozen.params[0]]["step"] == 2
    assert not torch.equal(frozen.params[0], before[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_strides(backend: str) -> None:
    twins = Twin(backend), Twin(backend)

    def spread(twin: Twin) -> None:
        for p in twin.params:
            assert p.grad is not None
            p.grad = p.grad.reshape(-1)[:1].expand(p.numel()).reshape(p.shape)
            if p.dim() == 2:
                p.grad = p.grad.t().contiguous().t()

    def spread_plainly(twin: Twin) -> None:
        spread(twin)
        for p in twin.params:
            assert p.grad is not None
            p.grad = p.grad.contiguous()

    for twin, event in zip(twins, (spread, spread_plainly), strict=True):
        for _ in range(2):
            twin.step(event)
    assert_same(*twins)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients have the dtype of their parameters")
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_another_dtype_that_come_later(backend: str) -> None:
    """bf16 gradients are what the same numbers are in fp32."""
    twins = Twin(backend), Twin(backend)

    def rounded(twin: Twin) -> None:
        for p in twin.params:
            assert p.grad is not None
            p.grad = p.grad.bfloat16().float()

    def short(twin: Twin) -> None:
        for p in twin.params:
            assert p.grad is not None
            p.grad_dtype = None
            p.grad = p.grad.bfloat16()

    for twin, event in zip(twins, (short, rounded), strict=True):
        twin.step()
        twin.step(event)
        twin.step()
    assert_same(*twins)


@pytest.mark.parametrize("backend", BACKENDS)
def test_written_over_a_sample_then_stepped(backend: str) -> None:
    """The step starts at what was written, with the gradient as it is."""
    written_to, other = Twin(backend), Twin(backend)
    for twin in (written_to, other):
        twin.step()
    with torch.no_grad():
        other.params[0].fill_(5.0)

    def write(twin: Twin) -> None:
        twin.params[0].data.fill_(5.0)

    with pytest.warns(UserWarning, match="written while they held"):
        written_to.step(write)
    other.step()
    assert_same(written_to, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_in_a_step_leaves_the_mean_to_come_back_to(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample stays, and with it the gradient: the step can be made again, with the same bits."""
    failing, other = Twin(backend), Twin(backend)
    for twin in (failing, other):
        twin.step()
    means = [p.detach().clone() for p in failing.params]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    def interrupted(twin: Twin) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(twin.optimizer.backend_of(torch.device("cpu")), "step", fail)
            with pytest.raises(KeyboardInterrupt):
                twin.optimizer.step()
        assert all(torch.equal(twin.optimizer.mean_of(p), mean) for p, mean in zip(twin.params, means, strict=True))

    failing.step(interrupted)
    other.step()
    assert_same(failing, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 1023, 1024, 4799])
def test_one_element_written_over_a_sample(place: int, backend: str) -> None:
    """Wherever it is in a tensor of several chunks, and behind autograd's back."""
    twin = Twin(backend)
    twin.step()
    means = [p.detach().clone() for p in twin.params]
    twin.optimizer.train()
    twin.params[2].data.view(-1)[place] = 5.0
    means[2].view(-1)[place] = 5.0
    with pytest.warns(UserWarning, match="written while they held"):
        twin.optimizer.eval()
    assert all(map(torch.equal, twin.params, means))


@needs_compiler
def test_neighbours_exchanged_in_a_sample() -> None:
    """A plain sum would not notice."""
    twin = Twin("compile")
    twin.step()
    twin.optimizer.train()
    flat = twin.params[2].data.view(-1)
    first, second = flat[:16].clone(), flat[16:32].clone()
    flat[:16], flat[16:32] = second, first
    with pytest.warns(UserWarning, match="written while they held"):
        twin.optimizer.eval()
    assert torch.equal(twin.params[2].detach().view(-1)[:32], torch.cat([second, first]))


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("beta1", 1.0), ("ess", float("nan")), ("maximize", 1)])
def test_a_bad_hyperparameter_is_refused_every_time(name: str, value: Any) -> None:
    twin = Twin("eager")
    twin.step()
    before = twin.bits()
    good = twin.optimizer.param_groups[0][name]
    twin.set_gradients()
    for _ in range(2):
        twin.optimizer.param_groups[0][name] = value
        with pytest.raises(ValueError, match=name):
            twin.optimizer.step()
        twin.optimizer.param_groups[0][name] = good
    assert all(map(torch.equal, twin.bits(), before))
    twin.step()


def test_a_learning_rate_in_a_tensor_is_read_every_time() -> None:
    twin = Twin("eager")
    lr = torch.tensor(0.1)
    twin.optimizer.param_groups[0]["lr"] = lr
    twin.step()
    twin.optimizer.train()
    twin.set_gradients()
    lr.fill_(-1.0)
    with pytest.raises(ValueError, match="lr must lie in"):
        twin.optimizer.step()


# ---------------------------------------------------------------- ranks


def adapters() -> list[LoraAdapter]:
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator))

    return [
        LoraAdapter("plain", parameter(3, 5), parameter(7, 3)),
        LoraAdapter("triplet", parameter(4, 6), parameter(2, 4), parameter(4, 1)),
        LoraAdapter("other", parameter(2, 2, 3), parameter(5, 2, 1)),
    ]


def test_rank_map_is_what_loops_would_do() -> None:
    found, ours = adapters(), RankMap(adapters())
    assert ours.ranks == [3, 4, 2]
    values = torch.rand(sum(ours.sizes), generator=torch.Generator().manual_seed(0))
    parts = iter(values.split(ours.sizes))
    sums = [functools.reduce(torch.add, [next(parts) for _ in a.tensors()]) for a in found]
    assert torch.equal(ours.add(values), torch.cat(sums))
    of_adapters = torch.arange(9.0)
    expected = [part for a, part in zip(found, of_adapters.split(ours.ranks), strict=True) for _ in a.tensors()]
    assert torch.equal(ours.spread(of_adapters), torch.cat(expected))
    assert ours.owners(values.device).tolist() == [0] * 3 + [1] * 4 + [2] * 2
    places = [(tensor, rank) for tensor, size in enumerate(ours.sizes) for rank in range(size)]
    assert [ours.place(i) for i in range(len(places))] == places
    numbers = [p.numel() // size for p, size in zip(ours.params, ours.sizes, strict=True) for _ in range(size)]
    assert ours.counts.tolist() == numbers


def test_shared_entries_take_in_what_somebody_puts_there() -> None:
    entries: list[dict[str, Any]] = [{}, {"x": torch.ones(3)}, {}]
    shared = SharedEntry("x", [2, 3, 1], 0.0)
    whole = shared.of(entries, torch.device("cpu"))
    assert whole.tolist() == [0, 0, 1, 1, 1, 0]
    whole.copy_(torch.arange(6.0))
    assert [entry["x"].tolist() for entry in entries] == [[0, 1], [2, 3, 4], [5]]
    assert shared.of(entries, torch.device("cpu")) is whole
    entries[1]["x"] = torch.full((3,), 7.0)
    assert shared.of(entries, torch.device("cpu")).tolist() == [0, 1, 7, 7, 7, 5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_was_replaced_is_the_mask(backend: str) -> None:
    found = adapters()
    params = [p for a in found for _, p, _ in a.tensors()]
    pruner = RankPruner(found, 1, total_steps=20, warmup=1, final=15, interval=2)
    optimizer = IVON(params, lr=0.1, ess=50, backend=backend, pruner=pruner)
    for step in range(8):
        optimizer.train()
        for p in params:
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        optimizer.step()
    mask = optimizer.state[found[1].A]["rank_mask"]
    other = torch.tensor([True, False, False, True])
    assert pruner.is_hard(optimizer.completed_steps)
    assert not torch.equal(mask, other)
    for _, p, _ in found[1].tensors():
        optimizer.state[p]["rank_mask"] = other.clone()
    before = found[1].A.detach().clone()
    optimizer.train()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert ((before != found[1].A).any(1) == other).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_made_between_two_allocations_goes_on_by_itself(backend: str) -> None:
    """What the pruner knows of the memory of its entries is not true of those of a copy."""
    found = adapters()
    optimizer = IVON(
        [p for a in found for _, p, _ in a.tensors()],
        lr=0.1,
        ess=50,
        backend=backend,
        pruner=RankPruner(found, 1, total_steps=20, warmup=1, final=10, interval=2),
    )

    def steps(mine: IVON, n: int) -> list[Tensor]:
        params: list[Tensor] = mine.param_groups[0]["params"]
        for _ in range(n):
            mine.train()
            generator = torch.Generator().manual_seed(mine.completed_steps)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            mine.step()
        return [x.detach().clone() for p in params for x in (p, mine.state[p]["rank_mask"], mine.state[p]["rank_snr"])]

    before = steps(optimizer, 5)
    copied = copy.deepcopy(optimizer)
    expected = steps(optimizer, 8)
    assert not all(map(torch.equal, before[1::3], expected[1::3]))
    assert all(map(torch.equal, steps(copied, 8), expected))


SUM_SHAPES = [((6, 37), 0), ((29, 6), 1), ((5, 3, 3, 3), 0), ((7, 5, 3, 3), 1), ((4, 1), 0), ((2, 2500), 0)]
SUM_SHAPES += [((900, 3), 1), ((40, 16), 1), ((3, 140), 1), ((2, 1500), 1), ((1, 5), 1)]


@needs_compiler
def test_compiled_sums_round_to_the_exact_means() -> None:
    from ivon_lora.backends.compiled import Compiled

    generator = torch.Generator().manual_seed(0)
    own = torch.tensor([0.1])
    works, dims = [], []
    for index, (shape, dim) in enumerate(SUM_SHAPES):
        mean, hess = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.1
        works.append(Work(index, mean, mean, mean, hess, own_decay=own if index % 2 else None))
        dims.append(dim)
    for criterion in (name for name in CRITERIA if name != "sensitivity"):
        sums = Compiled().rank_sums(works, dims, criterion, 100.0, 0.1)
        assert sums is not None
        parts = np.split(sums, np.cumsum([w.mean.shape[dim] for w, dim in zip(works, dims, strict=True)])[:-1])
        for work, dim, part in zip(works, dims, parts, strict=True):
            values = importance(criterion, work.mean, root_precision(work.hess, 100.0, 0.1))
            count = values.numel() // values.shape[dim]
            means, undecided = rounded_means(part, count, count)
            assert np.array_equal(means[~undecided], rank_mean(values, dim).numpy()[~undecided])
            assert undecided.mean() <= 0.5 or len(undecided) < 4
