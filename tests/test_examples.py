"""The scripts of examples/ run as they are written, each with the real framework, and learn."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true but no accelerator is found",
    "ignore:.gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    "ignore:The '.*_dataloader' does not have many workers",
)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run one script in an empty folder: (its variables, its output)."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before this one
    GradientState._reset_state()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning sets it for good; this takes it back

    def run_example(name: str) -> tuple[dict[str, Any], str]:
        return runpy.run_path(str(EXAMPLES / f"{name}.py")), capsys.readouterr().out

    return run_example


def test_every_example_is_short_and_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in source
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 30


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop"])
def test_loops(name, run):
    losses = [float(line.split()[-1]) for line in run(name)[1].splitlines()]
    assert len(losses) == 8
    assert losses[-1] < 0.1 < losses[0]


def test_trainer(run, tmp_path):
    variables, output = run("trainer")
    history = [entry for entry in variables["trainer"].state.log_history if "loss" in entry]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[0]["ivon/rank/live"] > history[-1]["ivon/rank/live"] == 11 * 2
    assert (tmp_path / "runs" / "trainer" / "adapter" / "adapter_model.safetensors").exists()
    assert variables["report"].max_abs_error < 1e-6
    assert "largest rank" in output


def test_sft(run):
    trainer = run("sft")[0]["trainer"]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1]["mean_token_accuracy"] > history[0]["mean_token_accuracy"] + 0.1
    assert history[-1]["ivon/rank/live"] == 14 * 4
    assert not any(torch.isnan(p).any() for p in trainer.model.parameters())


@pytest.mark.parametrize("name", ["lightning_automatic", "lightning_manual"])
def test_lightning(name, run):
    trainer = run(name)[0]["trainer"]
    assert trainer.callback_metrics["loss"] < 0.1
    assert trainer.global_step == 8 * 8
