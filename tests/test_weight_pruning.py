"""Pruning of single weights at test time: which ones go, how many, and that the means come back."""

import math

import pytest
import torch

from ivon_lora import IVON, posterior_predict, prune_weights, snapshot_posterior
from ivon_lora.posterior.posterior import PosteriorFile


def make(mean: dict[str, list[float]], std: dict[str, list[float]]) -> PosteriorFile:
    return PosteriorFile(
        mean={name: torch.tensor(values) for name, values in mean.items()},
        std={name: torch.tensor(values) for name, values in std.items()},
        rank_mask={},
        seed=1,
        completed_steps=0,
    )


#: signal-to-noise ratios: a 2, 1, 8, 0.5; b 30, 20, 10, 3 although its means are the smaller ones
POSTERIOR = make(
    {"a": [2.0, -1.0, 4.0, 1.0], "b": [0.3, -0.2, 0.1, 0.03]},
    {"a": [1.0, 1.0, 0.5, 2.0], "b": [0.01, 0.01, 0.01, 0.01]},
)


def zeros(posterior: PosteriorFile) -> dict[str, list[int]]:
    return {name: [i for i, m in enumerate(posterior.mean[name]) if m == 0] for name in posterior.names}


@pytest.mark.parametrize(
    ("fraction", "scope", "want"),
    [
        (0.0, "tensor", {"a": [], "b": []}),
        (0.25, "tensor", {"a": [3], "b": [3]}),
        (0.5, "tensor", {"a": [1, 3], "b": [2, 3]}),
        (1.0, "tensor", {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}),
        (0.25, "global", {"a": [1, 3], "b": []}),
        (0.5, "global", {"a": [0, 1, 3], "b": [3]}),
        (0.1, "global", {"a": [3], "b": []}),
    ],
)
def test_the_noisiest_weights_go_without_leaving_noise(fraction, scope, want):
    pruned = prune_weights(POSTERIOR, fraction, scope)
    assert zeros(pruned) == want
    for name in pruned.names:
        dead = pruned.mean[name] == 0
        assert not pruned.std[name][dead].any()
        assert torch.equal(pruned.mean[name][~dead], POSTERIOR.mean[name][~dead])
        assert torch.equal(pruned.std[name][~dead], POSTERIOR.std[name][~dead])
        assert not pruned.sample(5, 2)[name][dead].any()
    assert zeros(POSTERIOR) == {"a": [], "b": []}, "the original is as it was"


def test_ties_go_by_index_and_dead_ranks_do_not_count():
    equal = make({"a": [1.0] * 6}, {"a": [1.0] * 6})
    assert zeros(prune_weights(equal, 0.5)) == {"a": [0, 1, 2]}
    ranks = make({"a": [0.0, 1.0, 1e-9, 0.0]}, {"a": [0.0, 1.0, 1.0, 0.0]})
    assert zeros(prune_weights(ranks, 0.5)) == {"a": [0, 2, 3]}, "one of the two that are alive"
    assert zeros(prune_weights(ranks, 0.5, "global")) == {"a": [0, 2, 3]}
    untrained = make({"a": [0.0, 0.0, 1.0, 2.0]}, {"a": [1.0, 1.0, 1.0, 1.0]})
    assert zeros(prune_weights(untrained, 0.75)) == {"a": [0, 1, 2]}, "a zero with noise is alive"
    certain = make({"a": [1e-9, 5.0]}, {"a": [0.0, 1.0]})
    assert zeros(prune_weights(certain, 0.5)) == {"a": [1]}, "a weight without noise is infinitely certain"


def test_the_model_predicts_with_the_pruned_means_and_gets_its_own_back():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    optimizer = IVON(model.named_parameters(), lr=0.1, ess=20)
    before = model.weight.detach().clone()
    pruned = prune_weights(snapshot_posterior(optimizer), 0.5, names=["weight"])
    assert int((pruned.mean["weight"] == 0).sum()) == 6
    lowest = before.abs().flatten().sort().indices[:6]
    with pruned.loaded(model):
        assert not model.weight.flatten()[lowest].any()
        logits = model(x).detach()
    assert torch.equal(model.weight, before)
    assert torch.equal(posterior_predict(model, pruned, lambda m: m(x), temperature=math.inf), logits.softmax(-1))
    with pytest.raises(KeyboardInterrupt), pruned.loaded(model):
        raise KeyboardInterrupt
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": -0.1}, r"fraction must lie in \[0, 1\], got -0.1"),
        ({"fraction": math.nan}, "fraction must lie in"),
        ({"fraction": 0.1, "scope": "layer"}, "scope must be one of tensor, global, got 'layer'"),
        ({"fraction": 0.1, "names": ["c"]}, "no parameter 'c'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune_weights(POSTERIOR, **arguments)
