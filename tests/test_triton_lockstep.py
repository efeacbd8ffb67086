"""The Triton backend has the bits of the eager one: every state tensor, every step, every term switched on."""

import copy
import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ivon_lora import IVON
from ivon_lora.backends import Work, choose_backend
from ivon_lora.backends.eager import BlockedEager
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey, normal_array
from ivon_lora.kernels import tables
from ivon_lora.kernels.launch import LaunchConfig, TritonBackend, gpu_supports, supports
from tests.optimizer_problem import assert_same_state

# Every term on: weight decay, clipping (which bites for some elements only), bias correction, all coefficients odd.
HYPER = Hyper(
    ess=777.0,
    weight_decay=0.013,
    lr=0.07,
    beta1=0.87,
    beta1_complement=1 - 0.87,
    rho=1 - 0.931,
    clip_radius=0.37,
    debias=1 - 0.87**3,
    square_scale=777.0,
    inverse_batch=1 / 48,
    noise_ess=777.0,
    curvature="price",
    step_rule="newton",
)
FISHER = dataclasses.replace(
    HYPER, curvature="fisher", step_rule="adam", square_scale=48.0, clip_radius=3.7, prior_weight=0.3
)
HYPERS = {
    "gradsq": dataclasses.replace(HYPER, curvature="gradsq", clip_radius=float("inf")),
    "fisher": FISHER,
    "warm-up": dataclasses.replace(FISHER, rho=1.0, noise_ess=float("inf"), step_rule="newton"),
}
#: few, big tiles for the interpreter; on a GPU the usual ones
TILE = 4096 if "TRITON_INTERPRET" in os.environ else 512
KEY = NoiseKey(seed=2**64 - 3, step=2**32 - 7, sample=5)

# shape, rank dimension (None: no hard mask). Sizes with and without a remainder mod 4, an empty tensor, a scalar,
# LoRA's A and B with ranks that divide nothing, E, a convolution, and one tensor of several tiles.
LAYOUT: tuple[tuple[tuple[int, ...], int | None], ...] = (
    ((6, 98), 0),
    ((33, 6), 1),
    ((5,), None),
    ((), None),
    ((0, 3), None),
    ((12, 40), 0),
    ((50, 12), 1),
    ((12, 1), 0),
    ((5, 2, 3, 3), 0),
    ((9000,), None),
)


@pytest.fixture(autouse=True)
def _numpy_may_meet_nan() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where a GPU is silent."""
    with np.errstate(all="ignore"):
        yield


def make_works(dtype: torch.dtype, banked: bool, seed: int = 0) -> list[Work]:
    """Random state and gradients; some gradients are not finite, one tensor lies at an odd address, one is strided."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    works = []
    for index, (shape, rank_dim) in enumerate(LAYOUT):
        numel = int(np.prod(shape))
        param = randn(*shape).to(dtype)
        if len(shape) == 2 and index == 5:
            param = param.t().contiguous().t()
        if len(shape) == 1 and index == 9:
            param = torch.cat([param[:1], param])[1:]
        mean = param if dtype == torch.float32 else param.float() + 1e-4 * randn(*shape)
        mean = mean.contiguous()
        grad = randn(*shape).to(dtype)
        if numel > 4:
            grad.view(-1)[1], grad.view(-1)[numel - 1] = float("nan"), float("-inf")
        works.append(
            Work(
                index=3 * index + 2**31,
                param=param,
                mean=mean,
                momentum=randn(*shape) * 0.1,
                hess=randn(*shape).abs() * 0.1,
                grad=grad,
                mean_state=mean if dtype != torch.float32 else None,
                banked_grad=randn(*shape) if banked else None,
                banked_curvature=randn(*shape) if banked else None,
                rank_mask=None if rank_dim is None else torch.rand(shape[rank_dim], generator=generator) > 0.4,
                rank_dim=rank_dim or 0,
            )
        )
    return works


