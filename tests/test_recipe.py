"""What finds its own value: ess, hess_init, beta2, batch_size, and `IVON.from_adamw`, which sets all of them."""

import copy
import logging
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, LoraAdapter, RankPruner
from ivon_lora.optim.examples import ExampleCounter, examples_in
from ivon_lora.optim.param_groups import horizon_free_rho, hyper_of

FISHER: dict[str, Any] = {"hess_approx": "fisher", "batch_size": 8, "weight_decay": 0.01}


def regression(n: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3 * torch.randn(n, 1, generator=generator)


def linear() -> nn.Linear:
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 0.2, -0.3]]))
        model.bias.fill_(0.1)
    return model


def backward(model: nn.Module, x: Tensor, y: Tensor, share: float = 1.0) -> None:
    (share * nn.functional.mse_loss(model(x), y)).backward()


# ---------------------------------------------------------------- ess, prior_std


def test_ess_is_the_number_of_examples_over_the_temperature() -> None:
    p = [nn.Parameter(torch.ones(2))]
    assert IVON(p, 0.1, "auto", num_examples=500).param_groups[0]["ess"] == 500
    group = IVON(p, 0.1, "auto", num_examples=500, temperature=0.01, prior_std=0.1).param_groups[0]
    assert group["ess"] == 50_000
    assert group["weight_decay"] == pytest.approx(1 / (50_000 * 0.1**2))


def test_prior_std_is_the_posteriors_where_the_data_say_nothing() -> None:
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    groups: list[dict[str, Any]] = [
        {"params": [first]},
        {"params": [second], "prior_std": 0.3},
        {"params": [third], "weight_decay": 0.5},
    ]
    optimizer = IVON(groups, 0.1, 200.0, prior_std=0.2, hess_init="auto", hess_approx="fisher", batch_size=4)
    assert torch.allclose(optimizer.posterior(first).stddev, torch.tensor(0.2))
    assert torch.allclose(optimizer.posterior(second).stddev, torch.tensor(0.3))
    assert torch.allclose(optimizer.posterior(third).stddev, torch.tensor(0.1))  # 1 / sqrt(200 * 0.5)
    assert "prior_std" not in optimizer.param_groups[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ess": "auto"}, "ess='auto' needs num_examples"),
        ({"ess": "auto", "num_examples": 0}, "num_examples must be an integer of at least 1, got 0"),
        ({"ess": "auto", "num_examples": 10, "temperature": 0.0}, r"temperature must lie in \(0, inf\), got 0.0"),
        ({"ess": "many"}, "ess must be a number or 'auto', got 'many'"),
        ({"num_examples": 10}, "num_examples is read for ess='auto' only"),
        ({"temperature": 0.1}, "temperature is read for ess='auto' only"),
        ({"prior_std": -1.0}, r"prior_std must lie in \(0, inf\), got -1.0"),
        ({"prior_std": math.nan}, "prior_std must lie"),
        ({"hess_approx": "fisher"}, "hess_approx='fisher' needs batch_size"),
        ({"hess_init": "auto"}, "hess_init='auto' needs batch_size"),
        ({"beta2": "auto"}, "beta2='auto' needs batch_size"),
        ({"hess_approx": "fisher", "batch_size": 0}, "batch_size must be .*at least 1, or 'auto', got 0"),
        ({"hess_approx": "fisher", "batch_size": 2.5}, "batch_size must be .*got 2.5"),
        ({**FISHER, "weight_decay": 0.0}, "hess_approx='fisher' needs weight_decay > 0"),
        (
            {"hess_approx": "gradsq", "hess_init": "auto", "weight_decay": 0.0},
            "hess_init='auto' needs weight_decay > 0",
        ),
        ({"step_rule": "adam"}, "step_rule='adam' needs hess_approx='fisher', got 'price'"),
        ({"noise_warmup": 10}, "noise_warmup=10 needs hess_approx='fisher', got 'price'"),
        ({**FISHER, "noise_warmup": -1}, "noise_warmup must be a number of examples, .*got -1"),
        ({"antithetic": True}, "mc_samples must be even, got 1"),
        ({"step_rule": "sgd"}, "step_rule must be one of 'newton', 'adam', got 'sgd'"),
        ({"hess_init": "automatic"}, "hess_init must be a number, got 'automatic'"),
    ],
)
def test_what_cannot_be_found_is_asked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IVON([nn.Parameter(torch.ones(2))], lr=0.1, **{"ess": 10.0, **options})


