"""A real DeepSpeed engine on the CPU: stage 0 trains as a plain loop does, ZeRO is refused.

DeepSpeed is in no extra, because it builds itself when it is installed: ``DS_BUILD_OPS=0 pip install deepspeed``, and
these tests run, in a process of their own: it changes torch for all that comes after.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ivon_lora import IVON

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: DS_BUILD_OPS=0 pip install deepspeed"
)
ROOT = Path(__file__).resolve().parents[1]
#: the smallest configuration that takes somebody else's optimizer
CONFIG = {"train_batch_size": 8, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def trained(stage: int | None) -> Any:
    """Weights after three steps, or the error; None: without DeepSpeed."""
    import deepspeed

    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    optimizer: Any = IVON(model.named_parameters(), lr=0.1, ess=50.0, beta2=0.9, weight_decay=1e-3)
    optimizer.attach(model)
    config = {**CONFIG, "zero_optimization": {"stage": stage}}
    try:
        called, end = model, optimizer
        if stage is not None:
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
            called = end = engine
        for _ in range(3):
            loss = nn.functional.mse_loss(called(x), y)
            loss.backward() if stage is None else end.backward(loss)
            end.step()
            optimizer.zero_grad()
        return [p.detach().reshape(-1).tolist() for p in model.parameters()]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def partitioned_before() -> str:
    """The error of an IVON that is given parameters which ZeRO 3 has partitioned already."""
    import deepspeed

    try:
        with deepspeed.zero.Init(config_dict_or_path={**CONFIG, "zero_optimization": {"stage": 3}}):
            model = nn.Linear(6, 5)
        IVON(model.named_parameters(), lr=0.1, ess=50.0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main() -> None:
    import deepspeed
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes, and not used
    store = tempfile.mktemp(prefix="store-")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    found = [trained(stage) for stage in (None, 0, 1, 2, 3)]
    print("\n" + json.dumps([*found, partitioned_before()]))


def test_stage_0_equals_the_plain_loop_and_zero_is_refused_with_what_to_use_instead() -> None:
    told = {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from tests.test_deepspeed import main; main()"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **told}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    plain, stage_0, *errors, partitioned = json.loads(done.stdout.splitlines()[-1])
    assert stage_0 == plain
    for error in errors:
        assert error.startswith("RuntimeError: DeepSpeed has replaced the optimizer's parameters by flat partitions")
        assert "use FSDP2, torch.distributed.fsdp.fully_shard(model)" in error
    assert partitioned.startswith("ValueError: parameter weight is partitioned by DeepSpeed's ZeRO stage 3: use FSDP2")
