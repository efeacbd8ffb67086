"""Noise kept from sample to step: the same bits with and without it, bounded, and gone when the step is over."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, LoraAdapter, RankPruner, blocks, noise_passes, noise_store
from ivon_lora.backends.compiled import Compiled
from ivon_lora.backends.eager import BlockedEager
from ivon_lora.functional import noise
from ivon_lora.functional.noise import NoiseKey, normal_array, normals_of_quads
from ivon_lora.noise_passes import NormalPasses
from ivon_lora.noise_store import NoiseStore
from tests.compiler import BACKENDS, has_compiler, needs_compiler

SHAPES = ((3, 5), (4, 30), (2, 1500), (1,), (30, 4), (7,))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def closure_of(optimizer: IVON, params: list[nn.Parameter]) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([(p.float() ** 2).sum() + (p.float() ** 4).sum() for p in params]).sum()
        loss.backward()
        return loss

    return closure


def eventful_run(params: list[nn.Parameter], backend: str, **options: Any) -> list[Tensor]:
    """Steps of every kind with all that may happen between them; every state tensor at the end."""
    groups: list[dict[str, Any]] = [{"params": params[:4]}, {"params": params[4:], "lr": 0.03}]
    optimizer = IVON(groups, 0.01, 100.0, backend=backend, seed=5, **options)
    closure = closure_of(optimizer, params)
    for step in range(6):
        if step == 1:
            with pytest.raises(KeyError), optimizer.sampled_params(train=True):
                raise KeyError
        if step == 2:
            optimizer.train()
            closure()
            with optimizer.sampled_params():
                pass
            optimizer.train()
            closure()
            optimizer.eval()
            optimizer.step()
        if step == 3:
            for _ in range(2):
                with optimizer.sampled_params(train=True):
                    closure()
            optimizer.step()
        if step == 4:
            optimizer.train()
            with torch.no_grad():
                params[2].data[0, :3] = 1.0
            with pytest.warns(UserWarning, match="written"):
                optimizer.eval()
        optimizer.step(closure)
    return [*params, *(x for p in params for _, x in sorted(optimizer.state[p].items()))]


@pytest.mark.parametrize(
    "options", [{}, {"mc_samples": 3}, {"mc_samples": 4, "antithetic": True}, {"hess_approx": "gradsq"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_what_is_kept(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 512)  # one tensor is cut, the others are packed
    expected: list[Tensor] = []
    for backend in ("eager", "compile") if has_compiler() else ("eager",):
        for limit in (0, 4 * 1000, 64 << 20):
            monkeypatch.setattr(noise_store, "LIMIT", limit)
            result = eventful_run(parameters(dtype), backend, **options)
            expected = expected or result
            assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True)), (backend, limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_masks_leave_the_kept_normals_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (0, 64 << 20):
        monkeypatch.setattr(noise_store, "LIMIT", limit)
        generator = torch.Generator().manual_seed(0)
        a, b = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 30), (20, 4)))
        pruner = RankPruner([LoraAdapter("a", a, b)], 2, total_steps=8, warmup=1, final=4, interval=1)
        optimizer = IVON([a, b], 0.01, 100.0, backend=backend, pruner=pruner)
        for _ in range(8):
            optimizer.step(closure_of(optimizer, [a, b]))
        assert int(optimizer.state[a]["rank_mask"].sum()) == 2
        results.append([a, b, optimizer.state[a]["hess"], optimizer.state[b]["momentum"]])
    for nothing, everything in zip(*results, strict=True):
        assert torch.equal(nothing, everything)


def store_of(optimizer: IVON) -> NoiseStore:
    backend = optimizer.backend_of(torch.device("cpu"))
    assert isinstance(backend, BlockedEager | Compiled)
    return backend.store


def count_draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of elements of all draws from now on."""
    drawn: list[int] = []
    draw = NormalPasses.draw

    def counted(self: NormalPasses, *arguments: Any) -> None:
        drawn.append(len(arguments[-1]))
        draw(self, *arguments)

    monkeypatch.setattr(NormalPasses, "draw", counted)
    return drawn


@needs_compiler
def test_compiled_loops_use_what_is_kept() -> None:
    """Whatever lies in the memory is taken for the normals."""
    p = nn.Parameter(torch.ones(3000))
    optimizer = IVON([p], 0.01, 100.0, hess_init=2.0, backend="compile", seed=3)
    optimizer.train()
    (kept,) = store_of(optimizer)._kept.values()
    assert np.array_equal(kept, normal_array(NoiseKey(3, 0), 0, 0, 3000))
    p.grad = torch.ones_like(p)
    kept[:] = 0.0  # so the curvature of this step will be zero
    optimizer.step()
    expected = IVON([q := nn.Parameter(torch.ones(3000))], 0.01, 100.0, hess_init=2.0, backend="compile", seed=3)
    q.grad = torch.zeros_like(q)
    expected.train()
    expected.step()
    assert torch.equal(optimizer.state[p]["hess"], expected.state[q]["hess"])
    assert bool((optimizer.state[p]["hess"] < 2.0).all())


