"""Runs of a real DeepSpeed engine on the CPU, in a process of their own: it changes torch for all that comes after.

``python -m tests.deepspeed_runs`` prints one JSON object: what became of IVON, and of PEFT's AdaLoRA, under ZeRO
stages 0 to 3.
"""

import json
import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora import IVON

STEPS = 3
#: the smallest configuration that takes somebody else's optimizer
CONFIG = {"train_batch_size": 8, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def make_optimizer(model: nn.Module) -> IVON:
    optimizer = IVON(model.named_parameters(), lr=0.1, ess=50.0, beta2=0.9, weight_decay=1e-3)
    optimizer.attach(model)
    return optimizer


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> Any:
    import deepspeed

    config = {**CONFIG, "zero_optimization": {"stage": stage}}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def weights(model: nn.Module) -> list[list[float]]:
    return [p.detach().reshape(-1).tolist() for p in model.parameters()]


def plain_loop() -> list[list[float]]:
    model = make_model()
    optimizer = make_optimizer(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), Y).backward()
        optimizer.step()
    return weights(model)


def trained(stage: int) -> Any:
    """Weights after some steps, or the error."""
    try:
        model = make_model()
        engine = engine_of(model, make_optimizer(model), stage)
        for _ in range(STEPS):
            engine.backward(nn.functional.mse_loss(engine(X), Y))
            engine.step()
        return weights(model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def created_after() -> str:
    """The error of an IVON that is given parameters which ZeRO 3 has partitioned already."""
    import deepspeed

    try:
        with deepspeed.zero.Init(config_dict_or_path={**CONFIG, "zero_optimization": {"stage": 3}}):
            model = make_model()
        make_optimizer(model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def adalora(stage: int) -> str:
    """What AdaLoRA's allocator says after a backward pass of the engine."""
    import peft

    try:
        config = peft.AdaLoraConfig(init_r=4, target_r=1, tinit=0, tfinal=1, total_step=4, target_modules=["0", "2"])
        model: Any = peft.get_peft_model(make_model(), config)
        engine = engine_of(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), stage)
        loss: Tensor = nn.functional.mse_loss(engine(X), Y)
        engine.backward(loss)
        model.base_model.update_and_allocate(1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main() -> None:
    import deepspeed
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes, and not used
    store = tempfile.mktemp(prefix="store-")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    found = {
        "plain": plain_loop(),
        "ivon": [trained(stage) for stage in range(4)],
        "created after": created_after(),
        "adalora": [adalora(stage) for stage in range(4)],
    }
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    main()
