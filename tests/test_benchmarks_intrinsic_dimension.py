"""The benchmark of the intrinsic dimension: points of known dimension, and rows that say what was found."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks.intrinsic_dimension import OUT, bent_sphere, main


def test_the_points_are_bent_but_keep_the_distances_of_neighbours() -> None:
    x = bent_sphere(200, 4096, 3).double()
    assert torch.equal(bent_sphere(200, 4096, 3), x.float()), "the same every time"
    spectrum = torch.linalg.svdvals(x - x.mean(0))
    assert float(spectrum[30] / spectrum[0]) > 0.02, "in no subspace of a few dimensions"
    z = torch.nn.functional.normalize(torch.randn(200, 4, generator=torch.Generator().manual_seed(0))).double()
    near = torch.cdist(z, z) < 0.3
    # of the kernel of random sines: mean (sin a - sin b)^2 = 1 - exp(-|y - z|^2 / 2)
    expected = (1 - torch.exp(-torch.cdist(z, z).square() / 2)).sqrt()
    found = torch.cdist(x, x) / 4096**0.5
    torch.testing.assert_close(found[near], expected[near], rtol=0.15, atol=1e-3)


def test_a_run_appends_a_row_and_a_quick_one_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    path = tmp_path / "rows.csv"
    for _ in range(2):
        assert main(["--points", "1500", "--features", "256", "--dimension", "3", "--out", str(path)]) == 0
    assert main(["--quick", "--out", str(path)]) == 0
    torch.set_num_threads(threads)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        assert float(row["estimate"]) == pytest.approx(3, rel=0.1)
        assert (row["points"], row["features"], row["dimension"], row["threads"]) == ("1500", "256", "3", "1")
    assert "estimate" in capsys.readouterr().out


def test_the_committed_rows_are_right_and_far_below_the_matrix_of_distances() -> None:
    with OUT.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert float(row["estimate"]) == pytest.approx(float(row["dimension"]), rel=0.05)
        assert float(row["low"]) < float(row["dimension"]) < float(row["high"])
        assert float(row["peak_mib"]) < 4 * float(row["points_mib"]) + 500
