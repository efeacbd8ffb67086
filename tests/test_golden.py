"""Nothing that the optimizer computes has changed since ``python -m tests.golden`` wrote hashes.json."""

import json

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
