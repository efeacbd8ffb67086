"""The study of ranks: equal budgets, rows that are not made twice, and a report that says what the rows say."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks import ranks
from benchmarks.rank_methods import (
    ARMS,
    CONTROLS,
    OURS,
    SEEDS,
    build,
    gelora_pattern,
    options_of,
    scaled_ranks,
    settings_of,
)
from benchmarks.rank_report import (
    REFERENCES,
    difference_table,
    finding,
    not_run,
    page_text,
    place_table,
    results_table,
    write_report,
)
from benchmarks.rank_table import Row, append, read
from ivon_lora import IVON, find_adapters
from ivon_lora.finetune.batches import encode
from ivon_lora.finetune.corpus import Row as Sentence
from ivon_lora.finetune.model import load_base, load_tokenizer
from tests.tiny_classifier import make_model, make_rows


def row(method: str, seed: int, accuracy: float, **changes) -> Row:
    kept = " ".join(["3", "1", "0", "2", "4", "2"] * 6)
    one = Row(
        method, seed, "test", 100, "0.003", "beta2=0.9", 1000, accuracy, 0.4, 0.02, 0.13, 0.4, 72, 500.0, 5.0, kept,
        "2", "fp32", "m", "d", "c",
    )  # fmt: skip
    return replace(one, **changes)


def test_scaled_ranks_keep_the_sum_and_the_order():
    assert scaled_ranks({"a": 1, "b": 2, "c": 5}, 12) == {"a": 2, "b": 3, "c": 7}
    assert scaled_ranks({"a": 1, "b": 1, "c": 1}, 5) == {"a": 2, "b": 2, "c": 1}  # ties in order
    for total in range(4, 60):
        scaled = scaled_ranks({"a": 1, "b": 3, "c": 3, "d": 9}, total)
        assert sum(scaled.values()) == total
        assert 1 <= scaled["a"] <= scaled["b"] <= scaled["d"]
    with pytest.raises(ValueError, match="less than one rank"):
        scaled_ranks({"a": 1, "b": 1}, 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Path of a tiny model, and its training set."""
    path = make_model(tmp_path_factory.mktemp("tiny") / "model")
    sentences = [Sentence(text, int(label == "pos")) for text, label in make_rows(96)]
    return str(path), encode(sentences, load_tokenizer(str(path)), 32)


@pytest.mark.parametrize("name", ARMS)
def test_every_method_trains_and_ends_at_the_budget(name, tiny):
    path, data = tiny
    arm = ARMS[name]
    settings = settings_of(arm, seed=1, steps=12, rank=6, target=2)
    method = build(arm, load_base(path, seed=1), settings, data)
    before = [p.detach().clone() for p in method.trainable().values()]
    passes, updates, losses = ranks._steps(method, data, settings, ranks.Runtime("cpu", "fp32", None))
    assert len(passes) == len(updates) == len(losses) == 12
    assert all(math.isfinite(loss) for loss in losses)
    assert any(not torch.equal(p, b) for p, b in zip(method.trainable().values(), before, strict=True))
    layers = len(find_adapters(method.model))
    assert sum(method.kept_ranks().values()) == 2 * layers
    assert len(method.kept_ranks()) == layers
    for adapter in find_adapters(method.model):
        assert adapter.scaling == pytest.approx(2, rel=1e-4)


def test_gelora_sees_the_training_texts_and_ranks_whole_blocks(tiny):
    path, data = tiny
    base = load_base(path)
    pattern = gelora_pattern(base, data, 3)
    assert sum(pattern.values()) == 3 * len(pattern)
    blocks = [{rank for name, rank in pattern.items() if f".layer.{i}." in name} for i in (0, 1)]
    assert all(max(block) - min(block) <= 1 for block in blocks)  # of rounding
    assert not any(module._forward_hooks for module in base.modules())


