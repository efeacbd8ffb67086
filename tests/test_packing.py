"""State of small neighbours lies together, and nothing else depends on where it lies."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, LoraAdapter, RankPruner, blocks, packing
from ivon_lora.packing import packs, together


def test_packs_are_filled_in_order() -> None:
    assert packs([4, 8, 4, 16, 4], 16) == [[0, 1, 2], [3], [4]]
    assert packs([], 16) == []


def test_small_tensors_share_memory_and_large_ones_do_not() -> None:
    shapes: list[tuple[int, ...]] = [(3, 5), (2, 2), (), (40,), (0,), (7,)]
    params = [torch.empty(shape) for shape in shapes]
    found = together(params, torch.float64, limit=64)
    assert [i for i, p in enumerate(params) if p in found] == [0, 1, 2, 5]  # 40 elements are half a pack, or more
    for p, memory in found.items():
        assert (memory.shape, memory.dtype, memory.is_contiguous()) == (p.shape, torch.float64, True)
    start = found[params[0]].data_ptr()
    assert [(found[params[i]].data_ptr() - start) // 8 for i in (0, 1, 2, 5)] == [0, 16, 20, 24]
    assert found[params[0]].untyped_storage().nbytes() == 8 * 32


def parameters(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def run(params: list[nn.Parameter], optimizer: IVON, steps: int = 3) -> None:
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 0.1 * (i + 1) * (step - 1))
        optimizer.train()
        optimizer.step()


def everything(params: list[nn.Parameter], optimizer: IVON) -> list[Tensor]:
    return [*params, *(x for p in params for _, x in sorted(optimizer.state[p].items()))]


EVEN, UNEVEN = ((4, 30), (30, 4), (2, 6), (8, 1)), ((3, 5), (4, 30), (1,), (30, 4), (7,))


@pytest.mark.parametrize("shapes", [EVEN, UNEVEN], ids=["multiples of four", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_where_the_state_lies(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for limit in (0, packing.LIMIT):
        with monkeypatch.context() as patched:
            patched.setattr(packing, "is_small", lambda n, _, limit=limit: 0 < 2 * n < limit)  # state only, not blocks
            params = parameters(shapes, dtype)
            optimizer = IVON(params, 0.1, 100.0, backend="eager")
            run(params, optimizer)
        storages = {optimizer.state[p]["hess"].untyped_storage().data_ptr() for p in params}
        assert len(storages) == (1 if limit else len(params))
        ends.append(everything(params, optimizer))
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


def test_what_lies_together_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    move = blocks.Block._move

    def counted(self: blocks.Block, place: Any, row: int, out: bool) -> None:
        copied.extend(role for role, known in self._known.items() if known is place)
        move(self, place, row, out)

    monkeypatch.setattr(blocks.Block, "_move", counted)
    params = parameters(EVEN)
    run(params, IVON(params, 0.1, 100.0, backend="eager"))
    assert set(copied) == {"mean", "param", "grad"}  # the parameters (before the first draw they are the mean)


def test_checkpoints_and_copies_of_state_that_lies_together() -> None:
    params = parameters(EVEN)
    optimizer = IVON(params, 0.1, 100.0, backend="eager")
    run(params, optimizer)
    optimizer.train()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    stored = 4 * 3 * sum(p.numel() for p in params)
    assert len(file.getvalue()) < stored + 12_000
    file.seek(0)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    other = IVON(resumed, 0.1, 100.0, backend="eager")
    other.load_state_dict(torch.load(file))
    optimizer.eval()
    twin_params, twin = copy.deepcopy((params, optimizer))
    for mine, which in ((params, optimizer), (resumed, other), (twin_params, twin)):
        run(mine, which)
    for x, y, z in zip(
        everything(params, optimizer), everything(resumed, other), everything(twin_params, twin), strict=True
    ):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


def test_groups_masks_and_frozen_parameters_cut_what_lies_together() -> None:
    """Blocks that begin or end inside a pack, and ranks that stand still, have the bits of tensors that lie alone."""
    ends = []
    for limit in (0, packing.LIMIT):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(packing, "is_small", lambda n, _, limit=limit: 0 < 2 * n < limit)
            params = parameters(EVEN)
            pruner = RankPruner(
                [LoraAdapter("a", params[0], params[1])], 2, total_steps=8, warmup=1, final=4, interval=1
            )
            groups: list[dict[str, Any]] = [{"params": params[:3]}, {"params": params[3:], "lr": 0.01}]
            optimizer = IVON(groups, 0.1, 100.0, backend="eager", pruner=pruner)
            run(params, optimizer, 2)
            params[1].requires_grad_(False)
            run(params, optimizer, 2)
            params[1].requires_grad_(True)
            run(params, optimizer, 4)
        ends.append(everything(params, optimizer))
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))
