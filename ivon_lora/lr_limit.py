"""``lr_limit="auto"``: the largest learning rate that steps are taken with, from the scale that an adapter is drawn at.

LoRA (arXiv:2106.09685, section 4.1) draws A at random and starts B at zero, so at first the scale of A is all that is
known of how large the group's weights should be. Adam moves a weight by up to the learning rate in a step, whatever the
gradient. Where that is no longer small against the scale of A, B outgrows A within tens of steps, the adapter drowns
the layer it adapts, and no later step finds back.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

from ivon_lora.shards import whole

#: of the root mean square of a matrix as it is drawn
SHARE = 0.1


def limit_of(params: Iterable[Tensor]) -> float:
    """Three digits of `SHARE` of the median, over matrices that do not start at zero, of their root mean square.

    Args:
        params: of one group, as they are before the first step. A matrix has two dimensions larger than 1, and values
            (not on the device "meta"). Sharded parameters are asked as a whole, by all processes.

    Returns:
        the limit, or infinity unless some matrices are zero and others are not. So there is none for vectors on their
        own, a trained model, an adapter whose training goes on, or AdaLoRA, whose zeros are the gates E: columns that
        have to grow to about 1.
    """
    sizes = [_root_mean_square(p) for p in params if _is_matrix(p)]
    drawn = [size for size in sizes if size > 0]
    if not drawn or len(drawn) == len(sizes):
        return math.inf
    return float(f"{SHARE * statistics.median(drawn):.3g}")  # digits that no order of summation changes


def _is_matrix(p: Tensor) -> bool:
    return sum(n > 1 for n in p.shape) > 1 and p.is_floating_point() and not p.is_meta


def _root_mean_square(p: Tensor) -> float:
    with torch.no_grad():
        norm = torch.linalg.vector_norm(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return float(whole(norm)) / math.sqrt(p.numel())
