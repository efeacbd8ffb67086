"""The study of averaged predictions: what its kinds of weights are, a short run, and its table."""

import torch

from benchmarks import ledger, posterior

KEY = {"task": "small", "method": "vadam", "lr": 3e-3, "seed": 1, "steps": 3}


def test_a_short_run_of_each_method_gives_rows_for_the_table(tmp_path):
    bed = posterior.load_bed((("train", 12), ("test", 8), ("shifted", 4)))
    assert {name: (len(part), part.tokens[0].dtype) for name, part in bed.items()} == {
        "train": (12, torch.float16), "test": (8, torch.float16), "shifted": (4, torch.float16),
    }  # fmt: skip
    path = tmp_path / "rows.csv"
    for method in ("adamw", "vadam"):
        ledger.append(path, posterior.run({**KEY, "method": method}, bed))
    rows = ledger.read(path)
    assert len(rows) == 2 * (1 + 4)
    assert rows[["accuracy", "nll", "ece", "brier"]].notna().all().all()
    assert ledger.has(rows, **KEY)
    assert "| small | test | vadam 0.003, 8 samples minus adamw 0.003, mean | 1 |" in posterior.page(rows)
