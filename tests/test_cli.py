"""The command line: help, and one line with exit status 2 for whatever cannot be used."""

from pathlib import Path

import pytest

from ivon_lora.cli.main import main
from tests.tiny_classifier import make_model, make_rows, write_csv


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "data.csv", make_rows())


BAD_OPTIONS = [
    (["--rank", "0"], "--rank 0 is too small: give 1 or more"),
    (["--target-rank", "0"], "--target-rank 0 is too small"),
    (["--target-rank", "13"], "--target-rank 13 is above --rank 12"),
    (["--rank", "2", "--target-rank", "4"], "--target-rank 4 is above --rank 2"),
    (["--optimizer", "adalora", "--rank", "4"], "PEFT's AdaLoRA needs ranks to prune"),
    (["--optimizer", "adamw", "--target-rank", "4"], "it never prunes"),
    (["--optimizer", "sgd"], "--optimizer 'sgd' is unknown: choose ivon, adamw, adalora"),
    (["--criterion", "size"], "--criterion 'size' is unknown: choose snr_abs"),
    (["--steps", "0"], "--steps 0 is too small"),
    (["--steps", "50", "--warmup", "30", "--final", "30"], "--steps 50 is too few for --warmup 30 and --final 30"),
    (["--steps", "3", "--final", "3"], "--steps 3 is too few"),
    (["--warmup", "0.5", "--final", "0.5"], "is too few"),
    (["--warmup", "1.5"], "--warmup 1.5 must be a number of steps"),
    (["--warmup", "soon"], "argument --warmup"),
    (["--steps", "many"], "argument --steps"),
    (["--batch-size", "0"], "--batch-size 0 is too small"),
    (["--lr", "-1"], "--lr -1.0 must be a positive number"),
    (["--lr", "nan"], "--lr nan must be a positive number"),
    (["--ess", "inf"], "--ess inf must be a positive number"),
    (["--clip-radius", "inf"], "--clip-radius inf must be a positive number"),
    (["--beta2", "1.5"], "--beta2 1.5 is outside"),
    (["--recipe", "best"], "--recipe 'best' is unknown: choose auto, published"),
    (["--ess", "1e6"], "--ess is read with --recipe published only"),
    (["--recipe", "published", "--temperature", "1"], "--temperature is read with --recipe auto only"),
    (["--temperature", "0"], "--temperature 0.0 must be a positive number"),
    (["--weight-decay", "-1"], "--weight-decay -1.0"),
    (["--samples", "0"], "--samples 0 is too small"),
    (["--threads", "0"], "--threads 0 is too small"),
    (["--precision", "fp8"], "--precision 'fp8' is unknown"),
    (["--data", "absent.csv"], "--data absent.csv: cannot be read"),
    (["--data", "absent.xls"], "unknown kind of file"),
    (["--text", "body", "--data", "DATA"], "no column 'body'; it has 'text', 'label': set --text"),
    (["--label", "kind", "--data", "DATA"], "no column 'kind'; it has 'text', 'label': set --label"),
    (
        ["--model", "no-such-user/no-such-model", "--data", "DATA"],
        "--model no-such-user/no-such-model: cannot be loaded",
    ),
    (["--resume"], "--resume: no checkpoint in"),
    (["--colour", "red"], "unrecognized arguments: --colour red"),
]


@pytest.mark.parametrize(
    ("options", "message"), BAD_OPTIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line_and_status_2_and_nothing_is_written(
    options: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given = [str(data) if option == "DATA" else option for option in options]
    assert main(["finetune", "--out", str(out), *given]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ivon-lora: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_is_a_file_or_below_one_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    model = make_model(tmp_path / "model")
    capsys.readouterr()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert main(["finetune", "--model", str(model), "--data", str(data), "--out", str(out)]) == 2
        printed = capsys.readouterr()
        assert f"--out {out}" in printed.err
        assert printed.err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_a_broken_checkpoint_is_one_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run" / "checkpoint" / "state.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert main(["finetune", "--resume", "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert "state.pt cannot be read" in printed.err
    assert printed.err.count("\n") == 1


def test_inspect_of_something_else_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    (tmp_path / "report.json").write_text('{"a": 1}')
    assert main(["inspect", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert [line.split(":")[1] for line in printed.err.splitlines()] == [" error", " error"]
    assert "is not a report of ivon-lora finetune" in printed.err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["finetune", "--help"], ["inspect", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "ivon-lora finetune --data mails.csv --text body --label folder" in printed
    assert "--target-rank" in printed


def test_no_verb_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "ivon-lora --help" in capsys.readouterr().err


def test_env_lists_versions(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["precision"] in {"fp32", "bf16 autocast"}
