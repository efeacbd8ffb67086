"""The scripts of benchmarks/examples run as they are written, each with the real framework, and learn."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "benchmarks" / "examples"
TRAINERS_OWN = (
    "ignore:'pin_memory' argument is set as true but no accelerator is found",
    "ignore:.gradient_checkpointing. is deprecated:FutureWarning",
)
LIGHTNINGS_OWN = (
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    "ignore:The '.*_dataloader' does not have many workers",
)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run one script in an empty folder: (its variables, its output)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning sets it for good; this takes it back

    def run_example(name: str, *needed: str) -> tuple[dict[str, Any], str]:
        for module in needed:
            pytest.importorskip(module)
        if "accelerate" in needed:
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before this one
            GradientState._reset_state()
        return runpy.run_path(str(EXAMPLES / f"{name}.py")), capsys.readouterr().out

    return run_example


def test_every_example_is_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'run("{path.stem}"' in source for path in EXAMPLES.glob("*.py"))


def falls(output: str) -> bool:
    losses = [float(line.split()[-1]) for line in output.splitlines()]
    return len(losses) == 8 and losses[-1] < 0.1 < losses[0]


def test_plain_loop(run):
    assert falls(run("plain_loop")[1])


def test_accelerate_loop(run):
    assert falls(run("accelerate_loop", "accelerate")[1])


@pytest.mark.filterwarnings(*TRAINERS_OWN)
def test_trainer(run, tmp_path):
    variables, output = run("trainer", "accelerate", "peft", "transformers")
    history = [entry for entry in variables["trainer"].state.log_history if "loss" in entry]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[0]["ivon/rank/live"] > history[-1]["ivon/rank/live"] == 11 * 2
    assert (tmp_path / "runs" / "trainer" / "adapter" / "adapter_model.safetensors").exists()
    assert variables["report"].max_abs_error < 1e-6
    assert "largest rank" in output


@pytest.mark.filterwarnings(*TRAINERS_OWN)
def test_sft(run):
    variables, _ = run("sft", "accelerate", "peft", "transformers", "trl")
    trainer = variables["trainer"]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1]["mean_token_accuracy"] > history[0]["mean_token_accuracy"] + 0.1
    assert history[-1]["ivon/rank/live"] == 14 * 4
    assert not any(torch.isnan(p).any() for p in trainer.model.parameters())


@pytest.mark.filterwarnings(*LIGHTNINGS_OWN)
def test_lightning_automatic(run):
    variables, _ = run("lightning_automatic", "lightning")
    assert variables["trainer"].callback_metrics["loss"] < 0.1
    assert variables["trainer"].global_step == 8 * 8


@pytest.mark.filterwarnings(*LIGHTNINGS_OWN)
def test_lightning_manual(run):
    variables, _ = run("lightning_manual", "lightning")
    assert variables["trainer"].callback_metrics["loss"] < 0.1
    assert variables["trainer"].global_step == 8 * 8
