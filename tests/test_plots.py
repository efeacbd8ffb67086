"""The pictures show the numbers that they were given, in the Axes that they were given."""

import math

import numpy as np
import pytest
import torch

from ivon_lora import IVON, LoraAdapter, RankPruner, snapshot_posterior
from ivon_lora.plots import plot_rank_history, plot_ranks, plot_reliability, plot_snr
from ivon_lora.plots.grid import layers_and_modules, rank_grid
from ivon_lora.plots.reliability import wilson
from ivon_lora.plots.snr import FLOOR, QUANTILES, snr_by_module
from ivon_lora.plots.style import BLUE
from ivon_lora.posterior.metrics import Reliability
from ivon_lora.posterior.posterior import PosteriorFile

pytest.importorskip("matplotlib")


def test_ranks_are_arranged_by_layer_and_module():
    layers, rows = rank_grid({"enc.layer.10.a.q": 3, "enc.layer.2.a.q": 1, "enc.layer.2.out": 4, "pooler.dense": 5})
    assert layers == ["2", "10", "-"]
    assert rows == {"a.q": [1, 3, None], "out": [4, None, None], "pooler.dense": [None, None, 5]}


def test_several_numbered_stacks_keep_their_names():
    paths = ["m.encoder.block.0.layer.0.q", "m.encoder.block.1.layer.0.q", "m.decoder.block.1.layer.0.q", "m.lm_head"]
    places = [("0", "encoder.layer.0.q"), ("1", "encoder.layer.0.q"), ("1", "decoder.layer.0.q"), ("-", "m.lm_head")]
    assert list(layers_and_modules(paths).values()) == places
    assert list(rank_grid(dict.fromkeys(paths, 3))[1].values()) == [[3, 3, None], [None, 3, None], [None, None, 3]]
    nested = {"3.q": ("3", "q"), "encoder.layer.3.q": ("3", "encoder.layer.q")}
    assert layers_and_modules(nested) == nested
    assert layers_and_modules([]) == {}


def test_the_heat_map_has_every_rank_in_its_cell_and_says_what_is_absent():
    axes = plot_ranks({"layer.0.q": 3, "layer.0.v": 0, "layer.2.q": 8}, highest=8)
    np.testing.assert_array_equal(np.ma.getdata(axes.images[0].get_array()), [[3, 8], [0, np.nan]])
    assert axes.images[0].get_clim() == (0, 8)
    written = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "3", (1, 0): "8", (0, 1): "0"}
    assert [line.get_marker() for line in axes.lines] == ["x"]  # where there is no such module
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "v"]
    assert axes.get_title(loc="left") == "LoRA ranks: 11 of 24 live in 3 layers"


