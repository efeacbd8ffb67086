"""Triton's runtime, launching on the emulated GPU: a driver of one device, whose pointers are those of CPU tensors."""

from __future__ import annotations

import gc
import hashlib
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from tests.emulated_gpu.machine import Launch
from tests.emulated_gpu.ptx import Module, parse


class EmulatedDriver(DriverBase):
    """The driver.

    Args:
        capability: compute capability of the GPU, times ten.
    """

    def __init__(self, capability: int = 90) -> None:
        self.capability = capability
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
        )

    def _load(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[None, Module, int, int, int]:
        return None, parse(kernel.decode()), 0, 0, 1024  # module, function, registers, spills, most threads

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches one specialisation of a kernel."""
        taken = [kind != "constexpr" for kind in source.signature.values()]

        def launch(x: int, y: int, z: int, stream: int, module: Module, *rest: Any) -> None:
            assert z == 1
            arguments = [a for a, is_taken in zip(rest[4:], taken, strict=True) if is_taken]
            numbers = [a.data_ptr() if isinstance(a, torch.Tensor) else int(a) for a in arguments]
            numbers += [0] * (len(module.parameters) - len(numbers))  # scratch memory, which our kernels do not have
            Launch(module, x, y, numbers, metadata.shared).run()

        return launch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # so that Triton, which keeps its kernels by device, compiles for each

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError(ty)

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("an emulator has no times")


def activate(capability: int = 90) -> EmulatedDriver:
    """Make Triton launch here, and `ivon_lora.kernels` take tensors on the CPU for tensors there, from now on.

    The assembler is left out, which nobody reads. Tensors of a launch must be made after this call.
    """
    from ivon_lora.kernels import launch, runtime

    real = runtime.supports

    def supports(device: torch.device) -> tuple[bool, str]:
        return (True, "the emulated GPU of the tests") if device.type == "cpu" else real(device)

    runtime.supports = supports
    vars(launch)["supports"] = supports
    emulated = EmulatedDriver(capability)
    driver.set_active(emulated)
    knobs.runtime.add_stages_inspection_hook = _without_assembler
    gc.freeze()  # `Memory` looks through the objects made after this
    return emulated


def _without_assembler(backend: Any = None, stages: dict[str, Any] | None = None, *_: Any) -> tuple[str, str] | None:
    """Triton's hook: called without arguments it says what the cache must tell apart."""
    if stages is None:
        return _without_assembler.__name__, hashlib.sha256(__file__.encode()).hexdigest()
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None
