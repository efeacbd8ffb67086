"""The compiled backend has the bits of the eager one, compiles each loop once, and says when it cannot."""

import copy
import dataclasses
import os
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, LoraAdapter, RankPruner, c_compiler
from ivon_lora.backends import Work, choose_backend, compiled
from ivon_lora.backends.batch import ROWS
from ivon_lora.backends.compiled import CHUNKS_PER_THREAD, Compiled, _compiled
from ivon_lora.backends.eager import BlockedEager
from ivon_lora.c_compiler import compile_function, find_compiler
from ivon_lora.c_expressions import Value
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey, normal_array
from ivon_lora.loops import CHUNK, SCALARS, WORDS, Loop
from tests.optimizer_problem import assert_same_state

try:
    find_compiler()
except ValueError as error:
    pytest.skip(f"backend='compile' {error}", allow_module_level=True)

# Every term on: weight decay, clipping (which bites for some elements only), bias correction, odd coefficients.
HYPER = Hyper(777.0, 0.013, 0.07, 0.87, 1 - 0.87, 1 - 0.931, 0.37, 1 - 0.87**3, 777.0, 1 / 48, 777.0, "price", "newton")
GRADSQ = dataclasses.replace(HYPER, curvature="gradsq")
FISHER = dataclasses.replace(
    HYPER, curvature="fisher", step_rule="adam", square_scale=48.0, clip_radius=3.7, prior_weight=0.3
)
WARM_UP = dataclasses.replace(FISHER, rho=1.0, noise_ess=float("inf"), step_rule="newton")
KEY = NoiseKey(seed=2**64 - 3, step=2**32 - 7, sample=5)

# shape, rank dimension (None: no hard mask): remainders mod 4 and 8, an empty tensor, a scalar, LoRA's A and B with
# ranks that divide nothing, E, a convolution, several chunks with and without a rest.
LAYOUT: tuple[tuple[tuple[int, ...], int | None], ...] = (
    ((6, 98), 0),
    ((333, 6), 1),
    ((5,), None),
    ((), None),
    ((0, 3), None),
    ((12, 240), 0),
    ((50, 12), 1),
    ((12, 1), 0),
    ((5, 2, 3, 3), 0),
    ((3 * CHUNK + 7,), None),
    ((2 * CHUNK,), None),
)
STRIDED, ODD_ADDRESS = 6, 9


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IVON_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        compile_function.cache_clear()
        _compiled.cache_clear()
        yield
        compile_function.cache_clear()
        _compiled.cache_clear()


