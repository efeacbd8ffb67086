"""Programs of numpy passes: the bits of the formulas they were recorded from, in memory that is used again."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ivon_lora.eager_programs import Kind, numbers, sample_program, step_program
from ivon_lora.functional.ivon import Hyper, draw_sample, estimate_curvature, ivon_step
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.programs import FLOAT, BrokenAssumption, Program, Scratch, Symbol

HYPER = {
    "ess": 1e3,
    "weight_decay": 1e-2,
    "lr": 0.1,
    "beta1": 0.9,
    "beta1_complement": 0.1,
    "rho": 0.01,
    "debias": 0.19,
    "square_scale": 32.0,
    "inverse_batch": 1 / 32,
    "noise_ess": 900.0,
    "prior_weight": 0.37,
}


def arrays(count: int, n: int, dtype: np.dtype) -> list[np.ndarray]:
    """Numbers of many sizes; the first arrays have some that are not finite."""
    generator = np.random.default_rng(n)
    found = [(generator.standard_normal(n) * 10.0 ** generator.integers(-6, 3, n)).astype(dtype) for _ in range(count)]
    found[2] = np.abs(found[2]) + dtype.type(1e-3)  # the Hessian
    if n > 100:
        found[3][:4] = [np.inf, -np.inf, np.nan, 3e38 if dtype == np.float32 else 1e308]
    return found


CASES = [
    case
    for case in itertools.product(
        [("price", "newton"), ("gradsq", "newton"), ("fisher", "adam"), ("none", "newton")],
        [math.inf, 0.5],
        [False, True],
        [False, True],
    )
    if not (case[2] and case[0][0] == "none")
]


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize(("rules", "clip", "averaged", "masked"), CASES)
def test_a_step_has_the_bits_of_the_reference(
    rules: tuple[str, str], clip: float, averaged: bool, masked: bool, dtype: np.dtype
) -> None:
    hyper = Hyper(**HYPER, clip_radius=clip, curvature=rules[0], step_rule=rules[1])
    key = None if rules[0] == "none" else NoiseKey(0, 0)
    kind = Kind.of(hyper, key, averaged, masked, dtype)
    program, scratch = step_program(kind), Scratch()
    for n in (5, 1000, 5):
        mean, momentum, hess, grad, eps, sum_grad, sum_curvature = arrays(7, n, dtype)
        active = np.arange(n) % 3 > 0 if masked else None
        given = [mean, momentum, hess, grad, *([eps] if kind.has_noise else [])]
        given += [sum_grad, sum_curvature] if averaged else []
        given += [active] if active is not None else []
        before = [x.copy() for x in given]
        with np.errstate(all="ignore"):
            got = program.run(scratch, n, given, numbers(hyper, 3))
            curvature = None if key is None else estimate_curvature(grad, hess, eps, hyper)
            if averaged:
                grad, curvature = (grad + sum_grad) / 3, (curvature + sum_curvature) / 3
            expected = ivon_step(mean, momentum, hess, grad, curvature, hyper, active)
        for x, y in zip(got, expected, strict=True):
            assert x.dtype == y.dtype
            assert x.tobytes() == y.tobytes()
        for x, y in zip(given, before, strict=True):
            assert x.tobytes() == y.tobytes()  # arguments are not written to


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize(("rules", "clip", "averaged"), sorted({case[:3] for case in CASES}))
def test_a_step_that_assumes_finite_numbers_has_the_same_bits_or_gives_up(
    rules: tuple[str, str], clip: float, averaged: bool, dtype: np.dtype
) -> None:
    hyper = Hyper(**HYPER, clip_radius=clip, curvature=rules[0], step_rule=rules[1])
    kind = Kind.of(hyper, None if rules[0] == "none" else NoiseKey(0, 0), averaged, False, dtype)
    careful, assuming, scratch = step_program(kind), step_program(kind, assuming=True), Scratch()
    given = arrays(4 + kind.has_noise + 2 * averaged, 1000, dtype)
    given[-1] = np.abs(given[-1])  # the curvatures: "fisher" has no negative ones
    scalars = numbers(hyper, 3)
    for x in (np.inf, np.nan, 0.5):
        given[3][:4] = x
        before = [y.copy() for y in given]
        with np.errstate(all="ignore"):
            if np.isfinite(x):
                got = [y.copy() for y in assuming.run(scratch, 1000, given, scalars)]
                expected = careful.run(scratch, 1000, given, scalars)
                assert [y.tobytes() for y in got] == [y.tobytes() for y in expected[:3]]
            else:
                with pytest.raises(BrokenAssumption):
                    assuming.run(scratch, 1000, given, scalars)
        assert [y.tobytes() for y in given] == [y.tobytes() for y in before]


def test_a_hessian_that_would_not_stay_positive_breaks_the_assumption() -> None:
    hyper = Hyper(**HYPER, clip_radius=0.5, curvature="price", step_rule="newton")
    program = step_program(Kind.of(hyper, NoiseKey(0, 0), False, False, np.dtype(np.float32)), assuming=True)
    given = [np.full(5, x, np.float32) for x in (1.0, 1.0, 1.0, 1.0, 1.0)]
    program.run(Scratch(), 5, given, numbers(hyper, 1))
    given[2][3] = -HYPER["weight_decay"]  # h + delta = 0
    with np.errstate(all="ignore"), pytest.raises(BrokenAssumption):
        program.run(Scratch(), 5, given, numbers(hyper, 1))


def test_an_operation_that_is_repeated_is_called_once() -> None:
    def formula(x: Symbol, y: Symbol) -> list[Symbol]:
        unused = x * 3.0
        assert unused is not x
        return [(x + y) * (x + y) + (x + y) * 2.0 * (x + y)]

    program = Program(formula, [FLOAT, FLOAT], 0)
    calls = [function.__name__ for function, _, _ in program._calls]
    assert sorted(calls) == ["add", "add", "multiply", "multiply", "multiply"]
    x, y = np.arange(4, dtype=np.float32), np.ones(4, np.float32)
    assert program.run(Scratch(), 4, [x, y])[0].tolist() == (3 * (x + 1) ** 2).tolist()


def test_numbers_that_have_changed_are_read_again() -> None:
    program = Program(lambda x, a, b: [x * (a + b)], [FLOAT], 2)
    x, scratch = np.ones(3, np.float32), Scratch()
    for a in (1.0, 2.0, 5.0):
        assert program.run(scratch, 3, [x], [a, 1.0])[0].tolist() == [a + 1.0] * 3


def test_a_sample_may_be_written_over_its_mean() -> None:
    mean, _, hess, eps = arrays(4, 50, np.dtype(np.float32))
    expected = draw_sample(mean, hess, eps, 900.0, 0.1)
    sample_program(np.dtype(np.float32)).run(Scratch(), 50, [mean, hess, eps], [900.0, 0.1], out=mean)
    assert mean.tobytes() == expected.tobytes()


def test_memory_is_used_again() -> None:
    def sum_of_many(x: Symbol, y: Symbol) -> list[Symbol]:
        total = x
        for i in range(20):
            total = total + (y * float(i)) * x
        return [total]

    program = Program(sum_of_many, [FLOAT, FLOAT], 0)
    assert program.n_rows == 2
    x, y = np.arange(8, dtype=np.float32), np.ones(8, np.float32)
    assert program.run(Scratch(), 8, [x, y])[0].tolist() == (191 * x).tolist()


def test_what_cannot_be_recorded_is_refused() -> None:
    with pytest.raises(TypeError):
        Program(lambda x: [np.exp(x)], [FLOAT], 0)
    with pytest.raises(TypeError):
        Program(lambda x: [x.astype(np.int32)], [FLOAT], 0)
