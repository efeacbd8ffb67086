"""Whole runs of `ivon-lora finetune` on a tiny model: what they write, and that stopping them loses nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ivon_lora.cli.main import main
from ivon_lora.finetune.batches import encode
from ivon_lora.finetune.evaluate import predict_logits
from ivon_lora.finetune.model import load_base, load_tokenizer
from ivon_lora.finetune.runtime import Runtime
from ivon_lora.finetune.tables import load_table
from ivon_lora.posterior.metrics import score_probabilities
from tests.tiny_classifier import make_model, make_rows, write_csv

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `data.csv`."""
    folder = tmp_path_factory.mktemp("inputs")
    make_model(folder / "model")
    write_csv(folder / "data.csv", make_rows())
    return folder


def arguments(inputs: Path, out: Path, *more: str, steps: int = 30) -> list[str]:
    given = ["--model", str(inputs / "model"), "--data", str(inputs / "data.csv"), "--out", str(out)]
    return ["finetune", *given, "--steps", str(steps), "--samples", "2", *more]


def report_of(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "report.json").read_text())
    return loaded


def adapter_tensors(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "adapter" / "adapter_model.safetensors")


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """The part of a report that does not depend on time and place."""
    return {key: value for key, value in report.items() if key not in {"seconds", "settings"}}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")  # for AdaLoRA files
@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        ("ivon", ["--lr", "0.03"]),
        ("ivon", ["--lr", "0.03", "--layers", "lora"]),
        ("ivon", ["--lr", "10", "--recipe", "published"]),
        ("adamw", ["--lr", "0.03"]),
        ("adalora", ["--lr", "0.03"]),
    ],
    ids=["ivon", "ivon-lora", "ivon-published", "adamw", "adalora"],
)
def test_a_run_learns_and_writes_everything(
    optimizer: str, more: list[str], inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = ["--optimizer", optimizer, *more]
    assert main(arguments(inputs, out, *more, steps=60)) == 0
    printed = capsys.readouterr()
    report = report_of(out)

    # learning: the words give the label away, so chance is one half
    assert report["results"][0]["accuracy"] > 0.8
    history = report["history"]
    assert len(history["loss"]) == 60
    assert sum(history["loss"][-10:]) < 0.7 * sum(history["loss"][:10])

    # pruning
    full = 13 * (8 if optimizer == "adamw" else 12)
    final = full if optimizer == "adamw" else 13 * 4
    assert (history["live"][0], history["live"][-1], report["live_ranks"]) == (full, final, final)
    assert sum(report["ranks"].values()) == final
    assert history["budget"][-1] == final

    # what is written
    posterior = ["posterior.safetensors", "snr.png"] if optimizer == "ivon" else []
    expected = ["adapter", "checkpoint", "ranks.png", "reliability.png", "report.json", "training.png", *posterior]
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)
    for picture in [name for name in expected if name.endswith(".png")]:
        assert (out / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert report["settings"]["optimizer"] == optimizer
    assert report["settings"]["seed"] == 0
    assert report["versions"]["torch"] == torch.__version__
    kinds = [(row["set"], row["weights"]) for row in report["results"]]
    assert kinds == [("test", "mean")] + ([("test", "2 samples")] if optimizer == "ivon" else [])
    assert all(0 <= row["ece"] <= 1 and 0 <= row["brier"] <= 1 and row["nll"] > 0 for row in report["results"])
    assert f"{100 * report['results'][0]['accuracy']:.1f} %" in printed.out
    assert "training 60/60" in printed.err
    assert bool(history["snr_steps"]) == (optimizer == "ivon")

    # the adapter, loaded as a user would, predicts what the report says
    from peft import PeftModel

    reloaded = PeftModel.from_pretrained(load_base(str(inputs / "model"), 2), out / "adapter")
    corpus = load_table(inputs / "data.csv")
    data = encode(corpus.test, load_tokenizer(str(inputs / "model")), 48)
    p = predict_logits(reloaded, data, Runtime("cpu", "auto", None)).double().softmax(-1)
    again = score_probabilities(p, torch.tensor(data.labels))
    row = report["results"][0]
    assert again.accuracy == row["accuracy"]
    assert again.nll == pytest.approx(row["nll"], abs=1e-5)

    # the verb that shows a finished run
    assert main(["inspect", str(out)]) == 0
    assert f"ranks kept: {final}" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["ivon", "adamw", "adalora"])
