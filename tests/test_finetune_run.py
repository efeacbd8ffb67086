"""Whole runs of `ivon-lora finetune` on a tiny model: what they write, and that stopping them loses nothing."""

import io
import json
import os
import re
import shutil
import signal
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from ivon_lora import load_posterior, score_probabilities
from ivon_lora.cli.finetune.data import load_texts
from ivon_lora.cli.finetune.model import load_base, load_tokenizer
from ivon_lora.cli.main import main
from tests.tiny_classifier import make_model, make_rows, write_csv

pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with `model` and `data.csv`."""
    folder = tmp_path_factory.mktemp("inputs")
    make_model(folder / "model")
    write_csv(folder / "data.csv", make_rows())
    return folder


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """One test draws them; in the others they would be half of the time."""
    if "learns" not in request.node.name:
        monkeypatch.setattr("ivon_lora.cli.training.draw_pictures", lambda *_: None)


def arguments(inputs, out, *more, steps=30):
    given = ["--model", str(inputs / "model"), "--data", str(inputs / "data.csv"), "--out", str(out)]
    return ["finetune", *given, "--steps", str(steps), "--samples", "2", "--precision", "fp32", *more]


def report_of(out):
    return json.loads((out / "report.json").read_text())


def same_results(one, other):
    """Adapter and posterior bit by bit, and the numbers of the report."""
    for file in ("adapter/adapter_model.safetensors", "posterior.safetensors"):
        if (one / file).exists():
            first, second = load_file(one / file), load_file(other / file)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first)
    kept = ("results", "ranks", "history", "optimizer_metrics", "data")
    first, second = ({key: report_of(out)[key] for key in kept} for out in (one, other))
    assert first == second


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run that nobody stopped, with every step in its log."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(inputs, out, "--log-every", "1")) == 0
    return out


class InterruptedAt(io.StringIO):
    """A stderr that gets Ctrl-C when a text is written to it."""

    def write(self, text):
        if "training 19/" in text:
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


@pytest.mark.parametrize(
    ("method", "optimizer", "more", "rank"),
    [
        ("adalora", "ivon", ["--lr", "0.03"], 4),
        ("lora", "ivon", ["--lr", "0.03"], 4),
        ("adalora", "ivon", ["--lr", "10", "--recipe", "published"], 4),
        ("adalora", "adamw", ["--lr", "0.03"], 4),
        ("lora", "adamw", ["--lr", "0.01"], 8),
        ("cola", "adamw", ["--lr", "0.01", "--option", "links=2"], 16),
        ("beamlora", "ivon", ["--lr", "0.01", "--option", "parents=now"], 8),
    ],
    ids=["ivon", "ivon-lora", "ivon-published", "adalora", "adamw", "cola", "beamlora"],
)
def test_a_run_learns_and_writes_everything(method, optimizer, more, rank, inputs, tmp_path, capsys):
    out = tmp_path / "run"
    chosen = ["--method", method, "--optimizer", optimizer, *more]
    assert main(arguments(inputs, out, *chosen, steps=60)) == 0
    printed = capsys.readouterr()
    report = report_of(out)

    # learning: the words give the label away, so chance is one half
    assert report["results"][0]["accuracy"] > 0.8
    history = report["history"]
    assert history["step"] == [10, 20, 30, 40, 50, 60]
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    assert ("snr_p50" in history) == (optimizer == "ivon")

    # pruning
    final = 13 * rank
    assert report["live_ranks"] == sum(report["ranks"].values()) == final
    if rank == 4:
        assert history["live"][0] > history["live"][-1] == history["budget"][-1] == final

    # what is written
    files = {"adapter", "ranks.png", "reliability.png", "report.json", "settings.json", "training.png"}
    files |= {"predictions.safetensors"}
    files |= {"posterior.safetensors", "snr.png"} if optimizer == "ivon" else set()
    files |= {"checkpoint-50", "checkpoint-60"} if (method, optimizer) != ("adalora", "adamw") else set()
    assert {path.name for path in out.iterdir()} == files
    assert (report["settings"]["optimizer"], report["settings"]["method"]) == (optimizer, method)
    assert bool(report["events"]) == (method in ("cola", "beamlora"))
    assert report["versions"]["torch"] == torch.__version__
    kinds = [(row["set"], row["weights"]) for row in report["results"]]
    assert kinds == [("test", kind) for kind in ("mean", "mean + TS", "2 samples")[: 3 if optimizer == "ivon" else 1]]
    assert f"{100 * report['results'][0]['accuracy']:.1f} %" in printed.out
    assert printed.err.splitlines()[-1].startswith("training 60/60  loss ")

    # the adapter, loaded as a user would, predicts what the report says
    base = load_base(str(inputs / "model"), 2)
    tokenizer = load_tokenizer(str(inputs / "model"), base)
    model = PeftModel.from_pretrained(base, out / "adapter").eval()
    texts = load_texts(str(inputs / "data.csv")).splits["test"]
    with torch.no_grad():
        logits = model(**tokenizer(texts["text"].tolist(), padding=True, return_tensors="pt")).logits
    temperatures = [1.0]  # too few validation texts: that of "mean + TS" is from the posterior
    if optimizer == "ivon":
        temperatures.append(load_posterior(out / "posterior.safetensors").softmax_temperature)
        assert temperatures[1] == pytest.approx(report["softmax_temperature"]) != 1.0
    for temperature, row in zip(temperatures, report["results"], strict=False):
        p = (logits.double() / temperature).softmax(-1)
        again = score_probabilities(p, torch.tensor(texts["label"].tolist()))
        assert again.accuracy == row["accuracy"]
        assert again.nll == pytest.approx(row["nll"], abs=1e-5)


def test_progress_is_one_live_line_in_a_terminal(inputs, tmp_path, monkeypatch, capsys):
    """Written again and again, with carriage returns; the report on stdout stays clean. Elsewhere: the tests around."""
    reading, writing = os.openpty()
    with open(writing, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        assert main(arguments(inputs, tmp_path / "run")) == 0
        terminal.flush()
        screen = os.read(reading, 1 << 16).decode()
    os.close(reading)
    *warned, line = screen.removesuffix("\r\n").split("\r\n")
    assert len(warned) <= 1  # that noise is the prior's: above the line
    written = line.strip("\r").split("\r")
    assert len(written) > 3
    assert all(re.fullmatch(r"training \d+/30 \|.*\| .* left *", text) for text in written)
    assert re.search(r"^training 30/30 .*\| loss \d\.\d{4}  lr \d\.\d\de-\d\d  ranks 52  00:00 left", written[-1])
    assert "\r" not in (printed := capsys.readouterr().out)
    assert "ranks kept" in printed


def test_a_stopped_run_resumes_with_the_numbers_of_an_uninterrupted_one(inputs, whole, tmp_path, monkeypatch, capsys):
    """By Ctrl-C, while ranks are pruned: masks, momenta, noise, order and dropout all matter.

    What kill -9 leaves is a checkpoint without the file that the Trainer writes last: the one before it serves.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    monkeypatch.setattr(sys, "stderr", stderr := InterruptedAt())
    out = tmp_path / "run"
    assert main(arguments(inputs, out, "--log-every", "1", "--save-every", "9")) == 130
    monkeypatch.undo()
    message = "interrupted after step 19 of 30: go on from the last checkpoint with `ivon-lora finetune"
    assert message in stderr.getvalue()
    assert {path.name for path in out.iterdir()} == {"checkpoint-9", "checkpoint-18", "settings.json"}
    (out / "checkpoint-18" / "trainer_state.json").unlink()

    assert main(arguments(inputs, out)) == 2  # not by accident
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main(["finetune", "--resume", "--out", str(out), "--lr", "0.5"]) == 2
    assert "--lr is the run's own" in capsys.readouterr().err
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    same_results(whole, out)


