"""Proof that an exported adapter is the trained one: both updates are multiplied out and compared."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ivon_lora.export.plan import PlannedLayer

#: elements of the update that are held at once while comparing
BLOCK = 1 << 22
TOLERANCE = 1e-6


def check_layer(layer: PlannedLayer, a: Tensor | None, b: Tensor | None, scale: float) -> float:
    """Largest difference between the exported and the trained update of one layer.

    Args:
        layer: the trained layer.
        a: exported A as read back, (rank', ...); None where the layer is left out.
        b: exported B as read back.
        scale: the factor that a consumer will apply to B A.

    Raises:
        ValueError: if an element differs by more than 1e-6 * max(1, max |delta|) plus, for 16-bit tensors, what
            rounding B to that dtype can explain, or if the update is not finite.
    """
    worst, largest, excess = 0.0, 0.0, -math.inf
    for old, new, rounding in _blocks(layer, a, b, scale):
        difference = (new - old).abs()
        worst = max(worst, float(difference.max()))
        largest = max(largest, float(old.abs().max()))
        excess = max(excess, float((difference - rounding).max()))
    if not (math.isfinite(worst) and math.isfinite(largest)):
        raise ValueError(f"layer {layer.name!r} cannot be exported: its update is not finite (in {layer.B.dtype})")
    if excess > TOLERANCE * max(1.0, largest):
        raise ValueError(
            f"layer {layer.name!r}: the exported update differs from the trained one by {worst:.3g} "
            f"(max |delta| {largest:.3g}); nothing was written"
        )
    return worst


def largest_element(a: Tensor, b: Tensor, e: Tensor | None, scaling: float, ranks: Tensor) -> float:
    """max |delta| of the given ranks alone."""
    left, right = _factors(a, b, e, scaling, ranks)
    return max(float((rows @ right).abs().max()) for rows in _rows(left, right))


def consumer_rank_and_scale(config: Mapping[str, Any], target: str) -> tuple[int, float]:
    """(r, alpha / r) that PEFT gives to module ``target``: the first pattern that matches the end of its path."""
    rank = _pattern_value(config.get("rank_pattern") or {}, target, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern") or {}, target, config["lora_alpha"])
    return int(rank), alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern_value(patterns: Mapping[str, float], target: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", target)), default)


def _blocks(
    layer: PlannedLayer, a: Tensor | None, b: Tensor | None, scale: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    left, right = _factors(layer.A, layer.B, layer.E, layer.scaling, layer.live)
    if a is None or b is None:
        new_left, new_right = left[:, :0], right[:0]
    else:
        new_left, new_right = _factors(a.to(left.device), b.to(left.device), None, scale, None)
    unit, floor = _rounding(layer.B.dtype)
    magnitude = right.abs()
    for rows, new_rows in zip(_rows(left, right), _rows(new_left, right), strict=True):
        rounding = (rows.abs() * unit + floor) @ magnitude
        yield rows @ right, new_rows @ new_right, rounding


def _factors(a: Tensor, b: Tensor, e: Tensor | None, scaling: float, ranks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, rank) and (rank, in) in the widest dtype of the device, with the scale in the first."""
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    left, right = b.to(wide).reshape(b.shape[0], b.shape[1]), a.to(wide).reshape(a.shape[0], -1)
    left = left * scaling if e is None else left * scaling * e.to(wide).reshape(1, -1)
    if ranks is not None:
        keep = ranks.nonzero().flatten().to(a.device)
        left, right = left.index_select(1, keep), right.index_select(0, keep)
    return left, right


def _rows(left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    return torch.split(left, max(1, BLOCK // max(1, right.shape[1])))


def _rounding(dtype: torch.dtype) -> tuple[float, float]:
    """Relative and absolute error of rounding one number to a 16-bit dtype; zero for wider ones."""
    info = torch.finfo(dtype)
    if info.bits > 16:
        return 0.0, 0.0
    return 0.5 * info.eps, 0.5 * info.eps * info.smallest_normal
