"""A real DeepSpeed engine on the CPU: stage 0 trains as a plain loop does, ZeRO is refused, and the peer fails there.

DeepSpeed is in no extra, because it builds itself when it is installed: ``DS_BUILD_OPS=0 pip install deepspeed``, and
these tests run.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: DS_BUILD_OPS=0 pip install deepspeed"
    ),
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft: pip install 'ivon-lora[peft]'"),
]

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.deepspeed_runs"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_stage_0_equals_the_plain_loop(runs: dict[str, Any]) -> None:
    assert runs["ivon"][0] == runs["plain"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused_with_what_to_use_instead(runs: dict[str, Any], stage: int) -> None:
    error = runs["ivon"][stage]
    assert error.startswith(
        "RuntimeError: DeepSpeed has replaced the optimizer's parameters by flat partitions of them"
    )
    assert "use FSDP2, torch.distributed.fsdp.fully_shard(model)" in error
    assert "or ZeRO stage 0" in error


def test_parameters_partitioned_before_are_refused(runs: dict[str, Any]) -> None:
    error = runs["created after"]
    assert error.startswith("ValueError: parameter 0.weight is partitioned by DeepSpeed's ZeRO stage 3: use FSDP2")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adaloras_allocator_finds_no_gradients(runs: dict[str, Any], stage: int) -> None:
    """PEFT asks DeepSpeed for them only where transformers has set DeepSpeed up."""
    assert runs["adalora"][0] == "nothing was raised"
    assert runs["adalora"][stage].startswith("TypeError: unsupported operand")
