"""A penalty on ranks of one adapter that point the same way (AdaLoRA, arXiv:2303.10512; RM-LoRA, arXiv:2407.12074)."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonality_penalty(value: Tensor, dim: int) -> Tensor:
    """||M M^T - I||_F, (), M the ranks of a tensor, along ``dim``, as rows."""
    rows = value.movedim(dim, 0).flatten(1)
    return torch.linalg.norm(rows @ rows.mT - torch.eye(len(rows), device=rows.device, dtype=rows.dtype))


def penalty_gradient(value: Tensor, dim: int) -> Tensor:
    """Gradient of the penalty, in fp32 at least; 0 where the ranks are orthonormal."""
    wide = value.detach().to(torch.promote_types(value.dtype, torch.float32))
    gradient: Tensor = torch.func.grad(orthogonality_penalty)(wide, dim)
    return gradient
