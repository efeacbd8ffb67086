"""The kernels' tables: found from the batch that lends gradients, right in every call, and written no more than needed.

Tensors in MEAN and SAMPLED, gradients of other dtypes and at other addresses, sums over earlier samples: each call has
the bits of the eager backend, which reads the works one by one.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from ivon_lora import IVON
from ivon_lora.backends import Work
from ivon_lora.backends.batch import Batch
from ivon_lora.backends.eager import BlockedEager
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.kernels import tables, tiles
from ivon_lora.kernels.launch import TritonBackend
from ivon_lora.layout import addresses

HYPER = Hyper(777.0, 0.013, 0.07, 0.87, 1 - 0.87, 1 - 0.931, 0.37, 1.0, 777.0, 1 / 48, 777.0, "gradsq", "newton")
KEY = NoiseKey(5, 6)
SHAPES = ((3, 8), (5,), (8, 3))


@pytest.fixture(autouse=True)
def _numpy_may_meet_nan() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where a GPU is silent."""
    with np.errstate(all="ignore"):
        yield


def randn(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def make_works(dtype: torch.dtype, generator: torch.Generator) -> list[Work]:
    works = []
    for index, shape in enumerate(SHAPES):
        param = randn(generator, shape, dtype)
        mean = param if dtype == torch.float32 else param.float()
        half = None if dtype == torch.float32 else mean
        works.append(Work(index, param, mean, randn(generator, shape), randn(generator, shape).abs(), mean_state=half))
    return works


def to_device(works: list[Work], device: str) -> Batch:
    copies = copy.deepcopy(works)
    for w in copies:
        same = w.mean is w.param
        for name in ("param", "momentum", "hess", "mean"):
            setattr(w, name, getattr(w, name).to(device))
        w.mean = w.param if same else w.mean
        w.mean_state = None if same else w.mean
    return Batch(copies)


def lend(batch: Batch, grads: list[Tensor]) -> None:
    batch.lend(grads, addresses(grads), all(g.dtype == w.param.dtype for g, w in zip(grads, batch, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lent_gradients_are_found_wherever_they_are(dtype: torch.dtype, triton_device: str) -> None:
    """Call after call: the same dtype, another address, another dtype, back again, an odd address."""
    generator = torch.Generator().manual_seed(0)
    works = make_works(dtype, generator)
    batch = to_device(works, triton_device)
    eager, ours = BlockedEager(), TritonBackend(torch.device(triton_device))
    kept: list[Tensor] = []  # so that no address comes back
    for grad_dtype, odd in (
        (dtype, False),
        (dtype, False),
        (torch.float32, False),
        (torch.bfloat16, False),
        (dtype, True),
        (dtype, False),
    ):
        grads = [randn(generator, w.param.shape, grad_dtype) for w in works]
        moved = []
        for g in grads:
            room = torch.empty(g.numel() + odd, dtype=g.dtype, device=triton_device)
            moved.append(room[odd:].view(g.shape).copy_(g))
        kept += moved
        for w, g in zip(works, grads, strict=True):
            w.grad = g
        eager.step(works, HYPER, KEY, 1)
        lend(batch, moved)
        ours.step(batch, HYPER, KEY, 1)
        batch.take_back()
        assert all(w.grad is None for w in batch)
        for a, b in zip(works, batch, strict=True):
            for name in ("param", "mean", "momentum", "hess"):
                assert torch.equal(getattr(a, name), getattr(b, name).cpu()), (grad_dtype, odd, name)


def test_a_batch_that_gets_and_loses_sums_of_earlier_samples(triton_device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    works = make_works(torch.float32, generator)
    batch = to_device(works, triton_device)
    eager, ours = BlockedEager(), TritonBackend(torch.device(triton_device))
    grads = [randn(generator, w.param.shape) for w in works]
    for banked in (False, True, False, True):
        for some, device in ((works, "cpu"), (batch, triton_device)):
            for w in some:
                for role in ("banked_grad", "banked_curvature"):
                    setattr(w, role, torch.full(w.param.shape, 0.5, device=device) if banked else None)
        batch.read("banked_grad")
        batch.read("banked_curvature")
        for w, g in zip(works, grads, strict=True):
            w.grad = g
        lend(batch, [g.to(triton_device) for g in grads])
        if banked:
            eager.bank(works, HYPER, KEY)
            ours.bank(batch, HYPER, KEY)
        eager.step(works, HYPER, KEY, 2)
        ours.step(batch, HYPER, KEY, 2)
        batch.take_back()
        for a, b in zip(works, batch, strict=True):
            for name in ("param", "momentum", "hess"):
                assert torch.equal(getattr(a, name), getattr(b, name).cpu()), (banked, name)


def test_a_recorded_step_refuses_gradients_at_odd_addresses_and_goes_on(triton_device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    works = make_works(torch.float32, generator)
    batch = to_device(works, triton_device)
    eager, ours = BlockedEager(), TritonBackend(torch.device(triton_device))
    grads = [randn(generator, w.param.shape) for w in works]
    there = [g.to(triton_device) for g in grads]
    odd = [torch.empty(g.numel() + 1, device=triton_device)[1:].view(g.shape).copy_(g) for g in grads]
    for w, g in zip(works, grads, strict=True):
        w.grad = g
    for _ in range(3):
        eager.step(works, HYPER, KEY, 1)
    lend(batch, there)
    ours.step(batch, HYPER, KEY, 1)
    with ours.recording() as recording:
        ours.step(batch, HYPER, KEY, 1)
    batch.take_back()
    with pytest.raises(RuntimeError, match="an address of another alignment"):
        recording.use_gradients(odd)
    recording.use_gradients([g.clone() for g in there])
    recording.use_gradients(there)
    for launch in recording.launches:
        launch.run(ours.device)
    with pytest.raises(RuntimeError, match="an address of another alignment"):
        recording.use_gradients(odd)
    for g in there:
        g.fill_(torch.nan)
    lend(batch, odd)  # what was refused must not be taken for written
    ours.step(batch, HYPER, KEY, 1)
    batch.take_back()
    for a, b in zip(works, batch, strict=True):
        for name in ("param", "momentum", "hess"):
            assert torch.equal(getattr(a, name), getattr(b, name).cpu()), name


def test_a_step_writes_two_rows_of_scalars_and_addresses_only_when_gradients_have_moved(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [torch.ones(shape, device=triton_device, requires_grad=True) for shape in SHAPES]
    optimizer = IVON(params, 0.1, 50, backend="triton")
    monkeypatch.setattr(TritonBackend, "_run", lambda *_, **__: None)
    written: list[tuple[int, ...]] = []
    monkeypatch.setattr(tables, "write", lambda target, _: written.append(tuple(target.shape)))

    def cycle() -> list[tuple[int, ...]]:
        written.clear()
        optimizer.train()
        optimizer.step()
        return list(written)

    def new_gradients() -> None:
        for p in params:
            p.grad = torch.ones_like(p)

    new_gradients()
    cycle()
    scalars, columns = tiles.SCALAR_COLUMNS.value, tiles.TENSOR_COLUMNS.value
    assert cycle() == cycle() == [(2, scalars)] * 2
    kept: list[Any] = [p.grad for p in params]  # so that the next ones lie elsewhere
    new_gradients()
    assert cycle() == [(2, scalars), (len(params), columns), (2, scalars)]
    assert cycle() == [(2, scalars)] * 2
    assert len(kept) == len(params)


def test_a_tensor_of_ranks_without_elements(triton_device: str) -> None:
    """As a layer with no inputs has it: nothing to launch, and no rank is as long as a division by zero."""
    empty = torch.empty(4, 0, device=triton_device)
    mask = torch.ones(4, dtype=torch.bool, device=triton_device)
    work = Work(0, empty, empty, empty.clone(), empty.clone(), empty.clone(), rank_mask=mask)
    backend = TritonBackend(torch.device(triton_device))
    backend.sample([work], HYPER, KEY)
    backend.step([work], HYPER, KEY, 1)
    assert int(backend.nonfinite_elements()) == 0


# ---------------------------------------------------------------- the work list


@triton.jit
def places_kernel(tensors, items, offsets_out, ranks_out, exists_out, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Where the lanes of each tile are, which of them exist, and of which rank they are."""
    item = items + tl.program_id(0).to(tl.int64) * tiles.ITEM_COLUMNS
    row = tensors + tl.load(item + tiles.ITEM_TENSOR) * tiles.TENSOR_COLUMNS
    offsets, exists, _ = tiles.lanes(item, row, TILE, VECTOR)
    out = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(offsets_out + out, offsets)
    tl.store(exists_out + out, exists.to(tl.int8))
    tl.store(ranks_out + out, tiles.ranks(item, row, tiles.distances(item, tl.arange(0, TILE), VECTOR)))


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("tile", [64, 512])
@pytest.mark.parametrize(
    ("r", "inner", "outer", "offset"),
    [
        (1, 1, 300, 0), (16, 1, 90, 0), (12, 1, 70, 0), (7, 1, 50, 0), (75, 1, 9, 0), (5, 3, 40, 0), (16, 4, 10, 0),
        (6, 384, 1, 0), (3, 700, 2, 0), (9, 98, 1, 0), (200, 2, 4, 0), (70_000, 1, 2, 69_400), (3, 1 << 16, 1, 0),
        (16, 1, 90, 37), (6, 98, 1, 137), (16, 4, 10, 64), (4, 1 << 33, 1, (1 << 34) + (1 << 33) - 700),
    ],
)  # fmt: skip
def test_every_element_lies_in_one_tile_and_knows_its_rank(
    r: int, inner: int, outer: int, offset: int, tile: int, scored: bool, triton_device: str
) -> None:
    """Ranks without a division: those of ``element // inner % r``, for tensors whole and in pieces, however large."""
    numel = min(r * inner * outer - offset, 1400)
    row = [0] * tiles.TENSOR_COLUMNS.value
    row[tiles.OFFSET.value], row[tiles.RANK.value] = offset, r
    row[tiles.SLOT.value], row[tiles.NUMEL.value] = 0 if scored else -1, numel
    row[tiles.RANK_RECIPROCAL.value], row[tiles.INNER_RECIPROCAL.value] = map(tables.reciprocal, (r, inner))
    items = tables.work_list(0, row, inner, tile, misaligned=False)
    kinds = items[:, tiles.ITEM_KIND.value]
    seen = np.zeros(numel, np.int64)
    for vector in (False, True):
        mine = torch.from_numpy(items[(kinds != tiles.SCATTERED.value) == vector]).to(triton_device)
        if not len(mine):
            continue
        offsets = torch.zeros(len(mine) * tile, dtype=torch.int64, device=triton_device)
        ranks, exists = torch.zeros_like(offsets, dtype=torch.int32), torch.zeros_like(offsets, dtype=torch.int8)
        options = {"TILE": tile, "VECTOR": vector, "enable_fp_fusion": False}
        places_kernel[(len(mine),)](torch.tensor(row, device=triton_device), mine, offsets, ranks, exists, **options)
        real = exists.cpu().numpy() != 0
        places = offsets.cpu().numpy()[real]
        np.add.at(seen, places, 1)
        np.testing.assert_array_equal(ranks.cpu().numpy()[real], (places + offset) // inner % r)
    assert (seen == 1).all()
