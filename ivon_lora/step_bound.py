"""``max_step="auto"``: how far an element may move in one step, from the scale at which an adapter's weights are drawn.

LoRA (arXiv:2106.09685, section 4.1) draws A at random and starts B at zero, so at first the scale of A is all that is
known of how large the group's weights should be. At learning rates that suit the task Adam's steps are small against
it. Where they are not, B outgrows A within a few steps and the adapter drowns the layer it adapts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

from ivon_lora.shards import whole

#: of the root mean square of a matrix as it is drawn
SHARE = 0.05


def step_bound(params: Iterable[Tensor]) -> float:
    """`SHARE` of the median, over the matrices that do not start at zero, of their root mean square; two digits of it.

    Args:
        params: of one group, as they are before the first step. A matrix has two dimensions larger than 1, and values
            (not on the device "meta"). Sharded parameters are asked as a whole, by all processes.

    Returns:
        the bound, in the weights' units; infinity unless some matrices are zero and others are not. So vectors are not
        bounded on their own, nor is a trained model, an adapter whose training goes on, or AdaLoRA's gates E, which are
        columns between matrices that are drawn.
    """
    sizes = [_root_mean_square(p) for p in params if _is_matrix(p)]
    drawn = [size for size in sizes if size > 0]
    if not drawn or len(drawn) == len(sizes):
        return math.inf
    return float(f"{SHARE * statistics.median(drawn):.2g}")  # digits that no order of summation changes


def _is_matrix(p: Tensor) -> bool:
    return sum(n > 1 for n in p.shape) > 1 and p.is_floating_point() and not p.is_meta


def _root_mean_square(p: Tensor) -> float:
    with torch.no_grad():
        norm = torch.linalg.vector_norm(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return float(whole(norm)) / math.sqrt(p.numel())
