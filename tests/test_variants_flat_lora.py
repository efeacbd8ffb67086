"""Flat-LoRA: the noise has the size that it should, and the base weights are never anything but themselves."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import find_adapters
from ivon_lora.variants.flat_lora import FlatLora, row_variance
from tests.optimizer_problem import differing
from tests.two_processes import Pool
from tests.variant_problem import Run, loss_of, make_data, start


def half_way(optimizer: str = "adamw", **options: Any) -> Run:
    """A run at the middle of its ramp, where c_t = 1 / 2."""
    run = start("flat-lora", optimizer, steps=100, **options)
    run.variant.step = 50
    return run


def perturbed(run: Run) -> dict[str, Tensor]:
    """The base weights inside a training forward."""
    run.model.train()
    run.model(make_data()[0])
    return run.frozen()


@pytest.mark.parametrize("restore", ["copy", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_comes_back_bit_for_bit(restore: str, dtype: torch.dtype) -> None:
    def cast(model: Any) -> None:
        for layer in model.base_model.model.layers:
            layer.base_layer.to(dtype)

    run = half_way(restore=restore, prepare=cast)
    clean = run.frozen()

    def fail() -> None:
        with pytest.raises(RuntimeError):
            run.model(torch.zeros(3, 5))

    def interrupt() -> None:
        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = run.model.base_model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            run.model(make_data()[0])
        handle.remove()
        run.model.state_dict()  # what is saved then

    def skip() -> None:  # a step, as a GradScaler does
        loss_of(run.model).backward()
        run.optimizer.zero_grad()
        run.train(1)

    ways = (lambda: run.train(3), run.loss, run.model.state_dict, fail, interrupt, skip, run.variant.detach)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for come_back in ways:
            perturbed(run)
            assert differing(run.frozen(), clean)
            come_back()
            assert differing(run.frozen(), clean) == []


def test_one_noise_for_the_micro_batches_of_a_step_and_another_for_the_next() -> None:
    run = half_way()
    first = perturbed(run)
    assert differing(perturbed(run), first) == []
    run.loss()  # an evaluation between them
    assert differing(perturbed(run), first) == []
    run.train(1)
    assert len(differing(perturbed(run), first)) == 2  # weights; biases have none


@pytest.mark.parametrize("where", ["weights", "outputs"])
def test_the_noise_of_a_row_goes_with_the_norm_of_the_whole_weight(where: str) -> None:
    """One wide layer, whose outputs for x have the variance of ||x||^2 times that of an element."""
    from peft import LoraConfig, get_peft_model

    net: Any = nn.Sequential(nn.Linear(2000, 6, bias=False))
    with torch.no_grad():
        net[0].weight.mul_(torch.arange(1, 7)[:, None])
    model: Any = get_peft_model(net, LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    find_adapters(model)[0].B.data.normal_(std=0.1)
    variant = FlatLora(model, 100, rho=0.3, where=where)
    variant.attach(torch.optim.SGD(variant.param_groups(), lr=0.1))
    variant.step = 50
    layer: Any = model.base_model.model[0]
    clean, x = layer.base_layer.weight.detach().clone(), torch.randn(1, 2000)
    expected = 0.5 * 0.3 * (clean + layer.get_delta_weight("default").detach()).norm(dim=1) / 2000**0.5
    y = model.eval()(x).detach()
    noisy = [model.train()(x.expand(2000, -1)).detach().T for _ in range(2)]
    if where == "weights":
        noise = layer.base_layer.weight.detach() - clean
        assert torch.equal(*noisy)  # the next micro-batch
    else:
        noise = (noisy[0] - y.T) / x.norm()
        assert not torch.isclose(*noisy).any()
    assert ((noise.std(dim=1) - expected).abs() < 5 * expected / (2 * 2000) ** 0.5).all()
    assert (noise.mean(dim=1).abs() < 5 * expected / 2000**0.5).all()
    variant.rest()
    assert torch.equal(layer.base_layer.weight, clean)
    assert torch.equal(model.eval()(x), y)


def test_recomputed_forwards_and_copies_of_the_model() -> None:
    from torch.utils.checkpoint import checkpoint

    run = half_way(where="outputs")
    for adapter in run.variant.adapters:
        adapter.B.data.normal_(std=0.1)
    x, _ = make_data()
    layers = run.model.base_model.model.layers
    run.model.train()
    loss_of(run.model).backward()
    plain = [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
    run.optimizer.zero_grad()
    run.variant.forwards = 0
    run.model.base_model.model.forward = lambda x: checkpoint(layers[1], layers[0](x), use_reentrant=False)
    loss_of(run.model).backward()
    again = [p.grad for p in run.model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    twin = copy.deepcopy(run.model).train()
    assert torch.equal(twin(x), twin(x))


def test_the_known_variance_is_that_of_the_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5), (4, 2))
    a, b = (torch.randn(*shape, generator=generator) for shape in shapes)
    std_a, std_b = (0.3 * torch.rand(*shape, generator=generator) for shape in shapes)
    samples = 40_000
    left = b + std_b * torch.randn(samples, *b.shape, generator=generator)
    right = a + std_a * torch.randn(samples, *a.shape, generator=generator)
    found = (2.0 * left @ right).var(dim=0).mean(dim=1)
    torch.testing.assert_close(row_variance(a, b, std_a, std_b, 2.0), found, rtol=0.03, atol=0)


def test_top_up_adds_what_the_noise_in_training_does_not_give() -> None:
    run = half_way("vadam", top_up=True)
    for steps, has_noise in ((5, False), (15, True)):  # the first ten updates of VAdam are made at the mean
        run.train(steps)
        perturbed(run)
        run.variant.stop()
        for layer in run.variant.layers:
            a, b = (run.optimizer.posterior(p) for p in (layer.A, layer.B))
            known = row_variance(a.mean, b.mean, a.stddev, b.stddev, layer.scaling) * has_noise
            whole = layer.module.base_layer.weight + layer.B @ layer.A
            std = run.variant._row_std(layer, 0.4)
            torch.testing.assert_close(std.square() + known, 0.16 * whole.detach().square().mean(1))
            assert (std > 0).all()
            assert (known > 0).all() == has_noise


def test_replicas_draw_their_own_noise(two_processes: Pool) -> None:
    (own, same), (other_own, other_same) = two_processes(_noise_of_replica)
    assert differing(own, other_own)
    assert differing(same, other_same) == []


def _noise_of_replica(rank: int) -> list[dict[str, Tensor]]:
    return [perturbed(half_way(replicas=replicas)) for replicas in ("own", "same")]


def test_what_takes_no_noise_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    conv = get_peft_model(nn.Sequential(nn.Conv1d(2, 3, 3)), LoraConfig(r=2, target_modules=["0"]))
    FlatLora(conv, 10)
    with pytest.raises(ValueError, match=r"layer '.*0' takes no noise: noise on the outputs is for linear layers"):
        FlatLora(conv, 10, where="outputs")


def test_a_loop_in_evaluation_mode_is_told_that_it_has_no_noise() -> None:
    run = start("flat-lora", "adamw")
    run.model.eval()
    loss_of(run.model).backward()
    with pytest.warns(UserWarning, match="that FlatLora was built on had no forward in training mode"):
        run.optimizer.step()
