"""``pytest -p tests.emulated_gpu.plugin``: tests of the kernels on the emulated GPU, tensors on the CPU.

It takes the place of Triton's interpreter. Every test runs once for each compute capability, times ten, that
IVON_LORA_EMULATED_GPU lists (90).
"""

import os

import pytest

if "TRITON_INTERPRET" in os.environ:
    raise pytest.UsageError("unset TRITON_INTERPRET: the emulated GPU takes the place of the interpreter")
os.environ.setdefault("IVON_LORA_EMULATED_GPU", "90")  # tests/conftest.py leaves the interpreter off then
CAPABILITIES = os.environ["IVON_LORA_EMULATED_GPU"].split(",")


@pytest.fixture(autouse=True, scope="session", params=CAPABILITIES, ids="sm_{}".format)
def _emulated_gpu(request: pytest.FixtureRequest) -> None:
    from tests.emulated_gpu.driver import activate

    activate(int(request.param))
