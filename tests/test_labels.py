"""Losses that are means over labels: the posterior is that of the sum over the labels of an example."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ivon_lora import VAdam
from tests.tiny_language_model import WORDS, make_model

LENGTH = 6


def batch(*lengths: int) -> dict[str, Tensor]:
    """Sequences that are padded on the right; a label that is -100 in the first one is no prediction."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(2, len(WORDS), (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def optimizer_of(model: Any, **options: Any) -> VAdam:
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return VAdam(params, lr=1e-2, num_examples=32, noise_warmup=0, temperature=1e-2, **options)


def close(one: VAdam, other: VAdam, **tolerance: Any) -> None:
    for p, q in zip(one.parameters, other.parameters, strict=True):
        torch.testing.assert_close(one.posterior(p).mean, other.posterior(q).mean, **tolerance)
        torch.testing.assert_close(one.posterior(p).stddev, other.posterior(q).stddev, **tolerance)


@pytest.mark.parametrize("options", [{}, {"prior_std": 0.05}, {"batch_size": 4}])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_mean_over_tokens_is_the_sum_over_a_sequence(options: dict[str, Any], micro_batches: int) -> None:
    """Five labels a sequence: the same samples, steps and posterior as of losses that are sums, batch size 4."""
    tokens, sums = make_model(), make_model()
    counted, stated = optimizer_of(tokens, **options), optimizer_of(sums, **{**options, "batch_size": 4})
    counted.attach(tokens)
    whole = batch(*[LENGTH] * 4)
    for _ in range(20):
        tokens.train()
        sums.train()
        for part in range(micro_batches):
            (tokens(**{k: v[part::micro_batches] for k, v in whole.items()}).loss / micro_batches).backward()
        stated.train()
        logits = sums(whole["input_ids"], attention_mask=whole["attention_mask"]).logits[:, :-1]
        (F.cross_entropy(logits.flatten(0, 1), whole["labels"][:, 1:].flatten(), reduction="sum") / 4).backward()
        for optimizer in (counted, stated):
            optimizer.step()
            optimizer.zero_grad()
    assert counted.param_groups[0]["labels_per_example"] == LENGTH - 1
    assert stated.param_groups[0]["labels_per_example"] == 1
    assert counted.param_groups[0]["examples_seen"] == stated.param_groups[0]["examples_seen"] == 80
    close(counted, stated, rtol=1e-3, atol=1e-4)


def test_sequences_of_different_lengths_are_counted_by_their_labels() -> None:
    """5, 2 and 1 labels in a first step, then 4; a running mean a sequence, and one that a checkpoint keeps."""
    model = make_model()
    optimizer = optimizer_of(model)
    optimizer.attach(model)
    for lengths, mean in [((6, 3, 2), 8 / 3), ((5,), 12 / 4)]:
        model(**batch(*lengths)).loss.backward()
        assert optimizer.examples.of_step() == (len(lengths), sum(lengths) - len(lengths))
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.param_groups[0]["labels_per_example"] == pytest.approx(mean)
    other = optimizer_of(make_model())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["labels_per_example"] == pytest.approx(3)


def test_a_loss_of_our_own_counts_sequences_unless_it_is_told() -> None:
    """As in preference learning, where a sequence has one label: who likes it."""
    model = make_model()
    optimizer = optimizer_of(model)
    optimizer.attach(model)
    model(**batch(6, 6)).logits.square().mean().backward()
    assert optimizer.examples.of_step() == (2, 2)
    optimizer.zero_grad()
    optimizer.count_examples(2, labels=10)
    model(**batch(6, 6)).logits.square().mean().backward()
    assert optimizer.examples.of_step() == (2, 10)


def test_the_share_of_the_data_and_a_word_about_it(caplog: pytest.LogCaptureFixture) -> None:
    """One weight, gradient 2, batch 3: h = 12 beside a prior of precision 1 / (ess 0.1^2)."""

    def after(steps: int, **options: Any) -> tuple[float, str]:
        p = torch.nn.Parameter(torch.full((4,), 0.5))
        optimizer = VAdam([p], lr=0.0, num_examples=6, batch_size=3, noise_warmup=6, **options)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(steps):
                optimizer.train()
                p.grad = torch.full_like(p, 2.0)
                optimizer.param_groups[0]["lr"] = 1e-9
                optimizer.step()
        return optimizer.metrics()["data/share"], caplog.text

    share, said = after(1, temperature=1.0, prior_std=0.1)
    assert share == pytest.approx(12 / (12 + 100 / 6))
    assert said == ""  # half an epoch
    share, said = after(2, temperature=1.0, prior_std=1e-3)
    assert share == pytest.approx(12 / (12 + 1e6 / 6))
    assert "the data have 0.0072 % of the precision of the median weight" in said
    assert "larger prior_std=" in said
    share, said = after(2, temperature=1e4, prior_std=10.0)
    assert "times the weights, 0.5 in root mean square" in said
    assert after(4, temperature=1.0, prior_std=0.1)[1] == ""
