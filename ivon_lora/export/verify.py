"""Proof that an exported adapter is the trained one: the files are read back and both updates are multiplied out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ivon_lora.export.layout import WEIGHTS_FILE
from ivon_lora.export.read_saved import adapter_of
from ivon_lora.lora.config import CONFIG_FILE
from ivon_lora.lora.layer import LoraLayer
from ivon_lora.lora.names import ONCE
from ivon_lora.posterior.tensor_file import read_tensors

TOLERANCE = 1e-6


def verify(folder: Path, layers: Sequence[LoraLayer], files: Mapping[str, Mapping[str, Tensor]]) -> float:
    """Read the files of tensors as a consumer does and return max |delta' - delta| over all layers.

    Raises:
        ValueError: a layer's update is not the trained one, or another tensor is not what was written.
    """
    read = {name: read_tensors(folder / name)[0] for name in files}
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    exported = {layer.key: layer for layer in adapter_of(config, read[WEIGHTS_FILE], prefix=ONCE).layers}
    for name, written in files.items():
        for key, tensor in written.items():
            if key not in read[name] or not torch.equal(read[name][key], tensor.detach().cpu()):  # NaN equals nothing
                fault = "is not finite, or not in the file as it was written"
                raise ValueError(f"tensor {key!r} {fault}; nothing was replaced")
    nothing = (replace(layer, A=layer.A[:0], B=layer.B[:, :0], E=None) for layer in layers)
    return max(check_update(layer, exported.get(layer.key, zero)) for layer, zero in zip(layers, nothing, strict=True))


def check_update(layer: LoraLayer, exported: LoraLayer) -> float:
    """Largest difference between the exported and the trained update of one layer.

    Raises:
        ValueError: if an element differs by more than 1e-6 * max(1, max |delta|) plus, for 16-bit tensors, what
            rounding B to that dtype can explain, or if the update is not finite.
    """
    device, info = layer.A.device, torch.finfo(layer.B.dtype)
    exported = replace(exported, A=exported.A.to(device), B=exported.B.to(device))
    unit = 0.5 * info.eps if info.bits <= 16 else 0.0  # relative error of rounding one number of B
    worst, largest, excess = 0.0, 0.0, 0.0
    for (left, right, old), (*_, new) in zip(layer.updates(), exported.updates(), strict=True):
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
