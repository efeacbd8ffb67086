"""The study of what the posterior is worth: its bed, a short run of every method, and its table."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import ledger, posterior
from ivon_lora import VAdam, fit_temperature

KEY = {"task": "small", "method": "vadam", "lr": 3e-3, "seed": 6, "steps": 3}


def test_a_short_run_of_each_method_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(posterior, "SAMPLES", 2)
    monkeypatch.setattr(posterior, "FISHER_SAMPLES", 2)
    bed = posterior.load_bed((("train", 12), ("validation", 10), ("test", 8), ("shifted", 4)))
    assert bed["train"].tokens[0].dtype == torch.float16
    path = tmp_path / "posterior_runs.csv"
    for method in posterior.TASKS["small"][3].keys() - {"laplace"}:  # whose package is not among the tests'
        key = {**KEY, "method": method, "steps": 4}
        ledger.append(path, posterior.run(key, bed, path))
    rows = ledger.read(path)
    assert rows[rows.method == "vadam"].share.between(0, 1).all()
    assert rows[rows.method == "vadam"][["fisher_mean", "fisher_samples"]].abs().max(axis=None) <= 1
    assert rows.groupby("method").weights.apply(list).to_dict() == {
        "vadam": ["mean", "samples"], "ivon-opt": ["mean", "samples"], "adamw": ["mean"], "early": ["mean"],
        "swa": ["mean"],
    }  # fmt: skip
    archive = posterior.Archive(path, {})
    kept = archive.of("small", "vadam", 3e-3, 6)
    assert {name: len(p) for name, p in kept.items()} == {"validation": 10, "test": 8, "shifted": 4, "train": 12}
    labels = torch.tensor(bed["test"].labels)
    loss = torch.nn.functional.nll_loss(kept["test"].log(), labels)
    assert float(loss) == pytest.approx(rows[(rows.method == "vadam") & (rows.weights == "mean")].nll.item(), rel=1e-4)


def test_the_table_by_hand(tmp_path, monkeypatch):
    """Logits that are right with probability 0.8 and so sure of it, times a factor that the temperature finds."""
    generator = np.random.default_rng(0)
    monkeypatch.setattr(posterior, "TASKS", {"small": (256, 64, (6, 7), posterior.TASKS["small"][3])})
    monkeypatch.setattr(posterior, "SIZES", dict.fromkeys(posterior.SIZES, 200))
    labels = {name: torch.tensor([0, 1] * 100) for name in posterior.EVALUATED}
    monkeypatch.setattr(posterior, "load_sentences", lambda name, count: posterior.Sentences([], labels[name].tolist()))
    path = tmp_path / "posterior_runs.csv"
    factors = {"adamw": 3.0, "vadam": 2.0}
    for method, rates in posterior.TASKS["small"][3].items():
        for lr in rates:
            for seed in (6, 7):
                right = torch.from_numpy(generator.permutation(np.arange(200) % 5 > 0))
                sure = torch.where(right, 1.0, -1.0) * np.log(4) * factors.get(method, 1.0)
                p = {
                    k: torch.stack([-sure * (2 * y - 1), sure * (2 * y - 1)], -1).div(2).softmax(-1)
                    for k, y in labels.items()
                }
                for weights in ("mean", "samples"):
                    posterior.keep(path, ("small", method, lr, seed, weights), p)
                facts = {"share": 0.2, "fisher_mean": 0.8, "fisher_samples": 0.9} if method == "vadam" else {}
                ledger.append(path, [{**KEY, "method": method, "lr": lr, "seed": seed, "weights": "mean", **facts}])
    entropy = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2))
    page = posterior.page(path)
    cells = {
        line.split(" | ")[1]: line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| small")
    }
    assert "| small | 0.2000 ± 0.0000 | 0.8000 ± 0.0000 | 0.9000 ± 0.0000 |" in page.splitlines()
    assert len(cells) == 14 + 1
    assert float(cells["ours + TS"][5]) == pytest.approx(entropy, abs=1e-4)
    assert float(cells["ours, mean"][5]) == pytest.approx(0.8 * np.log(1 + 1 / 16) + 0.2 * np.log(1 + 16), abs=1e-4)
    assert cells["ours + TS"][10] == "+0.0000 ± 0.0000"
    assert cells["AdamW + TS"][10] == "0"
    assert float(cells["ours, mean as sure as 8 samples"][5]) == pytest.approx(float(cells["ours, mean"][5]), abs=1e-4)
    assert fit_temperature(posterior.Archive(path, labels).of("small", "vadam", 3e-3, 6)["test"], labels["test"]) == (
        pytest.approx(2.0, rel=1e-3)
    )


def test_the_true_fisher_of_a_linear_model_by_hand():
    """Log odds w x have the Fisher p (1 - p) x^2: the curvature ranks the weights by it if it is that of the data."""
    x = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    model = torch.nn.Module()
    model.lora_A = torch.nn.Parameter(torch.zeros(4))
    model.forward = lambda input_ids, attention_mask: SimpleNamespace(
        logits=torch.stack([torch.zeros(1), (input_ids[0].mean(0) * model.lora_A).sum()[None]], -1)
    )
    optimizer = VAdam(model.parameters(), 1e-3, num_examples=8, batch_size=1)
    optimizer.train()
    model.lora_A.grad = torch.tensor([1.0, 2.0, 0.5, 3.0])
    optimizer.step()
    found = posterior.fisher_correlations(model, optimizer, posterior.Sentences([x], [0]))
    assert found == pytest.approx({"fisher_mean": 1.0, "fisher_samples": 1.0})
    optimizer.state[model.lora_A]["hess"].copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]))  # places 4 3 2 1, and not 2 3 1 4
    found = posterior.fisher_correlations(model, optimizer, posterior.Sentences([x], [0]))
    assert found == pytest.approx({"fisher_mean": -0.4, "fisher_samples": -0.4})  # 1 - 6 (4 + 0 + 1 + 9) / 60
