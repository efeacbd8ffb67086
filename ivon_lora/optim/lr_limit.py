"""How large a learning rate a fresh LoRA adapter bears.

Adam moves a weight by up to the learning rate in a step, whatever the gradient, and LoRA (arXiv:2106.09685, section
4.1) starts B at zero and A at some 1 / sqrt(width). The moves of a row of A add up over its inputs, and B grows
meanwhile. Beyond some learning rate B A outgrows the layer that it adapts within tens of steps, and no later step
finds back.

Where that begins was measured (`benchmarks/results/posterior.md`, section 2): some 0.86 / (s sqrt(rank width)) in 200
steps, with s = lora_alpha / rank, whatever the scale at which A is drawn. An optimizer does not see s, and s sqrt(rank)
grows with the rank for those who scale alpha with it and falls for those who keep it fixed; so the limit follows the
width alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.parameter import is_lazy

from ivon_lora.optim.sharding import whole

#: learning rate times root of the width: below the collapse where lora_alpha / sqrt(rank) is at most some 7
REACH = 0.064


def lr_limit(params: Iterable[Tensor]) -> float:
    """Two digits of ``0.064 / sqrt(width)``, for the median number of inputs of the matrices that are drawn.

    Args:
        params: of one group, as they are before the first step. A matrix trains, has two dimensions larger than 1 and
            values (is neither lazy, fake nor on the device "meta"). Sharded parameters are asked as a whole, by all
            processes.

    Returns:
        the limit, or infinity unless some matrices are zero and others are not. So there is none for vectors on their
        own, a trained model, an adapter whose training goes on, or AdaLoRA, whose zeros are the gates E: columns that
        have to grow to about 1.
    """
    matrices = [p for p in params if _is_matrix(p)]
    drawn = [p for p in matrices if not _is_zero(p)]
    if not drawn or len(drawn) == len(matrices):
        return math.inf
    # of a convolution: channels times the size of its kernel
    width = statistics.median(p.shape[1:].numel() for p in drawn)
    return float(f"{REACH / math.sqrt(width):.2g}")


def _is_matrix(p: Tensor) -> bool:
    has_values = not p.is_meta and not is_lazy(p) and not isinstance(p, FakeTensor)
    return has_values and p.requires_grad and p.is_floating_point() and sum(n > 1 for n in p.shape) > 1


def _is_zero(p: Tensor) -> bool:
    with torch.no_grad():
        norm = torch.linalg.vector_norm(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return float(whole(norm)) == 0.0