# ---------------------------------------------------------------- beta2, hess_init


def test_the_memory_of_beta2_is_ten_updates_and_later_a_tenth_of_the_run() -> None:
    assert [horizon_free_rho(t) for t in (1, 2, 5, 10, 50, 100)] == [1, 0.5, 0.2, 0.1, 0.1, 0.1]
    assert [horizon_free_rho(t) for t in (200, 1000, 10**6)] == [0.05, 0.01, 1e-5]


@pytest.mark.parametrize("approx", ["fisher", "price", "gradsq"])
def test_the_first_ten_updates_are_made_at_the_mean_and_their_squares_averaged(approx: str) -> None:
    p = nn.Parameter(torch.zeros(50))
    scale = 100.0 if approx == "gradsq" else 8.0
    optimizer = IVON(
        [p], lr=0.0, ess=100.0, hess_approx=approx, hess_init="auto", batch_size=8, weight_decay=0.01, beta2=0.999
    )
    grads = torch.randn(13, 50, generator=torch.Generator().manual_seed(1))

    def squares(updates: int) -> Tensor:
        """Their exponential mean without the bias of its start, Adam's; "price" goes on from a plain mean."""
        weights = torch.tensor([(1.0 if approx == "price" else 0.999) ** (updates - i) for i in range(updates)])
        return scale * (weights / weights.sum()) @ grads[:updates].square()

    for t in range(10):
        optimizer.train()
        assert torch.equal(p.detach(), torch.zeros(50))  # the sample is the mean
        p.grad = grads[t].clone()
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["hess"], squares(t + 1), rtol=1e-5, atol=0)
    optimizer.train()
    noise = p.detach() / (1 / (100.0 * (optimizer.state[p]["hess"] + 0.01))).sqrt()
    assert 0.7 < float(noise.std()) < 1.3  # now it has noise, of the posterior's size
    for t in range(10, 13):
        optimizer.train()
        p.grad = grads[t].clone()
        before = optimizer.state[p]["hess"].clone()
        optimizer.step()
        if approx == "fisher":
            torch.testing.assert_close(optimizer.state[p]["hess"], squares(t + 1), rtol=1e-5, atol=0)
        else:
            rho = 0.001 if approx == "price" else 0.001 / (1 - 0.999 ** (t + 1))
            assert hyper_of(optimizer.param_groups[0], t + 1).rho == pytest.approx(rho)
            assert not torch.equal(before, optimizer.state[p]["hess"])


def test_prediction_draws_have_noise_from_the_start() -> None:
    p = nn.Parameter(torch.zeros(1000))
    optimizer = IVON.from_adamw([p], lr=3e-3, num_examples=100, batch_size=4)
    with optimizer.sampled_params():
        assert float(p.detach().std()) == pytest.approx(0.1, rel=0.1)  # of the prior
    assert torch.equal(p.detach(), torch.zeros(1000))


def test_beta2_of_price_is_slow_enough_for_a_bias_of_five_percent() -> None:
    group = IVON(
        [nn.Parameter(torch.ones(2))], 0.1, 7000.0, beta2="auto", hess_init="auto", batch_size=35
    ).param_groups[0]
    assert hyper_of(group, 20).rho == pytest.approx(0.1 * 35 / 7000)
    assert hyper_of(group, 10).rho == pytest.approx(0.1)  # of the mean of squares at the beginning
    assert hyper_of({**group, "ess": 1.0}, 2000).rho == pytest.approx(0.005)  # enough data per example: as for fisher


