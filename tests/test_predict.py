"""The posterior predictive, and PEFT's AdaLoRA penalty in the evaluation loss."""

import math

import numpy as np
import pytest
import torch

from ivon_lora import IVON, choose_temperature, posterior_predict, snapshot_posterior
from ivon_lora.functional.noise import NoiseKey, normal
from ivon_lora.lora.adalora import orthogonality_in_training_only


def linear(seed=3):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return (
        model,
        IVON(model.named_parameters(), lr=0.1, ess=20, hess_init=0.3, weight_decay=0.2, seed=seed),
        torch.randn(5, 4),
    )


@pytest.fixture
def adalora_classifier():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    lora = peft.AdaLoraConfig(
        task_type="SEQ_CLS", init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2, orth_reg_weight=0.5
    )
    model = peft.get_peft_model(transformers.BertForSequenceClassification(config), lora)
    batch = {"input_ids": torch.arange(8).reshape(2, 4), "labels": torch.tensor([0, 1])}
    return model, batch


@pytest.mark.parametrize("how", ["attach", "function"])
def test_the_orthogonality_penalty_stays_out_of_the_evaluation_loss(adalora_classifier, how):
    model, batch = adalora_classifier
    model.eval()
    with torch.no_grad():
        leaking = float(model(**batch).loss)
        task = float(torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"]))
    assert leaking > task + 0.1, "PEFT's own behaviour, which this test is about"
    if how == "attach":
        optimizer = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=10)
        handles = [optimizer.attach(model)]
    else:
        handles = orthogonality_in_training_only(model)
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(task, abs=1e-6)
    model.train()
    out = model(**batch)
    task = torch.nn.functional.cross_entropy(out.logits, batch["labels"])
    assert float(out.loss.detach()) > float(task.detach()) + 0.1, "in training it stays"
    model.eval()
    with pytest.raises(ValueError, match=r".*"), torch.no_grad():
        model(input_ids=torch.zeros(1, 2, 3, 4))  # an error in the forward pass must not lose the weight
    assert model.base_model.peft_config["default"].orth_reg_weight == 0.5
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(leaking, abs=1e-6)


def averaged(model, x, seed, tau, draws=6, ess=20.0):
    """Closed form of the predictive of `linear()`."""
    sigma = 1 / math.sqrt(tau * ess * 0.5)
    total = np.zeros((5, 3))
    for draw in range(draws):
        key = NoiseKey(seed, draw, prediction=True)
        weight = model.weight.detach().double() + sigma * normal(key, 0, (3, 4), "cpu")
        bias = model.bias.detach().double() + sigma * normal(key, 1, (3,), "cpu")
        total += (x.double() @ weight.T + bias).softmax(-1).numpy() / draws
    return total


@pytest.mark.parametrize("tau", [0.25, 1.0, 100.0])
@pytest.mark.parametrize("source", ["optimizer", "snapshot"])
def test_probabilities_are_averaged_and_temperature_multiplies_the_effective_sample_size(tau, source):
    model, optimizer, x = linear()
    taken = optimizer if source == "optimizer" else snapshot_posterior(optimizer)
    if source == "snapshot":  # it begins at its first draw every time
        posterior_predict(model, taken, lambda m: m(x), n_samples=2)
    got = posterior_predict(model, taken, lambda m: m(x), n_samples=6, temperature=tau)
    np.testing.assert_allclose(got.numpy(), averaged(model, x, 3, tau), rtol=2e-5)


@pytest.mark.parametrize("source", ["optimizer", "snapshot"])
def test_an_infinite_temperature_is_the_mean_in_one_pass(source):
    model, optimizer, x = linear()
    passes = []

    def forward(m):
        passes.append(1)
        return m(x)

    taken = optimizer if source == "optimizer" else snapshot_posterior(optimizer)
    got = posterior_predict(model, taken, forward, n_samples=6, temperature=math.inf)
    assert torch.equal(got, model(x).detach().softmax(-1))
    assert len(passes) == 1


def test_a_temperature_leaves_groups_and_a_live_training_sample_as_they_were():
    model, optimizer, x = linear()
    optimizer.train()
    sampled = [p.detach().clone() for p in model.parameters()]
    posterior_predict(model, optimizer, lambda m: m(x), n_samples=2, temperature=0.1)
    assert optimizer.is_sampled
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), sampled, strict=True))
    assert optimizer.param_groups[0]["ess"] == 20

    def broken(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        posterior_predict(model, optimizer, broken, temperature=0.1)
    assert optimizer.param_groups[0]["ess"] == 20
    optimizer.eval()
    assert not optimizer.is_sampled


@pytest.mark.parametrize("source", ["optimizer", "snapshot"])
def test_the_chosen_temperature_has_the_least_nll_on_one_and_the_same_noise(source):
    model, optimizer, x = linear()
    labels = torch.tensor([0, 1, 2, 0, 1])
    taken = optimizer if source == "optimizer" else snapshot_posterior(optimizer)
    grid = (0.3, 1.0, 3.0, math.inf)
    curve = choose_temperature(model, taken, lambda m: m(x), labels, n_samples=6, temperatures=grid)
    want = [-np.log(averaged(model, x, 3, tau)[range(5), labels]).mean() for tau in grid]
    np.testing.assert_allclose(curve.nll, want, rtol=1e-5)
    assert curve.temperatures == grid
    assert curve.temperature == grid[int(np.argmin(want))]


def test_of_equal_temperatures_the_least_noisy_one_is_chosen():
    model = torch.nn.Linear(4, 3)
    optimizer = IVON(model.named_parameters(), lr=0.1, ess=20)
    x = torch.zeros(5, 4)
    frozen = choose_temperature(model, optimizer, lambda m: x @ torch.zeros(4, 3), torch.zeros(5, dtype=torch.long))
    assert frozen.temperature == math.inf


def test_what_cannot_be_a_temperature_is_refused():
    model, optimizer, x = linear()
    for tau in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            posterior_predict(model, optimizer, lambda m: m(x), temperature=tau)
        with pytest.raises(ValueError, match="temperature must be positive"):
            snapshot_posterior(optimizer).sample(0, 0, tau)
    with pytest.raises(ValueError, match="n_samples must be at least 1, got 0"):
        posterior_predict(model, optimizer, lambda m: m(x), n_samples=0)
    with pytest.raises(ValueError, match="temperatures is empty"):
        choose_temperature(model, optimizer, lambda m: m(x), torch.zeros(5), temperatures=())
    with pytest.raises(ValueError, match="has no posterior"):
        posterior_predict(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m: m(x))
