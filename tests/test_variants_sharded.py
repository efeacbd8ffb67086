"""Methods on parameters that FSDP2 has sharded over two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.two_processes import Pool
from tests.variant_problem import ROWS, base, loss_of, make_data, start

#: options under which all of a method happens in nine steps
OPTIONS: dict[str, dict[str, Any]] = {
    "beamlora": {"interval": 3, "top_p": 0.6, "until": 9},
    "cola": {},
    "diffora": {"search": 4},
    "flat-lora": {"rho": 0.5, "replicas": "own"},
    "lora-pro": {},
    "rm-lora": {"orthogonality": 0.1},
    "sora": {"strength": 0.1, "final": 0.4, "init": "normal"},
    "xgblora": {"booster_steps": 3},
}


def shard(model: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.base_model.model.layers, model):
        fully_shard(part, mesh=mesh)


def train(rank: int, method: str, optimizer: str, is_sharded: bool, path: str) -> dict[str, Tensor]:
    """Nine steps, each process on half of the rows; outputs before and after `detach`, and the base weights."""
    from ivon_lora import export_lora

    run = start(method, optimizer, steps=9, prepare=shard if is_sharded else lambda model: None, **OPTIONS[method])
    if method == "flat-lora":
        assert all(x.A is y.A for x, y in zip(run.variant.layers, run.variant.adapters, strict=True))
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2) if is_sharded else slice(None)
    for _ in range(9):
        run.optimizer.zero_grad()
        loss_of(run.model, rows).backward()
        run.optimizer.step()
    found = {"in training": run.logits()}
    run.variant.detach()
    found["detached"] = run.logits()
    export_lora(run.model, run.optimizer, path)
    weights = [layer.base_layer.weight.detach() for layer in run.model.base_model.model.layers]
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
