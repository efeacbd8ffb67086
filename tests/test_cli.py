"""The command line: help, and one line with exit status 2 for whatever cannot be used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ivon_lora
from ivon_lora.cli.main import main
from ivon_lora.variants import METHODS
from tests.tiny_classifier import make_model, make_rows, write_csv

ROOT = Path(__file__).resolve().parents[1]

TINY = ("--model", "MODEL", "--data", "DATA")
BAD_OPTIONS = [
    (["--rank", "0"], "argument --rank: 0 is too small: give 1 or more"),
    (["--target-rank", "13"], "--target-rank 13 is above --rank 12"),
    (["--rank", "2", "--target-rank", "4"], "--target-rank 4 is above --rank 2"),
    (["--optimizer", "adalora", "--rank", "4"], "PEFT's AdaLoRA needs ranks to prune"),
    (["--optimizer", "adamw", "--target-rank", "4"], "which prunes otherwise or not at all"),
    (["--method", "sora", "--target-rank", "4"], "--target-rank 4 with --method sora with --optimizer ivon"),
    (["--method", "gelora", "--rank", "4"], "which finds the ranks itself: drop it"),
    (["--optimizer", "adalora", "--method", "cola"], "--optimizer adalora is adamw with --method adalora, not cola"),
    (["--method", "dora"], "argument --method: invalid choice: 'dora' (choose from"),
    (["--option", "links=2"], "--option links: this method has no options"),
    (["--method", "cola", "--option", "link=2"], "this method has carry, links, ranks, store, warmup; give NAME=VALUE"),
    (["--optimizer", "sgd"], "argument --optimizer: invalid choice: 'sgd' (choose from"),
    (["--steps", "50", "--warmup", "30", "--final", "30"], "--steps 50 is too few for --warmup 30 and --final 30"),
    (["--warmup", "0.5", "--final", "0.5"], "is too few"),
    (["--warmup", "1.5"], "argument --warmup: 1.5 must be a number of steps"),
    (["--warmup", "soon"], "argument --warmup"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--lr", "nan"], "argument --lr: nan must be a positive number"),
    (["--ess", "inf"], "argument --ess: inf must be a positive number"),
    (["--beta2", "1.5"], "argument --beta2: 1.5 is outside"),
    (["--ess", "1e6"], "--ess is read with --recipe published only"),
    (["--recipe", "published", "--temperature", "1"], "--temperature is read with --recipe auto only"),
    (["--weight-decay", "0.1"], "--prior-std says how wide the prior is"),
    (["--weight-decay", "-1"], "argument --weight-decay: -1 must be 0 or a positive number"),
    (["--data", "absent.csv"], "--data absent.csv cannot be read: [Errno 2]"),
    (["--data", "absent.xls"], "unknown kind of file"),
    (["--text", "body", "--data", "DATA"], "no column 'body'; it has 'text', 'label': set --text"),
    (["--method", "gelora", "--option", "trim=2", *TINY], "trim=2 is outside [0, 1)"),
    (
        ["--method", "cola", "--option", "links=0", *TINY],
        "--method cola: links must be an integer of at least 1",
    ),
    (["--method", "cola", "--option", "links=two", *TINY], "--method cola: links must be an integer of at least 1"),
    (
        ["--method", "sora", "--option", "strength=auto", "--optimizer", "adamw", *TINY],
        "--method sora: strength='auto' reads the posterior of the gates; take IVON or VAdam",
    ),
    (["--model", "no-such-user/no-such-model", "--data", "DATA"], "--model no-such-user/no-such-model cannot be"),
    (["--resume"], "--resume: no run in"),
    (["--colour", "red"], "unrecognized arguments: --colour red"),
]


@pytest.mark.parametrize(
    ("options", "message"), BAD_OPTIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line_and_status_2_and_nothing_is_written(
    options, message, tmp_path, tmp_path_factory, capsys
):
    folder = tmp_path_factory.mktemp("inputs")
    inputs = {"DATA": str(write_csv(folder / "data.csv", make_rows()))}
    if "MODEL" in options:
        inputs["MODEL"] = str(make_model(folder / "model"))
    given = [inputs.get(option, option) for option in options]
    assert main(["finetune", "--out", str(tmp_path / "run"), *given]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ivon-lora: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_every_verb_has_help_with_examples_and_json(capsys):
    for verb in ("finetune", "ranks", "inspect", "export", "plot", "env"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert f"examples:\n  ivon-lora {verb}" in text
        assert "--json" in text


def test_the_help_lists_the_methods_of_the_table(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in ("adalora", "lora", "gelora", *METHODS))
    assert "SoRA: sparse gates between A and B (arXiv:2311.11696)" in text


def test_no_verb_is_an_error(capsys):
    assert main([]) == 2
    assert "ivon-lora --help" in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ivon-lora {ivon_lora.__version__}\n"


def test_env_lists_versions(capsys):
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["precision"] in {"fp32", "bf16 autocast"}


def test_a_library_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for name in [name for name in sys.modules if name.startswith("ivon_lora.cli.finetune.")]:
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
