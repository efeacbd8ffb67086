"""The verbs that work on what a run, PEFT or the Trainer has left: inspect, export, plot; and --json of all of them."""

import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ivon_lora
from ivon_lora.cli.main import main
from tests.test_export_saved import trained
from tests.tiny_classifier import make_model, make_rows, write_csv

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.filterwarnings("ignore:pruning is not final:UserWarning")


@pytest.fixture(scope="module")
def printed_run(tmp_path_factory):
    """The folder of a finished run, and what it printed on stdout and stderr."""
    folder = tmp_path_factory.mktemp("run")
    model, data = make_model(folder / "model"), write_csv(folder / "data.csv", make_rows())
    arguments = ["--model", str(model), "--data", str(data), "--steps", "20", "--samples", "2", "--seed", "1"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["finetune", *arguments, "--out", str(folder / "run"), "--json"]) == 0
    return folder / "run", out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(printed_run):
    """The folder of a finished run."""
    return printed_run[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An adapter with its optimizer beside it, as the Trainer saves them, while ranks are still being pruned."""
    folder = tmp_path_factory.mktemp("checkpoints") / "checkpoint-8"
    model, optimizer = trained(8)
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder, optimizer


def read(capsys):
    return json.loads(capsys.readouterr().out)


def test_export_of_a_run_in_the_other_layout(run, tmp_path, capsys):
    assert main(["export", str(run), "--layout", "compact", "--out", str(tmp_path / "c"), "--json"]) == 0
    report = read(capsys)
    ranks = json.loads((run / "report.json").read_text())["ranks"]
    assert sum(report["ranks"].values()) == sum(ranks.values())
    assert (report["layout"], report["path"]) == ("compact", str(tmp_path / "c"))
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["r"] == max(ranks.values())
    assert (tmp_path / "c" / "adapter_model.safetensors").stat().st_size < (
        run / "adapter" / "adapter_model.safetensors"
    ).stat().st_size


def test_export_goes_beside_the_adapter_and_replaces_only_when_told(run, tmp_path, capsys):
    mine = shutil.copytree(run / "adapter", tmp_path / "mine")
    assert main(["export", str(mine)]) == 0
    assert "vllm serve --max-lora-rank" in capsys.readouterr().out
    assert (tmp_path / "mine-uniform" / "adapter_config.json").is_file()
    assert main(["export", str(mine)]) == 2
    assert "mine-uniform exists" in capsys.readouterr().err
    assert main(["export", str(mine), "--overwrite"]) == 0
    assert main(["export", str(mine), "--out", str(mine), "--overwrite"]) == 2
    assert "is the adapter itself" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["beside", "given"])
def test_export_reads_the_masks_of_the_optimizer(where, checkpoint, tmp_path, capsys):
    folder, optimizer = checkpoint
    folder = shutil.copytree(folder, tmp_path / "copy")
    more = []
    if where == "given":
        (folder / "optimizer.pt").rename(tmp_path / "elsewhere.pt")
        assert main(["export", str(folder), "--out", str(tmp_path / "all"), "--json"]) == 0
        assert sum(read(capsys)["ranks"].values()) == 12  # nothing is exactly zero yet
        more = ["--optimizer", str(tmp_path / "elsewhere.pt")]
    assert main(["export", str(folder), "--out", str(tmp_path / "out"), *more, "--json"]) == 0
    report = read(capsys)
    assert report["ranks"] == {
        row["name"].removeprefix("base_model.model."): row["live"] for row in optimizer.rank_table()
    }
    assert "pruning is not final" in report["notes"][-1]


def test_export_of_a_checkpoint_of_the_trainer(tmp_path, capsys):
    from transformers import Trainer

    from ivon_lora.integrations.trainer import IVONFactory
    from tests.tiny_trainer import arguments, make_data, make_model

    args = arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=4)
    options = {"args": args, "num_examples": 24, "target_rank": 1, "pruner_options": {"interval": 1, "final": 2}}
    trainer = Trainer(
        model=make_model(), args=args, train_dataset=make_data(), optimizer_cls_and_kwargs=(IVONFactory, options)
    )
    trainer.train()
    capsys.readouterr()
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        assert main(["export", str(folder), "--out", str(tmp_path / f"lora-{step}"), "--json"]) == 0
        report = read(capsys)
        assert sum(report["ranks"].values()) == trainer.optimizer.optimizer.pruner.budget(step)
        assert report["max_abs_error"] <= 1e-6
    live = {
        row["name"].removeprefix("base_model.model."): row["live"] for row in trainer.optimizer.optimizer.rank_table()
    }
    assert report["ranks"] == live
    assert sum(live.values()) == 4  # of the 16 at the start


def test_inspect_of_an_adapter_with_its_optimizer(checkpoint, capsys):
    folder, optimizer = checkpoint
    assert main(["inspect", str(folder), "--json"]) == 0
    found = read(capsys)
    assert found["live_ranks"] == sum(row["live"] for row in optimizer.rank_table()) < 12
    assert found["completed_steps"] == 8
    name, p = next(
        (n, p)
        for n, p in zip(optimizer.param_groups[0]["param_names"], optimizer.param_groups[0]["params"], strict=True)
    )
    assert ".one.lora_A" in name
    row = next(row for row in found["snr"] if (row["module"], row["factor"]) == ("one", "A"))
    ordered = optimizer.snr(p).flatten().double().sort().values
    assert row["p50"] == pytest.approx(float(ordered[round((len(ordered) - 1) / 2)]), rel=1e-5)
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert f"ranks kept: {found['live_ranks']}" in text
    assert "|mean| / std" in text


def test_json_of_a_run_is_its_report(run, capsys):
    assert main(["inspect", str(run), "--json"]) == 0
    assert read(capsys) == json.loads((run / "report.json").read_text())


def test_finetune_prints_its_report_as_json_alone(printed_run):
    folder, out, err = printed_run
    assert json.loads(out) == json.loads((folder / "report.json").read_text())
    assert "ranks kept" in err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ivon-lora {ivon_lora.__version__}\n"


def test_an_error_of_the_system_is_one_line_with_the_file_and_status_1(run, tmp_path, monkeypatch, capsys):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(os, "rename", full)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"ivon-lora: error: {tmp_path / 'out'}: {os.strerror(errno.ENOSPC)}\n"
    assert list(tmp_path.iterdir()) == []


def test_env_as_json(capsys):
    assert main(["env", "--json"]) == 0
    assert read(capsys)["torch"] == torch.__version__


def test_plot_of_a_run_draws_what_finetune_drew(run, tmp_path, capsys):
    assert main(["plot", str(run), "--out", str(tmp_path), "--json"]) == 0
    files = [Path(file).name for file in read(capsys)["files"]]
    assert sorted(files) == sorted(path.name for path in run.glob("*.png"))
    assert files == ["ranks.png", "training.png", "reliability.png", "snr.png"]
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in files)


def test_plot_in_another_format_and_only_some(run, tmp_path, capsys):
    assert main(["plot", str(run), "--only", "snr,ranks", "--format", "pdf", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.pdf", "snr.pdf"]
    assert (tmp_path / "snr.pdf").read_bytes()[:5] == b"%PDF-"
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "ranks.pdf"), str(tmp_path / "snr.pdf")]


def test_plot_of_an_adapter(checkpoint, tmp_path, capsys):
    folder, _ = checkpoint
    assert main(["plot", str(folder), "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.png", "snr.png"]


BAD = [
    (["export", "ABSENT"], "no adapter_config.json and no report.json"),
    (["inspect", "ABSENT"], "no adapter_config.json and no report.json"),
    (["plot", "ABSENT"], "no adapter_config.json and no report.json"),
    (["export", "ADAPTER", "--layout", "flat"], "--layout 'flat' is unknown: choose uniform, compact"),
    (["export", "ADAPTER", "--posterior", "ABSENT"], "no posterior at"),
    (["export", "ADAPTER", "--optimizer", "ABSENT"], "cannot be read"),
    (["export", "ADAPTER", "--optimizer", "JUNK"], "is not a saved state_dict"),
    (["export", "ADAPTER", "--optimizer", "ADAMW"], "is not the state of an IVON"),
    (["export", "ADAPTER", "--optimizer", "NAMELESS"], "does not name its parameters"),
    (["plot", "ADAPTER", "--only", "colours"], "--only 'colours' is unknown: choose ranks, training, reliability, snr"),
    (["plot", "ADAPTER", "--format", "gif"], "--format 'gif' is unknown: choose png, pdf, svg"),
    (["plot", "ADAPTER", "--only", "training"], "has nothing to draw it from; give the --out of a finished run"),
    (["plot", "ADAPTER", "--only", "snr"], "give a --posterior or --optimizer"),
    (["plot", "ADAPTER", "--out", "JUNK"], "junk is a file: name a folder"),
    (["plot"], "the following arguments are required: folder"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_cannot_be_used_is_one_line_and_status_2_and_writes_nothing(arguments, message, run, tmp_path, capsys):
    places = {name: tmp_path / name.lower() for name in ("ABSENT", "ADAPTER", "JUNK", "ADAMW", "NAMELESS")}
    shutil.copytree(run / "adapter", places["ADAPTER"])
    places["JUNK"].write_bytes(b"junk")
    weight = torch.nn.Parameter(torch.ones(1))
    torch.save(torch.optim.AdamW([weight]).state_dict(), places["ADAMW"])
    torch.save({"state": {}, "param_groups": [{"params": [0], "ess": 1.0}]}, places["NAMELESS"])
    before = sorted(tmp_path.rglob("*"))
    assert main([str(places.get(argument, argument)) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ivon-lora: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_every_verb_has_help_with_examples_and_json(capsys):
    for verb in ("finetune", "ranks", "inspect", "export", "plot", "env"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert f"examples:\n  ivon-lora {verb}" in text
        assert "--json" in text


@pytest.mark.parametrize("verb", ["inspect", "env"], ids=["more than a buffer", "less"])
def test_a_reader_that_goes_away_is_no_error(run, verb):
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [str(run), "--json"] if verb == "inspect" else []
    command = [sys.executable, "-m", "ivon_lora", verb, *arguments]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, cwd=ROOT, env=buffered, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 0
    assert done.stderr == ""