def test_a_row_survives_the_file_and_is_not_made_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ranks.csv"
    made = []

    def train(run, limit):
        made.append(run)
        return row(
            run.arm.name, run.seed, 0.8, lr=f"{run.arm.lr:g}", split=run.split, steps=run.steps, options=run.arm.options
        )

    monkeypatch.setattr(ranks, "train", train)
    names = f"{CONTROLS[0].name},{OURS[0].name}"
    for _ in range(3):
        assert ranks.main(["--out", str(path), "--methods", names, "--seeds", "1,2", "--runs", "3"]) == 0
    assert [(run.arm.name, run.seed) for run in made] == [
        (CONTROLS[0].name, 1), (OURS[0].name, 1), (CONTROLS[0].name, 2), (OURS[0].name, 2),
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines()[-1] == "left: 0"
    assert read(path)[0] == row(CONTROLS[0].name, 1, 0.8, options=CONTROLS[0].options)
    assert ranks.main(["--out", str(path), "--methods", names, "--seeds", "1,3", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["done", "done", "missing", "missing"]
    # another learning rate or split is another run
    assert ranks.main(["--out", str(path), "--methods", names, "--seeds", "1", "--lr", "0.1", "--runs", "9"]) == 0
    assert (
        ranks.main(["--out", str(path), "--methods", names, "--seeds", "1", "--split", "validation", "--runs", "9"])
        == 0
    )
    assert len(made) == 8


def test_a_run_with_other_defaults_is_another_run_and_is_not_averaged_with_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ranks.csv"
    arm = OURS[0]
    append(path, row(arm.name, 1, 0.8, lr=f"{arm.lr:g}", options=arm.options))
    command = ["--out", str(path), "--methods", arm.name, "--seeds", "1", "--list"]
    assert ranks.main(command) == 0
    assert capsys.readouterr().out.startswith("done")
    before = IVON.from_adamw
    monkeypatch.setattr(IVON, "from_adamw", lambda *args, **options: before(*args, prior_std=0.3, **options))
    assert arm.options != read(path)[0].options
    assert ranks.main(command) == 0
    assert capsys.readouterr().out.startswith("missing")
    append(path, row(arm.name, 2, 0.8, lr=f"{arm.lr:g}", options=arm.options))
    with pytest.raises(
        ValueError, match=r"uniform ivon lora was run with beta1=.* and with beta1=.*cannot be averaged"
    ):
        page_text(read(path))


def test_the_options_of_the_optimizer_that_trains_are_those_of_its_row(tiny, monkeypatch):
    path, data = tiny
    for arm in (*CONTROLS, *OURS[:2]):
        settings = settings_of(arm, seed=1, steps=12, rank=6, target=2)
        optimizer = build(arm, load_base(path, seed=1), settings, data).optimizer
        told = dict(pair.split("=", 1) for pair in arm.options.replace(", ", ",").split())
        found = dict(pair.split("=", 1) for pair in options_of(optimizer).replace(", ", ",").split())
        given_by_the_data = {"ess", "weight_decay", "noise_warmup"}  # which are fewer here
        assert told.keys() == found.keys()
        assert {name for name in told if told[name] != found[name]} <= given_by_the_data
        assert {"beta2", "weight_decay", "hess_approx"} <= told.keys() or "betas" in told


def test_an_unknown_method_and_a_foreign_file_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        ranks.main(["--methods", "guess"])
    assert "there is no guess" in capsys.readouterr().err
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match="has the columns"):
        read(tmp_path / "a.csv")


ROWS = [
    row("uniform adamw lora", 1, 0.80),
    row("uniform adamw lora", 2, 0.82),
    row("snr_abs ivon lora", 1, 0.81),
    row("snr_abs ivon lora", 2, 0.832),
    row("snr ivon lora", 3, 0.9),
]


def test_the_tables_by_hand():
    # mean .81, standard deviation .01 sqrt 2, t(.975, 1) = 12.706: half width 12.706 * .01
    assert "0.8100 ± 0.1271" in results_table(ROWS)
    # differences .010 and .012
    assert "+0.0110 ± 0.0127" in difference_table(ROWS, REFERENCES[0])
    assert "snr ivon" not in difference_table(ROWS, REFERENCES[0])  # no seed in common
    cells = place_table(ROWS).splitlines()[2].split()[-12:]
    assert cells == ["3.0", "1.0", "0.0", "2.0", "4.0", "2.0", *["2.0"] * 6]


def test_what_is_found_is_said_with_its_direction():
    assert "- none" in finding(ROWS, REFERENCES[0])
    better = [row("snr_abs ivon lora", seed, 0.9 + 0.001 * seed, nll=0.5) for seed in (1, 2)]
    text = finding(ROWS[:2] + better, REFERENCES[0])
    assert "accuracy" not in text  # the interval of .1 and .081 is wider than their mean
    assert "- snr_abs ivon lora: NLL worse by 0.1000" in text
    assert "nothing can be told apart" in finding(ROWS[:1], REFERENCES[0])


def test_what_was_not_run_is_said():
    text = not_run(ROWS)
    assert "- snr_abs ivon triplets: seed 1, 2, 3\n" in text
    assert "- uniform adamw lora: seed 3\n" in text
    assert not_run([row(arm.name, seed, 0.8) for arm in (*CONTROLS, *OURS) for seed in SEEDS]) == ""


def test_the_report_is_a_page_and_a_picture(tmp_path):
    rows = [*ROWS, row("snr ivon lora", 0, 0.7, split="validation")]
    for each in rows:
        append(tmp_path / "ranks.csv", each)
    files = write_report(read(tmp_path / "ranks.csv"), tmp_path / "ranks.csv")
    assert [file.name for file in files] == ["ranks.md", "ranks.png"]
    assert files[0].read_text() == page_text(rows)
    assert "0.7000" in files[0].read_text()
    assert files[1].read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no runs on the test split"):
        write_report(rows[-1:], tmp_path / "ranks.csv")


def test_the_committed_report_is_that_of_the_committed_rows():
    rows = read(ranks.RESULTS / "ranks.csv")
    assert {r.ranks for r in rows} == {144}
    assert {r.method for r in rows} <= set(ARMS)
    assert len({r.key for r in rows}) == len(rows)
    assert (ranks.RESULTS / "ranks.md").read_text(encoding="utf-8") == page_text(rows)