def moved(works: list[Work], device: str) -> list[Work]:
    """A copy on a device; tensors that were one stay one."""
    memory: dict[int, Any] = {}

    def to(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if device == "cpu":
            return copy.deepcopy(tensor, memory)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in memory:
            memory[storage.data_ptr()] = storage.to(device=device)
        there = torch.empty(0, dtype=tensor.dtype, device=device)
        return there.set_(memory[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())

    tensors = [f.name for f in dataclasses.fields(Work) if f.name not in ("index", "rank_dim")]
    copies: list[dict[str, Any]] = [{name: to(getattr(w, name)) for name in tensors} for w in works]
    return [dataclasses.replace(w, **changes) for w, changes in zip(works, copies, strict=True)]


def assert_same_bits(expected: list[Work], found: list[Work]) -> None:
    for a, b in zip(expected, found, strict=True):
        for name in ("param", "mean", "momentum", "hess", "grad", "mean_state", "banked_grad", "banked_curvature"):
            x, y = getattr(a, name), getattr(b, name)
            if x is None:
                continue
            integer = torch.int32 if x.dtype == torch.float32 else torch.int16
            x, y = x.contiguous(), y.cpu().contiguous()
            nan = torch.isnan(x)
            assert torch.equal(nan, torch.isnan(y)), (name, a.param.shape)
            same = (x.view(integer) == y.view(integer)) | nan
            assert bool(same.all()), (name, a.param.shape, int((~same).sum()))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("price", torch.float32),
        ("price", torch.bfloat16),
        ("price", torch.float16),
        ("gradsq", torch.float32),
        ("fisher", torch.bfloat16),
        ("warm-up", torch.float32),
        ("mirrored", torch.bfloat16),
        ("banked", torch.bfloat16),
        ("unsampled", torch.float16),
    ],
    ids=str,
)
def test_sample_bank_and_step_have_the_bits_of_the_eager_backend(
    dtype: torch.dtype, case: str, triton_device: str
) -> None:
    hyper = HYPERS.get(case, HYPER)
    key = None if case == "unsampled" else dataclasses.replace(KEY, mirrored=case == "mirrored")
    works = make_works(dtype, banked=case == "banked")
    ours = moved(works, triton_device)
    eager, triton_backend = BlockedEager(), TritonBackend(torch.device(triton_device), LaunchConfig(tile=TILE))
    if key is not None:
        eager.sample(works, hyper, key)
        triton_backend.sample(ours, hyper, key)
        assert_same_bits(works, ours)
    if case == "banked":
        assert key is not None
        eager.bank(works, hyper, key)
        triton_backend.bank(ours, hyper, key)
        assert_same_bits(works, ours)
    before = [w.hess.clone() for w in works]
    eager.step(works, hyper, key, 3)
    triton_backend.step(ours, hyper, key, 3)
    assert_same_bits(works, ours)
    assert int(triton_backend.nonfinite_elements()) == eager.nonfinite_elements() > 0
    moving = [not torch.equal(w.hess, h) for w, h in zip(works, before, strict=True)]
    assert any(moving) == (case != "unsampled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_next_sample_within_a_step_has_the_bits_of_a_step_and_a_sample(
    dtype: torch.dtype, triton_device: str
) -> None:
    works = make_works(dtype, banked=False)
    for w in works:
        w.mean_copy = torch.zeros_like(w.mean) if dtype == torch.float32 else None
    ours = moved(works, triton_device)
    following = dataclasses.replace(HYPER, ess=99.0, weight_decay=0.2), NoiseKey(KEY.seed, KEY.step + 1)
    eager, triton_backend = BlockedEager(), TritonBackend(torch.device(triton_device), LaunchConfig(tile=TILE))
    eager.step(works, HYPER, KEY, 1)
    for w in works:
        if w.mean_copy is not None:
            w.mean = w.mean_copy.copy_(w.param)
    eager.sample(works, *following)
    triton_backend.step(ours, HYPER, KEY, 1, following)
    for w in ours:
        w.mean = w.mean if w.mean_copy is None else w.mean_copy
    assert_same_bits(works, ours)
    assert not torch.equal(works[0].param.float(), works[0].mean)


def test_pieces_of_tensors_have_the_bits_of_the_whole(triton_device: str) -> None:
    """As shards have them: cut between rows, at any multiple of a row, and with ranks along either dimension."""
    layout: tuple[tuple[tuple[int, ...], int | None, tuple[int, ...]], ...] = (
        ((33, 6), 1, (0, 5, 5, 33)),  # a piece starts within a quad; one is empty
        ((50, 12), 1, (0, 7, 50)),
        ((6, 98), 0, (0, 2, 5, 6)),
        ((4001,), None, (0, 1001, 4001)),
    )
    generator = torch.Generator().manual_seed(4)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    wholes, pieces, parents = [], [], []
    for index, (shape, rank_dim, cuts) in enumerate(layout):
        param = randn(*shape)
        whole = Work(index, param, param, randn(*shape), randn(*shape).abs(), randn(*shape))
        if rank_dim is not None:
            whole.rank_mask, whole.rank_dim = torch.rand(shape[rank_dim], generator=generator) > 0.4, rank_dim
        row = int(np.prod(shape[1:]))
        for first, last in itertools.pairwise(cuts):
            cut = {name: getattr(whole, name)[first:last].clone() for name in ("param", "momentum", "hess", "grad")}
            piece = dataclasses.replace(whole, **cut, mean=cut["param"], offset=first * row)
            pieces.append(piece)
            parents.append((whole, first, last))
        wholes.append(whole)
    ours = moved(pieces, triton_device)
    eager, triton_backend = BlockedEager(), TritonBackend(torch.device(triton_device), LaunchConfig(tile=1024))
    eager.sample(wholes, HYPER, KEY)
    triton_backend.sample(ours, HYPER, KEY)
    for (whole, first, last), piece in zip(parents, ours, strict=True):
        assert torch.equal(whole.param[first:last], piece.param.cpu())
    eager.step(wholes, HYPER, KEY, 1)
    triton_backend.step(ours, HYPER, KEY, 1)
    for (whole, first, last), piece in zip(parents, ours, strict=True):
        for name in ("param", "momentum", "hess"):
            assert torch.equal(getattr(whole, name)[first:last], getattr(piece, name).cpu()), name


