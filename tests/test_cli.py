"""The command line: help, the verbs that work on what a run, PEFT or the Trainer has left, and errors in one line."""

import contextlib
import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ivon_lora
from ivon_lora.cli import main
from ivon_lora.variants import METHODS
from tests.tiny_classifier import make_model, make_rows, write_csv

ROOT = Path(__file__).resolve().parents[1]


def test_help_and_version(capsys):
    for verb in ("finetune", "sft", "ranks", "inspect", "export", "plot", "env"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert f"examples:\n  ivon-lora {verb}" in text
        assert "--json" in text
        if verb == "finetune":
            assert all(f"\n  {name} " in text for name in ("adalora", "lora", "gelora", *METHODS))
            assert "SoRA: sparse gates between A and B (arXiv:2311.11696)" in text
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"ivon-lora {ivon_lora.__version__}\n"


def test_env_lists_versions(capsys):
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["precision"] in {"fp32", "bf16 autocast"}


def test_a_library_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for name in [name for name in sys.modules if name.startswith(("ivon_lora.cli.finetune.", "ivon_lora.cli.exa"))]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["finetune"]) == 2
    assert capsys.readouterr().err == "ivon-lora: error: pandas is missing: pip install 'ivon-lora[demo]'\n"


def test_a_reader_that_goes_away_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "ivon_lora", "env"]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, cwd=ROOT, env=buffered, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run with a checkpoint at step 10 of 20; beside it are `model` and `data.csv`."""
    folder = tmp_path_factory.mktemp("run")
    model, data = make_model(folder / "model"), write_csv(folder / "data.csv", make_rows())
    arguments = ["--model", str(model), "--data", str(data), "--steps", "20", "--samples", "2", "--interval", "4"]
    arguments += ["--batch-size", "40"]  # after ten steps the noise has grown to all of it
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["finetune", *arguments, "--save-every", "10", "--out", str(folder / "run"), "--json"]) == 0
    assert json.loads(out.getvalue()) == report_of(folder / "run"), "--json prints the report alone"
    assert "trained numbers on" in err.getvalue()
    return folder / "run"


@pytest.fixture
def checkpoint(run, tmp_path):
    """A checkpoint of the Trainer while ranks are still being pruned: none is exactly zero."""
    return shutil.copytree(run / "checkpoint-10", tmp_path / "checkpoint-10")


def report_of(run):
    return json.loads((run / "report.json").read_text())


def printed(capsys, *command):
    assert main([*map(str, command)]) == 0
    return capsys.readouterr().out


def read(capsys, *command):
    return json.loads(printed(capsys, *command, "--json"))


def test_inspect_of_a_run(run, capsys):
    assert read(capsys, "inspect", run) == report_of(run)
    text = printed(capsys, "inspect", run)
    assert f"ranks kept: {report_of(run)['live_ranks']}" in text
    assert "2 samples" in text


def masks(checkpoint):
    """(name of lora_E, mask, mean / std) of each layer, from the files of the checkpoint alone."""
    from safetensors.torch import load_file

    weights = load_file(checkpoint / "adapter_model.safetensors")
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    (group,) = saved["param_groups"]
    for index, name in zip(group["params"], group["param_names"], strict=True):
        state = saved["state"][index]
        if "lora_E" in name:
            mean = weights[name.removesuffix(".default")]
            std = (group["ess"] * (state["hess"] + group["weight_decay"])) ** -0.5
            yield name, state["rank_mask"], mean.abs() / std


def test_inspect_of_a_checkpoint_reads_masks_and_signal_to_noise(checkpoint, capsys):
    found = read(capsys, "inspect", checkpoint)
    live = {name: int(mask.sum()) for name, mask, _ in masks(checkpoint)}
    assert sum(live.values()) == found["live_ranks"] < 13 * 12
    assert {f"base_model.model.{name}.lora_E.default": rank for name, rank in found["ranks"].items()} == live
    assert found["completed_steps"] == 10
    (row,) = (row for row in found["snr"] if (row["module"], row["factor"]) == ("bert.pooler.dense", "E"))
    (ratios,) = (ratios for name, _, ratios in masks(checkpoint) if "pooler" in name)
    assert row["p95"] == pytest.approx(float(ratios.flatten().sort().values[round(0.95 * 11)]), rel=1e-4)
    assert "|mean| / std" in printed(capsys, "inspect", checkpoint)


def test_export_of_a_run_in_the_other_layout(run, tmp_path, capsys):
    report, ranks = read(capsys, "export", run, "--layout", "compact", "--out", tmp_path), report_of(run)["ranks"]
    assert sum(report["ranks"].values()) == sum(ranks.values())
    assert (report["layout"], report["path"]) == ("compact", str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == max(ranks.values())


def test_export_goes_beside_the_adapter_and_replaces_only_when_told(run, tmp_path, capsys):
    mine = shutil.copytree(run / "adapter", tmp_path / "mine")
    assert "vllm serve --max-lora-rank" in printed(capsys, "export", mine)
    assert (tmp_path / "mine-uniform" / "adapter_config.json").is_file()
    assert main(["export", str(mine)]) == 2
    assert "mine-uniform exists" in capsys.readouterr().err
    assert main(["export", str(mine), "--overwrite"]) == 0
    assert main(["export", str(mine), "--out", str(mine), "--overwrite"]) == 2
    assert "is the adapter itself" in capsys.readouterr().err


def test_export_reads_the_masks_of_the_optimizer(checkpoint, tmp_path, capsys):
    live = sum(int(mask.sum()) for _, mask, _ in masks(checkpoint))
    beside = read(capsys, "export", checkpoint, "--out", tmp_path / "beside")
    (checkpoint / "optimizer.pt").rename(tmp_path / "elsewhere.pt")
    without = read(capsys, "export", checkpoint, "--out", tmp_path / "without")
    assert sum(without["ranks"].values()) > live  # what is masked has learnt on, and is not zero
    given = read(capsys, "export", checkpoint, "--out", tmp_path / "out", "--optimizer", tmp_path / "elsewhere.pt")
    for report in (beside, given):
        assert sum(report["ranks"].values()) == live
        assert "pruning is not final" in report["notes"][-1]


def test_a_full_disk_is_one_line_with_the_file_and_status_1(run, tmp_path, monkeypatch, capsys):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(os, "rename", full)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"ivon-lora: error: {tmp_path / 'out'}: {os.strerror(errno.ENOSPC)}\n"
    assert list(tmp_path.iterdir()) == []


def test_plot_draws_what_finetune_drew_and_of_an_adapter_what_there_is(run, checkpoint, tmp_path, capsys):
    files = [Path(file) for file in read(capsys, "plot", run, "--out", tmp_path)["files"]]
    assert [file.name for file in files] == ["ranks.png", "training.png", "reliability.png", "snr.png"]
    assert sorted(file.name for file in files) == sorted(path.name for path in run.glob("*.png"))
    assert all(file.parent == tmp_path and file.read_bytes()[:4] == b"\x89PNG" for file in files)
    printed(capsys, "plot", checkpoint, "--out", tmp_path / "both")
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["ranks.png", "snr.png"]
    only = ["--only", "snr", "--format", "pdf", "--out", tmp_path]
    assert printed(capsys, "plot", run, *only) == f"{tmp_path / 'snr.pdf'}\n"
    assert (tmp_path / "snr.pdf").read_bytes()[:5] == b"%PDF-"


# ---------------------------------------------------------------- what cannot be used

BAD = {
    "": "the following arguments are required: VERB (see `ivon-lora --help`)",
    "finetune --rank 0": "argument --rank: 0 is too small: give 1 or more",
    "finetune --target-rank 13": "--target-rank 13 is above --rank 12",
    "finetune --optimizer adamw --method adalora --rank 4": "PEFT's AdaLoRA needs ranks to prune",
    "finetune --optimizer adamw --target-rank 4": "which prunes otherwise or not at all",
    "finetune --method sora --target-rank 4": "--target-rank 4 with --method sora with --optimizer ivon",
    "finetune --method gelora --rank 4": "which finds the ranks itself: drop it",
    "finetune --method dora": "argument --method: invalid choice: 'dora' (choose from",
    "finetune --option links=2": "--option links: this method has no options",
    "finetune --method cola --option links": "--option links: this method has",
    "finetune --method cola --option link=2": "method has carry, links, ranks, store, warmup; give NAME=VALUE",
    "finetune --steps 50 --warmup 30 --final 30": "--steps 50 is too few for --warmup 30 and --final 30",
    "finetune --warmup 0.5 --final 0.5": "is too few",
    "finetune --warmup 1.5": "argument --warmup: 1.5 must be a number of steps",
    "finetune --lr nan": "argument --lr: nan must be a positive number",
    "finetune --ess inf": "argument --ess: inf must be a positive number",
    "finetune --beta2 1.5": "argument --beta2: 1.5 is outside",
    "finetune --ess 1e6": "--ess is read with --recipe published only",
    "finetune --recipe published --temperature 1": "--temperature is read with --recipe auto only",
    "finetune --weight-decay 0.1": "--weight-decay is read with --recipe published only",
    "finetune --weight-decay -1": "argument --weight-decay: -1 must be 0 or a positive number",
    "finetune --data absent.csv": "--data absent.csv cannot be read: [Errno 2]",
    "finetune --text body --data DATA": "no column 'body'; it has 'text', 'label': set --text",
    "finetune --method gelora --option trim=2 TINY": "trim=2 is outside [0, 1)",
    "finetune --method cola --option links=0 TINY": "--method cola: links must be an integer of at least 1",
    "finetune --method cola --option ranks=4 TINY": "--method cola: ranks must be 3 numbers from 1 to 8",
    "finetune --method sora --option strength=auto --optimizer adamw TINY": "--method sora: strength='auto' reads what "
    "AdamW lacks: take IVON or VAdam",
    "finetune --model no-such-user/no-such-model --data DATA": "--model no-such-user/no-such-model cannot be",
    "finetune --resume": "--resume: no run in",
    "finetune --colour red": "unrecognized arguments: --colour red",
    "finetune --out JUNK": "junk is a file: give a folder",
    "finetune TINY --out JUNK/run": "junk/run: cannot be written",
    "sft --data absent.txt": "--data absent.txt cannot be read: [Errno 2]",
    "sft --rank 2": "--target-rank 4 is above --rank 2: lower it or raise --rank",
    "sft --max-rank 2": "--target-rank 4 is above --max-rank 2: lower it or raise --max-rank",
    "sft --model ABSENT --data TEXTS": "absent cannot be loaded: ",
    "export ABSENT": "absent: no adapter_config.json; give an adapter directory, or the --out of",
    "plot ABSENT": "absent: no adapter_config.json; give an adapter directory, or the --out of",
    "export ADAPTER --layout flat": "argument --layout: invalid choice: 'flat'",
    "export ADAPTER --posterior ABSENT": "no posterior at",
    "export ADAPTER --posterior JUNK": "junk",
    "export ADAPTER --optimizer ABSENT": "No such file",
    "export ADAPTER --optimizer JUNK": "junk: ",
    "export ADAPTER --optimizer ADAMW": "not the state of an IVON",
    "export ADAPTER --optimizer NAMELESS": "does not name its parameters",
    "export ADAPTER --samples 2": "--samples needs a posterior, and ",
    "export ADAPTER --out LOOP": "Not a directory",
    "inspect RUN --optimizer JUNK": "junk: ",  # though a posterior lies beside the adapter
    "plot ADAPTER --only colours": "--only 'colours' is unknown: choose ranks, training, reliability, snr",
    "plot ADAPTER --format gif": "argument --format: invalid choice: 'gif'",
    "plot ADAPTER --only training": "has nothing to draw it from; give the --out of a finished run",
    "plot ADAPTER --only snr": "give a --posterior or --optimizer",
    "plot ADAPTER --out JUNK": "junk is a file: name a folder",
    "plot": "the following arguments are required: folder",
}


@pytest.mark.parametrize("command", BAD)
def test_what_cannot_be_used_is_one_line_and_status_2_and_writes_nothing(command, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    beside = {"DATA": run.parent / "data.csv", "MODEL": run.parent / "model", "RUN": run}
    shutil.copytree(run / "adapter", "adapter")
    Path("junk").write_bytes(b"junk")
    Path("loop").symlink_to("loop")
    Path("texts").with_suffix(".txt").write_text("\n\n".join(text for text, _ in make_rows(60)))
    torch.save(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).state_dict(), "adamw")
    torch.save({"state": {}, "param_groups": [{"params": [0], "ess": 1.0}]}, "nameless")
    before = sorted(tmp_path.rglob("*"))
    given = command.replace("TEXTS", "texts.txt").replace("TINY", "--model MODEL --data DATA").split()
    lowered = [word.lower() if word.isupper() or "JUNK" in word else word for word in given]
    assert main([str(beside.get(word, low)) for word, low in zip(given, lowered, strict=True)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ivon-lora: error: ")
    assert BAD[command] in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


DAMAGED = {
    "report.json": ["plot", "--only", "ranks,training"],
    "adapter/adapter_config.json": ["export", "--out", "OUT", "--overwrite"],
    "adapter/adapter_model.safetensors": ["export", "--out", "OUT", "--overwrite"],
    "posterior.safetensors": ["inspect", "--json"],
}


@pytest.mark.parametrize(("file", "verb"), DAMAGED.items())
def test_no_damage_of_a_file_shows_a_traceback(file, verb, run, tmp_path, capsys):
    """Cut, flipped and foreign bytes, and JSON of other shapes: what can still be read is, the rest is one line."""
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "*.png"))
    sound = (copy / file).read_bytes()
    draw = random.Random(0)
    contents = [b"", b"junk", b"{}", b"[1, 2]", b'{"peft_type": 3}', sound[: len(sound) // 2]]
    if file == "report.json":
        report = json.loads(sound)
        for key in ("settings", "results", "ranks", "history"):
            for value in (None, [], {}, [1], {"a": None}, {"a": "b"}, [{}]):
                contents.append(json.dumps({**report, key: value}).encode())
    for _ in range(8):
        flipped = bytearray(sound)
        for _ in range(20):
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        contents.append(bytes(flipped))
    outcomes = set()
    for content in contents:
        (copy / file).write_bytes(content)
        for name, *options in (["inspect"], verb):
            given = [str(tmp_path / "out") if option == "OUT" else option for option in options]
            status = main([name, str(copy), *given])
            error = capsys.readouterr().err
            assert status in (0, 2), error
            assert error.count("\n") == (status == 2)
            outcomes.add(status)
    assert 2 in outcomes
