"""Scores of ranks a block at a time: the sums that the exact means allow, whatever the shape and the block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ivon_lora import rank_blocks
from ivon_lora.backends import Work
from ivon_lora.functional.importance import CRITERIA, importance, rank_mean, rounded_means
from ivon_lora.functional.ivon import root_precision

SHAPES = [((6, 37), 0), ((29, 6), 1), ((5, 3, 3, 3), 0), ((7, 5, 3, 3), 1), ((4, 1), 0), ((3, 500), 0), ((500, 3), 1)]


@pytest.mark.parametrize("block", [1, 16, 1000, 1 << 15])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_block_sums_round_to_the_exact_means(shape: tuple[int, ...], dim: int, block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mean, hess = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.1
    own = torch.tensor([0.1])
    work = Work(0, mean, mean, mean, hess, own_decay=own if block == 16 else None)
    for criterion in CRITERIA:
        if criterion == "sensitivity":
            continue
        (sums,) = rank_blocks.rank_sums([work], [dim], criterion, 100.0, 0.1 if work.own_decay is None else 5.0, block)
        values = importance(criterion, mean, root_precision(hess, 100.0, 0.1))
        count = values.numel() // shape[dim]
        means, undecided = rounded_means(sums, count, count)
        expected = rank_mean(values, dim).numpy()
        assert np.array_equal(means[~undecided], expected[~undecided])
        assert undecided.mean() <= 0.5 or len(undecided) < 4
