"""DiffoRA against known answers: a planted network in which two of eight layers can lower the loss."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import VAdam
from ivon_lora.variants import Diffora
from tests.variant_problem import ROWS, loss_of, make_model, start

LAYERS, WIDTH, PLANTED = 8, 6, (2, 5)


class Sum(nn.Module):
    """Layers side by side, each with inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x[:, i]) for i, layer in enumerate(self.layers)]).sum(0)


def make_planted() -> Any:
    """A PeftModel, and a function that draws batches from a base in which two layers differ, with noise."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base, truth = Sum(), Sum()
    truth.load_state_dict(base.state_dict())
    for i in PLANTED:
        truth.get_parameter(f"layers.{i}.weight").data.add_(0.6 * torch.outer(torch.randn(WIDTH), torch.randn(WIDTH)))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=2, target_modules=[f"layers.{i}" for i in range(LAYERS)]))

    def batch(rows: int = 32) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, LAYERS, WIDTH)
        with torch.no_grad():
            return x, truth(x) + 0.5 * torch.randn(rows, WIDTH)

    return model, batch


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize(("score", "steps"), [("gate", 60), ("snr", 100), ("gain", 12)])
def test_the_layers_that_can_lower_the_loss_are_chosen(score: str, steps: int) -> None:
    model, batch = make_planted()
    variant = Diffora(model, steps + 20, share=len(PLANTED) / LAYERS, search=steps, score=score, gate_lr=0.02)
    optimizer: Any = (
        torch.optim.AdamW(variant.param_groups(), lr=0.02)
        if score == "gate"
        else VAdam(variant.param_groups(), lr=0.02, num_examples=1000, lr_limit=None)
    )
    variant.attach(optimizer)
    if score != "gate":
        optimizer.attach(model)
    for _ in range(steps + 5):
        if score == "gate":
            with variant.architecture():
                mse(model, batch()).backward()
        optimizer.zero_grad()
        mse(model, batch()).backward()
        optimizer.step()
    assert [name.split(".")[-1] for name in variant.chosen] == [str(i) for i in PLANTED]
    for i, adapter in enumerate(variant.adapters):  # five steps after they began anew
        assert bool(adapter.B.detach().any()) == (i in PLANTED)
    assert variant.history[0]["step"] == steps


def test_the_gradient_of_a_gate_is_that_of_the_equation() -> None:
    """dL/da = Gamma (1 - Gamma) <G, s B A>."""
    model = make_model()
    variant = Diffora(model, 10)
    assert variant.gammas is not None
    adapter = variant.adapters[1]
    for a in variant.adapters:
        a.B.data.normal_()
    gate, gamma = variant.gammas[1], 0.3
    gate.data.fill_(torch.logit(torch.tensor(gamma)).item())
    base: Any = model.get_submodule(adapter.name)
    base.base_layer.weight.requires_grad_(True)  # its gradient is G
    loss_of(model).backward()
    update = adapter.scaling * adapter.B.detach() @ adapter.A.detach()
    expected = gamma * (1 - gamma) * (base.base_layer.weight.grad * update).sum()
    assert gate.grad is not None
    torch.testing.assert_close(gate.grad[0], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "vadam"])
def test_gates_and_weights_each_see_their_own_batches_only(optimizer: str) -> None:
    run, plain = (start("diffora", optimizer, steps=100, gate_lr=0.0) for _ in range(2))
    run.train(12)
    for _ in range(3):
        before = run.trained()
        loss_of(run.model, slice(0, 8)).backward()  # half of a step, then the gates' turn, then the other half
        gradients = [p.grad.clone() for p in run.variant.adapters[0].tensors()[0][1:2] if p.grad is not None]
        assert isinstance(run.variant, Diffora)
        with run.variant.architecture():
            loss_of(run.model, slice(8, 16)).backward()
        for old, p in zip(gradients, [run.variant.adapters[0].A], strict=True):
            assert p.grad is not None
            assert torch.equal(p.grad, old)
        run.optimizer.zero_grad()
        assert all(torch.equal(p, before[n]) for n, p in run.trained().items() if optimizer == "adamw")
        run.train(1)
    plain.train(15)
    for name, p in plain.trained().items():  # with a rate of 0 the gates stay, and nothing else has seen the blocks
        assert torch.equal(run.trained()[name], p), name
    if optimizer == "vadam":
        assert run.optimizer.param_groups[0]["examples_seen"] == 15 * ROWS


def test_the_training_batches_do_not_move_gates_that_have_their_own() -> None:
    run = start("diffora", "adamw", steps=100, gate_lr=0.1)
    assert isinstance(run.variant, Diffora)
    run.train(2)
    assert 0.5 not in run.variant.scores().values()  # without blocks they do
    with run.variant.architecture():
        loss_of(run.model).backward()
    scores = run.variant.scores()
    run.train(3)
    assert run.variant.scores() == scores


def test_a_choice_is_what_peft_takes() -> None:
    from peft import LoraConfig, get_peft_model

    from tests.variant_problem import base

    run = start("diffora", "adamw", steps=100)
    run.train(5)
    assert isinstance(run.variant, Diffora)
    choice = run.variant.choose()
    assert len(choice.layers) == 1
    arguments = choice.lora_arguments()
    model = get_peft_model(base(), LoraConfig(**arguments))
    assert arguments == {"target_modules": [choice.layers[0][17:]], "r": 4, "lora_alpha": 4.0}
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 1
    run.variant.share = 1.0
    assert len(run.variant.choose().layers) == 2
