"""Loops over vectors do what their statements say, element by element, however the statements are arranged."""

from typing import Any

import numpy as np
import pytest

from ivon_lora.c_compiler import compile_function
from ivon_lora.c_expressions import Value
from ivon_lora.loop_frame import PRELUDE
from ivon_lora.loops import Loop
from ivon_lora.vector_loops import COPIES, _halves, long_loop, vector_loop
from tests.compiler import needs_compiler

MOST = 100  # elements: of no vector, of incomplete ones, of many turns


def _values(listing: list[str], *names: str) -> list[Any]:  # numpy's functions do not say that they take them
    return [Value(listing, "float", name) for name in names]


def chain() -> list[str]:
    """Statements with four roots and divisions in a chain, one of two inputs being needed at its end again."""
    listing: list[str] = []
    x, y = _values(listing, "x_i", "y_i")
    early = y * y + 1.0
    z = (np.sqrt(x) + y) / early
    z = np.where(z > 0.25, z, early) * z
    z = np.sqrt(z + early) / (x + 1.0) - x
    loads = [f"const vf {name}_i = read({name} + @I@, @LEFT@);" for name in ("x", "y")]
    return [*loads, *listing, f"write(out + @I@, {z.name}, @LEFT@);"]


def expected(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    one, early = np.float32(1.0), y * y + np.float32(1.0)
    z = (np.sqrt(x) + y) / early
    z = np.where(z > np.float32(0.25), z, early) * z
    return np.sqrt(z + early) / (x + one) - x


@needs_compiler
@pytest.mark.parametrize("loop", [vector_loop, long_loop])
def test_a_loop_computes_every_element_and_no_more(loop) -> None:
    head = 'extern "C" int64_t run(float *out, const float *x, const float *y, int64_t n, int64_t, int64_t) {'
    run = compile_function(f"{PRELUDE}\n{head}\n{loop(chain())}\nreturn 0;\n}}\n", "a test")
    generator = np.random.default_rng(5)
    x, y = generator.random((2, MOST), np.float32)
    for n in range(MOST):
        out = np.full(MOST, 7.0, np.float32)
        run(out.ctypes.data, x.ctypes.data, y.ctypes.data, n, 0, 0)
        np.testing.assert_array_equal(out[:n], expected(x, y)[:n])
        assert (out[n:] == 7.0).all()


@needs_compiler
def test_a_long_loop_may_write_where_it_reads() -> None:
    head = 'extern "C" int64_t run(float *x, const float *y, int64_t n, int64_t, int64_t, int64_t) { float *out = x;'
    run = compile_function(f"{PRELUDE}\n{head}\n{long_loop(chain())}\nreturn 0;\n}}\n", "a test")
    x, y = np.random.default_rng(6).random((2, MOST), np.float32)
    right = expected(x, y)
    run(x.ctypes.data, y.ctypes.data, MOST, 0, 0, 0)
    np.testing.assert_array_equal(x, right)


def test_a_chain_is_cut_where_it_waits_for_the_third_time() -> None:
    lines = [
        "const vf x_i = read(x + @I@, @LEFT@);",
        "const vf v0 = root(x_i);",
        "const vf v1 = v0 + x_i;",
        "const vf v2 = v1 / x_i;",
        "const vf v3 = x_i / x_i;",
        "const vf v4 = v2 * v3;",
        "write(out + @I@, v4, @LEFT@);",
    ]
    assert _halves(lines) == (lines[1:5], lines[5:])


@pytest.mark.parametrize("curvature", ["price", "gradsq", "fisher", "none"])
def test_the_halves_of_a_step_are_all_that_it_computes(curvature: str) -> None:
    lines = Loop("step", curvature)._body(masked=True)
    begin, end = _halves(lines)
    assert begin + end == [line for line in lines if " = read(" not in line]
    assert min(len(begin), len(end)) >= COPIES * 3
    assert not any(line.startswith(("write(", "skipped")) for line in begin)