@pytest.mark.parametrize(("beta2", "heard"), [(0.99999, True), (0.9, False), ("auto", False)])
@pytest.mark.parametrize("said_by", ["argument", "pruner", "framework"])
def test_a_hessian_that_cannot_move_within_the_run_is_noted_in_the_log(
    beta2: float | str, heard: bool, said_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.zeros(4, 2))
    options: dict[str, Any] = {"beta2": beta2, "batch_size": 4}
    if said_by == "argument":
        options["total_steps"] = 1000
    elif said_by == "pruner":
        options["pruner"] = RankPruner([LoraAdapter("layer", a, b)], 1, total_steps=1000)
    optimizer = IVON([a, b], 0.1, 10.0, **options)
    optimizer.expect(total_steps=1000)  # heard once
    notices = [r for r in caplog.records if "still has a weight of 99%" in r.message]
    assert [r.levelname for r in notices] == ["WARNING"] * heard


def test_the_argument_says_it_before_the_pruner(caplog: pytest.LogCaptureFixture) -> None:
    a, b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.zeros(4, 2))
    pruner = RankPruner([LoraAdapter("layer", a, b)], 1, total_steps=1000)
    IVON([a, b], 0.1, 10.0, total_steps=200_000, pruner=pruner)
    assert not caplog.records
    for wrong in (0, 2.0, True, "auto"):
        with pytest.raises(ValueError, match="total_steps must be the number of steps of the run, at least 1, or None"):
            IVON([a, b], 0.1, 10.0, total_steps=wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- batch_size


def test_batches_are_found_in_any_argument() -> None:
    x, row = torch.zeros(5, 2), torch.zeros(3)
    assert examples_in((x,), {}) == 5
    assert examples_in((), {"labels": row, "input_ids": x}) == 5
    assert examples_in((None, {"mask": torch.tensor(1.0), "pixel_values": x}), {}) == 5
    assert examples_in(([row, x],), {"input_ids": x}) == 3
    assert examples_in((1, "text"), {"flag": True}) == 0


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_auto_counts_what_the_gradient_averages_over(micro_batches: int) -> None:
    """Accumulation or not, the Hessian is that of a batch size that was stated; the short last batch included."""
    x, y = regression(40)
    counted, stated = linear(), linear()
    options: dict[str, Any] = {**FISHER, "lr": 0.01, "ess": 64.0, "hess_init": "auto", "beta2": "auto"}
    auto = IVON(counted.parameters(), **{**options, "batch_size": "auto"})
    known = IVON(stated.parameters(), **{**options, "batch_size": 16})
    auto.attach(counted)
    for start, stop in ((0, 16), (16, 32), (32, 40)):
        known.param_groups[0]["batch_size"] = stop - start
        known.train()
        backward(stated, x[start:stop], y[start:stop])
        known.step()
        known.zero_grad()
        counted.eval()
        counted(x)  # evaluation does not count
        counted.train()
        size = (stop - start) // micro_batches
        for i in range(start, stop, size):
            backward(counted, x[i : i + size], y[i : i + size], 1 / micro_batches)
        auto.step()
        auto.zero_grad()
    for p, q in zip(counted.parameters(), stated.parameters(), strict=True):
        torch.testing.assert_close(auto.state[p]["hess"], known.state[q]["hess"], rtol=1e-4, atol=1e-6)


def test_each_sample_of_a_step_has_a_batch_of_its_own() -> None:
    x, y = regression()
    models, hess = [linear(), linear()], []
    for model, size in zip(models, ("auto", 8), strict=True):
        options = {**FISHER, "batch_size": size, "lr": 0.01, "ess": 64.0, "hess_init": "auto"}
        optimizer = IVON(model.parameters(), **options)
        optimizer.attach(model)
        for step in range(3):
            for sample in range(2):
                with optimizer.sampled_params(train=True):
                    backward(model, x[8 * sample + step :][:8], y[8 * sample + step :][:8])
            optimizer.step()
            optimizer.zero_grad()
        hess.append([optimizer.state[p]["hess"].clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*hess, strict=True))


def test_auto_without_a_count_is_refused_before_anything_changes() -> None:
    model = linear()
    optimizer = IVON.from_adamw(model.parameters(), num_examples=64)
    x, y = regression()
    optimizer.train()
    backward(model, x, y)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"optimizer\.attach\(model\) once.*or pass batch_size="):
        optimizer.step()
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert optimizer.completed_steps == 0
    optimizer.count_examples(64)  # a loop may count itself
    optimizer.step()
    assert optimizer.completed_steps == 1