def test_a_run_of_a_variant_resumes_with_the_same_numbers(inputs, tmp_path):
    """From the middle of DiffoRA's search."""
    chosen = ["--method", "diffora", "--option", "search=0.8", "--save-every", "20"]
    assert main(arguments(inputs, tmp_path / "whole", *chosen)) == 0
    for kept in ("checkpoint-20", "settings.json"):
        copy = shutil.copytree if kept.startswith("checkpoint") else shutil.copy
        (tmp_path / "run").mkdir(exist_ok=True)
        copy(tmp_path / "whole" / kept, tmp_path / "run" / kept)
    assert main(["finetune", "--resume", "--out", str(tmp_path / "run")]) == 0
    same_results(tmp_path / "whole", tmp_path / "run")
    assert report_of(tmp_path / "run")["events"]


def test_ctrl_c_during_evaluation_keeps_the_training(inputs, whole, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer.predict", stop)
    assert main(arguments(inputs, tmp_path, "--save-every", "20", "--log-every", "1")) == 130
    monkeypatch.undo()
    assert main(["finetune", "--resume", "--out", str(tmp_path)]) == 0
    same_results(whole, tmp_path)


@pytest.mark.parametrize("file", ["optimizer.pt", "adapter_model.safetensors", "scheduler.pt", "settings.json"])
def test_a_damaged_checkpoint_is_one_line(file, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "checkpoint-30").rename(out / "checkpoint-20")
    state = out / "checkpoint-20" / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 30', '"global_step": 20'))
    path = out / file if file == "settings.json" else out / "checkpoint-20" / file
    sound = path.read_bytes()
    for content in (b"", b"junk", sound[: len(sound) // 2]):
        path.write_bytes(content)
        capsys.readouterr()
        assert main(["finetune", "--resume", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "start again with --overwrite" in error


def test_a_run_is_replaced_only_when_asked_and_resumed_only_with_its_data(inputs, tmp_path, capsys):
    out, data = tmp_path / "run", shutil.copy(inputs / "data.csv", tmp_path / "data.csv")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    command = arguments(inputs, out, "--data", str(data), "--optimizer", "adamw", steps=3)
    assert main(command) == 0
    before = (out / "report.json").read_bytes()
    write_csv(data, [("another text", "neg"), *make_rows()[1:]])
    for again, message in ((command, "--overwrite"), (["finetune", "--resume", "--out", str(out)], "the data is not")):
        assert main(again) == 2
        assert message in capsys.readouterr().err
    assert (out / "report.json").read_bytes() == before
    adalora = ("--optimizer", "adamw", "--method", "adalora")
    assert main(arguments(inputs, out, *adalora, "--overwrite", steps=10)) == 0
    assert report_of(out)["settings"]["method"] == "adalora"
    assert not list(out.glob("checkpoint-*"))
    assert (out / "notes.txt").read_text() == "mine"
    assert main(["finetune", "--resume", "--out", str(out)]) == 2
    assert "PEFT's AdaLoRA cannot be resumed" in capsys.readouterr().err


def test_several_runs_are_one_prediction(inputs, tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", [(f"{text} {i}", label) for i in range(3) for text, label in make_rows()])
    command = arguments(inputs, tmp_path / "run", "--data", str(data), "--runs", "2", steps=10)
    assert main(command) == 0
    printed = capsys.readouterr().out
    folders = [tmp_path / "run" / f"seed{k}" for k in range(2)]
    report, single = report_of(tmp_path / "run"), [report_of(folder) for folder in folders]
    assert [one["settings"]["seed"] for one in single] == [0, 1]
    assert single[0]["data"]["validation"] >= 50
    kept = [load_file(folder / "predictions.safetensors") for folder in folders]
    want = score_probabilities((kept[0]["test"] + kept[1]["test"]) / 2, kept[0]["test.labels"])
    assert report["results"][-1]["weights"] == "mixture of 2 runs"
    assert report["results"][-1]["nll"] == pytest.approx(want.nll)
    assert f"{want.nll:.4f}" in printed.splitlines()[-3]
    by_kind = {row["weights"]: row for row in single[0]["results"]}
    tempered = score_probabilities(kept[0]["test"], kept[0]["test.labels"])
    assert by_kind["mean + TS"]["nll"] == pytest.approx(tempered.nll)
    posterior = load_posterior(folders[0] / "posterior.safetensors")
    assert posterior.softmax_temperature == pytest.approx(single[0]["softmax_temperature"])
    before = (folders[0] / "report.json").stat().st_mtime_ns
    (folders[1] / "report.json").unlink()
    (folders[1] / "settings.json").unlink()
    assert main([*command, "--resume"]) == 0  # the second, anew
    assert (folders[0] / "report.json").stat().st_mtime_ns == before
    assert report_of(tmp_path / "run")["results"] == report["results"]


def test_a_diverged_run_is_one_line_and_status_1(inputs, tmp_path, capsys):
    assert main(arguments(inputs, tmp_path / "run", "--optimizer", "adamw", "--lr", "1e30", steps=5)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "ivon-lora: error: the loss is nan at step 5: lower --lr"


def test_a_decoder_without_a_padding_token_three_classes_and_a_part_of_the_texts(inputs, tmp_path):
    """GPT-2: fused Conv1D layers, a head called score, and the last token counts."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    model, out = tmp_path / "gpt2", tmp_path / "run"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(inputs / "model" / "tokenizer.json"), eos_token="[SEP]")
    tokenizer.save_pretrained(model)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2ForSequenceClassification(config).save_pretrained(model)
    rows = [(text, label if i % 3 else "none") for i, (text, label) in enumerate(make_rows())]
    data = write_csv(tmp_path / "data.csv", rows)
    command = arguments(inputs, out, "--model", str(model), "--data", str(data), "--eval-limit", "20", steps=10)
    assert main(command) == 0
    report = report_of(out)
    assert report["data"]["labels"] == ["neg", "none", "pos"]
    sizes = [(row["weights"], row["n"]) for row in report["results"]]
    everything = report["data"]["test"]
    assert sizes == [("mean", everything), ("mean + TS", everything), ("mean", 20), ("2 samples", 20)]
    layers = [f"{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert sorted(name.split(".", 2)[2] for name in report["ranks"]) == layers
    assert any("score" in name for name in load_file(out / "adapter" / "adapter_model.safetensors"))
