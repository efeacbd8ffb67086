"""How large a learning rate a fresh LoRA adapter bears, and learning rates lowered to that.

LoRA (arXiv:2106.09685, section 4.1) draws A at random and starts B at zero, so at first the scale of A is all that is
known of how large the group's weights should be. Adam moves a weight by up to the learning rate in a step, whatever the
gradient. Where that is no longer small against the scale of A, B outgrows A within tens of steps, the adapter drowns
the layer it adapts, and no later step finds back.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ivon_lora.shards import whole

logger = logging.getLogger(__name__)

#: of the root mean square of a matrix as it is drawn
SHARE = 1 / 9


def lr_limit(params: Iterable[Tensor]) -> float:
    """Two digits of `SHARE` of the median, over matrices that do not start at zero, of their root mean square.

    Args:
        params: of one group, as they are before the first step. A matrix trains, has two dimensions larger than 1 and
            values (is not on the device "meta"). Sharded parameters are asked as a whole, by all processes.

    Returns:
        the limit, or infinity unless some matrices are zero and others are not. So there is none for vectors on their
        own, a trained model, an adapter whose training goes on, or AdaLoRA, whose zeros are the gates E: columns that
        have to grow to about 1.
    """
    sizes = [_root_mean_square(p) for p in params if _is_matrix(p)]
    drawn = [size for size in sizes if size > 0]
    if not drawn or len(drawn) == len(sizes):
        return math.inf
    return float(f"{SHARE * statistics.median(drawn):.2g}")  # digits that no order of summation changes


def with_limited_lrs(params: Sequence[Any], lr: Any) -> tuple[list[Any], Any]:
    """Parameters or groups, and the learning rate of those without their own, each lowered to its limit.

    Args:
        params: tensors, pairs of name and tensor, or groups with such; what cannot be one is left to torch to refuse.
        lr: number or tensor; what it was where that is not too large.
    """
    if not any(isinstance(item, dict) for item in params):
        return list(params), _limited(lr, params)
    groups = []
    for item in params:
        if isinstance(item, dict) and isinstance(item.get("params"), Iterable):
            given = item["params"]
            tensors = given if isinstance(given, Tensor | set) else list(given)  # it may be a generator
            item = {**item, "params": tensors}
            stated = item.get("lr", lr)
            own = _limited(stated, [tensors] if isinstance(tensors, Tensor) else tensors)
            if own is not stated:
                item["lr"] = own
        groups.append(item)
    return groups, lr


def _limited(lr: Any, params: Iterable[Any]) -> Any:
    tensors = [item[-1] if isinstance(item, tuple) else item for item in params]
    limit = lr_limit(p for p in tensors if isinstance(p, Tensor))
    if not isinstance(lr, Real | Tensor) or not float(lr) > limit:
        return lr
    logger.warning(
        "lr=%g is lowered to %g, a ninth of the scale at which LoRA's A was drawn, for beyond it training tends to "
        "collapse (lr_limit=None keeps it)",
        float(lr),
        limit,
    )
    return torch.full_like(lr, limit) if isinstance(lr, Tensor) else limit


def _is_matrix(p: Tensor) -> bool:
    return p.requires_grad and p.is_floating_point() and not p.is_meta and sum(n > 1 for n in p.shape) > 1


def _root_mean_square(p: Tensor) -> float:
    with torch.no_grad():
        norm = torch.linalg.vector_norm(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return float(whole(norm)) / math.sqrt(p.numel())