def test_a_batch_size_that_is_wrong_is_noticed_once() -> None:
    x, y = regression()
    model = linear()
    optimizer = IVON.from_adamw(model.parameters(), num_examples=64, batch_size=8)
    optimizer.attach(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for i in range(0, 32, 8):  # 8 is the micro-batch, and there are four of them
                backward(model, x[i : i + 8], y[i : i + 8], 0.25)
            optimizer.step()
            optimizer.zero_grad()
    assert [str(w.message).split(":")[0] for w in caught] == [
        "batch_size is 8, but a step's gradient is the mean of 32 examples"
    ]


def test_a_short_last_batch_is_no_mistake_but_two_in_a_row_are() -> None:
    counter = ExampleCounter()
    complaints = []
    for examples in (32, 5, 32, 5, 32, 60, 10, 10):
        counter.add(examples)
        complaints.append(counter.complaint(32, 1) is not None)
        counter.next_step()
    assert complaints == [False] * 7 + [True]
    assert counter.complaint(32, 1) is None  # nothing was counted


@pytest.mark.parametrize(("examples", "steps"), [(64, 1), (16, 2)])
def test_a_factor_of_two_is_a_mistake(examples: int, steps: int) -> None:
    """Two micro-batches, or two processes, of which only one was thought of; or counted where there are none."""
    counter = ExampleCounter()
    for step in range(1, steps + 1):
        counter.add(examples)
        complaint = counter.complaint(32, 1)
        assert (complaint is None) == (step < steps)
        counter.next_step()
    assert complaint is not None
    assert f"Pass batch_size={examples} " in complaint


# ---------------------------------------------------------------- from_adamw


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.5)])
def test_from_adamw_takes_the_steps_of_adam_where_there_is_no_noise(betas: tuple[float, float]) -> None:
    """Temperature to 0: torch's Adam, for any batch size, but for rounding (30 steps of a few 1e-7)."""
    x, y = regression()
    trained = []
    for size in (1, 64):
        model = linear()
        optimizer = IVON.from_adamw(
            model.parameters(), 0.01, betas, num_examples=64, batch_size=size, temperature=1e-20, prior_std=1e5
        )
        for _ in range(30):
            optimizer.train()
            backward(model, x, y)
            optimizer.step()
            optimizer.zero_grad()
        trained.append([p.detach().clone() for p in model.parameters()])
    model = linear()
    adam = torch.optim.Adam(model.parameters(), lr=0.01, betas=betas)
    for _ in range(30):
        backward(model, x, y)
        adam.step()
        adam.zero_grad()
    for p, a, b in zip(model.parameters(), *trained, strict=True):
        torch.testing.assert_close(a, p.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(b, p.detach(), rtol=1e-4, atol=1e-6)


def test_a_step_is_at_most_about_lr_in_root_mean_square() -> None:
    p = nn.Parameter(torch.zeros(20_000))
    optimizer = IVON.from_adamw([p], lr=1e-3, num_examples=1000, batch_size=32)
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** torch.linspace(-6, 2, p.numel())
    for _ in range(25):
        before = p.detach().clone()
        optimizer.train()
        p.grad = scale * (torch.randn(p.shape, generator=generator) + 0.5)
        optimizer.step()
        assert float((p.detach() - before).square().mean().sqrt()) < 1.2e-3
        assert float((p.detach() - before).abs().max()) < 1e-2
    assert float((p.detach() - before).square().mean().sqrt()) > 3e-4


@pytest.mark.parametrize(
    ("examples", "temperature", "largest"), [(3000, 3e-3, 1e-3**0.5), (3000, 3e-5, 1e-5**0.5), (30, 3e-3, 0.1)]
)
def test_largest_noise_of_from_adamw(examples: int, temperature: float, largest: float) -> None:
    """sqrt(temperature / (num_examples * 1e-3)), never above 0.1; a stated temperature is that of any learning rate."""
    p = nn.Parameter(torch.zeros(2))
    for lr in (1e-4, 1e-2):
        optimizer = IVON.from_adamw([p], lr, num_examples=examples, temperature=temperature, batch_size=4)
        assert float(optimizer.posterior(p).stddev[0]) == pytest.approx(largest)
    own = IVON.from_adamw([p], num_examples=examples, temperature=temperature, batch_size=4, prior_std=0.3)
    assert float(own.posterior(p).stddev[0]) == pytest.approx(0.3)


@pytest.mark.parametrize(("examples", "largest"), [(3000, 1e-3**0.5), (30, 0.1)])
def test_noise_is_proportional_to_small_learning_rates(examples: int, largest: float) -> None:
    """Below 3e-3, in groups, too; the weight that the prior has beside the loss does not depend on it."""
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def noise_of(lr: float | torch.Tensor, **options: Any) -> list[float]:
        groups: list[dict[str, Any]] = [{"params": [p]}, {"params": [q], "lr": 3e-4}]
        optimizer = IVON.from_adamw(groups, lr, num_examples=examples, batch_size=4, **options)
        assert len({group["weight_decay"] for group in optimizer.param_groups}) == 1 or options
        return [float(optimizer.posterior(each).stddev[0]) for each in (p, q)]

    for lr in (3e-3, torch.tensor(1e-2), 0.0):
        assert noise_of(lr) == pytest.approx([largest, largest / 10])
    assert noise_of(3e-4) == pytest.approx([largest / 10, largest / 10])
    assert noise_of(3e-5, prior_std=0.3) == pytest.approx([0.3, 0.3])


def test_noise_grows_over_the_first_epoch() -> None:
    """None for ten updates, then (examples seen / epoch) of the posterior's; draws for predictions are not smaller.

    A standard deviation over 20,000 elements has a relative error of 0.5 %; the bound is four of them.
    """
    p = nn.Parameter(torch.zeros(20_000))
    optimizer = IVON.from_adamw([p], lr=0.0, num_examples=320, batch_size=16)
    for t in range(25):
        share = 0.0 if t < 10 else min(1.0, 16 * t / 320)
        optimizer.train()
        drawn, whole = p.detach().clone(), optimizer.posterior(p).stddev
        assert float((drawn / whole).std()) == pytest.approx(share, rel=0.02)
        optimizer.eval()
        with optimizer.sampled_params():
            assert float((p.detach() / whole).std()) == pytest.approx(1.0, rel=0.02)
        optimizer.train()
        assert torch.equal(p.detach(), drawn)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        resumed = IVON.from_adamw([p], lr=0.0, num_examples=320, batch_size=16)
        resumed.load_state_dict(optimizer.state_dict())
        optimizer = resumed
    assert optimizer.param_groups[0]["examples_seen"] == 25 * 16


def test_the_priors_pull_grows_with_the_variance_of_the_noise() -> None:
    """With gradients of one size, Adam's step is lr; the prior adds lr w delta m / sqrt(h / B), w = (seen / epoch)^2.

    The gradient's sign alternates, so its momentum is known too; h / B is the square of its size in every step.
    """
    size, lr, decay, start = 0.5, 1e-4, 0.1, 3.0
    p = nn.Parameter(torch.full((4,), start, dtype=torch.float64))
    optimizer = IVON.from_adamw(
        [p], lr=lr, betas=(0.0, 0.9), num_examples=64, batch_size=8, weight_decay=decay, temperature=1e-12
    )
    mean = start
    for t in range(12):
        optimizer.train()
        gradient = size if t % 2 else -size
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
        weight = min(1.0, 8 * t / 64) ** 2
        mean -= lr * (gradient + weight * decay * mean) / (size + 1e-8)
        # the noise of temperature 1e-12 does not enter: gradients are given
        assert p.detach().tolist() == pytest.approx([mean] * 4, rel=1e-12)


def test_noise_warmup_counts_examples() -> None:
    x, y = regression()
    model = linear()
    optimizer = IVON.from_adamw(model.parameters(), lr=0.01, num_examples=64)
    optimizer.attach(model)
    for i in (0, 8):
        backward(model, x[i : i + 8], y[i : i + 8])
        backward(model, x[i : i + 4], y[i : i + 4])  # accumulated
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["examples_seen"] == 24
    assert IVON.from_adamw(model.parameters(), num_examples=64, noise_warmup=7).param_groups[0]["noise_warmup"] == 7


def test_from_adamw_takes_adamws_groups(caplog: pytest.LogCaptureFixture) -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups: list[dict[str, Any]] = [
        {"params": [first], "weight_decay": 0.01, "lr": 1e-4, "betas": (0.9, 0.95)},
        {"params": [second], "weight_decay": 0.0, "prior_std": 1.0, "eps": 1e-8},
    ]
    with caplog.at_level(logging.INFO, logger="ivon_lora"):
        optimizer = IVON.from_adamw(groups, num_examples=1000, batch_size=4)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-4, 1e-3]
    ess = [1000 / (3e-3 / 30**2), 1000 / (3e-3 / 3**2)]
    assert [g["ess"] for g in optimizer.param_groups] == pytest.approx(ess)
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([1e-3, 1 / ess[1]])
    assert [(g["beta1"], g["beta2"]) for g in optimizer.param_groups] == [(0.9, 0.95), (0.9, 0.999)]
    assert "betas" not in optimizer.param_groups[0]
    assert "dropped ['eps', 'weight_decay']" in caplog.text
    assert groups[0]["weight_decay"] == 0.01  # the caller's
    named = IVON.from_adamw(linear().named_parameters(), num_examples=10)
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]


