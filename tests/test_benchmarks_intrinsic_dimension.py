"""The benchmark of the intrinsic dimension: points of known dimension, and rows that say what was found."""

import pytest
import torch

from benchmarks import ledger
from benchmarks.intrinsic_dimension import OUT, main


def test_runs_append_rows(tmp_path, capsys):
    threads = torch.get_num_threads()
    for _ in range(2):
        assert (
            main(["--points", "1500", "--features", "256", "--dimension", "3", "--out", str(tmp_path / "x.csv")]) == 0
        )
    torch.set_num_threads(threads)
    rows = ledger.read(tmp_path / "x.csv")
    assert rows.estimate.tolist() == pytest.approx([3, 3], rel=0.1)
    assert rows[["points", "features", "dimension", "threads"]].values.tolist() == [[1500, 256, 3, 1]] * 2
    assert "estimate" in capsys.readouterr().out


def test_the_committed_rows_are_right_and_far_below_the_matrix_of_distances():
    rows = ledger.read(OUT)
    assert len(rows)
    assert rows.estimate.tolist() == pytest.approx(rows.dimension.tolist(), rel=0.05)
    assert ((rows.low < rows.dimension) & (rows.dimension < rows.high)).all()
    assert (rows.peak_mib < 4 * rows.points_mib + 500).all()
