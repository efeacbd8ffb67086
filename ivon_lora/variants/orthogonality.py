"""A penalty on ranks of one adapter that point the same way (AdaLoRA, arXiv:2303.10512; RM-LoRA, arXiv:2407.12074)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ivon_lora.lora.adapters import LoraAdapter

#: "norm": ||M M^T - I||_F, M the ranks as rows; "cosine": mean |cosine| of two of its rows
KINDS = ("norm", "cosine")

#: which tensors
ON = ("both", "A", "B")


def orthogonality_penalty(values: Sequence[tuple[Tensor, int]], kind: str = "norm") -> Tensor:
    """Mean over tensors of how far their ranks are from orthonormal (for "cosine": from orthogonal).

    Args:
        values: tensors, e.g. of `penalised`, with their rank dimensions.
        kind: of `KINDS`.

    Returns:
        ().
    """
    found = []
    for value, dim in values:
        rows = value.movedim(dim, 0).flatten(1)
        if kind == "norm":
            found.append(torch.linalg.norm(rows @ rows.mT - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)))
        else:
            rows = torch.nn.functional.normalize(rows, dim=1)
            upper = torch.triu(rows @ rows.mT, diagonal=1)
            found.append(upper.abs().sum() / max(len(rows) * (len(rows) - 1) / 2, 1))
    return torch.stack(found).mean()


def penalty_gradients(values: Sequence[tuple[Tensor, int]], kind: str = "norm") -> list[Tensor]:
    """Gradient of the penalty for each of the tensors, in fp32 at least; 0 where a tensor is orthonormal."""
    with torch.enable_grad():
        wide = [(v.detach().to(torch.promote_types(v.dtype, torch.float32)).requires_grad_(), dim) for v, dim in values]
        return list(torch.autograd.grad(orthogonality_penalty(wide, kind), [v for v, _ in wide]))


def penalised(adapters: Sequence[LoraAdapter], on: str = "both") -> list[tuple[Tensor, int]]:
    """The tensors A and B of some adapters, or one kind, with their rank dimensions."""
    return [(p, dim) for a in adapters for key, p, dim in a.tensors() if key != "E" and on in ("both", key)]
