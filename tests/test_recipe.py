"""VAdam: AdamW's learning rate and steps, a batch size that is counted, and noise that means something."""

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, VAdam


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


def vector(n: int = 2, value: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.full((n,), value))


def std(optimizer: IVON, *params: Tensor) -> list[float]:
    return [float(optimizer.posterior(p).stddev.flatten()[0]) for p in params]


# ---------------------------------------------------------------- the steps of Adam


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.5)])
def test_towards_temperature_zero_it_is_adam(betas: tuple[float, float]) -> None:
    """torch's, for any batch size, but for rounding (30 steps of a few 1e-7)."""
    x, y = regression()
    model = linear()
    adam = torch.optim.Adam(model.parameters(), lr=0.01, betas=betas)
    for _ in range(30):
        backward(model, x, y)
        adam.step()
        adam.zero_grad()
    cold: dict[str, Any] = {"temperature": 1e-20, "prior_std": 1e5}
    for size in (1, 64):
        mine = linear()
        optimizer = VAdam(mine.parameters(), 0.01, betas, num_examples=64, batch_size=size, **cold)
        for _ in range(30):
            optimizer.train()
            backward(mine, x, y)
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(model.parameters(), mine.parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)
            assert (optimizer.state[q]["hess"] > 0).all()


# ---------------------------------------------------------------- the size of the noise


@pytest.mark.parametrize(("width", "expected"), [(1600, 27 * 0.0016), (400, 27 * 0.0032), (64, 0.09)])
def test_the_prior_of_an_adapter_is_three_times_as_wide_as_it_starts(width: int, expected: float) -> None:
    """For any learning rate and number of examples: 27 times the two digits of 0.064 / sqrt(width); or prior_std.

    That of a narrow adapter is no wider than others.
    """
    for lr in (1e-5, 1e-3, 1.0):
        lora = [nn.Parameter(torch.randn(4, width) / (3 * width) ** 0.5), nn.Parameter(torch.zeros(7, 4))]
        optimizer = VAdam(lora, lr, num_examples=round(30 / lr), batch_size=4)
        assert std(optimizer, *lora) == pytest.approx([expected] * 2)
        assert width == 64 or expected == pytest.approx(3 * float(lora[0].detach().std()), rel=0.2)
        assert std(VAdam(lora, lr, num_examples=30, batch_size=4, prior_std=0.3), *lora) == pytest.approx([0.3] * 2)


def test_noise_is_proportional_to_small_learning_rates() -> None:
    """Below 3e-3, in groups, too, where nothing starts as LoRA does; the temperature, to their square."""
    p, q = vector(), vector()
    groups: list[dict[str, Any]] = [{"params": [p]}, {"params": [q], "lr": 3e-4}]
    for lr, shares in ((3e-3, (1.0, 0.1)), (torch.tensor(1e-2), (1.0, 0.1)), (0.0, (1.0, 0.1)), (3e-4, (0.1, 0.1))):
        optimizer = VAdam(groups, lr, num_examples=3000, batch_size=4)
        assert std(optimizer, p, q) == pytest.approx([0.081 * share for share in shares])
        ess = [group["ess"] for group in optimizer.param_groups]
        assert ess == pytest.approx([3000 / (0.006 * share**2) for share in shares])
    optimizer = VAdam(groups, 3e-5, num_examples=3000, batch_size=4, prior_std=0.3)
    assert std(optimizer, p, q) == pytest.approx([0.3, 0.3])
    groups[1]["prior_std"] = 0.2
    assert std(VAdam(groups, 3e-3, num_examples=30, temperature=1.0), p, q) == pytest.approx([0.081, 0.2])


def test_the_first_ten_updates_are_made_at_the_mean_and_squares_are_averaged() -> None:
    p = vector(50)
    optimizer = VAdam([p], 0.0, num_examples=100, batch_size=8, temperature=1.0, prior_std=0.1, noise_warmup=0)
    grads = torch.randn(13, 50, generator=torch.Generator().manual_seed(1))
    for t in range(13):
        optimizer.train()
        noise = p.detach() / optimizer.posterior(p).stddev
        assert 0.7 < float(noise.std()) < 1.3 if t >= 10 else not noise.any()
        p.grad = grads[t].clone()
        optimizer.step()
        weights = torch.tensor([0.999 ** (t - i) for i in range(t + 1)])
        mean = 8 * (weights / weights.sum()) @ grads[: t + 1].square()
        torch.testing.assert_close(optimizer.state[p]["hess"], mean, rtol=1e-5, atol=0)


