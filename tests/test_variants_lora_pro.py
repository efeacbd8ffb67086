"""LoRA-Pro: its gradients are those of the pseudo-inverse, and they move B A as full fine-tuning would."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import find_adapters
from ivon_lora.variants.gradients import step_sizes
from ivon_lora.variants.lora_pro import LoraPro, minimum_norm
from tests.variant_problem import loss_of, start


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
@pytest.mark.parametrize("damping", [0.0, 0.01, 3.0])
@pytest.mark.parametrize(("m", "n", "r", "scaling"), [(7, 5, 2, 2.0), (8, 9, 3, 0.5), (3, 4, 5, 1.3), (6, 6, 1, 16.0)])
def test_equals_the_minimum_norm_or_the_damped_least_squares_solution(
    m: int, n: int, r: int, scaling: float, damping: float, kind: str
) -> None:
    a, b, g = problem(m, n, r, kind)
    j, damping = jacobian(a, b, scaling), damping * scaling**2
    if damping:
        best = torch.linalg.solve(j.T @ j + damping * torch.eye(j.shape[1], dtype=j.dtype), j.T @ g.flatten())
    else:
        best = torch.linalg.pinv(j, rtol=1e-9) @ g.flatten()
    new_a, new_b = minimum_norm(a, b, *raw(a, b, g, scaling), scaling, damping)
    found = torch.cat([new_a.flatten(), new_b.flatten()])
    assert (found - best).norm() <= 1e-12 * best.norm()


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


def one_layer(**options: Any) -> tuple[Any, LoraPro]:
    """A linear layer with a B that has begun, in float64."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6, bias=False)), config).double()
    find_adapters(model)[0].B.data.normal_()
    return model, LoraPro(model, **options)


def test_the_released_rule_for_s_is_not_used_and_the_loss_falls_by_the_square_of_the_equivalent_gradient() -> None:
    model, variant = one_layer()
    (adapter,) = variant.adapters
    lr = 1e-7
    optimizer = torch.optim.SGD(variant.param_groups(), lr=lr)
    variant.attach(optimizer)
    x, y = torch.randn(9, 8).double(), torch.randn(9, 6).double()

    def loss() -> Tensor:
        return nn.functional.mse_loss(model(x), y)

    a, b = adapter.A.detach().clone(), adapter.B.detach().clone()
    before = loss()
    before.backward()
    optimizer.step()
    assert adapter.A.grad is not None
    assert adapter.B.grad is not None
    equivalent = 3.0 * (b @ adapter.A.grad + adapter.B.grad @ a)
    assert float((before - loss()).detach()) == pytest.approx(lr * float(equivalent.square().sum()), rel=1e-4)


def test_the_full_mode_is_adam_on_the_whole_weight_projected() -> None:
    model, variant = one_layer(mode="full")
    with pytest.raises(ValueError, match=r"Adam's moments itself; take .* without momentum"):
        variant.attach(torch.optim.AdamW(variant.param_groups()))
    (adapter,) = variant.adapters
    optimizer = torch.optim.SGD(variant.param_groups(), lr=0.01)
    variant.attach(optimizer)
    a, b = adapter.A.detach().clone(), adapter.B.detach().clone()
    weight = model.base_model.model[0].base_layer.weight.detach()
    x, y = torch.randn(9, 8).double(), torch.randn(9, 6).double()
    dense = nn.Parameter(torch.zeros(6, 8).double())
    adam = torch.optim.Adam([dense], lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

        g = 2 * (x @ (weight + 3.0 * b @ a).T - y).T @ x / y.numel()
        j = jacobian(a, b, 3.0)
        dense.grad = (j @ (torch.linalg.pinv(j, rtol=1e-9) @ g.flatten())).view(6, 8)
        last = dense.detach().clone()
        adam.step()
        best = torch.linalg.pinv(j, rtol=1e-9) @ (last - dense.detach()).flatten()
        a, b = a - 0.01 * best[:16].view(2, 8), b - 0.01 * best[16:].view(6, 2)
    torch.testing.assert_close(adapter.A.detach(), a)
    torch.testing.assert_close(adapter.B.detach(), b)


@pytest.mark.parametrize("samples", [1, 2])
def test_under_a_posterior_the_direction_is_lora_pros_and_the_size_that_of_lora(samples: int) -> None:
    """At the sample where the gradients were taken, and of several samples, whose mean they are, at the mean."""
    run = start("lora-pro", "vadam", damping="prior")
    run.train(15)
    a, b = run.variant.adapters[0].A, run.variant.adapters[0].B
    means = [run.optimizer.posterior(p).mean.clone() for p in (a, b)]
    decay = run.optimizer.param_groups[0]["weight_decay"]
    damping = float(decay * means[0].square().sum(1).mean() / run.optimizer.state[b]["hess"].mean())
    sizes, momentum = step_sizes(run.optimizer, a).clone(), run.optimizer.state[a]["momentum"].clone()
    taken = []
    for _ in range(samples):
        with run.optimizer.sampled_params(train=True) if samples > 1 else nullcontext():
            run.optimizer.zero_grad()
            loss_of(run.model).backward()
            taken.append(([a.detach().clone(), b.detach().clone()], [a.grad.clone(), b.grad.clone()]))
    at = taken[0][0] if samples == 1 else means
    gradients = [torch.stack(each).mean(0) for each in zip(*(gradients for _, gradients in taken), strict=True)]
    run.optimizer.step()
    moved = (run.optimizer.state[a]["momentum"] - 0.9 * momentum) / 0.1
    direction, _ = minimum_norm(at[0], at[1], gradients[0], gradients[1], 1.0, damping)
    assert float(nn.functional.cosine_similarity(moved.flatten(), direction.flatten(), dim=0)) == pytest.approx(
        1, abs=1e-4
    )
    assert float((sizes * moved).norm()) == pytest.approx(float((sizes * gradients[0]).norm()), rel=1e-3)