@pytest.mark.parametrize("offset", [2**31 - 4, 2**33 + 2, 2**41])
def test_indices_beyond_32_bits(offset: int, triton_device: str) -> None:
    """The noise of a piece far behind in a tensor; all 42 bits of an element's index count."""
    param = torch.zeros(11, device=triton_device)
    work = Work(7, param, torch.zeros_like(param), torch.zeros_like(param), torch.ones_like(param), offset=offset)
    hyper = dataclasses.replace(HYPER, ess=1.0, weight_decay=0.0, noise_ess=1.0)
    TritonBackend(torch.device(triton_device), LaunchConfig(tile=16)).sample([work], hyper, KEY)
    np.testing.assert_array_equal(param.cpu().numpy(), normal_array(KEY, 7, offset, offset + 11))


def test_bits_do_not_depend_on_the_tile(triton_device: str) -> None:
    works = make_works(torch.float32, banked=False)[2:9]
    one, other = moved(works, triton_device), moved(works, triton_device)
    for config, ours in ((LaunchConfig(tile=128, num_warps=1), one), (LaunchConfig(tile=2048, num_warps=8), other)):
        backend = TritonBackend(torch.device(triton_device), config)
        backend.sample(ours, HYPER, KEY)
        backend.step(ours, HYPER, KEY, 1)
    for a, b in zip(one, other, strict=True):
        for name in ("param", "momentum", "hess"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_tables_are_written_again_only_when_they_change_and_stay_where_they_are(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = moved(make_works(torch.float32, banked=False)[2:4], triton_device)
    backend = TritonBackend(torch.device(triton_device))
    written: list[Tensor] = []
    original = tables.write

    def writing(target: Tensor, values: np.ndarray) -> None:
        written.append(target)
        original(target, values)

    monkeypatch.setattr(tables, "write", writing)
    backend.sample(works, HYPER, KEY)
    (site,) = backend._sites.values()
    (part,) = site.parts

    def sample_and_list(hyper: Hyper, key: NoiseKey) -> list[int]:
        written.clear()
        backend.sample(works, hyper, key)
        assert site.parts == [part]
        return [t.data_ptr() for t in written]

    assert sample_and_list(HYPER, KEY) == []
    assert sample_and_list(dataclasses.replace(HYPER, ess=3.0), NoiseKey(1, 2)) == [site.scalars.data_ptr()]
    address = part.tensors.data_ptr()
    works[0].mean = works[0].mean.clone()
    assert sample_and_list(dataclasses.replace(HYPER, ess=3.0), NoiseKey(1, 2)) == [address]


class Problem:
    """Two parameters and a quadratic loss whose gradient is computed on the CPU, so that it has the same bits."""

    def __init__(self, backend: str, device: str, dtype: torch.dtype, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [
            torch.randn(shape, generator=generator).to(dtype).to(device).requires_grad_() for shape in ((9, 5), (11,))
        ]
        self.targets = [torch.randn(p.shape, generator=generator).to(dtype) for p in self.params]
        arguments = {"lr": 0.1, "ess": 300.0, "hess_init": 0.3, "beta2": 0.9, "clip_radius": 0.2} | options
        groups: list[dict[str, Any]] = [
            {"params": [self.params[0]]},
            {"params": [self.params[1]], "weight_decay": 0.1, "lr": 0.05},
        ]
        self.optimizer = IVON(groups, seed=11, backend=backend, **arguments)

    def backward(self) -> None:
        for p, t in zip(self.params, self.targets, strict=True):
            p.grad = ((p.detach().cpu() - t) * 1.5).to(p.device)

    def run(self, steps: int) -> None:
        for step in range(steps):
            if step % 3 == 2:
                for _ in range(2):
                    with self.optimizer.sampled_params(train=True):
                        self.backward()
            else:
                self.optimizer.train()
                self.backward()
            self.optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_optimizer_runs_the_same_trajectory_on_both_backends(dtype: torch.dtype, triton_device: str) -> None:
    assert_same_trajectory(Problem("eager", "cpu", dtype), Problem("triton", triton_device, dtype), 3)


@pytest.mark.parametrize(
    "options",
    [
        {"hess_approx": "fisher", "step_rule": "adam", "beta2": "auto"},
        {"hess_approx": "price", "beta2": 0.99},
    ],
    ids=["fisher", "price"],
)
def test_so_do_the_updates_with_and_without_noise_around_the_end_of_the_warm_up(
    options: dict[str, Any], triton_device: str
) -> None:
    options = {"hess_init": "auto", "batch_size": 16, **options}
    eager, ours = Problem("eager", "cpu", torch.float32, **options), Problem("triton", triton_device, torch.float32)
    eager.run(9)
    with torch.no_grad():
        for p, q in zip(eager.params, ours.params, strict=True):
            q.copy_(p)
    ours.optimizer.load_state_dict(eager.optimizer.state_dict())
    assert ours.optimizer.param_groups[0]["hess_init"] == "auto"
    assert_same_trajectory(eager, ours, 3)  # updates 10 to 12


def assert_same_trajectory(eager: Problem, ours: Problem, steps: int) -> None:
    eager.run(steps)
    ours.run(steps)
    assert_same_state(eager.optimizer, ours.optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("launched", [False, True], ids=["before the launch", "after the launch"])
def test_an_interrupted_draw_loses_no_mean(
    dtype: torch.dtype, launched: bool, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch that writes the sample is also the one that copies the mean."""
    problem = Problem("triton", triton_device, dtype)
    problem.run(1)
    expected = [p.detach().clone() for p in problem.params]
    run, calls = TritonBackend._run, 0

    def interrupted(self: TritonBackend, *arguments: Any, **constants: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 and not launched:
            raise KeyboardInterrupt
        run(self, *arguments, **constants)
        if calls == 2 and launched:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TritonBackend, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            problem.optimizer.train()  # two groups: the second launch is interrupted
    assert all(torch.equal(p, q) for p, q in zip(problem.params, expected, strict=True))


def test_a_16_bit_parameter_written_by_the_user_is_the_new_mean(triton_device: str) -> None:
    problem = Problem("triton", triton_device, torch.bfloat16)
    problem.run(1)
    means = [problem.optimizer.state[p]["mean"].clone() for p in problem.params]
    with torch.no_grad():
        problem.params[0][2, 3] = 5.0
    means[0][2, 3] = 5.0
    problem.optimizer.train()
    problem.optimizer.eval()
    for p, mean in zip(problem.params, means, strict=True):
        assert torch.equal(problem.optimizer.state[p]["mean"], mean)


def test_float64_parameters_take_the_eager_backend_beside_the_kernels(triton_device: str) -> None:
    def run(backend: str, device: str) -> list[Tensor]:
        params = [torch.ones(5, dtype=torch.float64, device=device), torch.ones(5, device=device)]
        optimizer = IVON(params, lr=0.1, ess=10.0, backend=backend)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.train()
        optimizer.step()
        assert optimizer.nonfinite_elements() == 0
        return params

    for p, q in zip(run("eager", "cpu"), run("triton", triton_device), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=0 if p.dtype == torch.float32 else 1e-12, atol=0)


def test_who_can_run_and_why_not() -> None:
    assert supports(torch.device("meta"), torch.float32) == (False, "Triton has no support for tensors on 'meta'")
    supported, reason = supports(torch.device("cpu"), torch.float64)
    assert not supported
    assert "not torch.float64" in reason
    assert choose_backend("auto", torch.device("cpu"))[0] == "eager"
    with pytest.raises(ValueError, match="backend='triton' cannot run on meta"):
        choose_backend("triton", torch.device("meta"))
    with pytest.raises(ValueError, match="tile must be a power of two"):
        LaunchConfig(tile=100)
    with pytest.raises(ValueError, match="tile must be at most 32768, got 65536"):
        LaunchConfig(tile=1 << 16)
    with pytest.raises(ValueError, match="num_warps"):
        LaunchConfig(num_warps=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU whose driver starts")
def test_a_gpu_that_triton_cannot_run_gets_the_eager_backend_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    gpu = torch.device("cuda:0")
    assert gpu_supports(gpu) == (False, "Triton needs compute capability 7.0 or more, and cuda:0 has 6.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    supported, reason = gpu_supports(gpu)
    assert not supported
    assert reason.startswith("Triton's driver does not start (RuntimeError: 0 active drivers")
    p = torch.ones(3)
    with caplog.at_level("INFO", logger="ivon_lora"):
        optimizer = IVON([p], 0.1, 10)
        assert optimizer.backend_of(gpu).name == "eager"
    levels = {record.getMessage().split(":")[0]: record.levelname for record in caplog.records}
    assert levels["backend eager for parameters on cpu"] == "INFO"
    assert levels["backend eager for parameters on cuda"] == "WARNING", "many times slower: worth a word"


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_a_gpu() -> None:
    name, reason = choose_backend("auto", torch.device("cuda"))
    assert name == "triton"
    assert reason in ("CUDA tensors", "ROCm tensors")
