"""kill -9 at any moment of `ivon-lora finetune`, resume, and nothing in the results tells that it happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_classifier import make_model, make_rows, write_csv

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY = 12, 3

Runs = Callable[[str, list[int]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    make_model(folder / "model")
    write_csv(folder / "data.csv", make_rows(60))
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Iterator[Runs]:
    """``runs(name, deadlines)``: the attempts of one run into ``folder / name``."""
    arguments = ["finetune", "--model", str(folder / "model"), "--data", str(folder / "data.csv"), "--threads", "1"]
    arguments += ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--samples", "1", "--precision", "fp32"]
    arguments += ["--eval-limit", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.killed_runs"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(name: str, deadlines: list[int]) -> list[dict[str, Any]]:
            assert server.stdin is not None
            assert server.stdout is not None
            request = {"arguments": arguments, "out": str(folder / name), "deadlines": deadlines}
            print(json.dumps(request), file=server.stdin, flush=True)
            attempts: list[dict[str, Any]] = json.loads(server.stdout.readline())
            return attempts

        yield run
        server.stdin.close()
        server.wait(60)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> dict[str, Any]:
    """The run that nobody killed: its number of events, and the moments between which checkpoints were written."""
    (attempt,) = runs("whole", [])
    assert attempt["status"] == 0
    assert len(attempt["checkpoints"]) == STEPS // SAVE_EVERY
    return attempt


def results(out: Path) -> dict[str, Any]:
    """Everything a run leaves behind, but times, settings and the pictures' bytes."""
    report = json.loads((out / "report.json").read_text())
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors")}
    listing = sorted(str(p.relative_to(out)) for p in out.rglob("*"))
    return {
        **{key: value for key, value in report.items() if key not in ("seconds", "settings")},
        "files": files,
        "listing": listing,
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_anywhere(seed: int, whole: dict[str, Any], runs: Runs, folder: Path) -> None:
    draw = random.Random(seed)
    deadlines = [draw.randrange(1, whole["events"]) for _ in range(2)]
    attempts = runs(f"anywhere-{seed}", deadlines)
    assert attempts[0]["status"] == -9
    assert attempts[-1]["status"] == 0
    assert results(folder / f"anywhere-{seed}") == results(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_while_a_checkpoint_is_written(seed: int, whole: dict[str, Any], runs: Runs, folder: Path) -> None:
    """Whatever of the file was there: the one before it counts, or, if there is none, the run starts again."""
    draw = random.Random(100 + seed)
    first, last = whole["checkpoints"][draw.randrange(len(whole["checkpoints"]))]
    attempts = runs(f"writing-{seed}", [draw.randrange(first + 1, last)])
    assert [attempt["status"] for attempt in attempts] == [-9, 0]
    assert results(folder / f"writing-{seed}") == results(folder / "whole")
