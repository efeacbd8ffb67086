"""Methods on parameters that FSDP2 has sharded over two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ivon_lora.variants import METHODS
from tests.two_processes import Pool
from tests.variant_problem import ROWS, Run, base, loss_of, make_data, make_model, make_optimizer

OPTIONS: dict[str, dict[str, Any]] = {
    "beamlora": {"total_steps": 9, "interval": 3, "top_p": 0.6, "until": 9},
    "cola": {"total_steps": 9},
    "diffora": {"total_steps": 9, "search": 4},
    "flat-lora": {"total_steps": 9, "rho": 0.5},
    "lora-pro": {},
    "rm-lora": {"orthogonality": 0.1},
    "sora": {"total_steps": 9, "strength": 0.1, "final": 0.4},
    "xgblora": {"booster_steps": 3, "layers": 0.5},
}


def train(rank: int, method: str, optimizer: str, is_sharded: bool, path: str) -> dict[str, Tensor]:
    """Nine steps, each process on half of the rows; outputs before and after `detach`, and the base weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from ivon_lora import export_lora

    model = make_model()
    variant = METHODS[method](model, **OPTIONS[method])
    if is_sharded:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.base_model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    made = make_optimizer(optimizer, variant.param_groups(), 0.02, model)
    run = Run(model, variant.attach(made), made)
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2) if is_sharded else slice(None)
    for _ in range(9):
        made.zero_grad()
        loss_of(model, rows).backward()
        made.step()
    found = {"in training": run.logits()}
    variant.detach()
    found["detached"] = run.logits()
    export_lora(model, made, path)
    weights = [layer.base_layer.weight.detach() for layer in model.base_model.model.layers]
    found["base"] = torch.stack([w.full_tensor() if is_sharded else w for w in weights])
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "vadam"])
@pytest.mark.parametrize("method", list(OPTIONS))
def test_it_is_the_run_of_one_process(method: str, optimizer: str, two_processes: Pool, tmp_path: Path) -> None:
    from peft import PeftModel

    first, second = two_processes(train, method, optimizer, True, str(tmp_path / "sharded"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(first["base"], torch.stack([p.detach() for p in base().parameters() if p.dim() == 2]))
    if method != "flat-lora":  # whose replicas draw noise of their own
        torch.testing.assert_close(first, train(0, method, optimizer, False, str(tmp_path / "whole")))
    torch.testing.assert_close(first["detached"], first["in training"])
    consumer = PeftModel.from_pretrained(base(), str(tmp_path / "sharded")).eval()
    torch.testing.assert_close(consumer(make_data()[0]).detach(), first["in training"], atol=1e-5, rtol=1e-5)
