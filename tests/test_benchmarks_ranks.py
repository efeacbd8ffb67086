"""The study of related methods: equal budgets, rows that are not made twice, and a report that says what they say."""

import pandas as pd
import pytest
import torch

from benchmarks import ledger, related
from benchmarks.data import Sentences, encoder_linears
from benchmarks.rank_arms import ARMS, SPENT, Setup, gelora, scaled
from benchmarks.training import predict, scores
from ivon_lora import find_adapters
from tests.tiny_classifier import make_model, make_rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What makes a tiny classifier, and its training set."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = make_model(tmp_path_factory.mktemp("tiny") / "model")
    texts, labels = zip(*make_rows(96), strict=True)
    ids = AutoTokenizer.from_pretrained(path)(list(texts))["input_ids"]
    data = Sentences([torch.tensor(one) for one in ids], [int(label == "pos") for label in labels])
    return lambda: AutoModelForSequenceClassification.from_pretrained(path), data


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_and_ends_at_the_budget(name, tiny):
    make, data = tiny
    base = make()
    layers = len(encoder_linears(base))
    key = {"method": name, "seed": 1, "split": "test", "steps": 12, "lr": ARMS[name][1]}
    row = related.run(key, data, data.first(20), base, rank=6, target=2)
    found = sum(map(int, row["ranks_by_layer"].split()))
    if name.split()[0] in SPENT:  # these have no budget: what they end with is in the table
        assert 0 < row["ranks"] == found <= 4 * layers
    else:
        assert row["ranks"] == found == 2 * layers
    assert len(row["ranks_by_layer"].split()) == layers
    assert row["n"] == 20
    assert row["nll"] < scores(predict(make(), data.first(20)).softmax(-1), data.first(20))["nll"]


def test_gelora_ranks_whole_blocks_and_every_layer_has_the_same_scaling(tiny):
    make, data = tiny
    base = make()
    names = encoder_linears(base)
    arm = gelora(Setup(base, data, steps=12, lr=1e-3, target=3), bayesian=False)
    found = dict(zip(names, arm.ranks(), strict=True))
    assert sum(found.values()) == 3 * len(found)
    blocks = [{rank for name, rank in found.items() if f".layer.{i}." in name} for i in (0, 1)]
    assert all(max(block) - min(block) <= 1 for block in blocks)  # of rounding
    adapters = {adapter.name.removeprefix("base_model.model."): adapter for adapter in find_adapters(arm.model)}
    assert {name: adapter.rank for name, adapter in adapters.items()} == found
    assert all(adapter.scaling == pytest.approx(2) for adapter in adapters.values())


def test_scaled_ranks_keep_the_sum_and_the_order():
    assert scaled({"a": 1, "b": 2, "c": 5}, 12) == {"a": 2, "b": 3, "c": 7}
    assert scaled({"a": 1, "b": 1, "c": 1}, 5) == {"a": 2, "b": 2, "c": 1}  # ties in order


def row(method: str, seed: int, accuracy: float, **changes: object) -> dict[str, object]:
    facts = {"steps": 100, "lr": ARMS[method][1], "n": 1000, "nll": 0.4, "ece": 0.02, "brier": 0.13, "train_loss": 0.4}
    cost = {"ranks": 72, "passes_cpu_ms": 500.0, "optimizer_cpu_ms": 5.0}
    places = {"ranks_by_layer": " ".join(["3 1 0 2 4 2"] * 6), "commit": "abc"}
    return {"method": method, "seed": seed, "split": "test", "accuracy": accuracy, **facts, **cost, **places, **changes}


def test_runs_that_are_there_are_not_made_again(tmp_path, capsys):
    made, keys = [], [{"method": name, "seed": seed} for seed in (1, 2) for name in related.NAMES[:2]]

    def run(key):
        made.append(key)
        return [row(key["method"], key["seed"], 0.8)]

    for left in ("left: 1", "left: 0", "left: 0"):
        ledger.resume(tmp_path / "runs.csv", keys, run, 3)
        assert capsys.readouterr().out.splitlines()[-1] == left
    assert made == keys
    assert len(ledger.read(tmp_path / "runs.csv")) == 4


def test_related_methods_are_tuned_on_the_validation_split_and_then_tested():
    """By hand: two arms that have tried their learning rates, a third one that has not."""
    arms = len(related.NAMES)
    first = related.keys(pd.DataFrame())
    assert len(first) == 3 * arms
    assert {key["split"] for key in first} == {"validation"}
    tried = [key for key in first if key["method"] in related.NAMES[:2]]
    nll = {(related.NAMES[0], 0.003): 0.3, (related.NAMES[1], 0.0009): 0.2}
    rows = [{**row(key["method"], 0, 0.8), **key, "nll": nll.get((key["method"], key["lr"]), 0.5)} for key in tried]
    rows.append({**row(related.NAMES[2], 0, 0.8), **first[2]})
    assert related.tuned(pd.DataFrame(rows)) == {related.NAMES[0]: 0.003, related.NAMES[1]: 0.0009}
    tests = related.keys(pd.DataFrame(rows))[3 * arms :]
    assert [(key["method"], key["seed"], key["lr"]) for key in tests[:3]] == [
        (related.NAMES[0], 1, 0.003),
        (related.NAMES[1], 1, 0.0009),
        (related.NAMES[0], 2, 0.003),
    ]
    rows += [{**row(key["method"], 0, 0.8, nll=0.4 + 0.1 * (key["lr"] < 0.002)), **key} for key in tests]
    page = related.page(pd.DataFrame(rows))
    assert f"| {related.NAMES[1]} | 0.0009 | 72 | 0.8000 ± 0.0000 | 0.5000 ± 0.0000 |" in page
    assert "| +0.1000 ± 0.0000 | 500 |" in page
