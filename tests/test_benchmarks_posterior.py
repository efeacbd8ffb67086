"""The evidence about the posterior: its statistics against known answers, its ledger, its report, and a short run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel

from benchmarks.posterior import __main__ as command
from benchmarks.posterior import averaging, limits, minilm, oneshot, plan, report, tables, toys
from benchmarks.posterior.curvature import agreement, binary_fisher
from benchmarks.posterior.features import UpperLayers
from benchmarks.posterior.goals import verdict
from benchmarks.posterior.ledger import Ledger, select
from benchmarks.posterior.methods import clipped_share, make_optimizer
from benchmarks.posterior.options import parse_options
from benchmarks.posterior.statistics import Interval, average_ranks, interval, paired, spearman
from ivon_lora import IVON, LoraAdapter, posterior_predict
from ivon_lora.finetune.settings import DEFAULT_MODEL

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


# ---------------------------------------------------------------- statistics


def test_ranks_share_their_mean_where_values_are_equal() -> None:
    assert average_ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_spearman_of_monotone_data_is_one_and_agrees_with_scipy_under_ties() -> None:
    x = np.random.default_rng(0).integers(0, 9, 200).astype(float)
    y = x + np.random.default_rng(1).integers(0, 9, 200)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, y) == pytest.approx(float(spearmanr(x, y).statistic), abs=1e-12)
    assert math.isnan(spearman(x, np.ones(200)))


def test_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert found.half == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)
    assert math.isnan(interval([1.0]).half)
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_pairs_are_made_over_common_seeds_and_cancel_what_seeds_share() -> None:
    luck = {1: 10.0, 2: -5.0, 3: 2.0}
    found = paired({seed: value + 1 for seed, value in luck.items()}, {**luck, 4: 100.0})
    assert found.mean == pytest.approx(1)
    assert found.half == pytest.approx(0, abs=1e-12)
    assert found.n == 3


def test_a_basin_is_the_unbroken_stretch_around_the_best() -> None:
    accuracy = [0.5, 0.895, 0.9, 0.891, 0.7, 0.9]
    assert tables.basin(accuracy, 0.01) == (1, 3)
    assert tables.width([1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0], accuracy).startswith("2.0")


def test_a_basin_is_over_the_seeds_that_all_its_learning_rates_have() -> None:
    def row(lr: float, seed: int, accuracy: float, options: str = "") -> dict[str, str]:
        key = {"task": "full", "method": "ours", "lr": f"{lr:g}", "seed": str(seed), "split": "validation"}
        return key | {"options": options, "steps": "9", "validation_accuracy": str(accuracy)}

    rows = [row(0.1, 0, 0.5), row(0.1, 2, 0.7), row(0.2, 0, 0.8), row(0.2, 1, 0.1), row(0.2, 2, 0.9)]
    rows += [
        row(0.3, 1, 0.3, "lr_limit=None"),
        row(0.3, 0, 0.4, "lr_limit=None"),
        row(0.001, 0, 0.6),
        row(0.001, 3, 0.7),
    ]
    found = tables.basin_rows(rows, "full", "ours", 9, (0.1, 0.2, 0.3))
    assert {lr: tables.mean_of(part, "validation_accuracy") for lr, part in found.items()} == pytest.approx(
        {0.1: 0.6, 0.2: 0.85}
    )
    assert tables.seeds_of(found) == 2
    free = tables.basin_rows(rows, "full", "ours", 9, (0.001, 0.2, 0.3), "lr_limit=None")
    assert {lr: tables.mean_of(part, "validation_accuracy") for lr, part in free.items()} == {0.001: 0.6, 0.3: 0.4}
    assert tables.basin_rows(rows, "over", "ours", 9, (0.1,)) == {}
    assert tables.basin_rows([rows[0], rows[3]], "full", "ours", 9, (0.1, 0.2)) == {}  # no seed in common


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [
        (1.0, 0.5, "met"),
        (1.0, math.nan, "met, without an interval"),
        (0.2, 0.5, "met on average"),
        (-0.2, 0.5, "not met on average"),
        (-1.0, 0.5, "missed"),
    ],
)
def test_a_verdict_needs_the_whole_interval(mean: float, half: float, said: str) -> None:
    assert verdict(0.0, math.inf, Interval(mean, half, 5)).startswith(said)
    assert verdict(-math.inf, 0.0, Interval(-mean, half, 5)).startswith(said)


# ---------------------------------------------------------------- curvature


def test_fisher_of_logistic_regression_is_the_closed_form() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(50, 3), toys.Logistic(3)
    nn.init.normal_(model.linear.weight)
    p = model(x).softmax(-1)[:, 1].detach()
    weight, bias = (p * (1 - p) @ x.square() / 50)[None], (p * (1 - p)).mean()[None]
    params = dict(model.named_parameters())
    for name, found in zip(params, toys.fisher(model, params, x), strict=True):
        torch.testing.assert_close(found, weight if name == "linear.weight" else bias)
    y = torch.randint(2, (50,))
    observed = toys.fisher(model, params, x, y)[0]
    torch.testing.assert_close(observed, ((p - y).square() @ x.square() / 50)[None])
    per_example = binary_fisher(list(params.values()), lambda i: model(x[i : i + 1])[0], range(50))
    torch.testing.assert_close(per_example[0], weight)


def test_agreement_of_a_posterior_with_its_own_curvature_is_perfect_and_half_the_truth_doubles_the_variance() -> None:
    model = nn.Linear(6, 5, bias=False)
    optimizer = IVON(model.parameters(), 0.1, ess=50.0, weight_decay=1e-6)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.train()
    optimizer.step()
    truth = torch.linspace(0.1, 3, 30).view(5, 6)
    optimizer.state[model.weight]["hess"].copy_(truth / 2)
    found = agreement(optimizer, [model.weight], ([truth], [truth]))
    assert found.spearman == pytest.approx(1)
    assert found.ceiling == pytest.approx(1)
    assert found.variance_ratio == pytest.approx(2, rel=1e-4)
    assert found.scale == pytest.approx(0.5, rel=1e-4)


def test_clipped_entries_are_counted() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = make_optimizer("published", [p], 1e-3, num_examples=10, batch_size=1, seed=0, hess_init=1.0)
    optimizer.train()  # type: ignore[attr-defined]
    p.grad = torch.tensor([0.0, 1e-5, 1.0, -1.0])
    optimizer.step()
    assert clipped_share(optimizer) == 0.5
    assert p.detach().abs().max() == pytest.approx(1e-3)  # lr is learning rate times clip radius


# ---------------------------------------------------------------- pruning at one stroke


def test_a_cut_zeroes_what_it_does_not_keep_and_gives_it_back() -> None:
    adapter = LoraAdapter("layer", torch.ones(3, 4), torch.ones(2, 3))
    cut = oneshot.Cut("magnitude", 1, [adapter], torch.tensor([False, True, False]))
    with cut.applied():
        assert adapter.B.tolist() == [[0, 1, 0], [0, 1, 0]]
    assert adapter.B.tolist() == [[1, 1, 1], [1, 1, 1]]


# ---------------------------------------------------------------- ledger and report


def test_a_ledger_knows_what_is_done_and_refuses_what_is_no_column(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "rows.csv", ("method", "lr"), ("nll",))
    assert not book.has({"method": "a", "lr": 1e-3})
    book.append({"method": "a", "lr": 1e-3}, {"nll": 0.5}, 1.0)
    assert book.has({"method": "a", "lr": 0.001})
    assert not book.has({"method": "a", "lr": 0.01})
    assert select(book.rows(), method="a", lr=1e-3)[0]["nll"] == "0.5"
    with pytest.raises(ValueError, match="accuracy"):
        book.append({"method": "a", "lr": 1.0}, {"accuracy": 1.0}, 1.0)
    with pytest.raises(ValueError, match="columns"):
        Ledger(book.path, ("method",), ("nll",)).rows()


def test_options_are_numbers_or_words() -> None:
    assert parse_options("beta2=0.99 hess_approx=price") == {"beta2": 0.99, "hess_approx": "price"}
    with pytest.raises(ValueError, match="name=value"):
        parse_options("beta2")


def test_tables_are_put_between_their_marks_and_words_stay() -> None:
    page = "before\n<!-- table one -->\nold\n<!-- end -->\nafter"
    filled = report.fill(page, {"one": "| new |"})
    assert filled == "before\n<!-- table one -->\n| new |\n<!-- end -->\nafter"
    assert report.fill(filled, {"one": "| new |"}) == filled
    with pytest.raises(ValueError, match="one"):
        report.fill(page, {"two": ""})


def test_the_published_page_says_what_the_files_say() -> None:
    page = (RESULTS / report.PAGE).read_text(encoding="utf-8")
    assert report.fill(page, report.all_tables(RESULTS)) == page


# ---------------------------------------------------------------- a short run


def test_toys_run_once_and_the_report_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = plan.quick_toy_runs()
    assert all(toys.execute(step.run, tmp_path, step.curvature) for step in steps)
    assert not any(toys.execute(step.run, tmp_path, step.curvature) for step in steps)
    rows = toys.ledger(tmp_path).rows()
    assert len(rows) == len(steps)
    ours = select(rows, bed="logreg", method="ours")[0]
    published = select(rows, bed="logreg", method="signature")[0]
    assert float(ours["posterior_spearman"]) > 0.9 > float(published["posterior_spearman"])
    assert command.main(["--stage", "report", "--out", str(tmp_path)]) == 0
    assert "posterior_truth.png" in capsys.readouterr().out


def test_a_stage_stops_in_time_and_lists_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--stage", "toys", "--only", "logreg adamw", "--seconds", "-1", "--out", str(tmp_path)])
    assert "left: 9" in capsys.readouterr().out
    command.main(["--stage", "minilm", "--list", "--only", "over adamw 0.0005", "--out", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [f"missing over adamw 0.0005 {seed} test 0" for seed in plan.SEEDS]


@pytest.mark.parametrize(("config", "model"), [(BertConfig, BertModel), (MPNetConfig, MPNetModel)])
def test_upper_layers_are_the_end_of_the_encoder(config: Any, model: Any) -> None:
    torch.manual_seed(0)
    small = config(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
    encoder = model(small, add_pooling_layer=False).eval()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.no_grad():
        whole = encoder(torch.randint(5, 50, (2, 7)), attention_mask=mask, output_hidden_states=True)
        found = UpperLayers(encoder, 2)(whole.hidden_states[-3], mask).last_hidden_state
    torch.testing.assert_close(found, whole.last_hidden_state)


def test_limits_are_sought_without_a_limit(tmp_path: Path) -> None:
    runs = [step.run for step in plan.quick_limit_runs()]
    for run in runs:
        assert limits.execute(run, tmp_path, sizes=minilm.QUICK_SIZES)
        assert not limits.execute(run, tmp_path, sizes=minilm.QUICK_SIZES)
    rows = limits.ledger(tmp_path).rows()
    assert [(row["width"], row["drawn"]) for row in rows] == [("384", "1"), ("384", "4")]
    bed = minilm.load_bed(minilm.QUICK_SIZES)
    key = minilm.Run("full", "ours", runs[0].lr, 0, "validation", "lr_limit=None", runs[0].steps)
    assert float(rows[0]["train_loss"]) == pytest.approx(minilm.train(key, bed).facts["train_loss"], rel=1e-4)
    table = tables.limit_table(rows)
    assert [f"| {DEFAULT_MODEL} | 384 | 8 / 16 | {x} | 0 |" in table for x in (1, 4)] == [True, True]
    drawn = [dict(limits.adapted(run, DEFAULT_MODEL).named_parameters()) for run in runs]
    for name, p in drawn[0].items():
        torch.testing.assert_close(drawn[1][name], (4 if "lora_A" in name else 1) * p, rtol=0, atol=0)


def test_growing_averages_are_those_of_posterior_predict_and_run_once(tmp_path: Path) -> None:
    (step,) = plan.quick_averaging_runs()
    assert averaging.execute(step.run, tmp_path, minilm.QUICK_SIZES)
    assert not averaging.execute(step.run, tmp_path, minilm.QUICK_SIZES)
    rows = averaging.ledger(tmp_path).rows()
    assert [row["samples"] for row in rows] == ["0", "1", "2"]
    bed = minilm.load_bed(minilm.QUICK_SIZES)
    data = bed["test"].first(minilm.QUICK_SIZES.test)
    trained = minilm.train(minilm.Run("over", "ours", step.run.lr, step.run.seed, steps=step.run.steps), bed)
    optimizer = trained.optimizer
    assert isinstance(optimizer, IVON)
    predicted = posterior_predict(trained.model, optimizer, lambda model: minilm.predict(model, data), n_samples=2)
    found = minilm.scores("test", predicted, data)
    assert {name: float(rows[2][name]) for name in found} == pytest.approx(found, rel=1e-5)  # of six digits
    assert rows[2]["test_nll"] != rows[1]["test_nll"] != rows[0]["test_nll"]
