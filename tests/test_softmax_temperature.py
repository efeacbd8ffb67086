"""One softmax temperature of validation labels, and several runs as one prediction."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize

from ivon_lora import IVON, fit_temperature, load_posterior, posterior_predict, save_posterior, snapshot_posterior

INF = math.inf


def overconfident(n=400, classes=3, factor=2.5):
    """Logits ``factor`` times larger than those that the labels were drawn from."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return factor * logits, labels


def test_the_temperature_is_where_the_nll_is_least():
    logits, labels = overconfident()

    def loss(t):
        return float(torch.nn.functional.cross_entropy(logits / t, labels))

    found = fit_temperature(logits.softmax(-1), labels)
    assert found == pytest.approx(optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded").x, rel=1e-4)
    assert 2.1 < found < 2.9  # 2.5, but for the chance of 400 labels
    assert fit_temperature((logits / 5).float().softmax(-1), labels) == pytest.approx(found / 5, rel=1e-4)


def test_probabilities_as_targets_give_back_how_certain_they_are():
    logits, labels = overconfident()
    assert fit_temperature(logits.softmax(-1), (logits / 1.9).softmax(-1)) == pytest.approx(1.9)
    hard = torch.nn.functional.one_hot(labels, 3).double()
    assert fit_temperature(logits.softmax(-1), hard) == fit_temperature(logits.softmax(-1), labels)
    with pytest.raises(ValueError, match=r"of the shape of probabilities, \(400, 3\), got \(400, 2\)"):
        fit_temperature(logits.softmax(-1), hard[:, :2])


def test_certainty_without_errors_and_errors_without_end_stay_within_bounds():
    right = torch.eye(2)[[0, 1] * 30] * 0.8 + 0.1
    labels = torch.tensor([0, 1] * 30)
    assert 0.05 <= fit_temperature(right, labels) < 0.06
    assert fit_temperature(right.flip(1), labels) == pytest.approx(20)
    assert fit_temperature(torch.eye(2)[[0, 1] * 30], 1 - labels) == pytest.approx(20)  # p = 0 of what happens


def test_few_labels_bring_a_warning_and_wrong_ones_an_error():
    logits, labels = overconfident(49)
    with pytest.warns(UserWarning, match="a softmax temperature of 49 examples: below 50"):
        fit_temperature(logits.softmax(-1), labels)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\]"):
        fit_temperature(logits.softmax(-1), labels + 1)


def runs(count=3):
    """Models that differ, their optimizers, and inputs."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(4, 3) for _ in range(count)]
    optimizers = [
        IVON(m.named_parameters(), lr=0.1, ess=20, hess_init=0.3, seed=k, weight_decay=0.2)
        for k, m in enumerate(models)
    ]
    return models, optimizers, torch.randn(5, 4)


def test_several_runs_are_the_mean_of_their_probabilities(tmp_path):
    models, optimizers, x = runs()
    singles = [
        posterior_predict(m, snapshot_posterior(o), lambda m: m(x)) for m, o in zip(models, optimizers, strict=True)
    ]
    paths = [save_posterior(o, tmp_path / f"{k}.safetensors") for k, o in enumerate(optimizers)]
    sources = [snapshot_posterior(optimizers[0]), paths[1], str(paths[2])]
    fresh = torch.nn.Linear(4, 3)
    before = fresh.weight.detach().clone()
    torch.testing.assert_close(posterior_predict(fresh, sources, lambda m: m(x)), sum(singles) / 3)
    at_means = posterior_predict(fresh, sources, lambda m: m(x), temperature=INF)
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
    torch.testing.assert_close(posterior_predict(model, saved, lambda m: m(x), temperature=INF), tempered)
    both = posterior_predict(model, [path, snapshot_posterior(optimizers[1])], lambda m: m(x), temperature=INF)
    torch.testing.assert_close(both, (tempered + plain) / 2)
    sampled = posterior_predict(model, saved, lambda m: m(x), n_samples=3)
    assert torch.equal(sampled, posterior_predict(model, saved, lambda m: m(x), n_samples=3, softmax_temperature=1.0))
    halved = posterior_predict(model, saved, lambda m: m(x), n_samples=3, softmax_temperature=0.5)
    np.testing.assert_allclose(halved, sampled**2 / (sampled**2).sum(-1, keepdim=True), rtol=1e-5)
    for wrong in (0.0, -1.0, INF, math.nan):
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
