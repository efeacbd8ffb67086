"""Proof that an exported adapter is the trained one: the files are read back and both updates are multiplied out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ivon_lora.export.layer import Layer
from ivon_lora.export.layout import tensor_keys
from ivon_lora.posterior.tensor_file import read_tensors

#: elements of the update that are held at once while comparing
BLOCK = 1 << 22
TOLERANCE = 1e-6


def verify(weights: Path, config: Path, layers: Sequence[Layer], written: Mapping[str, Tensor]) -> float:
    """Read the files as a consumer does and return max |delta' - delta| over all layers.

    Raises:
        ValueError: a layer's update is not the trained one, or another tensor is not what was written.
    """
    settings = json.loads(config.read_text(encoding="utf-8"))
    tensors, _ = read_tensors(weights)
    worst = 0.0
    for layer in layers:
        a, b = (tensors.get(key) for key in tensor_keys(layer))
        rank, scale = consumer_rank_and_scale(settings, layer.target)
        if a is None or b is None:
            a, b = layer.A[:0], layer.B[:, :0]
        elif len(a) != rank * layer.experts:
            raise ValueError(f"layer {layer.key!r}: the file has {len(a)} ranks, its configuration {rank}")
        worst = max(worst, check_update(layer, a, b, scale))
    for key, tensor in written.items():
        found = tensors.get(key)
        if found is None or not bool(torch.isfinite(found).all()) or not torch.equal(found, tensor.detach().cpu()):
            raise ValueError(
                f"tensor {key!r} is not finite, or not in the file as it was written; nothing was replaced"
            )
    return worst


def check_update(layer: Layer, a: Tensor, b: Tensor, scale: float) -> float:
    """Largest difference between the exported and the trained update of one layer.

    Args:
        layer: the trained layer.
        a: exported A as read back.
        b: exported B as read back.
        scale: the factor that a consumer will apply to B A.

    Raises:
        ValueError: if an element differs by more than 1e-6 * max(1, max |delta|) plus, for 16-bit tensors, what
            rounding B to that dtype can explain, or if the update is not finite.
    """
    device, info = layer.A.device, torch.finfo(layer.B.dtype)
    exported = replace(layer, A=a.to(device), B=b.to(device), E=None, scaling=scale)
    unit = 0.5 * info.eps if info.bits <= 16 else 0.0  # relative error of rounding one number of B
    worst, largest, excess = 0.0, 0.0, 0.0
    for (left, right, old), (*_, new) in zip(_parts(layer, layer.live), _parts(exported), strict=True):
        difference = (new - old).abs()
        if not bool(torch.isfinite(difference).all()):  # before any maximum, which would hide a NaN
            raise ValueError(f"layer {layer.key!r}: its update is not finite (in {layer.B.dtype}); nothing was written")
        rounding = (left.abs() * unit + unit * info.smallest_normal) @ right.abs()
        worst, largest = max(worst, float(difference.max())), max(largest, float(old.abs().max()))
        excess = max(excess, float((difference - rounding).max()))
    if excess > TOLERANCE * max(1.0, largest):
        raise ValueError(
            f"layer {layer.key!r}: the exported update differs from the trained one by {worst:.3g} "
            f"(max |delta| {largest:.3g}); nothing was written"
        )
    return worst


def largest_element(layer: Layer, ranks: Tensor) -> float:
    """max |delta| of the given ranks alone."""
    return max(float(update.abs().max()) for _, _, update in _parts(layer, ranks))


def _parts(layer: Layer, ranks: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(left, right, left @ right) of some rows of the update after others."""
    for left, right in layer.blocks(ranks):
        for rows in torch.split(left, max(1, BLOCK // max(1, right.shape[1]))):
            yield rows, right, rows @ right


def consumer_rank_and_scale(config: Mapping[str, Any], target: str) -> tuple[int, float]:
    """(r, alpha / r) that PEFT gives to ``target``: the first pattern that matches the end of its path."""
    rank = _pattern_value(config.get("rank_pattern") or {}, target, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern") or {}, target, config["lora_alpha"])
    return int(rank), alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern_value(patterns: Mapping[str, float], target: str, default: float) -> float:
    matches = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", target))
    return next(matches, patterns.get(target, default))
