"""The benchmark of the intrinsic dimension: points of known dimension, and rows that say what was found."""

import pytest
import torch

from benchmarks import ledger
from benchmarks.intrinsic_dimension import OUT, bent_sphere, main


def test_the_points_are_bent_but_keep_the_distances_of_neighbours():
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
