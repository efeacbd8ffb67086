"""The cpp backend has the bits of the eager one, compiles once on a machine, and says when it cannot."""

import dataclasses
import logging
import os
import platform
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ivon_lora import IVON
from ivon_lora.backends import choose_backend, compiler
from ivon_lora.backends.batch import Batch
from ivon_lora.backends.cpp import CppBackend
from ivon_lora.backends.eager import BLOCK, EagerBackend
from ivon_lora.functional.importance import CRITERIA
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import normal
from tests import batches
from tests.batches import KEY
from tests.compiler import needs_compiler

pytestmark = needs_compiler
CPU = torch.device("cpu")
CHUNK = 128  # of kernels.cpp

WARM_UP = dataclasses.replace(batches.HYPERS["fisher"], rho=1.0, noise_ess=float("inf"), grad_scale=-1.0)
HYPERS = {**batches.HYPERS, "warm-up": WARM_UP}

# shape, rank dimension (None: no mask): remainders mod 4 and 8, an empty tensor, a scalar, LoRA's A and B with ranks
# that divide nothing, E, a convolution, several chunks with and without a rest, more than a block.
LAYOUT: tuple[tuple[tuple[int, ...], int | None], ...] = (
    ((6, 98), 0),
    ((333, 6), 1),
    ((5,), None),
    ((), None),
    ((0, 3), None),
    ((12, 240), 0),
    ((12, 1), 0),
    ((5, 2, 3, 3), 0),
    ((3 * CHUNK + 7,), None),
    ((2 * CHUNK,), None),
    ((BLOCK // 8 + 5, 9), 1),
)
UNMASKED = tuple((shape, None) for shape, _ in LAYOUT)


def make_batch(dtype: torch.dtype, hyper: Hyper = batches.HYPER, masked: bool = True, **options: Any) -> Batch:
    """Before a draw, with parameters at odd addresses."""
    made = batches.make_batch(LAYOUT if masked else UNMASKED, dtype, hyper=hyper, **options)
    return batches.about_to_draw(batches.moved(made, odd=["param"]))


Call = Callable[[EagerBackend | CppBackend, Batch], Any]


def assert_equal(make: Callable[[], Batch], *calls: Call) -> Batch:
    """Both backends do the same; returns what the cpp backend leaves."""
    backends: list[Any] = [CppBackend(), EagerBackend()]
    made = make(), make()
    for call in calls:
        for backend, batch in zip(backends, made, strict=True):
            call(backend, batch)
        batches.assert_same_bits(*made)
    assert backends[0].nonfinite_elements() == backends[1].nonfinite_elements()
    return made[0]


def sample(backend: EagerBackend | CppBackend, batch: Batch) -> None:
    backend.sample([batch], KEY)


def bank(backend: EagerBackend | CppBackend, batch: Batch) -> None:
    backend.bank([batch], KEY)


def step(backend: EagerBackend | CppBackend, batch: Batch) -> None:
    backend.step([batch], KEY, 1 if batch.banked_grad is None else 3)


def step_without_sample(backend: EagerBackend | CppBackend, batch: Batch) -> None:
    backend.step([batch], None)


# fp16 and fp64 are left to the eager backend
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"masked": False},
    "banked, masks": {"banked": True},
    "sensitivity": {"sensitivity": True, "masked": False},
    "shards": {"offsets": [17 * i + 3 for i in range(len(LAYOUT))]},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))
