"""LoRA-Pro: its gradients are those of the pseudo-inverse, and they move B A as full fine-tuning would."""

import pytest
import torch
from torch import Tensor

from ivon_lora.variants.minimum_norm import minimum_norm


def jacobian(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """d vec(s B A) / d (A, B), (m n, r n + m r)."""
    both = torch.autograd.functional.jacobian(lambda x, y: scaling * y @ x, (a, b))
    return torch.cat([d.reshape(b.shape[0] * a.shape[1], -1) for d in both], 1)


def problem(m: int, n: int, r: int, kind: str = "full") -> tuple[Tensor, Tensor, Tensor]:
    """A, B and the gradient of the whole weight, in float64."""
    generator = torch.Generator().manual_seed(100 * m + 10 * n + r)
    a, b, g = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((r, n), (m, r), (m, n)))
    if kind == "fresh":
        b.zero_()
    if kind == "dead rank":
        a[-1], b[:, -1] = 0, 0
    return a, b, g


def raw(a: Tensor, b: Tensor, g: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """LoRA's gradients of A and B."""
    return scaling * b.T @ g, scaling * g @ a.T


@pytest.mark.parametrize("kind", ["full", "fresh", "dead rank"])
@pytest.mark.parametrize(("m", "n", "r", "scaling"), [(7, 5, 2, 2.0), (8, 9, 3, 0.5), (3, 4, 5, 1.3), (6, 6, 1, 16.0)])
def test_equals_the_minimum_norm_least_squares_solution(m: int, n: int, r: int, scaling: float, kind: str) -> None:
    a, b, g = problem(m, n, r, kind)
    new_a, new_b = minimum_norm(a, b, *raw(a, b, g, scaling), scaling)
    best = torch.linalg.pinv(jacobian(a, b, scaling), rtol=1e-9) @ g.flatten()
    found = torch.cat([new_a.flatten(), new_b.flatten()])
    assert (found - best).norm() < 1e-12 * best.norm() or kind == "dead rank" and r == 1 and not found.any()


@pytest.mark.parametrize("kind", ["full", "fresh", "dead rank"])
@pytest.mark.parametrize("damping", [0.01, 3.0])
def test_damped_it_equals_the_dense_solve(damping: float, kind: str) -> None:
    a, b, g = problem(6, 8, 3, kind)
    j = jacobian(a, b, 2.0)
    best = torch.linalg.solve(j.T @ j + damping * torch.eye(j.shape[1], dtype=j.dtype), j.T @ g.flatten())
    new_a, new_b = minimum_norm(a, b, *raw(a, b, g, 2.0), 2.0, damping)
    torch.testing.assert_close(torch.cat([new_a.flatten(), new_b.flatten()]), best, rtol=1e-12, atol=1e-12)


def test_what_remains_is_outside_both_spans_and_no_gauge_changes_it() -> None:
    a, b, g = problem(6, 8, 2)
    new_a, new_b = minimum_norm(a, b, *raw(a, b, g, 2.0), 2.0)
    moved = 2.0 * (b @ new_a + new_b @ a)
    outside_b = torch.eye(6, dtype=torch.float64) - b @ torch.linalg.pinv(b)
    outside_a = torch.eye(8, dtype=torch.float64) - torch.linalg.pinv(a) @ a
    torch.testing.assert_close(g - moved, outside_b @ g @ outside_a)
    gauge = torch.tensor([[1.0, 2.0], [0.5, -3.0]], dtype=torch.float64)
    a, b = gauge @ a, b @ torch.linalg.inv(gauge)
    new_a, new_b = minimum_norm(a, b, *raw(a, b, g, 2.0), 2.0)
    torch.testing.assert_close(2.0 * (b @ new_a + new_b @ a), moved)


def test_without_coupling_it_is_the_riemannian_preconditioner() -> None:
    a, b, g = problem(6, 8, 3)
    grad_a, grad_b = raw(a, b, g, 2.0)
    new_a, new_b = minimum_norm(a, b, grad_a, grad_b, 2.0, damping=0.01, coupling=False)
    one = 0.01 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(new_a, torch.linalg.solve(4 * b.T @ b + one, grad_a))
    torch.testing.assert_close(new_b, torch.linalg.solve(4 * a @ a.T + one, grad_b.T).T)


def test_fp32_is_exact_where_b_has_hardly_begun() -> None:
    a, b, g = problem(16, 24, 4)
    exact = minimum_norm(a, b * 1e-5, *raw(a, b * 1e-5, g, 2.0), 2.0)
    a32, b32, g32 = a.float(), (b * 1e-5).float(), g.float()
    for mine, best in zip(minimum_norm(a32, b32, *raw(a32, b32, g32, 2.0), 2.0), exact, strict=True):
        assert (mine - best).norm() < 1e-5 * best.norm()
