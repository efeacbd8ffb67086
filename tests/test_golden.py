"""Nothing that the optimizer computes has changed since ``python -m tests.golden`` wrote hashes.json."""

import importlib.util
import json
import os

import numpy as np
import pytest

from tests.compiler import BACKENDS
from tests.golden import HASHES
from tests.golden.trajectories import CASES, trajectory

GOLDEN = json.loads(HASHES.read_text())


def test_every_case_has_its_hashes_and_no_other_has() -> None:
    assert list(GOLDEN) == CASES


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bits_are_those_of_before(backend: str, case: str) -> None:
    assert trajectory(case, backend) == GOLDEN[case]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")
@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="made for Triton's interpreter")
@pytest.mark.parametrize("case", ["price-fp32-few_steps", "price-fp32-few_steps_ranks"])
def test_the_bits_of_triton_are_those_of_before(case: str) -> None:
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns where a GPU is silent
        assert trajectory(case, "triton") == GOLDEN[case]
