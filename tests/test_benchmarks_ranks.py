"""The study of ranks: equal budgets, rows that are not made twice, and a report that says what the rows say."""

import pandas as pd
import pytest
import torch

from benchmarks import ledger, ranks, related
from benchmarks.data import Sentences, encoder_linears
from benchmarks.machine import RESULTS
from benchmarks.rank_arms import ARMS, SPENT, Setup, gelora, scaled
from benchmarks.training import predict, scores
from ivon_lora import find_adapters
from tests.tiny_classifier import make_model, make_rows

REFERENCE, OURS = ranks.REFERENCES


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
    row = ranks.run(key, data, data.first(20), base, rank=6, target=2)
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
    arm = gelora(Setup(base, data, steps=12, lr=1e-3, target=3))
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
    with pytest.raises(ValueError, match="less than one rank"):
        scaled({"a": 1, "b": 1}, 1)


def row(method: str, seed: int, accuracy: float, **changes: object) -> dict[str, object]:
    facts = {"steps": 100, "lr": ARMS[method][1], "n": 1000, "nll": 0.4, "ece": 0.02, "brier": 0.13, "train_loss": 0.4}
    cost = {"ranks": 72, "passes_cpu_ms": 500.0, "optimizer_cpu_ms": 5.0}
    places = {"ranks_by_layer": " ".join(["3 1 0 2 4 2"] * 6), "commit": "abc"}
    return {"method": method, "seed": seed, "split": "test", "accuracy": accuracy, **facts, **cost, **places, **changes}


def test_runs_that_are_there_are_not_made_again(tmp_path, monkeypatch, capsys):
    made = []

    def run(key, data, evaluated):
        made.append((key["method"], key["seed"], key["split"], key["lr"]))
        return row(key["method"], key["seed"], 0.8, split=key["split"], lr=key["lr"])

    monkeypatch.setattr(ranks, "run", run)
    monkeypatch.setattr(ranks, "load_sentences", lambda *_: None)
    command = ["--out", str(tmp_path / "ranks.csv"), "--arms", f"{REFERENCE},{OURS}", "--seeds", "1,2", "--runs", "3"]
    for _ in range(3):
        assert ranks.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "left: 0"
    assert [key[:2] for key in made] == [(REFERENCE, 1), (OURS, 1), (REFERENCE, 2), (OURS, 2)]
    for more in (["--lr", "0.1"], ["--split", "validation"]):  # another run each, and none of the report
        assert ranks.main([*command, *more]) == 0
    assert len(set(made)) == len(made) == 4 + 3 + 3
    assert len(ranks.planned(ledger.read(tmp_path / "ranks.csv"))) == 4
    with pytest.raises(SystemExit):
        ranks.main(["--arms", "guess"])
    assert "there is no guess" in capsys.readouterr().err


ROWS = pd.DataFrame(
    [
        row(REFERENCE, 1, 0.80),
        row(REFERENCE, 2, 0.82),
        row(OURS, 1, 0.81),
        row(OURS, 2, 0.832),
        row("snr ivon triplets", 3, 0.9),
    ]
)


def test_the_tables_by_hand():
    # mean .81, standard deviation .01 sqrt 2, t(.975, 1) = 12.706: half width 12.706 * .01
    assert f"| {REFERENCE} | 2 | 0.8100 ± 0.1271 |" in ranks.results_table(ROWS)
    differences = ranks.difference_table(ROWS, REFERENCE)
    assert f"| {OURS} | 2 | +0.0110 ± 0.0127 |" in differences  # of .010 and .012
    assert "snr ivon" not in differences  # no seed in common
    cells = [f"| {OURS} ", *(f"| {rank} " for rank in ("3.0", "1.0", "0.0", "2.0", "4.0", "2.0", *["2.0"] * 6)), "|"]
    assert "".join(cells) in ranks.place_table(ROWS)
    assert f"| {OURS} | 500 | 5.0 | 1.0 % |" in ranks.time_table(ROWS)


def test_the_picture_has_every_run():
    panel = ranks.picture(ROWS).axes[0]
    seeds = [list(line.get_xdata()) for line in panel.lines if line.get_marker() == "|" and len(line.get_xdata())]
    assert [0.80, 0.82] in seeds
    assert [label.get_text() for label in panel.get_yticklabels()] == [REFERENCE, OURS, "snr ivon triplets"]


def test_the_committed_report_is_that_of_the_committed_rows():
    rows = ledger.read(RESULTS / "ranks.csv")
    assert set(rows.ranks) == {144}
    assert not rows[["method", "seed", "split", "steps", "lr"]].duplicated().any()
    assert (RESULTS / "ranks.md").read_text(encoding="utf-8") == ranks.page(ranks.planned(rows))


def test_related_methods_are_tuned_on_the_validation_split_and_then_tested():
    """By hand: two arms that have tried their learning rates, a third one that has not."""
    arms = len(related.NAMES)
    first = related.keys(pd.DataFrame())
    assert len(first) == 3 * arms
    assert {key["split"] for key in first} == {"validation"}
    tried = [key for key in first if key["method"] in related.NAMES[:2]]
    nll = {(related.NAMES[0], 0.003): 0.3, (related.NAMES[1], 0.009): 0.2}
    rows = [{**row(key["method"], 0, 0.8), **key, "nll": nll.get((key["method"], key["lr"]), 0.5)} for key in tried]
    rows.append({**row(related.NAMES[2], 0, 0.8), **first[2]})
    assert related.tuned(pd.DataFrame(rows)) == {related.NAMES[0]: 0.003, related.NAMES[1]: 0.009}
    tests = related.keys(pd.DataFrame(rows))[3 * arms :]
    assert [(key["method"], key["seed"], key["lr"]) for key in tests[:3]] == [
        (related.NAMES[0], 1, 0.003),
        (related.NAMES[1], 1, 0.009),
        (related.NAMES[0], 2, 0.003),
    ]
    rows += [{**row(key["method"], 0, 0.8, nll=0.4 + 0.1 * (key["lr"] > 0.005)), **key} for key in tests]
    page = related.page(pd.DataFrame(rows))
    assert f"| {related.NAMES[1]} | 0.009 | 72 | 0.8000 ± 0.0000 | 0.5000 ± 0.0000 |" in page
    assert "| +0.1000 ± 0.0000 | 500 |" in page