@pytest.mark.parametrize("hyper", HYPERS.values(), ids=list(HYPERS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_has_the_bits_of_eager(dtype: torch.dtype, hyper: Hyper, options: dict[str, Any]) -> None:
    calls = [sample, *([bank] if options.get("banked") else []), step, step, step_without_sample]
    after = assert_equal(lambda: make_batch(dtype, hyper, **options), *calls)
    before = make_batch(dtype, hyper, **options)
    assert not torch.equal(after.param[-1], before.param[-1])


@pytest.mark.parametrize(("dtype", "grad_dtype"), [DTYPES[:2], DTYPES[1::-1]])
def test_gradients_of_another_dtype(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    assert_equal(lambda: make_batch(dtype, grad_dtype=grad_dtype, banked=True), sample, bank, step)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_means_of_ranks_have_the_bits_of_eager(criterion: str) -> None:
    layout = [(shape, dim) for shape, dim in LAYOUT if dim is not None and 0 not in shape]
    batch = batches.make_batch(layout, sensitivity=True)
    mine, theirs = (backend.rank_means([batch], criterion) for backend in (CppBackend(), EagerBackend()))
    assert [len(x) for x in mine] == [shape[dim] for shape, dim in layout]
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("hyper", HYPERS.values(), ids=list(HYPERS))
def test_extreme_values_have_the_bits_of_eager(hyper: Hyper) -> None:
    """Subnormal and huge numbers, both zeros: where a compiler that re-orders or flushes shows."""
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e-30, 1.0, -1e20, 3e38], dtype=torch.float32)
    grid = torch.cartesian_prod(*[values] * 4)  # 4096 combinations
    extreme: dict[str, Any] = {"weight_decay": 1e-12, "clip_radius": float("inf"), "debias": 0.1, "rho": 1e-5}
    if hyper.is_noisy:
        extreme |= {"ess": 1e10, "noise_ess": 1e10}

    def make() -> Batch:
        param, momentum, hess, grad = (column.contiguous() for column in grid.clone().unbind(1))
        mean = torch.zeros_like(param)
        scalars = dataclasses.replace(hyper, **extreme)
        return Batch(scalars, [0], [0], [param], [mean], [momentum], [hess.abs()], grad=[grad])

    assert_equal(make, sample, step)


@pytest.mark.parametrize("first", [0, 3, (1 << 34) - 2, (1 << 34) + 1, 5 << 36])
def test_noise_of_far_elements(first: int) -> None:
    """Shards of tensors with more than 2^32 groups of four elements, which begin anywhere in a group."""
    hyper = dataclasses.replace(batches.HYPER, weight_decay=0.0, ess=1.0, noise_ess=1.0)
    zeros = [torch.zeros(CHUNK + 5) for _ in range(3)]
    batch = Batch(hyper, [9], [first], [zeros[0]], [zeros[1]], [zeros[2]], [torch.ones(CHUNK + 5)])
    sample(CppBackend(), batch)
    assert torch.equal(batch.param[0], normal(KEY, 9, (CHUNK + 5,), CPU, first))


@pytest.fixture
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, and a compiler that writes down its calls and takes what has been compiled before."""
    library = Path(compiler.library()._name)
    fake, calls = tmp_path / "c++", tmp_path / "calls"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nwhile [ "$1" != -o ]; do shift; done\ncp {library} "$2"\n')
    fake.chmod(0o700)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("IVON_LORA_CACHE", str(tmp_path / "new" / "cache"))
    compiler.library.cache_clear()
    yield tmp_path
    compiler.library.cache_clear()


def compile_again(compilers: Path) -> tuple[int, list[Path]]:
    """As a new process would: how often the compiler has run so far, and the files in the cache."""
    compiler.library.cache_clear()
    p = nn.Parameter(torch.zeros(3))
    optimizer = IVON([p], 0.1, 10, backend="cpp")
    optimizer.train()
    assert p.detach().any()
    calls = (compilers / "calls").read_text().splitlines()
    cache = compilers / "new" / "cache"
    return len(calls), sorted(cache.iterdir()) if cache.exists() else []


def test_it_is_compiled_once_and_kept(compilers: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    calls, [file] = compile_again(compilers)
    assert calls == 1
    assert "compiling the CPU kernels for this machine, once" in caplog.text
    assert "-ffp-contract=off" in (compilers / "calls").read_text()
    assert compile_again(compilers) == (1, [file])
    for path in (file, file.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", ["other bytes", "cut", "writable by others"])
def test_a_file_of_no_trust_is_compiled_again(damage: str, compilers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, [file] = compile_again(compilers)
    whole, other = file.read_bytes(), compilers / "other" / file.name  # this process has loaded the first one
    monkeypatch.setenv("IVON_LORA_CACHE", str(other.parent))
    other.parent.mkdir(mode=0o700)
    other.write_bytes({"other bytes": b"damaged", "cut": whole[:-4096]}.get(damage, whole))
    other.chmod(0o722 if damage == "writable by others" else 0o700)
    assert compile_again(compilers)[0] == 2
    assert other.read_bytes() == whole
    assert stat.S_IMODE(other.stat().st_mode) == 0o700


@pytest.mark.parametrize("problem", ["a file is in its place", "others may write there"])
def test_a_folder_of_no_trust_is_replaced(problem: str, compilers: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = compilers / "new" / "cache"
    if problem == "a file is in its place":
        cache.parent.write_text("")
    else:
        cache.mkdir(parents=True)
        cache.chmod(0o777)
    assert compile_again(compilers) == (1, [])
    assert compile_again(compilers)[0] == 1  # the folder of this process is kept
    assert ("can be written by others" in caplog.text) == (problem == "others may write there")


def test_a_compiler_that_dies_leaves_nothing_behind(compilers: Path) -> None:
    script = (compilers / "c++").read_text().replace("cp ", "echo rubbish > $2; exit 1; cp ")
    (compilers / "c++").write_text(script)
    with pytest.raises(ValueError, match=r"the C\+\+ compiler .*c\+\+ fails"):
        compile_again(compilers)
    assert list((compilers / "new" / "cache").iterdir()) == []
    (compilers / "c++").write_text(script.replace("echo rubbish > $2; exit 1; ", ""))
    calls, files = compile_again(compilers)
    assert (calls, len(files)) == (4, 1)  # it was tried for three targets


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "/nonexistent/c++"}, r"needs a C\+\+ compiler, and CXX='/nonexistent/c\+\+' is not there"),
        (
            {"CXX": "", "PATH": ""},
            r"needs a C\+\+ compiler, and none of g\+\+, clang\+\+, c\+\+ is in PATH; install one",
        ),
        ({"CXX": "false"}, r"the C\+\+ compiler .*false fails"),
        ({"CXX": "true"}, r"the C\+\+ compiler .*true fails"),
        ({"CXX": "sh -c 'echo no such flag >&2; exit 1'"}, r"the C\+\+ compiler .*fails:\nno such flag"),
    ],
)
def test_a_compiler_that_is_missing_or_fails(
    environment: dict[str, str], message: str, compilers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for, it is an error that says what to do; "auto" trains with eager."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("cpp", "compile"):
        with pytest.raises(ValueError, match=f"(?s)backend='{name}' {message}.*; take backend='auto' or 'eager'"):
            IVON([nn.Parameter(torch.zeros(3))], 0.1, 10, backend=name)
    chosen, reason = choose_backend("auto", CPU)
    assert chosen == "eager"
    assert reason.startswith("backend 'cpp'")
    IVON([nn.Parameter(torch.zeros(3))], 0.1, 10).train()


def test_it_is_what_auto_takes_on_a_cpu_and_nowhere_else() -> None:
    assert choose_backend("auto", CPU) == ("cpp", "CPU, and a C++ compiler")
    assert choose_backend("compile", CPU)[0] == "cpp"
    with pytest.raises(ValueError, match="runs on CPU, and there are parameters on meta"):
        choose_backend("cpp", torch.device("meta"))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX is of these processors")
@pytest.mark.parametrize("flag", ["-mno-avx", "-mno-avx512f"])
def test_processors_without_avx_have_the_same_bits(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{os.environ.get('CXX') or compiler._find_compiler()[0]} {flag}")
    monkeypatch.setenv("IVON_LORA_CACHE", str(tmp_path))
    compiler.library.cache_clear()
    try:
        assert_equal(lambda: make_batch(torch.float32), sample, step)
        assert len(list(tmp_path.iterdir())) == 1
    finally:
        compiler.library.cache_clear()
