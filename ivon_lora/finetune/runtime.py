"""Where and how precisely to compute: device, threads, autocast, and the seed of each step."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import torch

from ivon_lora.finetune.errors import InputError

__all__ = ["Runtime", "step_seed"]


class Runtime:
    """The device and precision of a run.

    Args:
        device: cpu, cuda, or auto (cuda where there is one).
        precision: fp32, bf16 (autocast of forward passes; parameters stay fp32), or auto: bf16 where the device
            multiplies it natively, else fp32.
        threads: of torch on the CPU; None leaves torch's choice.

    Raises:
        InputError: if cuda is asked for and absent.
    """

    def __init__(self, device: str, precision: str, threads: int | None) -> None:
        has_cuda = torch.cuda.is_available()
        if device == "cuda" and not has_cuda:
            raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device("cuda" if device != "cpu" and has_cuda else "cpu")
        self.bf16 = precision == "bf16" or (precision == "auto" and has_native_bf16(self.device))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of every forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        precision = "bf16 autocast" if self.bf16 else "fp32"
        return {"device": self.device.type, "precision": precision, "threads": torch.get_num_threads()}


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are fast; on a CPU without the instructions they are ten times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


def step_seed(seed: int, step: int) -> int:
    """Seed of torch's generator (dropout) for one step: no history, so a resumed run drops the same units."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:6], "big")
