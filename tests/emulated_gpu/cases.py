"""Tests that only the emulated GPU can run: any order of the programs, and what a step moves.

``pytest -p tests.emulated_gpu.plugin tests/emulated_gpu/cases.py``; `tests/test_triton_emulated.py` does it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import driver

from ivon_lora import IVON
from ivon_lora.backends.ranking import Ranking
from ivon_lora.kernels.launch import TritonBackend
from tests.batches import KEY, make_batch
from tests.emulated_gpu.driver import EmulatedDriver
from tests.test_triton_ranks import masks_of, ranking_of

LAYOUT = [((40, 48), 0), ((32, 40), 1)] * 3
ADAPTERS = [[0, 1], [2, 3], [4, 5]]
BUDGET = 50


@pytest.fixture
def gpu() -> Iterator[EmulatedDriver]:
    emulated = driver.active
    assert isinstance(emulated, EmulatedDriver), "run with -p tests.emulated_gpu.plugin"
    yield emulated
    emulated.rng, emulated.moved = None, None


def step_and_rank(**options: Any) -> torch.Tensor:
    """A step that adds up scores, and an allocation: masks and scores."""
    batch = make_batch(LAYOUT)
    ranking: Ranking = ranking_of(batch, ADAPTERS, criterion="snr_abs", budget=BUDGET, **options)
    backend = TritonBackend(torch.device("cpu"))
    backend.step([batch], KEY, 1, ranking)
    backend.rank([batch], ranking)
    masks = masks_of(ranking)
    assert sum(masks) == BUDGET
    return torch.cat([torch.tensor(masks).float(), *(adapter[0].scores for adapter in ranking.adapters)])


def test_any_order_of_the_programs_leads_to_the_same(gpu: EmulatedDriver) -> None:
    """Who adds to a sum when is chance; warps of a program are interrupted anywhere."""
    expected = step_and_rank()
    gpu.rng = np.random.default_rng(0)
    assert torch.equal(step_and_rank(), expected)


def test_a_step_moves_what_the_equations_must_and_no_more(gpu: EmulatedDriver) -> None:
    """Per element 16 bytes for a sample and 28 for a step. Tables add some 64 bytes per tile of 512 elements."""
    params = [torch.full((1024, 16), 0.5, requires_grad=True) for _ in range(2)]
    for p in params:
        p.grad = torch.full_like(p, 0.25)
    optimizer = IVON(params, 0.1, 100, backend="triton")
    optimizer.train()
    optimizer.step()  # creates what there is to create
    optimizer.train()
    gpu.moved = {}
    optimizer.step()
    optimizer.train()
    assert gpu.moved.keys() == {"step_kernel", "sample_kernel"}
    assert 28 <= gpu.moved["step_kernel"] / (2 * 1024 * 16) < 28.3
    assert 16 <= gpu.moved["sample_kernel"] / (2 * 1024 * 16) < 16.3