def test_noise_is_drawn_once_per_step_and_forgotten_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = count_draws(monkeypatch)
    p = nn.Parameter(torch.ones(1000))
    optimizer = IVON([p], 0.01, 100.0, backend="eager")
    closure = closure_of(optimizer, [p])
    for _ in range(3):
        optimizer.train()
        closure()
        assert store_of(optimizer).bytes_kept == 4000
        optimizer.step()
        assert store_of(optimizer).bytes_kept == 0
    assert drawn == [1000] * 3
    with optimizer.sampled_params(train=True):
        closure()
    assert store_of(optimizer).bytes_kept == 4000  # ivon-opt's spelling: the step comes after the context
    optimizer.step()
    assert (len(drawn), store_of(optimizer).bytes_kept) == (4, 0)
    optimizer.train()
    optimizer.eval()
    assert store_of(optimizer).bytes_kept == 0
    with optimizer.sampled_params():
        assert store_of(optimizer).bytes_kept == 0  # no step follows
    drawn.clear()
    fisher = IVON([p], 0.01, 100.0, hess_approx="fisher", batch_size=1, weight_decay=0.1, backend="eager")
    fisher.train()
    assert store_of(fisher).bytes_kept == 0  # its step wants none
    fisher.eval()
    monkeypatch.setattr(noise_store, "LIMIT", 100)
    optimizer.train()
    assert store_of(optimizer).bytes_kept == 100


def test_an_error_while_drawing_restores_the_mean_and_forgets_what_was_not_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 512)
    params = parameters()
    optimizer = IVON(params, 0.01, 100.0, backend="eager", seed=5)
    optimizer.step(closure_of(optimizer, params))
    before, drawn, draw = [p.detach().clone() for p in params], [0], NormalPasses.draw

    def failing(self: NormalPasses, *arguments: Any) -> None:
        drawn[0] += 1
        if drawn[0] == 3:
            raise MemoryError
        draw(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(NormalPasses, "draw", failing)
        with pytest.raises(MemoryError):
            optimizer.train()
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    assert store_of(optimizer).bytes_kept == 0
    optimizer.step(closure_of(optimizer, params))
    expected = IVON(others := parameters(), 0.01, 100.0, backend="eager", seed=5)
    for _ in range(2):
        expected.step(closure_of(expected, others))
    assert all(torch.equal(p, x) for p, x in zip(params, others, strict=True))


@pytest.mark.parametrize(
    ("radius_bits", "angle_words"),
    [
        (np.arange(100_000), np.arange(-50_000, 50_000) * 85_899),
        ((1 << 31) - 1 - np.arange(100_000), np.arange(100_000)),  # the radius is zero for some
        ((1 << 30) - 50_000 + np.arange(100_000), np.arange(-50_000, 50_000)),
        (np.arange(100_000) * 21_474, (np.arange(100_000) * 2_654_435_761 & 0xFFFFFFFF) - (1 << 31)),
    ],
    ids=["small u", "u near 1", "u near 1/2", "all over"],
)
def test_powers_of_two_can_be_taken_out_of_box_muller(radius_bits: np.ndarray, angle_words: np.ndarray) -> None:
    words = radius_bits.astype(np.int32), angle_words.astype(np.int32)
    for got, expected in zip(noise_passes.polar_normals(*words), noise.polar_normals(*words), strict=True):
        assert np.array_equal(got.view(np.int32), expected.view(np.int32))


def test_mirrored_samples_share_one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = count_draws(monkeypatch)
    p = nn.Parameter(torch.ones(1000))
    optimizer = IVON([p], 0.01, 100.0, backend="eager", antithetic=True, mc_samples=2)
    optimizer.step(closure_of(optimizer, [p]))
    assert len(drawn) == 1


def test_noise_is_in_no_copy_and_no_state_dict() -> None:
    p = nn.Parameter(torch.ones(100_000))
    optimizer = IVON([p], 0.01, 100.0, backend="eager")
    optimizer.step(closure_of(optimizer, [p]))
    optimizer.eval()
    without = len(pickle.dumps(optimizer))
    optimizer.train()
    live = len(pickle.dumps(optimizer))
    assert live - without < 4 * 100_000 + 10_000  # the mean's copy, and nothing else of that size
    assert {name for entry in optimizer.state_dict()["state"].values() for name in entry} == {
        "step",
        "momentum",
        "hess",
        "mean",
    }
    assert not copy.deepcopy(optimizer)._parts.members.backends


@pytest.mark.parametrize(
    "key",
    [NoiseKey(7, 3), NoiseKey(2**64 - 1, 2**32 - 1, 2**23 - 1, True), NoiseKey(2**40 + 9, 77, 5, mirrored=True)],
    ids=["small", "largest", "mirrored"],
)
@pytest.mark.parametrize(
    "runs",
    [
        [(0, 5000, 3)],
        [(0, 1, 0), (17, 2000, 1), (2**32 - 3, 3, 2**32 - 1), (2**33, 50, 2**31)],
        [(2**32 - 3, 9, 1)],  # the counter's second word changes inside
        [(2**40 - 10, 10, 1)],  # up to the last element there can be
    ],
    ids=["one", "several", "crossing", "last"],
)
def test_passes_draw_the_readable_formulas_bits(key: NoiseKey, runs: list[tuple[int, int, int]]) -> None:
    firsts, counts, parameters = np.array(runs, np.int64).T
    out = np.empty(4 * counts.sum(), np.float32)
    NormalPasses().draw(key, firsts, counts, parameters, out)
    quads = np.concatenate([np.arange(first, first + n, dtype=np.uint64) for first, n, _ in runs])
    expected = np.empty((len(quads), 4), np.float32)
    normals_of_quads(key, quads, np.repeat(parameters.astype(np.uint64), counts), expected)
    assert np.array_equal(out.view(np.int32), expected.reshape(-1).view(np.int32))


def test_passes_may_be_used_for_smaller_and_larger_draws_in_turn() -> None:
    passes, key = NormalPasses(), NoiseKey(1, 2)
    for n in (10, 3000, 10, 5000, 3000, 1):
        out = np.empty(4 * n, np.float32)
        passes.draw(key, np.array([5]), np.array([n]), np.array([4]), out)
        assert np.array_equal(out, normal_array(key, 4, 20, 20 + 4 * n))
