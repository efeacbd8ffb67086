"""Inputs unlike those of training: the distance is known in closed form, and nonsense is far from what was seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import InputDistance


class Mixer(nn.Module):
    """Embeds tokens and mixes them; the input of ``mix`` is the embedding."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, width), nn.Linear(width, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mixed: Tensor = self.mix(self.embed(input_ids))
        return mixed


def test_distance_is_the_closed_form_and_ignores_padding() -> None:
    torch.manual_seed(0)
    model, ids = Mixer(), torch.randint(50, (40, 6))
    batches = [{"input_ids": part} for part in ids.split(15)]
    distance = InputDistance.fit(model, "mix", batches, shrinkage=0.1)

    states = model.embed(ids).double().mean(1).detach()
    covariance = states.T.cov()
    covariance += 0.1 * covariance.diagonal().mean() * torch.eye(4)
    centred = states - states.mean(0)
    expected = torch.stack([(row @ torch.linalg.solve(covariance, row)).sqrt() for row in centred])
    torch.testing.assert_close(distance(model, {"input_ids": ids}), expected)

    padded = torch.cat([ids, torch.zeros(40, 3).long()], 1)
    mask = torch.cat([torch.ones(40, 6), torch.zeros(40, 3)], 1).long()
    torch.testing.assert_close(distance(model, {"input_ids": padded, "attention_mask": mask}), expected)
    assert not model.mix._forward_pre_hooks


def test_foreign_tokens_are_far() -> None:
    torch.manual_seed(0)
    model = Mixer(width=32)
    seen, held_back, foreign = (torch.randint(low, low + 25, (200, 32)) for low in (0, 0, 25))
    distance = InputDistance.fit(model, "mix", [{"input_ids": seen}])
    near, far = (distance(model, {"input_ids": ids}) for ids in (held_back, foreign))
    assert far.median() > near.quantile(0.95)


def test_what_cannot_be_measured_is_named() -> None:
    model, batch = Mixer(), {"input_ids": torch.zeros(3, 2).long()}
    with pytest.raises(ValueError, match="no layer 'mixer'"):
        InputDistance.fit(model, "mixer", [batch])
    with pytest.raises(ValueError, match=r"input of embed must be \(batch, tokens, hidden\), got \(3, 2\)"):
        InputDistance.fit(model, "embed", [batch])
    with pytest.raises(ValueError, match="at least 2 training inputs, got 0"):
        InputDistance.fit(model, "mix", [])
    with pytest.raises(ValueError, match="shrinkage must be positive, got 0"):
        InputDistance.fit(model, "mix", [batch], shrinkage=0)
