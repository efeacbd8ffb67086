"""The compiled kernels have the bits of the eager backend, and no races: see `emulated_gpu`.

What the compiler makes for a GPU is run on an emulated one, in a process of its own, by the tests that run on a real
one where there is one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from tests.offline_compile import compiler_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("IVON_LORA_EMULATED_GPU" in os.environ, reason="this is the process that is to be started"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which these tests run by themselves"),
]

#: file -> which of its tests to run
CHOSEN = {
    "test_triton_lockstep.py": "every_method and price or pieces or groups",
    "test_triton_ranks.py": "added_up or means_of_ranks and sensitivity or who_stays and values0",
}
#: a step that scores, and an allocation, where two floats share a register; code for sm_80 is that for sm_90
#: (`test_triton_compiles`)
ON_SM_100 = "added_up and float32 and True"


def test_compiled_kernels_pass_their_tests() -> None:
    here = Path(__file__).parent
    chosen = " or ".join(f"{file} and ({tests})" for file, tests in CHOSEN.items())
    env = compiler_environment() | {"IVON_LORA_EMULATED_GPU": "90,100"}
    options = ["-p", "tests.emulated_gpu.plugin", "-p", "no:cacheprovider", "-p", "no:xdist", "-q"]
    options += ["-k", f"sm_90 and ({chosen}) or sm_100 and {ON_SM_100}"]
    command = [sys.executable, "-m", "pytest", *options, *(str(here / file) for file in CHOSEN)]
    done = subprocess.run(command, cwd=here.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 12
