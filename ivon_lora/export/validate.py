"""The one check of everything that an export reads, from a model or from files: what is wrong, and what to do, in a line."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ivon_lora.export.layer import Adapter, Layer

PARTITIONED = (
    "as a run with partitioned parameters (ZeRO-3, FSDP) leaves them: gather them first, e.g. save under "
    "deepspeed.zero.GatheredParameters or summon_full_params"
)


def check_adapter(adapter: Adapter) -> None:
    """Check all tensors of an adapter.

    Raises:
        ValueError: a tensor is missing its values, its numbers, its rank or its shape; one line that says which.
    """
    for layer in adapter.layers:
        check_layer(layer)
    for key, tensor in adapter.extras.items():
        if tensor.is_floating_point() or tensor.is_meta:  # a module that was trained whole may count its batches
            _check_numbers(f"tensor {key!r}", "its value", tensor)
        if tensor.numel() == 0:
            raise ValueError(f"tensor {key!r} is empty, {PARTITIONED}")


def check_layer(layer: Layer) -> None:
    """Raises ValueError as `check_adapter`."""
    where = f"layer {layer.key!r}"
    tensors = {"lora_A": layer.A, "lora_B": layer.B, "lora_E": layer.E}
    tensors |= {"the bias of lora_B": layer.bias, "lora_magnitude_vector": layer.magnitude}
    for name, tensor in tensors.items():
        if tensor is not None:
            if tensor.dim() == 1 and tensor.numel() == 0:
                raise ValueError(f"{where}: {name} is empty, {PARTITIONED}")
            _check_numbers(where, name, tensor)
    if not math.isfinite(layer.scaling):
        raise ValueError(f"{where} has the scale {layer.scaling}: lora_alpha must be a finite number")
    _check_shapes(where, layer)


def _check_numbers(where: str, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(
            f"{where}: {name} is on the meta device (offloaded): load the model without device_map, or bring its weights "
            "in with accelerate.hooks.remove_hook_from_submodules(model)"
        )
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or tensor.layout != torch.strided:
        raise ValueError(f"{where}: {name} is {tensor.layout} of {tensor.dtype}: save the adapter dense in 16 or 32 bits")
    if not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{where} cannot be exported: {name} is not finite ({count} of {tensor.numel()} numbers, in {tensor.dtype}): the "
            "run has diverged or a number is too large for its type"
        )


def _check_shapes(where: str, layer: Layer) -> None:
    a, b, shapes = layer.A, layer.B, f"lora_A {tuple(layer.A.shape)}, lora_B {tuple(layer.B.shape)}"
    flat = a.dim() == b.dim() == 2
    conv = 3 <= a.dim() <= 5 and a.dim() == b.dim() and all(size == 1 for size in b.shape[2:])
    if not (flat or conv):
        raise ValueError(f"{where} is no layer of LoRA: {shapes}; (rank, in) and (out, rank) are, and convolutions")
    rank = a.shape[0]
    if b.shape[1] * layer.groups != rank:
        if flat and a.shape[1] == b.shape[0] <= min(rank, b.shape[1]):
            raise ValueError(f"{where}: the factors are transposed: {shapes}; give (rank, in) and (out, rank)")
        if conv and b.shape[1] and rank % b.shape[1] == 0:
            raise ValueError(
                f"{where} is of a convolution in {rank // b.shape[1]} groups ({shapes}): export it from the model, with "
                "export_lora(model, ...)"
            )
        raise ValueError(f"{where}: the factors have different ranks: {shapes}; save the adapter again")
    if rank and (a.numel() == 0 or b.numel() == 0):
        raise ValueError(f"{where} has an empty factor ({shapes}), {PARTITIONED}")
    if layer.experts > 1 and rank % layer.experts:
        raise ValueError(f"{where}: {rank} ranks cannot be those of {layer.experts} experts; save the adapter again")
    wrong: Iterable[tuple[str, Tensor | None, int]] = (
        ("lora_E", layer.E, rank),
        ("the bias of lora_B", layer.bias, b.shape[0]),
        ("lora_magnitude_vector", layer.magnitude, b.shape[0]),
        ("its rank mask", layer.mask, layer.size),
    )
    for name, tensor, size in wrong:
        if tensor is not None and tensor.numel() != size:
            raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, the layer needs {size} numbers ({shapes})")
