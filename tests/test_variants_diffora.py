"""DiffoRA against known answers: a planted network in which two of eight layers can lower the loss."""

from typing import Any

import pytest
import torch

from ivon_lora import VAdam
from ivon_lora.variants import Diffora
from tests.optimizer_problem import differing
from tests.variant_problem import ROWS, base, loss_of, make_model, make_planted, start


@pytest.mark.parametrize(("score", "steps"), [("gate", 60), ("snr", 100), ("gain", 12)])
def test_the_layers_that_can_lower_the_loss_are_chosen(score: str, steps: int) -> None:
    model, loss = make_planted((2, 5))
    variant = Diffora(model, steps + 20, share=2 / 8, search=steps, score=score, gate_lr=0.02)
    optimizer: Any = torch.optim.AdamW(variant.param_groups(), lr=0.02)
    if score != "gate":
        optimizer = VAdam(variant.param_groups(), lr=0.02, num_examples=1000, lr_limit=None)
        optimizer.attach(model)
    variant.attach(optimizer)
    for _ in range(steps + 5):
        if score == "gate":
            with variant.architecture():
                loss().backward()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert [name.split(".")[-1] for name in variant.chosen] == ["2", "5"]
    for i, adapter in enumerate(variant.adapters):  # five steps after they began anew
        assert bool(adapter.B.detach().any()) == (i in (2, 5))
    assert variant.history[0]["step"] == steps


def test_the_gradient_of_a_gate_is_that_of_the_equation() -> None:
    """dL/da = Gamma (1 - Gamma) <G, s B A>."""
    model = make_model()
    variant = Diffora(model, 10)
    assert variant.gates is not None
    adapter = variant.adapters[1]
    for a in variant.adapters:
        a.B.data.normal_()
    gate, gamma = variant.gates[1], 0.3
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
        run.optimizer.zero_grad()
        loss_of(run.model, slice(0, 8)).backward()  # half of a step, then the gates' turn
        a = run.variant.adapters[0].A
        assert a.grad is not None
        gradient = a.grad.clone()
        with run.variant.architecture():
            loss_of(run.model, slice(8, 16)).backward()
        assert torch.equal(a.grad, gradient)
        run.train(1)
    plain.train(15)
    assert differing(run.trained(), plain.trained()) == []  # with a rate of 0 the gates stay
    if optimizer == "vadam":
        assert run.optimizer.param_groups[0]["examples_seen"] == 15 * ROWS


def test_the_training_batches_do_not_move_gates_that_have_their_own() -> None:
    run = start("diffora", "adamw", steps=100, gate_lr=0.1)
    run.train(2)
    assert 0.5 not in run.variant.scores().values()  # without blocks they do
    with run.variant.architecture():
        loss_of(run.model).backward()
    scores = run.variant.scores()
    run.train(3)
    assert run.variant.scores() == scores


def test_a_choice_is_what_peft_takes() -> None:
    from peft import LoraConfig, get_peft_model

    variant = Diffora(make_model(), 100)
    arguments = variant.lora_arguments()
    assert arguments == {"target_modules": ["layers.0"], "r": 4, "lora_alpha": 4.0}
    model = get_peft_model(base(), LoraConfig(**arguments))
    assert sum("lora_A" in parameter for parameter, _ in model.named_parameters()) == 1
    variant.share = 1.0
    assert len(variant.lora_arguments()["target_modules"]) == 2
