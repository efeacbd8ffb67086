"""Tests that only the emulated GPU can run: any order of the programs, and kernels that lack what orders them.

``pytest -p tests.emulated_gpu.plugin tests/emulated_gpu/cases.py``; `tests/test_triton_emulated.py` does it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import driver

from ivon_lora import IVON
from ivon_lora.backends import Work
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.kernels import prior, select, step
from ivon_lora.kernels.launch import LaunchConfig, TritonBackend
from tests.emulated_gpu.driver import EmulatedDriver
from tests.emulated_gpu.memory import Fault
from tests.emulated_gpu.ptx import Block, Module
from tests.test_triton_ranks import ranking_of

HYPER = Hyper(100.0, 0.01, 0.0, 0.9, 0.1, 0.01, 1.0, 1.0, 1.0, 1.0, 100.0, "fisher", "newton")
SHAPES: list[list[tuple[tuple[int, ...], int]]] = [[((40, 48), 0), ((32, 40), 1)] for _ in range(3)]
BUDGET = 50


@pytest.fixture
def gpu() -> Iterator[EmulatedDriver]:
    emulated = driver.active
    assert isinstance(emulated, EmulatedDriver), "run with -p tests.emulated_gpu.plugin"
    yield emulated
    emulated.rng, emulated.edit, emulated.counted = None, lambda module: module, None


def make_works(own_decay: bool) -> list[Work]:
    generator = torch.Generator().manual_seed(0)
    works = []
    for index, (shape, _) in enumerate(pair for adapter in SHAPES for pair in adapter):
        p = torch.randn(shape, generator=generator)
        own = torch.tensor(0.02) if own_decay else None
        zeros = [torch.zeros_like(p) for _ in range(2)]
        works.append(Work(index, p, p, zeros[0], torch.ones_like(p), zeros[1], own_decay=own))
    return works


def step_and_select(config: LaunchConfig | None = None, own_decay: bool = False, min_rank: int = 0) -> torch.Tensor:
    """One launch of everything: masks, scores and deltas, one after another."""
    works = make_works(own_decay)
    ranking = ranking_of(SHAPES, "cpu", criterion="snr_abs", budget=BUDGET, min_rank=min_rank)
    backend = TritonBackend(torch.device("cpu"), config)
    backend.begin_ranking(ranking)
    backend.step(works, HYPER, NoiseKey(0, 0), 1, decay_bounds=(1e-9, 1e9) if own_decay else None)
    backend.finish_ranking()
    assert backend._layout is not None
    assert not backend._layout.sums.any(), "cleared for the next step"
    masks = torch.cat([adapter[0].mask for adapter in ranking.adapters])
    assert int(masks.sum()) == BUDGET
    scores = torch.cat([adapter[0].scores for adapter in ranking.adapters])
    deltas = [w.own_decay.reshape(1) for w in works if w.own_decay is not None]
    return torch.cat([masks.float(), scores, *deltas])


@pytest.mark.parametrize("own_decay", [False, True], ids=["", "priors"])
def test_any_order_of_the_programs_leads_to_the_same(own_decay: bool, gpu: EmulatedDriver) -> None:
    """Who adds to a sum when, and who finishes last, is chance; warps of a program are interrupted anywhere."""
    expected = step_and_select(own_decay=own_decay)
    for seed in range(2):
        gpu.rng = np.random.default_rng(seed)
        assert torch.equal(step_and_select(own_decay=own_decay), expected)


def test_a_step_moves_what_the_equations_must_and_no_more(gpu: EmulatedDriver) -> None:
    """Per element 16 bytes for a sample and 28 for a step, or 32 for both in one.

    Tables add 48 bytes per tile of 512 elements, i.e. 0.1, and some 200 per tensor.
    """
    params = [torch.full((1024, 16), 0.5, requires_grad=True) for _ in range(4)]
    for p in params:
        p.grad = torch.full_like(p, 0.25)
    optimizer = IVON(params, 0.1, 100, backend="triton")
    for resample, expected in ((False, {"sample_kernel": 16, "step_kernel": 28}), (True, {"step_kernel": 32})):
        optimizer.train()
        optimizer.step(resample=resample)  # creates what there is to create
        gpu.counted = []
        optimizer.train()
        optimizer.step(resample=resample)
        found = {name: counter.bytes / (4 * 1024 * 16) for name, counter in gpu.counted}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert value <= found[name] < value + 0.2


# ---------------------------------------------------------------- kernels that lack something


def edited(change: Callable[[Block], Block]) -> Callable[[Module], Module]:
    """The step kernel after a change to its instructions, block by block."""

    def edit(module: Module) -> Module:
        if module.name != step.step_kernel.__name__:
            return module
        blocks = tuple(map(change, module.blocks))
        assert blocks != module.blocks, "nothing was changed"
        return replace(module, blocks=blocks)

    return edit


def without_barriers(module_of_kernels: ModuleType, lines: list[int]) -> Callable[[Module], Module]:
    name = Path(str(module_of_kernels.__file__)).name
    places = {f"{name}:{line}" for line in lines}
    return edited(lambda block: [i for i in block if i.base != "bar" or i.source not in places])


def barriers_in(module_of_kernels: ModuleType) -> list[int]:
    """Lines of the source that ask for a barrier."""
    text = Path(str(module_of_kernels.__file__)).read_text()
    return [number for number, line in enumerate(text.splitlines(), 1) if re.match(r"\s+tl\.debug_barrier\(", line)]


def relaxed(block: Block) -> Block:
    return [replace(i, name=tuple("relaxed" if x == "acq_rel" else x for x in i.name)) for i in block]


def test_counting_finished_programs_must_order_memory(gpu: EmulatedDriver) -> None:
    gpu.edit = edited(relaxed)
    with pytest.raises(Fault, match="nothing orders"):
        step_and_select()


@pytest.mark.parametrize(
    ("kernels", "barrier", "following", "options"),
    [
        (prior, 0, 1, {"own_decay": True}),  # every warp has added its part before the tile counts as finished
        (select, 0, 0, {"config": LaunchConfig(score_block=32)}),  # several warps read a sum before one clears it
        (select, 1, 0, {"min_rank": 1}),  # keys are written before others read them
        (select, 2, 4, {}),  # as the first
        (select, 4, 4, {}),  # keys again
    ],
    ids=["moments", "clear", "granted", "scores", "keys"],
)
def test_barriers_that_the_source_asks_for_are_needed(
    kernels: ModuleType, barrier: int, following: int, options: dict[str, Any], gpu: EmulatedDriver
) -> None:
    """Some versions of Triton add their own beside one: on the next lines, which go too."""
    line = barriers_in(kernels)[barrier]
    gpu.edit = without_barriers(kernels, list(range(line, line + following + 1)))
    with pytest.raises(Fault, match=r"nothing orders|no barrier between"):
        step_and_select(**options)