def test_noise_and_posterior_grow_over_two_epochs() -> None:
    """(Examples seen / two epochs) of the prior's where no data speak; none in training for ten updates.

    A standard deviation over 20,000 elements has a relative error of 0.5 %; the bound is four of them.
    """
    p = vector(20_000)
    optimizer = VAdam([p], lr=0.0, num_examples=160, batch_size=16, prior_std=0.1)
    for t in range(25):
        share = min(1.0, 16 * t / 320) if t else 1.0  # the prior, before any example
        assert std(optimizer, p) == pytest.approx([0.1 * share])
        optimizer.train()
        drawn = p.detach().clone()
        assert float(drawn.std()) == pytest.approx(0.1 * share if t >= 10 else 0.0, rel=0.02)
        optimizer.eval()
        with optimizer.sampled_params():
            assert float(p.detach().std()) == pytest.approx(0.1 * share, rel=0.02)
        optimizer.train()
        assert torch.equal(p.detach(), drawn)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        resumed = VAdam([p], lr=0.0, num_examples=160, batch_size=16)
        resumed.load_state_dict(optimizer.state_dict())
        optimizer = resumed


def test_the_priors_pull_grows_with_the_variance_of_the_noise() -> None:
    """Of gradients of one size Adam takes steps of lr; the prior adds lr w delta m / sqrt(h / B), w = (seen / 64)^2.

    The gradient's sign alternates, so its momentum is known too; h / B is the square of its size in every step.
    """
    size, lr, decay, mean = 0.5, 1e-4, 0.1, 3.0
    p = nn.Parameter(torch.full((4,), mean, dtype=torch.float64))
    prior_std = (1e-12 / 32 / decay) ** 0.5
    optimizer = VAdam([p], lr, (0.0, 0.9), num_examples=32, batch_size=8, prior_std=prior_std, temperature=1e-12)
    for t in range(12):
        optimizer.train()
        gradient = size if t % 2 else -size
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
        mean -= lr * (gradient + min(1.0, 8 * t / 64) ** 2 * decay * mean) / (size + 1e-8)
        assert p.detach().tolist() == pytest.approx([mean] * 4, rel=1e-12)


# ---------------------------------------------------------------- counting examples


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_auto_counts_what_the_gradient_averages_over(micro_batches: int) -> None:
    x, y = regression(40)
    counted, stated = linear(), linear()
    auto, known = (VAdam(m.parameters(), 0.01, num_examples=64, batch_size="auto") for m in (counted, stated))
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
    assert [o.param_groups[0]["examples_seen"] for o in (auto, known)] == [40, 40]
    for p, q in zip(counted.parameters(), stated.parameters(), strict=True):
        torch.testing.assert_close(auto.state[p]["hess"], known.state[q]["hess"], rtol=1e-4, atol=1e-6)


def test_each_sample_of_a_step_has_a_batch_of_its_own() -> None:
    x, y = regression()
    hess = []
    for size in ("auto", 8):
        model = linear()
        optimizer = VAdam(model.parameters(), 0.01, num_examples=64, batch_size=size)
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
    optimizer = VAdam(model.parameters(), num_examples=64)
    optimizer.train()
    backward(model, *regression())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"optimizer\.attach\(model\) once.*or pass batch_size="):
        optimizer.step()
    assert before["param_groups"] == optimizer.state_dict()["param_groups"]
    optimizer.count_examples(64)  # a loop may count itself
    optimizer.step()
    assert optimizer.completed_steps == 1


