"""``pytest -p tests.emulated_gpu.plugin``: tests of the kernels on the emulated GPU, tensors on the CPU.

It takes the place of Triton's interpreter. IVON_LORA_EMULATED_GPU chooses the compute capability, times ten (90).
"""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

if "TRITON_INTERPRET" in os.environ:
    raise pytest.UsageError("unset TRITON_INTERPRET: the emulated GPU takes the place of the interpreter")
os.environ.setdefault("IVON_LORA_EMULATED_GPU", "90")  # tests/conftest.py leaves the interpreter off then


@pytest.fixture(autouse=True, scope="session")
def _emulated_gpu() -> Iterator[None]:
    from ivon_lora.kernels import launch, tables
    from tests.emulated_gpu.driver import activate

    real = launch.supports

    def supports(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        emulated = device.type == "cpu" and dtype in tables.DTYPES
        return (True, "the emulated GPU of the tests") if emulated else real(device, dtype)

    activate(int(os.environ["IVON_LORA_EMULATED_GPU"]))
    gc.freeze()  # only objects made from now on are looked through for the tensors of a launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "supports", supports)
        yield
