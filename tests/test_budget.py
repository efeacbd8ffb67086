"""The cubic schedule: AdaLoRA's formula, its ends, and monotonicity."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivon_lora.lora.rank_pruner import cubic_budget

RUN = {"initial": 432, "target": 144, "total_steps": 200, "warmup": 20, "final": 80}


def test_ends():
    assert [cubic_budget(t, **RUN) for t in (0, 1, 20, 120, 121, 200, 10_000)] == [432, 432, 432, 144, 144, 144, 144]


def test_budgets_of_adalora_on_the_real_task():
    """What PEFT's AdaLoRA logged at its ten allocations with these settings."""
    assert [cubic_budget(t, **RUN) for t in range(30, 121, 10)] == [353, 291, 242, 206, 180, 162, 151, 146, 144, 144]


@given(
    st.integers(0, 500),
    st.integers(0, 500),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(1, 100),
    st.integers(0, 300),
)
def test_falls_from_initial_to_target(a, b, warmup, final, annealing, step):
    initial, target = max(a, b), min(a, b)
    run = {
        "initial": initial,
        "target": target,
        "warmup": warmup,
        "final": final,
        "total_steps": warmup + final + annealing,
    }
    now, then = cubic_budget(step, **run), cubic_budget(step + 1, **run)
    assert target <= then <= now <= initial
    s = min(max((step - warmup) / annealing, 0.0), 1.0)
    assert now == pytest.approx(target + (initial - target) * (1 - s) ** 3, abs=1 + 1e-9)
    assert now <= target + (initial - target) * (1 - s) ** 3 + 1e-9