@pytest.mark.parametrize(
    ("examples", "noticed"),
    [([32, 5, 32, 5, 32, 60, 10], None), ([32, 10, 10], 3), ([16, 16], 2), ([32, 64], 2), ([0, 0, 0], None)],
)
def test_a_batch_size_that_is_wrong_is_noticed_once(examples: list[int], noticed: int | None) -> None:
    """Two processes, or micro-batches, of which one was forgotten are a factor of two. A last batch may be short."""
    p = vector()
    optimizer = VAdam([p], num_examples=64, batch_size=32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, n in enumerate([*examples, *([examples[-1]] * 2 if noticed else [])], start=1):
            optimizer.train()
            p.grad = torch.ones(2)
            optimizer.count_examples(n)
            optimizer.step()
            assert len(caught) == (noticed is not None and step >= noticed)
    message = f"batch_size is 32, but a step's gradient is the mean of {examples[-1]} examples"
    assert all(message in str(w.message) for w in caught)


# ---------------------------------------------------------------- groups, and the older spelling


def test_it_takes_adamws_groups(caplog: pytest.LogCaptureFixture) -> None:
    groups: list[dict[str, Any]] = [
        {"params": [vector()], "weight_decay": 0.01, "lr": 1e-4, "betas": (0.9, 0.95)},
        {"params": [vector()], "weight_decay": 0.0, "prior_std": 1.0, "eps": 1e-8},
    ]
    with caplog.at_level(logging.INFO, logger="ivon_lora"):
        optimizer = VAdam(groups[:1], num_examples=1000, batch_size=4)
        optimizer.add_param_group(groups[1])
    ess = [1000 / (0.006 / 30**2), 1000 / (0.006 / 3**2)]
    found = [[g[name] for name in ("lr", "ess", "weight_decay", "beta1", "beta2")] for g in optimizer.param_groups]
    assert found[0] == pytest.approx([1e-4, ess[0], 1 / (ess[0] * 0.0027**2), 0.9, 0.95])
    assert found[1] == pytest.approx([1e-3, ess[1], 1 / ess[1], 0.9, 0.999])
    assert not any(group.keys() & {"betas", "eps", "prior_std"} for group in optimizer.param_groups)
    assert "dropped ['eps', 'weight_decay']" in caplog.text
    assert groups[0]["weight_decay"] == 0.01  # the caller's
    named = VAdam(linear().named_parameters(), num_examples=10)
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize(
    ("options", "old"),
    [
        ({}, {}),
        ({"lr": 3e-3, "temperature": 0.1, "maximize": True}, {"total_steps": 20}),
        ({"prior_std": 0.1}, {"prior": "fixed"}),
        ({"prior_std": 0.1}, {"weight_decay": 1e-2}),  # as ever, prior_std goes first
        ({"prior_std": (0.006 / 9 / 64 / 0.02) ** 0.5}, {"prior_std": None, "weight_decay": 0.02}),
    ],
)
def test_from_adamw_is_the_old_spelling(options: dict[str, Any], old: dict[str, Any]) -> None:
    ends = []
    for make, more in ((VAdam, {}), (IVON.from_adamw, old)):
        p, q = vector(5, 0.3), vector(3, 0.2)
        groups: list[dict[str, Any]] = [{"params": [p]}, {"params": [q], "prior_std": 0.05}]
        optimizer = make(groups, **{"num_examples": 64, "batch_size": 8, **options, **more})
        assert isinstance(optimizer, VAdam)
        for step in range(21):
            optimizer.train()
            p.grad, q.grad = torch.linspace(-1, 2, 5) * p.detach() + 0.1, q.detach() * (1 + step % 2)
            optimizer.step()
        ends.append(torch.cat([x.detach() for x in (p, q, optimizer.state[p]["hess"])]))
    torch.testing.assert_close(*ends, rtol=0 if "weight_decay" not in old else 1e-6, atol=0)


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (
            {},
            {"prior": "empirical"},
            "prior='empirical' is gone, and priors are fixed: state the width .* by prior_std",
        ),
        ({"prior": "empirical"}, {}, "prior='empirical' is gone"),
        ({}, {"prior_std": "empirical"}, "prior_std must be a number, got 'empirical'"),
        ({}, {"weight_decay": 0.0}, "VAdam needs weight_decay > 0"),
    ],
)
def test_priors_that_are_no_width_are_refused(group: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IVON.from_adamw([{"params": [vector()], **group}], num_examples=10, batch_size=2, **options)
