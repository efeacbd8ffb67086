"""The compiled kernels have the bits of the eager backend, and no races: see `emulated_gpu`.

What the compiler makes for a GPU is run on an emulated one, in a process of its own, by the tests that run on a real
one where there is one.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version
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
#: a step that scores, and an allocation: on sm_100, where two floats share a register, and on sm_80, whose code is that
#: of sm_90 where Triton 3.7 compiles (`test_triton_compiles`)
ON_OTHERS = "added_up and float32 and True"
OTHERS = ["100"] if version("triton").startswith("3.7.") else ["80", "100"]


def test_compiled_kernels_pass_their_tests() -> None:
    here = Path(__file__).parent
    chosen = " or ".join(f"{file} and ({tests})" for file, tests in CHOSEN.items())
    env = compiler_environment() | {"IVON_LORA_EMULATED_GPU": ",".join(["90", *OTHERS])}
    options = ["-p", "tests.emulated_gpu.plugin", "-p", "no:cacheprovider", "-p", "no:xdist", "-q"]
    others = " or ".join(f"sm_{number} and {ON_OTHERS}" for number in OTHERS)
    options += ["-k", f"sm_90 and ({chosen}) or {others}"]
    command = [sys.executable, "-m", "pytest", *options, *(str(here / file) for file in CHOSEN)]
    done = subprocess.run(command, cwd=here.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 12
