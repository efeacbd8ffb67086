"""Variants in the Hugging Face Trainer, which needs one more line and no other change."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ivon_lora import VAdam, export_lora
from ivon_lora.variants import METHODS, Variant
from tests import tiny_trainer
from tests.variant_problem import make_variant

pytest.importorskip("transformers")


def make_trainer(folder: Path, method: str, optimizer: str) -> tuple[Any, Variant]:
    """Six steps of two micro-batches, a checkpoint after the fourth, evaluations between."""
    model = tiny_trainer.make_model()
    variant = make_variant(method, model, 6)
    groups = variant.param_groups()
    made: Any = torch.optim.AdamW(groups, lr=0.01) if optimizer == "adamw" else VAdam(groups, lr=0.01, num_examples=24)
    if optimizer == "vadam":
        made.attach(model)
    variant.attach(made)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    return tiny_trainer.make_trainer(folder, model, made, **options), variant


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_run_resumes_from_the_trainers_checkpoint_and_is_exported(method: str, tmp_path: Path) -> None:
    optimizer = "vadam" if method in ("rm-lora", "beamlora") else "adamw"
    whole, variant = make_trainer(tmp_path / "run", method, optimizer)
    whole.train()
    assert variant.step == 6
    resumed, again = make_trainer(tmp_path / "again", method, optimizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert again.step == 6
    expected = dict(whole.model.named_parameters())
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, expected[name]), name
    loss = whole.evaluate()["eval_loss"]
    variant.detach()
    assert whole.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-6)
    export_lora(whole.model, variant.optimizer, tmp_path / "exported")