def test_ctrl_c_and_resume_give_the_numbers_of_an_uninterrupted_run(
    optimizer: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops inside annealing (step 17 of 30), where masks, scores, momenta and noise all matter."""
    more = ["--optimizer", optimizer, "--threads", "1"]
    assert main(arguments(inputs, tmp_path / "whole", *more)) == 0

    from ivon_lora.finetune import train

    one_step = train.one_step

    def interrupted_step(*args: Any) -> float:
        if args[3] == 17:
            os.kill(os.getpid(), signal.SIGINT)  # arrives in the middle of the step, which is finished all the same
        return one_step(*args)

    monkeypatch.setattr(train, "one_step", interrupted_step)
    capsys.readouterr()
    assert main(arguments(inputs, tmp_path / "parts", *more)) == 130
    monkeypatch.undo()
    printed = capsys.readouterr()
    assert "interrupted after step 17 of 30" in printed.err
    assert f"ivon-lora finetune --resume --out {tmp_path / 'parts'}" in printed.err
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoint"]

    assert main(["finetune", "--resume", "--out", str(tmp_path / "parts")]) == 0
    whole, parts = adapter_tensors(tmp_path / "whole"), adapter_tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert numbers(report_of(tmp_path / "whole")) == numbers(report_of(tmp_path / "parts"))


def test_a_real_ctrl_c_in_a_real_process(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "ivon_lora", *arguments(inputs, out, "--log-every", "1", steps=5000)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("training 3/"):
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, "".join(lines)
    assert lines[-1].startswith("interrupted after step ")
    assert "Traceback" not in "".join(lines)
    saved = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    assert 3 <= saved["step"] < 5000
    assert list(out.iterdir()) == [out / "checkpoint"]


def test_ctrl_c_during_evaluation_keeps_the_training(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ivon_lora.finetune import evaluate, run

    out = tmp_path / "run"
    real = evaluate.evaluate

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(run, "evaluate", interrupted)
    assert main(arguments(inputs, out)) == 130
    monkeypatch.undo()
    assert "the checkpoint stays" in capsys.readouterr().err
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert len(report_of(out)["history"]["loss"]) == 30


def test_resume_refuses_what_would_change_the_numbers(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(inputs, out, "--optimizer", "adamw", steps=3)) == 0
    capsys.readouterr()
    resume = ["finetune", "--resume", "--out", str(out)]
    for option, value in (("--lr", "0.5"), ("--seed", "3"), ("--optimizer", "ivon")):
        assert main([*resume, option, value]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{option} {value} differs" in error
    assert main([*resume, "--steps", "3", "--eval-limit", "10"]) == 0  # equal values and free ones are fine

    rows = make_rows()
    rows[0] = ("another text", "neg")
    data = write_csv(tmp_path / "data.csv", rows)
    other = tmp_path / "other"
    moved = ["finetune", "--model", str(inputs / "model"), "--data", str(data), "--out", str(other), "--steps", "3"]
    assert main([*moved, "--optimizer", "adamw"]) == 0
    write_csv(data, make_rows())
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out", str(other)]) == 2
    assert "the data is not what the run was started with" in capsys.readouterr().err


def test_a_run_is_replaced_only_when_asked(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(arguments(inputs, out, "--optimizer", "adamw", steps=3)) == 0
    before = (out / "report.json").read_bytes()
    capsys.readouterr()
    assert main(arguments(inputs, out, steps=3)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "report.json").read_bytes() == before
    assert main(arguments(inputs, out, "--optimizer", "adalora", "--overwrite")) == 0
    assert report_of(out)["settings"]["optimizer"] == "adalora"
    assert (out / "notes.txt").read_text() == "mine"


def test_more_than_two_classes(inputs: Path, tmp_path: Path) -> None:
    rows = [(text, label if i % 3 else "none") for i, (text, label) in enumerate(make_rows())]
    data = write_csv(tmp_path / "data.csv", rows)
    out = tmp_path / "run"
    assert (
        main(["finetune", "--model", str(inputs / "model"), "--data", str(data), "--out", str(out), "--steps", "10"])
        == 0
    )
    assert report_of(out)["data"]["labels"] == ["neg", "none", "pos"]
    assert len(report_of(out)["results"]) == 2


def test_a_diverged_run_is_one_line_and_status_1(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(inputs, tmp_path / "run", "--optimizer", "adamw", "--lr", "1e30")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ivon-lora: error: the loss is nan in step ")
    assert "lower --lr (now 1e+30)" in last


def test_a_decoder_without_a_padding_token(inputs: Path, tmp_path: Path) -> None:
    """GPT-2: fused Conv1D layers, a head called score, and the last token counts."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    model = tmp_path / "gpt2"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(inputs / "model" / "tokenizer.json"), eos_token="[SEP]")
    tokenizer.save_pretrained(model)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2ForSequenceClassification(config).save_pretrained(model)
    given = ["--model", str(model), "--data", str(inputs / "data.csv"), "--out", str(tmp_path / "run")]
    assert main(["finetune", *given, "--steps", "10", "--samples", "2"]) == 0
    report = report_of(tmp_path / "run")
    assert sorted({name.split(".", 2)[2] for name in report["ranks"]}) == [
        "0.attn.c_attn", "0.attn.c_proj", "0.mlp.c_fc", "0.mlp.c_proj",
        "1.attn.c_attn", "1.attn.c_proj", "1.mlp.c_fc", "1.mlp.c_proj",
    ]  # fmt: skip
    assert any("score" in name for name in adapter_tensors(tmp_path / "run"))