def test_from_adamw_finds_the_prior_unless_it_is_stated() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def priors(*groups: dict[str, Any], **options: Any) -> list[str]:
        optimizer = IVON.from_adamw([dict(group) for group in groups], num_examples=10, batch_size=2, **options)
        return [group["prior"] for group in optimizer.param_groups]

    first, second = {"params": [p]}, {"params": [q]}
    assert priors(first) == ["empirical"]
    assert priors(first, prior_std=0.1) == priors(first, weight_decay=1e-2) == ["fixed"]
    assert priors(first, prior_std=0.1, prior="empirical") == ["empirical"]
    assert priors(first, {**second, "prior_std": 0.1}) == ["empirical", "fixed"]
    assert priors({**first, "prior": "fixed"}, {**second, "prior_std": 0.1, "prior": "empirical"}) == [
        "fixed",
        "empirical",
    ]


def test_lora_without_a_gradient_for_a_at_first() -> None:
    """B = 0: the loss does not depend on A. A keeps its values and the prior's width, then learns as anybody else."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=generator)
    y = x @ torch.randn(6, 5, generator=generator)
    a, b = nn.Parameter(torch.randn(2, 6, generator=generator)), nn.Parameter(torch.zeros(5, 2))
    start = a.detach().clone()
    optimizer = IVON.from_adamw([a, b], lr=0.01, num_examples=256, batch_size=32, prior_std=0.1, noise_warmup=0)
    losses = []
    squares, weights = torch.zeros(2, 6, dtype=torch.float64), 0.0
    for step in range(300):
        rows = torch.randint(256, (32,), generator=generator)
        optimizer.train()
        loss = (x[rows] @ a.T @ b.T - y[rows]).square().sum(1).mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert a.grad is not None
        squares, weights = 0.999 * squares + a.grad.double().square(), 0.999 * weights + 1
        if step == 0:
            assert not a.grad.any()
            torch.testing.assert_close(a.detach(), start * (1 - 0.01))  # the prior, bounded; not start * (1 - 1e3)
            assert torch.allclose(optimizer.posterior(a).stddev, torch.tensor(0.1))
            assert float(optimizer.posterior(b).stddev.max()) < 0.02
    torch.testing.assert_close(optimizer.state[a]["hess"], (32 * squares / weights).float(), rtol=1e-4, atol=0)
    best = torch.linalg.svdvals(y)[2:].square().sum() / 512
    assert sum(losses[-20:]) / 20 < 1.5 * float(best) + 0.1 * losses[0]


def test_checkpoints_keep_auto_and_old_ones_mean_what_they_meant() -> None:
    x, y = regression()

    def make() -> tuple[nn.Linear, IVON]:
        model = linear()
        optimizer = IVON.from_adamw(model.parameters(), num_examples=64, batch_size=8, seed=5)
        optimizer.param_groups[0]["beta2"] = "auto"
        optimizer.attach(model)
        return model, optimizer

    def run(model: nn.Linear, optimizer: IVON, steps: range) -> None:
        for i in steps:
            backward(model, x[i : i + 8], y[i : i + 8])
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make()
    run(model, optimizer, range(7))
    saved, weights = pickle.loads(pickle.dumps(optimizer.state_dict())), copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["beta2"] == "auto"
    run(model, optimizer, range(7, 15))  # past the end of the warm-up
    again, resumed = make()
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    run(again, resumed, range(7, 15))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["hess"], resumed.state[q]["hess"])

    old = IVON(linear().parameters(), lr=0.1, ess=10.0).state_dict()
    for group in old["param_groups"]:
        del group["batch_size"], group["step_rule"]
    _, recipe = make()
    recipe.load_state_dict(old)
    assert {k: recipe.param_groups[0][k] for k in ("hess_approx", "batch_size", "step_rule", "beta2")} == {
        "hess_approx": "price",
        "batch_size": None,
        "step_rule": "newton",
        "beta2": 0.99999,
    }


def test_creating_the_state_with_a_step_at_lr_zero_needs_no_count() -> None:
    """torch.distributed.checkpoint does, with gradients of zero."""
    model = linear()
    optimizer = IVON.from_adamw(model.parameters(), lr=0.0, num_examples=64)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all("hess" in optimizer.state[p] for p in model.parameters())


# ---------------------------------------------------------------- antithetic


def test_pairs_of_samples_mirror_each_other_also_in_a_checkpoint() -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 7))
    mean = p.detach().clone()
    optimizer = IVON([p], lr=0.1, ess=10.0, mc_samples=4, antithetic=True)
    drawn = []
    for sample in range(4):
        with optimizer.sampled_params(train=True):
            drawn.append(p.detach() - mean)
            p.grad = torch.ones_like(p)
            if sample == 3:
                saved, weights = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    torch.testing.assert_close(drawn[1], -drawn[0])
    torch.testing.assert_close(drawn[3], -drawn[2])
    assert not torch.equal(drawn[0], drawn[2])
    q = nn.Parameter(torch.zeros(7))
    resumed = IVON([q], lr=0.1, ess=10.0)
    resumed.load_state_dict(saved)
    with torch.no_grad():
        q.copy_(weights)  # the model's, saved at the sample and loaded after the optimizer's
    assert resumed.posterior(q).mean.equal(mean)