@pytest.fixture(scope="module")
def optimizer():
    """After four steps of two layers of three ranks, one of which lives in each."""
    torch.manual_seed(0)
    names = {i: [f"layer.{i}.q.lora_{k}.default.weight" for k in "AB"] for i in (0, 1)}
    tensors = {name: torch.nn.Parameter(torch.randn(3, 3)) for i in names for name in names[i]}
    adapters = [LoraAdapter(f"layer.{i}.q", *(tensors[name] for name in names[i])) for i in names]
    pruner = RankPruner(adapters, 1, total_steps=4, warmup=0, final=1, interval=1)
    optimizer = IVON(tensors.items(), lr=0.1, ess=50, pruner=pruner)
    for _ in range(4):
        optimizer.train()
        sum((p**2).sum() for p in tensors.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_the_ranks_of_an_optimizer(optimizer):
    axes = plot_ranks(optimizer)
    live = [row["live"] for row in optimizer.rank_table()]
    assert np.ma.getdata(axes.images[0].get_array()).tolist() == [live]
    assert axes.get_title(loc="left") == "LoRA ranks: 2 of 6 live in 2 layers"


def test_snr_is_that_of_live_weights_with_the_layers_together(optimizer):
    posterior = snapshot_posterior(optimizer)
    groups = snr_by_module(posterior)
    assert set(groups) == {("q", "A"), ("q", "B")}
    assert sum(map(len, groups.values())) == 2 * 2 * 3  # two live ranks, three numbers in A and in B
    names = [f"layer.{i}.q.lora_A.default.weight" for i in (0, 1)]
    ratios = torch.cat([(posterior.mean[n].abs() / posterior.std[n])[posterior.std[n] > 0] for n in names])
    assert torch.equal(groups["q", "A"], ratios)
    axes = plot_snr(posterior)
    q = np.maximum(np.quantile(ratios.double(), QUANTILES), FLOOR)
    drawn = [line.get_xdata() for line in axes.lines if line.get_color() == BLUE][:3]
    np.testing.assert_allclose(drawn[0], [q[0], q[-1]])
    np.testing.assert_allclose(drawn[1], [q[1], q[-2]])
    np.testing.assert_allclose(drawn[2], [q[2]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["A", "B"]


def test_the_module_and_factor_of_a_parameter():
    keys = {
        "base_model.model.encoder.layer.3.attention.self.query.lora_E.default": ("attention.self.query", "E"),
        "tok.lora_embedding_A.default": ("tok", "A"),
        "base_model.model.classifier.modules_to_save.default.weight": ("classifier.weight", ""),
    }
    ones = dict.fromkeys(keys, torch.ones(2))
    posterior = PosteriorFile(ones, ones, {}, seed=0, completed_steps=0)
    assert list(snr_by_module(posterior)) == list(keys.values())


def test_the_history_shows_both_lines():
    axes = plot_rank_history([12, 12, 8, 8], [12, 10, 9, 8], steps=[5, 10, 15, 20])
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["live"].get_ydata().tolist() == [12, 12, 8, 8]
    assert lines["budget"].get_ydata().tolist() == [12, 10, 9, 8]
    assert lines["live"].get_xdata().tolist() == [5, 10, 15, 20]
    assert lines["live"].get_linestyle() != lines["budget"].get_linestyle()
    assert len(plot_rank_history([3]).lines) == 1


BINS = Reliability((0, 0, 10, 30), (math.nan, math.nan, 0.6, 0.9), (math.nan, math.nan, 0.5, 0.8))


def test_the_reliability_diagram_has_points_intervals_and_shares():
    axes = plot_reliability(BINS, "mean")
    curve = axes.containers[1]
    np.testing.assert_allclose(curve[0].get_xydata(), [[0.6, 0.5], [0.9, 0.8]])
    ends = [segment[:, 1] for segment in curve[2][0].get_segments()]
    np.testing.assert_allclose(ends, [wilson(0.5, 10), wilson(0.8, 30)])
    assert [bar.get_height() for bar in axes.containers[0]] == [0.25, 0.75]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "mean, ECE 0.100, n = 40" in labels
    assert axes.get_xlim()[0] == 0.5
    plot_reliability(BINS, "other", axes)
    assert len(axes.containers) == 3  # one more curve, no more bars
    first, second = axes.containers[1][0], axes.containers[2][0]
    for trait in ("get_color", "get_marker", "get_linestyle"):
        assert getattr(first, trait)() != getattr(second, trait)()


def test_wilson_by_its_defining_equation():
    """Both ends solve (p - share)^2 = z^2 p (1 - p) / n."""
    for share, n in ((0.5, 10), (0.0, 7), (1.0, 3), (0.93, 1000)):
        for p in wilson(share, n):
            assert (p - share) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-6)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="ranks is empty"):
        plot_ranks({})
    with pytest.raises(ValueError, match="needs ranks: give the optimizer one, pruner="):
        plot_ranks(IVON([torch.nn.Parameter(torch.ones(1))], lr=0.1, ess=1))
    with pytest.raises(ValueError, match="one entry for each step"):
        plot_rank_history([1, 2], [1])
    with pytest.raises(ValueError, match="one entry for each step"):
        plot_rank_history([])
    with pytest.raises(ValueError, match="no weight with noise"):
        plot_snr(PosteriorFile({}, {}, {}, seed=0, completed_steps=0))
