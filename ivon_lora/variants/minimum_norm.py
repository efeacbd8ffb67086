"""The smallest change of A and B that moves their product towards a gradient of the whole weight."""

from __future__ import annotations

import torch
from torch import Tensor

#: eigenvalues below this share of the largest are rounding: their inverse is 0 (16-bit gradients: 1e-4)
SMALLEST = {torch.float64: 1e-12, torch.float32: 1e-6}


def minimum_norm(
    a: Tensor,
    b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    scaling: float,
    damping: float = 0.0,
    coupling: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""The smallest (dA, dB) for which s (B dA + dB A) comes closest to the gradient G of the whole weight.

    With J the Jacobian of (A, B) -> s B A, LoRA's gradients are J^T G, and these are J^+ G, or with damping l
    (J^T J + l)^-1 J^T G. In the eigenbases U of s^2 B^T B (eigenvalues p) and V of s^2 A A^T (q), and with
    C = U^T (gA A^T + B^T gB) V / 2, whose two terms are equal in exact arithmetic::

        dA = U [(U^T gA)_i / (p_i + l) + C_ij (1 / (p_i + q_j + l) - 1 / (p_i + l)) (s^2 / q_j) (V^T A)_j]
        dB = [(gB V)_j / (q_j + l) + (B U)_i (s^2 / p_i) C_ij (1 / (p_i + q_j + l) - 1 / (q_j + l))] V^T

    This solves the paper's Sylvester equation on the way. A direction in which A or B is zero stays at rest.

    Args:
        a, grad_a: (r, n), A and its gradient.
        b, grad_b: (m, r), B and its gradient.
        scaling: s, the factor of B A.
        damping: l >= 0, in the units of s^2 B^T B.
        coupling: False leaves out what A and B know of each other, the terms with C: the block diagonal of the same
            system, Riemannian preconditioned LoRA (arXiv:2402.02347).

    Returns:
        dA (r, n) and dB (m, r), in the gradients' dtype.
    """
    dtype = grad_a.dtype
    wide = torch.promote_types(dtype, torch.float32)
    smallest = SMALLEST.get(dtype, 1e-4)
    a, b, grad_a, grad_b = (x.to(wide) for x in (a, b, grad_a, grad_b))
    p, u = torch.linalg.eigh(scaling**2 * (b.T @ b))
    q, v = torch.linalg.eigh(scaling**2 * (a @ a.T))
    of_p, of_q = _inverse(p + damping, smallest), _inverse(q + damping, smallest)
    new_a, new_b = of_p[:, None] * (u.T @ grad_a), of_q * (grad_b @ v)
    if coupling:
        c = u.T @ (grad_a @ a.T + b.T @ grad_b) @ v / 2
        of_both = _inverse(p[:, None] + q + damping, smallest)
        new_a += (c * (of_both - of_p[:, None]) * scaling**2 * _inverse(q, smallest)) @ (v.T @ a)
        new_b += (b @ u * scaling**2 * _inverse(p, smallest)) @ (c * (of_both - of_q))
    return (u @ new_a).to(dtype), (new_b @ v.T).to(dtype)


def _inverse(x: Tensor, smallest: float) -> Tensor:
    """1 / x, and 0 where x is not above a share of the largest."""
    return torch.where(x > smallest * x.max(), 1 / x, 0.0)
