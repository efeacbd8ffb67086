"""How kernels are launched, and where they can be."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from ivon_lora.kernels import tiles

#: compute capability of the oldest NVIDIA GPUs that Triton supports
OLDEST = (8, 0)


@dataclass(frozen=True)
class LaunchConfig:
    """How kernels are launched; results do not depend on it.

    Attributes:
        tile: elements per program, a power of two from 128 to 2^15. 512 is one 16-byte vector per thread of four warps
            of 32 threads.
        num_warps: warps per program.
    """

    tile: int = 512
    num_warps: int = 4

    def __post_init__(self) -> None:
        low, high = tiles.LANES.value, tiles.LARGEST.value
        if not low <= self.tile <= high or self.tile & (self.tile - 1):
            raise ValueError(f"tile must be a power of two from {low} to {high}, got {self.tile}")
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"num_warps must be a power of two from 1 to 32, got {self.num_warps}")

    @classmethod
    def of(cls, device: torch.device) -> LaunchConfig:
        """What suits a device: one 16-byte vector per thread and array."""
        if device.type != "cuda":
            return cls()
        return cls(tile=4 * cls.num_warps * getattr(torch.cuda.get_device_properties(device), "warp_size", 32))


class Flags(NamedTuple):
    """What is known when a kernel over tiles is compiled; each of them reads what concerns it.

    TILE: elements of a tile.  DTYPE, GRAD_DTYPE: of the parameters and their gradients.  CURVATURE: as in `Hyper`.
    UPDATES_HESS: a curvature can be had; else the Hessian stays.  BANKED: there are sums over earlier samples.
    MASKED: some tensor has a rank mask.  SENSITIVITY: some tensor has the running means of that criterion.  CRITERION:
    of the scores that add up, "" for none.
    """

    TILE: int
    DTYPE: str = "fp32"
    GRAD_DTYPE: str = "fp32"
    CURVATURE: str = "price"
    UPDATES_HESS: bool = True
    BANKED: bool = False
    MASKED: bool = False
    SENSITIVITY: bool = False
    CRITERION: str = ""


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, **constants: Any) -> None:
    """Launch a kernel on the device of its first argument, unless the grid is empty."""
    if 0 in grid:
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)


def supports(device: torch.device) -> tuple[bool, str]:
    """Whether the kernels can run on tensors of a device, and why (not)."""
    interpreted = isinstance(tiles.locate, InterpretedFunction)
    if device.type == "cpu":
        if interpreted:
            return True, "TRITON_INTERPRET=1 runs the kernels in Triton's interpreter (slow: for tests)"
        return False, "Triton needs a GPU (or, for tests, TRITON_INTERPRET=1 set before triton is first imported)"
    if device.type == "cuda":
        if interpreted:
            return False, "TRITON_INTERPRET=1 is set: unset it to run the kernels on the GPU"
        return gpu_supports(device)
    return False, f"Triton has no support for tensors on {device.type!r}"


def gpu_supports(device: torch.device) -> tuple[bool, str]:
    """Whether Triton can run on a GPU, and why (not): old ones it does not know, and it needs a C compiler."""
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            needed, found = (".".join(map(str, version)) for version in (OLDEST, capability))
            return False, f"Triton needs compute capability {needed} or more, and {device} has {found}"
    try:
        driver.active.get_current_target()  # starts it, which it else does at the first launch
    except Exception as error:  # whatever it meets: no compiler, no library, a cache that cannot be written
        return False, f"Triton's driver does not start ({type(error).__name__}: {error})"
    return True, f"{'ROCm' if torch.version.hip else 'CUDA'} tensors"
