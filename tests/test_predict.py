"""The posterior predictive, of one run and of several, and PEFT's AdaLoRA penalty in the evaluation loss."""

import math

import numpy as np
import pytest
import torch

from ivon_lora import IVON, choose_temperature, load_posterior, posterior_predict, save_posterior, snapshot_posterior
from ivon_lora.functional.noise import NoiseKey, normal
from tests.tiny_trainer import make_base


def runs(count):
    """Models that differ, their optimizers, and inputs."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(4, 3) for _ in range(count)]
    optimizers = [
        IVON(m.named_parameters(), lr=0.1, ess=20, hess_init=0.3, weight_decay=0.2, seed=k)
        for k, m in enumerate(models)
    ]
    return models, optimizers, torch.randn(5, 4)


def linear():
    (model,), (optimizer,), x = runs(1)
    return model, optimizer, x


def test_the_orthogonality_penalty_stays_out_of_the_evaluation_loss():
    peft = pytest.importorskip("peft")
    options = {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 2, "orth_reg_weight": 0.5}
    model = peft.get_peft_model(make_base(), peft.AdaLoraConfig(task_type="SEQ_CLS", **options)).eval()
    batch = {"input_ids": torch.arange(8).reshape(2, 4), "labels": torch.tensor([0, 1])}
    with torch.no_grad():
        leaking = float(model(**batch).loss)
        task = float(torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"]))
    assert leaking > task + 0.1, "PEFT's own behaviour, which this test is about"
    optimizer = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=10)
    handle = optimizer.attach(model)
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
    handle.remove()
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(leaking, abs=1e-6)


def averaged(model, x, tau, draws=6, ess=20.0):
    """Closed form of the predictive of `linear()`."""
    sigma = 1 / math.sqrt(tau * ess * 0.5)
    total = np.zeros((5, 3))
    for draw in range(draws):
        key = NoiseKey(0, draw, prediction=True)
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
    np.testing.assert_allclose(got.numpy(), averaged(model, x, tau), rtol=2e-5)


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
    want = [-np.log(averaged(model, x, tau)[range(5), labels]).mean() for tau in grid]
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


# ---------------------------------------------------------------- several runs


def test_several_runs_are_the_mean_of_their_probabilities(tmp_path):
    models, optimizers, x = runs(3)
    singles = [
        posterior_predict(m, snapshot_posterior(o), lambda m: m(x)) for m, o in zip(models, optimizers, strict=True)
    ]
    paths = [save_posterior(o, tmp_path / f"{k}.safetensors") for k, o in enumerate(optimizers)]
    sources = [snapshot_posterior(optimizers[0]), paths[1], str(paths[2])]
    fresh = torch.nn.Linear(4, 3)
    before = fresh.weight.detach().clone()
    torch.testing.assert_close(posterior_predict(fresh, sources, lambda m: m(x)), sum(singles) / 3)
    at_means = posterior_predict(fresh, sources, lambda m: m(x), temperature=math.inf)
    torch.testing.assert_close(at_means, sum(m(x).softmax(-1) for m in models).detach() / 3)
    assert torch.equal(fresh.weight, before)
    with pytest.raises(ValueError, match="posterior is an empty list"):
        posterior_predict(fresh, [], lambda m: m(x))


def test_a_softmax_temperature_goes_with_the_posterior_and_belongs_to_its_mean(tmp_path):
    (model, other), optimizers, x = runs(2)
    path = save_posterior(optimizers[0], tmp_path, softmax_temperature=1.7)
    saved = load_posterior(path)
    assert saved.softmax_temperature == 1.7
    tempered, plain = (model(x).detach() / 1.7).softmax(-1), other(x).detach().softmax(-1)
    torch.testing.assert_close(posterior_predict(model, saved, lambda m: m(x), temperature=math.inf), tempered)
    both = posterior_predict(model, [path, snapshot_posterior(optimizers[1])], lambda m: m(x), temperature=math.inf)
    torch.testing.assert_close(both, (tempered + plain) / 2)
    sampled = posterior_predict(model, saved, lambda m: m(x), n_samples=3)
    assert torch.equal(sampled, posterior_predict(model, saved, lambda m: m(x), n_samples=3, softmax_temperature=1.0))
    halved = posterior_predict(model, saved, lambda m: m(x), n_samples=3, softmax_temperature=0.5)
    np.testing.assert_allclose(halved, sampled**2 / (sampled**2).sum(-1, keepdim=True), rtol=1e-5)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="softmax_temperature must be positive and finite"):
            posterior_predict(model, saved, lambda m: m(x), softmax_temperature=wrong)
        with pytest.raises(ValueError, match="softmax_temperature must be positive and finite"):
            save_posterior(optimizers[0], tmp_path, softmax_temperature=wrong)


def test_adapters_of_any_rank_in_one_model(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(rank, seed):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, target_modules=["0"], init_lora_weights=False, modules_to_save=["2"])
        model = peft.get_peft_model(base, config)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p)
        return model

    x, models = torch.randn(5, 4), [adapted(2, 1), adapted(3, 2)]
    for k, model in enumerate(models):
        model.save_pretrained(str(tmp_path / f"v{k}.0"))
    want = sum(m(x).softmax(-1) for m in models).detach() / 2
    host = adapted(1, 3)
    host.requires_grad_(False)
    host.base_model.model[0].lora_B["default"].weight.requires_grad_(True)
    before, plain = [(n, p.requires_grad) for n, p in host.named_parameters()], host(x)
    found = posterior_predict(host, [tmp_path / "v0.0", tmp_path / "v1.0"], lambda m: m(x), n_samples=4)
    torch.testing.assert_close(found, want)
    assert [(n, p.requires_grad) for n, p in host.named_parameters()] == before
    assert torch.equal(host(x), plain)
    with pytest.raises(ValueError, match="is an adapter and Linear no PeftModel"):
        posterior_predict(torch.nn.Linear(4, 3), tmp_path / "v0.0", lambda m: m(x))
    with pytest.raises(FileNotFoundError, match="no posterior at"):
        posterior_predict(host, tmp_path / "v2.0", lambda m: m(x))