def make_works(dtype: torch.dtype, banked: bool, aliased: bool = False) -> list[Work]:
    """Random state and gradients; some gradients are not finite, one tensor lies at an odd address, one is strided."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    state = torch.float64 if dtype == torch.float64 else torch.float32
    works = []
    for index, (shape, rank_dim) in enumerate(LAYOUT):
        param = randn(*shape).to(dtype)
        if index == STRIDED:
            param = param.t().contiguous().t()
        if index == ODD_ADDRESS:
            param = torch.cat([param[:1], param])[1:]
        mean = (param.to(state) + 1e-4 * randn(*shape)).contiguous()
        grad = randn(*shape).to(dtype)
        if grad.numel() > 4:
            grad.view(-1)[1], grad.view(-1)[-1], grad.view(-1)[3] = float("nan"), float("-inf"), 3e38
        works.append(
            Work(
                index=2**32 - 20 + index,
                param=param,
                mean=param if aliased and index != STRIDED else mean,
                momentum=randn(*shape).to(state),
                hess=(randn(*shape).abs() * 10.0 ** randn(*shape)).to(state),
                grad=grad,
                mean_state=mean if dtype != state else None,
                banked_grad=randn(*shape).to(state) if banked else None,
                banked_curvature=randn(*shape).to(state) if banked else None,
                rank_mask=None if rank_dim is None else torch.arange(shape[rank_dim]) % 3 != 1,
                rank_dim=rank_dim or 0,
            )
        )
    return works


def assert_same_bits(mine: list[Work], theirs: list[Work]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        for name in ("param", "momentum", "hess", "mean_state", "banked_grad", "banked_curvature"):
            x, y = getattr(a, name), getattr(b, name)
            if x is None:
                continue
            x, y = (t.contiguous().view(-1).view(torch.uint8).view(-1, t.element_size()) for t in (x, y))
            wrong = (x != y).any(-1) & ~(getattr(a, name).isnan() & getattr(b, name).isnan()).reshape(-1)
            assert not wrong.any(), f"{name} of {tuple(a.param.shape)}: {int(wrong.sum())} elements differ"


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_has_the_bits_of_eager(dtype: torch.dtype) -> None:
    mine, theirs = make_works(dtype, False), make_works(dtype, False)
    before = [w.param.clone() for w in mine]
    Compiled().sample(mine, HYPER, KEY)
    BlockedEager().sample(theirs, HYPER, KEY)
    assert_same_bits(mine, theirs)
    assert all(not torch.equal(w.param, b) for w, b in zip(mine, before, strict=True) if b.numel() > 1)


@pytest.mark.parametrize("hyper", [HYPER, GRADSQ, FISHER], ids=["price", "gradsq", "fisher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bank_has_the_bits_of_eager(dtype: torch.dtype, hyper: Hyper) -> None:
    mine, theirs = make_works(dtype, True), make_works(dtype, True)
    Compiled().bank(mine, hyper, KEY)
    BlockedEager().bank(theirs, hyper, KEY)
    assert_same_bits(mine, theirs)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of these processors")
def test_processors_without_avx2_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*loop: Any, **options: Any) -> Any:
        return compile_function(Loop(*loop, **options).source(), "a loop", flags=("-mno-avx2",))

    monkeypatch.setattr(compiled, "_compiled", without)
    mine, theirs = make_works(torch.float32, False), make_works(torch.float32, False)
    for backend, works in ((Compiled(), mine), (BlockedEager(), theirs)):
        backend.sample(works, HYPER, KEY)
        backend.step(works, HYPER, KEY, 1)
    assert_same_bits(mine, theirs)


def test_mirrored_noise_has_the_bits_of_eager() -> None:
    key = dataclasses.replace(KEY, mirrored=True)
    mine, theirs, plain = (make_works(torch.float32, False) for _ in range(3))
    for backend, works, which in ((Compiled(), mine, key), (BlockedEager(), theirs, key), (Compiled(), plain, KEY)):
        backend.sample(works, HYPER, which)
        backend.step(works, HYPER, which, 1)
    assert_same_bits(mine, theirs)
    assert not torch.equal(mine[0].hess, plain[0].hess)


@pytest.mark.parametrize("banked", [False, True])
@pytest.mark.parametrize("hyper", [HYPER, GRADSQ, FISHER, WARM_UP], ids=["price", "gradsq", "fisher", "warm-up"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_has_the_bits_of_eager(dtype: torch.dtype, hyper: Hyper, banked: bool) -> None:
    mine, theirs = make_works(dtype, banked), make_works(dtype, banked)
    compiled, eager = Compiled(), BlockedEager()
    for _ in range(2):
        compiled.step(mine, hyper, KEY, 3 if banked else 1)
        eager.step(theirs, hyper, KEY, 3 if banked else 1)
    assert_same_bits(mine, theirs)
    assert compiled.nonfinite_elements() == eager.nonfinite_elements() > 0


@pytest.mark.parametrize("aliased", [False, True])
def test_step_without_a_sample_has_the_bits_of_eager(aliased: bool) -> None:
    mine, theirs = (make_works(torch.float32, False, aliased) for _ in range(2))
    hess = [w.hess.clone() for w in mine]
    Compiled().step(mine, HYPER, None, 1)
    BlockedEager().step(theirs, HYPER, None, 1)
    assert_same_bits(mine, theirs)
    assert all(torch.equal(w.hess, h) for w, h in zip(mine, hess, strict=True))


def test_extreme_values_have_the_bits_of_eager() -> None:
    """Subnormal and huge numbers, both zeros: where a compiler that re-orders or flushes shows."""
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e-30, 1.0, -1e20, 3e38], dtype=torch.float32)
    grid = torch.cartesian_prod(*[values] * 4)  # 4096 combinations
    n = len(grid)
    hyper = dataclasses.replace(
        HYPER,
        ess=1e10,
        noise_ess=1e10,
        weight_decay=1e-12,
        lr=1e-3,
        beta1=0.9,
        beta1_complement=0.1,
        rho=1e-5,
        clip_radius=float("inf"),
        debias=0.1,
    )
    works = [
        [Work(0, torch.zeros(n), grid[:, 0].clone(), grid[:, 1].clone(), grid[:, 2].abs(), grid[:, 3].clone())]
        for _ in range(2)
    ]
    for method in ("sample", "step"):
        for backend, w in zip((Compiled(), BlockedEager()), works, strict=True):
            getattr(backend, method)(w, hyper, KEY, *([1] if method == "step" else []))
        assert_same_bits(*works)


def test_threads_do_not_change_the_bits() -> None:
    n = 2 * CHUNKS_PER_THREAD * CHUNK + 5
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        generator = torch.Generator().manual_seed(0)
        p, h, g = (torch.randn(n, generator=generator) for _ in range(3))
        g[::1000] = float("nan")
        work = Work(3, p, p.clone(), torch.zeros(n), h.abs() + 0.1, g)
        small = Work(4, p[:7].clone(), p[:7].clone(), torch.zeros(7), h[:7].abs() + 0.1, g[:7].clone())
        backend = Compiled()
        torch.set_num_threads(threads)
        try:
            backend.sample([small, work], HYPER, KEY)
            sample = work.param.clone()
            backend.step([small, work], HYPER, KEY, 1)
        finally:
            torch.set_num_threads(before)
        results.append((sample, work.param, work.hess, small.hess, torch.tensor(backend.nonfinite_elements())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert int(results[0][-1]) == (n + 999) // 1000 + 1


@pytest.mark.parametrize("start", [0, (1 << 34) - CHUNK, 1 << 34, 5 << 36])
def test_noise_of_far_elements(start: int) -> None:
    """Element indices beyond 32 bits: the loop is given one chunk of a tensor that would be far too large."""
    theta, mean, hess = torch.empty(CHUNK), torch.zeros(CHUNK), torch.ones(CHUNK)
    row = dict.fromkeys(ROWS, 0)
    for name, tensor in (("param", theta), ("mean", mean), ("hess", hess)):
        row[name] = tensor.data_ptr() - 4 * start
    row.update(numel=start + CHUNK, index=9, ranks=1, inner=1)
    table = np.array(list(row.values()), np.int64)
    scalars = np.ones(len(SCALARS))
    scalars[SCALARS.index("weight_decay")] = 0.0
    words = np.zeros(len(WORDS), np.int64)
    words[:4] = KEY.c1, KEY.step, *KEY.philox_key
    chunk = start // CHUNK
    _compiled("sample")(table.ctypes.data, 1, chunk, chunk + 1, scalars.ctypes.data, words.ctypes.data)
    np.testing.assert_array_equal(theta.numpy(), normal_array(KEY, 9, start, start + CHUNK))


def train(backend: str, rank: int = 6, lr: float = 0.05, seed: int = 1, steps: int = 24, **options: Any) -> IVON:
    """A small LoRA regression through annealing and into the final phase, with a bf16 head and a changing lr."""
    generator = torch.Generator().manual_seed(0)
    a, b = (nn.Parameter(torch.randn(*s, generator=generator) * 0.3) for s in ((rank, 37), (29, rank)))
    head = nn.Parameter(torch.randn(3, 29, generator=generator).bfloat16())
    x, y = torch.randn(16, 37, generator=generator), torch.randn(16, 3, generator=generator)
    pruner = RankPruner(
        [LoraAdapter("map", a, b)], rank // 2, total_steps=steps, warmup=2, final=steps // 3, interval=3
    )
    options = {"hess_init": 0.1, **options}
    optimizer = IVON([a, b, head], lr, 100, seed=seed, backend=backend, pruner=pruner, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((x @ a.t() @ b.t() @ head.float().t() - y) ** 2).mean()
        loss.backward()
        return loss

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr / (1 + step)
        if step == 5:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a step without a sample says so
                closure()
                optimizer.step()
        else:
            optimizer.step(closure)
    return optimizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hess_approx": "gradsq", "clip_radius": 0.5},
        {"mc_samples": 3, "debias": False},
        {"hess_approx": "fisher", "batch_size": 8, "hess_init": "auto", "beta2": "auto", "step_rule": "adam"},
        {"batch_size": 8, "hess_init": "auto", "beta2": "auto"},
    ],
)
def test_training_has_the_bits_of_eager(options: dict[str, Any]) -> None:
    mine, theirs = train("compile", **options), train("eager", **options)
    assert_same_state(mine, theirs)
    masks = [mine.state[p]["rank_mask"] for p in mine.param_groups[0]["params"][:2]]
    assert all(int(m.sum()) == 3 for m in masks)  # the final phase, with hard masks, was reached


def test_a_copy_goes_on_with_the_same_bits() -> None:
    mine, theirs = (train(backend, steps=10) for backend in ("compile", "eager"))
    mine = copy.deepcopy(mine)
    for optimizer in (mine, theirs):
        for _ in range(3):
            optimizer.train()
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert_same_state(mine, theirs)


def test_nothing_is_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    train("compile", steps=8)  # a sampled step and one without a sample, fp32 and bf16

    def fail(*args: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(c_compiler, "_compile", fail)
    misses = compile_function.cache_info().misses
    train("compile", steps=8, rank=9, lr=0.3, seed=2**63, weight_decay=0.5, clip_radius=0.1, debias=False)
    assert compile_function.cache_info().misses == misses


def test_what_was_compiled_is_kept_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IVON_LORA_CACHE", str(tmp_path / "new" / "folder"))
    source = (
        'extern "C" long long run(long long a, long long, long long, long long, long long, long long) {return a+1;}'
    )
    assert compile_function(source, "a test")(41, 0, 0, 0, 0, 0) == 42
    assert "compiling a test for this CPU, once" in capsys.readouterr().err
    [file] = (tmp_path / "new" / "folder").iterdir()
    compile_function.cache_clear()
    assert compile_function(source, "a test")(41, 0, 0, 0, 0, 0) == 42
    assert capsys.readouterr().err == ""
    assert file.stat().st_size > 0


def test_a_damaged_file_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IVON_LORA_CACHE", str(tmp_path))
    source = 'extern "C" long long run(long long a, long long, long long, long long, long long, long long) {return -a;}'
    file = tmp_path / f"{c_compiler._fingerprint(source, find_compiler())}.so"
    file.write_bytes(b"damaged")
    assert compile_function(source, "a test")(41, 0, 0, 0, 0, 0) == -41
    assert list(tmp_path.iterdir()) == [file]
    assert file.stat().st_size > len(b"damaged")


def test_a_cache_that_cannot_be_written_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IVON_LORA_CACHE", str(tmp_path / "file" / "folder"))
    assert c_compiler.cache_folder().is_dir()
    assert c_compiler.cache_folder() == c_compiler.cache_folder()


PROGRAM = """
import torch
from ivon_lora import IVON
p = torch.zeros(3, requires_grad=True)
IVON([p], 0.1, 10, backend="auto")
print("auto runs")
IVON([p], 0.1, 10, backend="compile")
"""


def test_without_a_compiler_it_is_refused(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[1])
    env = os.environ | {"PYTHONPATH": root, "IVON_LORA_CACHE": str(tmp_path), "CXX": "/nonexistent/c++", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == "auto runs\n"
    message = (
        r"backend='compile' needs a C\+\+ compiler, and CXX='/nonexistent/c\+\+' is not there; .* take backend='eager'"
    )
    assert re.search(f"^ValueError: {message}$", run.stderr, re.MULTILINE), run.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"CXX": "", "PATH": ""},
            r"none of g\+\+, clang\+\+, c\+\+ is in PATH; install one .* or take backend='eager'",
        ),
        ({"CXX": "false"}, r"backend='compile' the C\+\+ compiler .*false fails"),
        ({"CXX": "true"}, r"backend='compile' the C\+\+ compiler .*true fails"),
    ],
)
def test_a_compiler_that_is_missing_or_fails(
    environment: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (environment | {"IVON_LORA_CACHE": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    compile_function.cache_clear()
    _compiled.cache_clear()
    with pytest.raises(ValueError, match=message):
        choose_backend("compile", torch.device("cpu"))


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="runs on CPU, and there are parameters on meta"):
        choose_backend("compile", torch.device("meta"))


def test_the_recorder_refuses_what_it_would_get_wrong() -> None:
    """Operations whose numpy rounding or type it does not reproduce are errors, not other numbers."""
    listing: list[str] = []
    x, i, w = (cast(Any, Value(listing, kind, kind)) for kind in ("float", "int", "word"))
    for wrong in (
        lambda: x + i,
        lambda: i / i,
        lambda: w - 1,
        lambda: w * (1 << 32),
        lambda: np.exp(x),
        lambda: np.maximum(x, 0.0),
        lambda: w >> 3,
        lambda: i + 0.5,
    ):
        with pytest.raises(TypeError):
            wrong()
    assert listing == []
