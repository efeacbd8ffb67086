"""A compiled step finds on its way what was written over the sample: nothing is missed, and nobody else is held up."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON
from ivon_lora.backends import Work
from ivon_lora.backends.batch import Batch
from ivon_lora.backends.compiled import CHUNKS_PER_THREAD, Compiled
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.loops import CHUNK
from tests.compiler import needs_compiler
from tests.optimizer_problem import assert_same_state

pytestmark = needs_compiler

SIZES = (1250, CHUNK, 7, 3 * CHUNK + 5, 1, 2 * CHUNK, 300)
KEY = NoiseKey(7, 2, 0)
HYPER = Hyper(100.0, 0.01, 0.1, 0.9, 0.1, 0.01, 0.5, 1.0, 1.0, 1.0, 100.0, "price", "newton")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def one(p: Tensor) -> None:
    """The last element."""
    p.data[-1:] = 0.25


def exchange(p: Tensor) -> None:
    """Two elements: their sum stays."""
    with torch.no_grad():
        p[[0, 8]] = p[[8, 0]]


def all_of_it(p: Tensor) -> None:
    with torch.no_grad():
        p.fill_(0.5)


def new_memory(p: Tensor) -> None:
    p.data = torch.full_like(p, 0.5)


def nothing(p: Tensor) -> None:
    pass


def train(backend: str, write: Callable[[Tensor], None], written: tuple[int, ...], **options: Any) -> IVON:
    generator = torch.Generator().manual_seed(0)
    sizes = (*SIZES, 2 * CHUNKS_PER_THREAD * CHUNK)  # the last is shared by two threads
    dtypes = [torch.bfloat16 if i in (1, 2) else torch.float32 for i in range(len(sizes))]
    params = [
        nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n, dtype in zip(sizes, dtypes, strict=True)
    ]
    optimizer = IVON(params, 0.1, 100, hess_init=0.5, clip_radius=1.0, backend=backend, **options)
    for step in range(3):
        optimizer.train()
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if step == 1:
            for i in written:
                write(params[i])
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            optimizer.step()
        noticed = step == 1 and write is not nothing and bool(written)
        assert [str(w.message)[:33] for w in found] == ["parameters were written while the"] * noticed
    return optimizer


@pytest.mark.parametrize("write", [nothing, one, exchange, all_of_it, new_memory])
def test_bits_are_those_of_a_check_before_the_step(write: Callable[[Tensor], None], threads: int) -> None:
    written = (0, 3, 5, 7)
    assert_same_state(train("compile", write, written), train("eager", write, written))


@pytest.mark.parametrize("written", [(0,), (7,), (1, 2), (6, 4, 2), tuple(range(8))])
def test_whoever_is_written(written: tuple[int, ...]) -> None:
    assert_same_state(train("compile", all_of_it, written), train("eager", all_of_it, written))


@pytest.mark.parametrize(
    "options",
    [
        {"hess_approx": "gradsq", "maximize": True},
        {"hess_approx": "fisher", "batch_size": 8, "step_rule": "adam"},
        {"hess_approx": "fisher", "batch_size": 8, "prior": "empirical"},
    ],
)
def test_other_curvatures(options: dict[str, Any]) -> None:
    options = {"weight_decay": 0.01, **options}

    assert_same_state(train("compile", one, (0, 3), **options), train("eager", one, (0, 3), **options))


def test_a_warning_that_is_an_error_comes_after_the_step() -> None:
    optimizers = []
    for action in ("error", "ignore"):
        params = [nn.Parameter(torch.ones(n)) for n in SIZES]
        optimizer = IVON(params, 0.1, 100, backend="compile")
        optimizer.train()
        for p in params:
            p.grad = torch.ones_like(p)
        all_of_it(params[3])
        with warnings.catch_warnings(), contextlib.suppress(UserWarning):
            warnings.simplefilter(action)
            optimizer.step()
        assert optimizer.completed_steps == 1
        optimizers.append(optimizer)
    assert_same_state(*optimizers)


def make_works() -> list[Work]:
    generator = torch.Generator().manual_seed(1)
    works = []
    for i, n in enumerate(SIZES):
        p, h, g = (torch.randn(n, generator=generator) for _ in range(3))
        works.append(Work(i, p, p.clone(), torch.zeros(n), h.abs() + 0.1, g, offset=i))
    return works


def sealed() -> tuple[Compiled, Batch, np.ndarray]:
    backend, batch = Compiled(), Batch(make_works())
    backend.sample(batch, HYPER, KEY)
    return backend, batch, backend.seal(batch)


def tensors(works: Sequence[Work]) -> list[list[Tensor]]:
    return [[w.param.clone(), w.momentum.clone(), w.hess.clone()] for w in works]


def test_the_written_come_last() -> None:
    backend, batch, seal = sealed()
    backend.step(batch, HYPER, KEY, 1, seal, lambda numbers: pytest.fail(f"nobody wrote into {numbers}"))
    expected = tensors(batch)

    backend, batch, seal = sealed()
    batch[3].param[CHUNK + 1] += 1
    batch[6].param[-1] += 1
    before = tensors(batch)
    seen: list[int] = []

    def keep_written(numbers: Sequence[int]) -> None:
        seen.extend(numbers)
        for number, (now, old, new) in enumerate(zip(tensors(batch), before, expected, strict=True)):
            assert all(map(torch.equal, now, old if number in numbers else new)), number

    backend.step(batch, HYPER, KEY, 1, seal, keep_written)
    assert seen == [3, 6]
    assert all(all(map(torch.equal, now, new)) for now, new in zip(tensors(batch), expected, strict=True))
