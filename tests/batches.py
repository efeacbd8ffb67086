"""Batches and rankings made by hand, for tests of backends."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ivon_lora.backends.batch import Batch
from ivon_lora.backends.ranking import RankedTensor, Ranking
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey

# Every term on: weight decay, clipping (which bites for some elements only), bias correction, all coefficients odd.
HYPER = Hyper(
    ess=777.0,
    weight_decay=0.013,
    lr=0.07,
    beta1=0.87,
    rho=1 - 0.931,
    clip_radius=0.37,
    debias=1 - 0.87**3,
    curvature="price",
    square_scale=777.0,
    inverse_batch=1 / 48,
    noise_ess=777.0,
)
HYPERS = {
    "price": HYPER,
    "gradsq": dataclasses.replace(HYPER, curvature="gradsq", clip_radius=float("inf"), grad_scale=-1.0),
    "fisher": dataclasses.replace(HYPER, curvature="fisher", square_scale=48.0, clip_radius=3.7, prior_weight=0.3),
}
KEY = NoiseKey(seed=2**64 - 3, step=2**32 - 7, sample=5)

ROLES = (
    "param", "mean", "momentum", "hess", "grad", "banked_grad", "banked_curvature", "rank_mask", "sensitivity",
    "uncertainty",
)  # fmt: skip

#: shape, and the dimension of the ranks; None: the parameter has no rank mask
Layout = tuple[tuple[int, ...], int | None]


def make_batch(
    layout: Sequence[Layout],
    dtype: torch.dtype = torch.float32,
    *,
    grad_dtype: torch.dtype | None = None,
    hyper: Hyper = HYPER,
    banked: bool = False,
    sensitivity: bool = False,
    offsets: list[int] | None = None,
    seed: int = 0,
) -> Batch:
    """Random state and gradients, some of which are not finite; a third of the ranks is masked."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(wide)

    shapes = [shape for shape, _ in layout]
    params = [randn(shape).to(dtype) for shape in shapes]
    grads = [randn(shape).to(grad_dtype or dtype) for shape in shapes]
    for grad in grads:
        if grad.numel() > 4:
            grad.view(-1)[1], grad.view(-1)[-1] = float("nan"), float("-inf")
    masks = [None if dim is None else torch.rand(shape[dim], generator=generator) > 0.3 for shape, dim in layout]
    has_masks = any(mask is not None for mask in masks)
    return Batch(
        hyper=hyper,
        indices=[2**31 + 3 * n for n in range(len(layout))],
        offsets=offsets or [0] * len(layout),
        param=params,
        mean=params if dtype == wide else [(p.float() + 1e-4 * randn(tuple(p.shape))) for p in params],
        momentum=[randn(shape) * 0.1 for shape in shapes],
        hess=[randn(shape).abs() * 0.1 for shape in shapes],
        grad=grads,
        banked_grad=[randn(shape) for shape in shapes] if banked else None,
        banked_curvature=[randn(shape) for shape in shapes] if banked else None,
        rank_dims=[dim for _, dim in layout],
        rank_mask=masks if has_masks else None,
        sensitivity=[randn(shape).abs() for shape in shapes] if sensitivity else None,
        uncertainty=[randn(shape).abs() for shape in shapes] if sensitivity else None,
    )


def about_to_draw(batch: Batch) -> Batch:
    """The same with memory for the means, as the optimizer has it for a draw."""
    if batch.param[0].dtype == batch.momentum[0].dtype:
        batch.mean = [torch.full_like(p, 7.0) for p in batch.param]
    return batch


def moved(batch: Batch, device: str | torch.device = "cpu", odd: Sequence[str] = ()) -> Batch:
    """A copy on a device; a list of tensors that is another's stays so. ``odd``: roles at odd addresses."""
    memory: dict[int, Any] = {}

    def there(tensor: Tensor, shift: bool) -> Tensor:
        room = torch.empty(tensor.numel() + shift, dtype=tensor.dtype, device=device)
        return room[int(shift) :].view(tensor.shape).copy_(tensor)

    found = copy.copy(batch)
    for role in ROLES:
        tensors = getattr(batch, role)
        if tensors is not None and id(tensors) not in memory:
            memory[id(tensors)] = [None if t is None else there(t, role in odd) for t in tensors]
        setattr(found, role, None if tensors is None else memory[id(tensors)])
    return found


def ranking_of(batch: Batch, adapters: Sequence[Sequence[int]], **options: Any) -> Ranking:
    """Of the tensors of a batch with these numbers; the last of an adapter is its gate."""
    assert batch.rank_mask is not None
    ranked = []
    for adapter in adapters:
        tensors = []
        for n in adapter:
            mask = batch.rank_mask[n]
            assert mask is not None
            scores = torch.full(mask.shape, -1.0, device=mask.device)
            tensors.append(RankedTensor(batch.indices[n], n == adapter[-1], scores, mask))
        ranked.append(tensors)
    defaults: dict[str, Any] = {"criterion": "magnitude", "budget": 2, "min_rank": 0, "frozen": False, "hard": False}
    return Ranking(adapters=ranked, **{**defaults, **options})


def means_of(*values: Sequence[float] | Tensor) -> Batch:
    """Tensors of one element per rank, whose importance is its magnitude."""
    batch = make_batch([((len(v), 1), 0) for v in values])
    for p, v in zip(batch.param, values, strict=True):
        p.copy_(torch.as_tensor(v)[:, None])
    return batch


def assert_same_bits(expected: Batch, found: Batch, roles: Sequence[str] = ROLES) -> None:
    """All tensors of two batches have the same bits, but for those of NaNs."""
    for role in roles:
        for n, (x, y) in enumerate(zip(getattr(expected, role) or [], getattr(found, role) or [], strict=True)):
            if x is None:
                continue
            assert x.dtype == y.dtype, role
            x, y = x.detach().cpu().reshape(-1), y.detach().cpu().reshape(-1)
            integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[x.element_size()]
            same = (x.view(integer) == y.view(integer)) | (torch.isnan(x) & torch.isnan(y))
            assert bool(same.all()), (role, n, tuple(expected.param[n].shape), int((~same).sum()))
