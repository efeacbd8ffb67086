"""The Triton backend has the bits of the eager one: parameters, their state and the next sample."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ivon_lora import IVON
from ivon_lora.backends import choose_backend
from ivon_lora.backends.eager import EagerBackend
from ivon_lora.kernels.launch import TritonBackend
from ivon_lora.kernels.runtime import LaunchConfig, gpu_supports
from tests.batches import HYPERS, KEY, about_to_draw, assert_same_bits, make_batch, moved
from tests.triton_runs import Make, assert_equal_runs, default_gradient, ivon, vadam

#: with and without a remainder mod 4, a scalar, an empty tensor, and more elements than a tile
SHAPES = ((6, 11), (), (0, 3), (617,))


def in_two_groups(make: Callable[..., Make], **second: Any) -> Make:
    def made(params: Sequence[Tensor], backend: str) -> IVON:
        groups = [{"params": params[:2]}, {"params": params[2:], **second}]
        return make()(groups, backend)  # type: ignore[arg-type]

    return made


#: what is made, the dtype of the parameters, and the samples of a step
RUNS: dict[str, tuple[Make, torch.dtype, int]] = {
    "price": (ivon(), torch.float32, 1),
    "price, bf16": (ivon(), torch.bfloat16, 1),
    "price, fp16": (ivon(), torch.float16, 1),
    "gradsq": (ivon(hess_approx="gradsq", clip_radius=0.02), torch.float32, 1),
    "vadam, bf16": (vadam(), torch.bfloat16, 1),
    "two groups of ivon": (in_two_groups(ivon, lr=0.03, weight_decay=0.2), torch.bfloat16, 2),
    "two groups of vadam": (in_two_groups(vadam, lr=0.03, betas=(0.8, 0.99)), torch.bfloat16, 1),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_bits_of_the_eager_backend(name: str, triton_device: str) -> None:
    make, dtype, samples = RUNS[name]
    optimizer, params = assert_equal_runs(make, SHAPES, triton_device, dtype, samples=samples)
    assert not torch.equal(params[-1].float().cpu(), optimizer.posterior(params[-1]).mean.cpu()), "a sample"


@pytest.mark.parametrize(("make", "samples"), [(ivon(maximize=True), 3), (vadam(), 1)], ids=["ivon", "vadam"])
def test_gradients_that_are_missing_or_not_finite(make: Make, samples: int, triton_device: str) -> None:
    """Of a step, of a sample, and of single elements; the third tensor is frozen."""

    def gradient(index: int, number: int, p: Tensor) -> Tensor | None:
        grad = default_gradient(index, number, p)
        if (index + number) % 4 == 3:
            return None
        if grad.numel() > 4:
            grad.view(-1)[1], grad.view(-1)[-1] = (math.nan, -math.inf, 2.0**127)[number % 3], math.inf
        return grad

    def frozen(params: Sequence[Tensor], backend: str) -> IVON:
        params[0].requires_grad_(False)
        return make(params, backend)

    optimizer, _ = assert_equal_runs(frozen, SHAPES, triton_device, samples=samples, gradient=gradient)
    assert optimizer.metrics()["grad/nonfinite"] > 0


# ---------------------------------------------------------------- batches made by hand

LAYOUT = [((6, 98), 0), ((33, 6), 1), ((5,), None), ((), None), ((0, 3), None), ((50, 12), 1), ((5, 2, 3, 3), 0)]


def backends(device: str) -> tuple[EagerBackend, TritonBackend]:
    return EagerBackend(), TritonBackend(torch.device(device), LaunchConfig(tile=1024))


@pytest.mark.parametrize("curvature", HYPERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_method_has_the_bits_of_the_eager_backend(curvature: str, dtype: torch.dtype, triton_device: str) -> None:
    """A draw, a sum over samples, and a step, with masks and sensitivities."""
    batch = about_to_draw(make_batch(LAYOUT, dtype, hyper=HYPERS[curvature], banked=True, sensitivity=True))
    ours = moved(batch, triton_device, odd=("momentum",) if curvature == "fisher" else ())
    eager, triton = backends(triton_device)
    for call in (
        lambda backend, b: backend.sample([b], KEY),
        lambda backend, b: backend.bank([b], KEY),
        lambda backend, b: backend.step([b], KEY, 3),
    ):
        call(eager, batch)
        call(triton, ours)
        assert_same_bits(batch, ours)
    # the eager backend also counts those of masked ranks
    assert 0 < int(triton.nonfinite_elements()) <= int(eager.nonfinite_elements())


def test_a_step_without_a_sample_leaves_the_hessian(triton_device: str) -> None:
    batch = make_batch(LAYOUT, torch.float16)
    ours, before = moved(batch, triton_device), [h.clone() for h in batch.hess]
    eager, triton = backends(triton_device)
    eager.step([batch], None)
    triton.step([ours], None)
    assert_same_bits(batch, ours)
    assert all(map(torch.equal, batch.hess, before))


def test_pieces_of_tensors_have_the_bits_of_the_whole(triton_device: str) -> None:
    """As shards have them: cut between rows, with ranks along either dimension; one starts within a quad of noise."""
    layout = [((33, 6), 1), ((6, 98), 0), ((1001,), None)]
    whole = about_to_draw(make_batch(layout))
    cuts = [(0, 5, 5, 33), (0, 2, 5, 6), (0, 301, 1001)]
    pieces = moved(whole, triton_device)
    chosen = [(n, a, b) for n, ends in enumerate(cuts) for a, b in itertools.pairwise(ends)]

    def cut(tensors: list[Tensor]) -> Any:
        return [tensors[n][a:b].clone() for n, a, b in chosen]

    assert pieces.rank_mask is not None
    assert pieces.rank_dims is not None
    pieces = dataclasses.replace(
        pieces,
        indices=[whole.indices[n] for n, _, _ in chosen],
        offsets=[a * math.prod(layout[n][0][1:]) for n, a, _ in chosen],
        rank_mask=[pieces.rank_mask[n] for n, _, _ in chosen],
        rank_dims=[pieces.rank_dims[n] for n, _, _ in chosen],
        **{role: cut(getattr(pieces, role)) for role in ("param", "mean", "momentum", "hess", "grad")},
    )
    eager, triton = backends(triton_device)
    eager.sample([whole], KEY)
    eager.step([whole], KEY)
    triton.sample([pieces], KEY)
    triton.step([pieces], KEY)
    for (n, a, b), param, hess in zip(chosen, pieces.param, pieces.hess, strict=True):
        assert torch.equal(param.cpu(), whole.param[n][a:b])
        assert torch.equal(hess.cpu(), whole.hess[n][a:b])


# ---------------------------------------------------------------- where it runs


def test_a_gpu_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    supported, reason = gpu_supports(torch.device("cuda"))
    assert not supported
    assert "8.0" in reason
    assert "7.0" in reason


def test_other_devices_and_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="take backend='auto' or 'eager'"):
        choose_backend("triton", torch.device("meta"))
    with pytest.raises(ValueError, match="power of two from 128"):
        LaunchConfig(tile=1000)
    with pytest.raises(ValueError, match="num_warps"):
        LaunchConfig(num_warps=3)
