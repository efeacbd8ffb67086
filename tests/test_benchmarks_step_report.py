"""The cost split, the scaling and the page of the step benchmarks."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scaling, split, step_report
from benchmarks.cases import QUICK_CASES
from benchmarks.peers import BASELINE, REFERENCE
from ivon_lora import noise_store

QUICK = {case.name: case for case in QUICK_CASES}


def row(case: str, peer: str, cpu: float, malloc: str = "default") -> dict[str, str]:
    return {
        "case": case,
        "peer": peer,
        "threads": "1",
        "malloc": malloc,
        "rounds": "3",
        "elements": "1000000",
        "median_cpu_ms": str(cpu),
        "commit": "abc",
    }


def test_goals_are_judged_by_processor_time() -> None:
    rows = [row(step_report.LLAMA, REFERENCE, 1200), row(step_report.LLAMA, step_report.EAGER, 400)]
    rows += [
        row(step_report.LLAMA, step_report.COMPILE, 100),
        row(step_report.LLAMA, step_report.COMPILE + "+prune", 104),
    ]
    rows += [row(step_report.FLAT, step_report.COMPILE, 10), row(step_report.MANY, step_report.COMPILE, 20)]
    verdicts = {what: (measured, verdict) for what, _, measured, verdict in step_report.goals(rows)}
    assert verdicts["392 tensors: eager against ivon-opt"] == ("3x", "missed")
    assert verdicts["392 tensors: compile against ivon-opt"] == ("12x", "reached")
    assert verdicts["392 tensors: what pruning adds to compile"] == ("4 %", "reached")
    assert verdicts["4,000 tensors against one of as many elements, compile"] == ("2x", "missed")
    assert verdicts["MiniLM adapter: compile against ivon-opt"] == ("not run", "")
    assert verdicts["392 tensors: compile against ivon-opt, both with malloc tuned"] == ("not run", "")


def test_page_shows_every_run_and_part() -> None:
    rows = [row(step_report.LLAMA, peer, cpu) for peer, cpu in ((REFERENCE, 30.0), (BASELINE, 2.0), ("x", 5.0))]
    shares = [{"case": "c", "backend": "eager", "part": part, "cpu_ms": "1.5", "commit": "def"} for part in split.PARTS]
    page = step_report.page(rows, shares, [])
    assert "| llama-3.2-3b-lora-r16 | 1 | default | x | 3 | 5 | 5.00 | 6.00 | 2.50 |" in page
    assert "| c | eager | 1.50 | 1.50 | 1.50 | 1.50 | 1.50 | 1.50 | 9.00 |" in page
    assert "abc, def" in page


def test_picture_has_a_line_per_peer_and_sweep() -> None:
    points = [
        {"sweep": sweep, "peer": peer, "elements": str(10 * n), "tensors": str(n), "median_cpu_ms": str(n / 7)}
        for sweep in ("elements", "tensors")
        for peer in (REFERENCE, BASELINE, step_report.EAGER)
        for n in (100, 10)
    ]
    left, right = step_report.picture(points).axes
    assert [np.asarray(line.get_xdata()).tolist() for line in left.lines] == [[100, 1000]] * 3
    assert [np.asarray(line.get_xdata()).tolist() for line in right.lines] == [[10, 100]] * 3


def test_parts_of_a_step_are_found() -> None:
    limit = noise_store.LIMIT
    parts = split.split(QUICK["quick-minilm-lora-r8"], "eager", 2)
    assert limit == noise_store.LIMIT
    assert tuple(parts) == split.PARTS
    assert all(parts[part] > 0 for part in ("step", "scores", "bookkeeping"))
    assert all(value >= 0 for value in parts.values())
    assert split.split(QUICK["quick-one-tensor"], "eager", 1)["scores"] == 0.0  # no ranks


def test_split_and_scaling_write_tidy_rows(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "x.csv"), "--backends", "eager"]
    assert split.main([*out, "--cases", "quick-one-tensor", "--rounds", "1"]) == 0
    with (tmp_path / "x.csv").open() as file:
        assert [line["part"] for line in csv.DictReader(file)] == list(split.PARTS)
    assert scaling.main([*out, "--quick"]) == 0
    with (tmp_path / "x.csv").open() as file:
        found = list(csv.DictReader(file))
    assert {line["peer"] for line in found} == {BASELINE, REFERENCE, "ivon-lora[eager]"}
    assert all(float(line["median_cpu_ms"]) > 0 for line in found)
    with pytest.raises(SystemExit):
        split.main(["--cases", "nonsense"])
