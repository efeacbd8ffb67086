"""The model, the methods and the evaluation on a tiny classifier, and the packaged model's layers."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from ivon_lora.finetune.batches import Encoded, pad
from ivon_lora.finetune.evaluate import evaluate, merged, predict_logits
from ivon_lora.finetune.methods import AdaLora, Ivon, Method, make_method
from ivon_lora.finetune.model import MeanPoolClassifier, encoder_linears, head_modules, load_base, load_tokenizer
from ivon_lora.finetune.runtime import Runtime
from ivon_lora.finetune.settings import make_settings
from ivon_lora.posterior.metrics import score_probabilities
from tests.tiny_classifier import make_model

CPU = Runtime("cpu", "fp32", None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("tiny") / "model"))


def random_data(count: int = 50) -> Encoded:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    ids = tuple(tuple(torch.randint(5, 20, (n,), generator=generator).tolist()) for n in lengths)
    return Encoded(ids, tuple(i % 2 for i in range(count)), pad_id=0)


def make(tiny: str, **chosen: object) -> Method:
    settings = make_settings({"model": tiny, "steps": 20, **chosen})
    return make_method(load_base(tiny, 2, settings.seed), settings, 50)


def test_the_packaged_model_gets_lora_on_its_36_linear_layers() -> None:
    base = load_base()
    assert len(encoder_linears(base)) == 36
    assert head_modules(base) == ["classifier"]
    method = make_method(base, make_settings({"optimizer": "adamw"}), 50)
    assert len(method.kept_ranks()) == 36
    assert sum(p.numel() for p in method.trainable().values()) == 332_546
    assert load_tokenizer()("a film")["input_ids"] == [101, 1037, 2143, 102]


def test_mean_pooling_ignores_padding() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Config", (), {"hidden_size": 3, "initializer_range": 1.0})()
            self.table = nn.Embedding(10, 3)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            return type("Output", (), {"last_hidden_state": self.table(input_ids)})()

    model = MeanPoolClassifier(Encoder(), 2)
    ids = torch.tensor([[4, 5, 9]])
    output = model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 0]]), labels=torch.tensor([1]))
    by_hand = model.classifier((model.encoder.table(torch.tensor(4)) + model.encoder.table(torch.tensor(5))) / 2)  # type: ignore[operator]
    torch.testing.assert_close(output.logits[0], by_hand)
    torch.testing.assert_close(output.loss, -by_hand.log_softmax(-1)[1])


def test_the_same_seed_gives_the_same_model_and_leaves_torchs_generator_alone(tiny: str) -> None:
    before = torch.random.get_rng_state()
    first, second, third = make(tiny, seed=1), make(tiny, seed=1), make(tiny, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    one, two, three = (dict(m.trainable()) for m in (first, second, third))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize("optimizer", ["ivon", "adamw", "adalora"])
def test_merging_for_evaluation_changes_no_prediction_and_no_bit(tiny: str, optimizer: str) -> None:
    method = make(tiny, optimizer=optimizer)
    model = method.model
    with torch.no_grad():
        for p in method.trainable().values():
            p.normal_(std=0.3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    data = random_data()
    model.eval()
    with torch.no_grad():
        plain = model(**{k: v for k, v in pad(data, range(50), CPU.device).items() if k != "labels"}).logits
    logits = predict_logits(model, data, CPU)
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError), merged(model, CPU.device):
        raise RuntimeError
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adaloras_penalty_is_in_what_is_minimised_and_nowhere_else(tiny: str) -> None:
    method = make(tiny, optimizer="adalora")
    assert isinstance(method, AdaLora)
    method.model.eval()
    data = random_data()
    batch = pad(data, range(50), CPU.device)
    with torch.no_grad():
        minimised, shown = method.loss(batch)
    penalty = []
    for name, p in method.model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p.detach() @ p.detach().T if "lora_A" in name else p.detach().T @ p.detach()
            penalty.append((gram - torch.eye(len(gram))).norm())
    assert float(minimised - shown) == pytest.approx(0.1 * float(torch.stack(penalty).mean()), rel=1e-4)
    (result,) = evaluate(method, {"test": data}, CPU, samples=2, limit=0)
    assert result.scores.nll == pytest.approx(float(shown), rel=1e-5)


def test_results_say_which_sentences_they_are_about(tiny: str) -> None:
    data = random_data()
    calls: list[tuple[str, int, int]] = []
    method = make(tiny, optimizer="ivon")
    results = evaluate(
        method,
        {"test": data, "shifted": data.first(20)},
        CPU,
        samples=3,
        limit=30,
        progress=lambda *call: calls.append(call),
    )
    rows = [(r.set, r.weights, r.scores.n) for r in results]
    assert rows == [
        ("test", "mean", 50),
        ("test", "mean", 30),
        ("test", "3 samples", 30),
        ("shifted", "mean", 20),
        ("shifted", "3 samples", 20),
    ]
    assert calls[-1] == ("3 samples", 150, 150)
    logits = predict_logits(method.model, data, CPU)
    assert results[1].scores == score_probabilities(logits[:30].double().softmax(-1), torch.tensor(data.labels[:30]))
    assert math.isfinite(results[2].scores.nll)


def test_sampled_averages_are_the_mean_of_probabilities_and_repeatable(tiny: str) -> None:
    data = random_data()

    def averaged() -> torch.Tensor:
        method = make(tiny, optimizer="ivon", recipe="published", ess=100.0, hess_init=1.0)
        averaged = method.sampled_probabilities(lambda: predict_logits(method.model, data, CPU), 4)
        assert averaged is not None
        return averaged

    first, second = averaged(), averaged()
    assert torch.equal(first, second)
    torch.testing.assert_close(first.sum(-1), torch.ones(50, dtype=first.dtype))
    single = make(tiny, optimizer="ivon", recipe="published", ess=100.0, hess_init=1.0)
    assert isinstance(single, Ivon)
    draws = []
    for _ in range(4):
        with single.optimizer.sampled_params():
            draws.append(predict_logits(single.model, data, CPU).softmax(-1))
    torch.testing.assert_close(first.float(), torch.stack(draws).mean(0))
    assert not torch.allclose(draws[0], draws[1])


def test_unknown_models_are_one_line(tmp_path: Path) -> None:
    from ivon_lora.finetune.errors import InputError

    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), "no-such-user/no-such-model"):
        for load in (load_base, load_tokenizer):
            with pytest.raises(InputError, match=f"--model {name}: cannot be loaded") as caught:
                load(name)
            assert "\n" not in str(caught.value)


def test_signal_to_noise_is_that_of_live_ranks(tiny: str) -> None:
    method = make(tiny, optimizer="ivon")
    assert isinstance(method, Ivon)
    data = random_data()
    for step in range(1, 21):  # the last allocation is after step 12, hard: pruned ranks are 0 from then on
        method.begin_step()
        loss, _ = method.loss(pad(data, range(50), CPU.device))
        loss.backward()
        method.finish_step(step)
        method.optimizer.zero_grad()
    assert sum(method.kept_ranks().values()) == method.budget(20) == 13 * 4
    quantiles = method.snr_quantiles((0.0, 0.5, 1.0))
    live = []
    for adapter in method.pruner.adapters:
        mask = method.pruner.mask(adapter)
        for _, tensor, dim in adapter.tensors():
            posterior = method.optimizer.posterior(tensor)
            alive = posterior.mean.movedim(dim, 0)[mask].abs() / posterior.stddev.movedim(dim, 0)[mask]
            live.append(alive.flatten())
    values = torch.cat(live)
    assert quantiles == pytest.approx([float(values.quantile(q)) for q in (0.0, 0.5, 1.0)], rel=1e-3)
    assert float(values.median()) > 0
