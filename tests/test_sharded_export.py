"""Adapters and posteriors of models that FSDP2 has spread over two processes: the files of whole parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from ivon_lora import IVON, RankPruner, export_lora, find_adapters, load_posterior, merge_lora, save_posterior
from tests import tiny_trainer
from tests.two_processes import WORLD, Pool

pytest.importorskip("peft", reason="needs peft: pip install 'ivon-lora[peft]'")

STEPS = 4


def trained(shard: bool, **overrides: Any) -> tuple[nn.Module, IVON]:
    """A pruned adapter in the middle of a step, from gradients that are a function of step and parameter."""
    model = tiny_trainer.make_model(**overrides)
    if shard:
        for layer in model.base_model.model.bert.encoder.layer:  # type: ignore[union-attr]
            fully_shard(layer)
        fully_shard(model)
    pruner = RankPruner(find_adapters(model), 2, total_steps=STEPS, warmup=1, final=1, interval=1)
    optimizer = tiny_trainer.make_optimizer(model, pruner=pruner)
    optimizer.attach(model)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        optimizer.train()
        for p in [p for p in model.parameters() if p.requires_grad]:
            gradient: Tensor = torch.randn(p.shape, generator=generator)
            placed: Any = p
            p.grad = distribute_tensor(gradient, placed.device_mesh, placed.placements) if shard else gradient
        optimizer.step()
    optimizer.train()  # what is written is the mean all the same
    return model, optimizer


def export(rank: int, folder: str, options: dict[str, Any]) -> list[Any]:
    """Every process names a folder of its own, to see which of them writes."""
    model, optimizer = trained(shard=True, **options)
    path = f"{folder}/{rank}"
    live = optimizer.is_sampled
    report = export_lora(model, optimizer, path, "compact")
    written = save_posterior(optimizer, path)
    try:
        merge_lora(model, optimizer)
    except ValueError as error:
        return [report, written, live, str(error)]
    return [report, written, live, "nothing was raised"]


def refused(rank: int, path: str) -> str:
    model, optimizer = trained(shard=True)
    try:
        export_lora(model, optimizer, path)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True, "bias": "lora_only"}, {"task_type": None, "modules_to_save": ["classifier"]}],
    ids=["lora", "dora", "saved modules"],
)
def test_sharded_export_is_that_of_the_whole(options: dict[str, Any], tmp_path: Path, two_processes: Pool) -> None:
    answers = two_processes(export, str(tmp_path), options)
    model, optimizer = trained(shard=False, **options)
    whole = tmp_path / "whole"
    expected = export_lora(model, optimizer, whole, "compact")
    save_posterior(optimizer, whole)
    assert sum(expected.ranks.values()) == 2 * len(expected.ranks)
    names = sorted(file.name for file in whole.iterdir())
    assert sorted(file.name for file in (tmp_path / "0").iterdir()) == names
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "0" / name).read_bytes() == (whole / name).read_bytes(), name
    ours, others = load_posterior(tmp_path / "0"), load_posterior(whole)  # safetensors shuffles its metadata
    for field in ("names", "places", "seed", "completed_steps"):
        assert getattr(ours, field) == getattr(others, field)
    for field in ("mean", "std", "rank_mask"):
        found, wanted = getattr(ours, field), getattr(others, field)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not (tmp_path / "1").exists()
    for report, written, live, refusal in answers:
        assert report.path == tmp_path / "0"
        assert (report.ranks, report.max_abs_error, report.bytes) == (
            expected.ranks,
            expected.max_abs_error,
            expected.bytes,
        )
        assert written.parent == tmp_path / "0"
        assert live
        assert "merge_lora needs whole parameters" in refusal


def test_an_error_of_the_first_process_is_everybodys(tmp_path: Path, two_processes: Pool) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    assert len(set(two_processes(refused, str(file)))) == 1
    assert "is a file" in two_processes(refused, str(file))[WORLD - 1]
