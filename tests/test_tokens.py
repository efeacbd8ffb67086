"""Losses, entropies and temperatures of tokens, against probabilities of all tokens, classes and samples at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ivon_lora import (
    PosteriorFile,
    VAdam,
    choose_temperature,
    choose_token_temperature,
    fit_temperature,
    fit_token_temperature,
    load_posterior,
    save_posterior,
    score_probabilities,
    snapshot_posterior,
    token_nll,
)
from tests.tiny_language_model import WORDS, lora_config, make_model

IDS = torch.randint(2, len(WORDS), (6, 7), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(7) >= torch.tensor([7, 5, 4, 7, 3, 1])[:, None], -100)
BATCHES = [{"input_ids": IDS[rows], "labels": LABELS[rows]} for rows in (slice(0, 2), slice(2, 5), slice(5, 6))]
K = 5


@pytest.fixture(scope="module")
def trained() -> tuple[Any, VAdam, PosteriorFile]:
    model = make_model()
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = VAdam(params, lr=3e-2, num_examples=6, temperature=1e-2, noise_warmup=0)
    optimizer.attach(model)
    for _ in range(20):
        model(input_ids=IDS, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), optimizer, snapshot_posterior(optimizer)


def labels_of(model: Any) -> tuple[Tensor, Tensor]:
    """Logits and labels of all predictions."""
    wanted = LABELS[:, 1:] != -100
    with torch.no_grad():
        return model(input_ids=IDS).logits[:, :-1][wanted], LABELS[:, 1:][wanted]


def averaged(model: Any, posterior: PosteriorFile, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    drawn = []
    for k in range(K):
        with posterior.loaded(model, posterior.sample(posterior.seed, k, temperature)):
            drawn.append(labels_of(model)[0].softmax(-1))
    return torch.stack(drawn).mean(0), labels_of(model)[1]


def test_at_the_mean_it_is_the_models_own_loss(trained: Any) -> None:
    model, optimizer, _ = trained
    scores = token_nll(model, optimizer, BATCHES, temperature=math.inf)
    assert len(scores.nll) == 6 + 4 + 3 + 6 + 2
    with torch.no_grad():
        loss = float(model(input_ids=IDS, labels=LABELS).loss)
    assert float(scores.nll.mean()) == pytest.approx(loss, rel=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(scores.nll.mean()))


def test_averages_are_those_of_probabilities(trained: Any) -> None:
    model, _, posterior = trained
    p, labels = averaged(model, posterior)
    scores, wanted = token_nll(model, posterior, iter(BATCHES), K), score_probabilities(p, labels)
    torch.testing.assert_close(scores.nll, -p.gather(-1, labels[:, None])[:, 0].log())
    torch.testing.assert_close(scores.entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(scores.confidence, p.max(-1).values)
    assert float(scores.right.mean()) == pytest.approx(wanted.accuracy)
    assert scores.reliability().gap == pytest.approx(wanted.ece, abs=1e-6)
    mean = token_nll(model, posterior, BATCHES, temperature=math.inf)
    assert not torch.allclose(scores.nll, mean.nll, rtol=1e-3)


def test_the_temperature_is_that_of_all_labels_at_once(trained: Any) -> None:
    model, optimizer, posterior = trained
    grid = (0.1, 1.0, 10.0, math.inf)
    wanted = choose_temperature(model, posterior, lambda m: labels_of(m)[0], labels_of(model)[1], K, grid)
    for source in (posterior, optimizer):
        curve = choose_token_temperature(model, source, BATCHES, K, grid)
        assert curve.nll[-1] == pytest.approx(wanted.nll[-1], rel=1e-6)
    curve = choose_token_temperature(model, posterior, BATCHES, K, grid)
    assert curve.nll == pytest.approx(wanted.nll, rel=1e-6)
    assert curve.temperature == wanted.temperature
    assert len(set(curve.nll)) == len(grid)


@pytest.mark.filterwarnings("ignore:a softmax temperature of 21 examples")
@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_softmax_temperature_undoes_a_factor_of_the_logits(trained: Any, tmp_path: Path, factor: float) -> None:
    """Predictions with it are those of `fit_temperature` of all labels at once, whatever the factor."""
    model, optimizer, posterior = trained
    logits, labels = labels_of(model)
    best = fit_temperature(logits.softmax(-1), labels)
    average = fit_temperature(averaged(model, posterior)[0], labels)
    hook = model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, y: y * factor)
    with pytest.warns(UserWarning, match="a softmax temperature of 21 labels: below 50"):
        found = [fit_token_temperature(model, source, iter(BATCHES)) for source in (posterior, optimizer)]
    with pytest.warns(UserWarning, match="of 21 labels"):
        of_samples = fit_token_temperature(model, posterior, BATCHES, K, 1.0)
    assert found == pytest.approx([factor * best] * 2, rel=0.01)
    assert factor != 1 or of_samples == pytest.approx(average, rel=0.01)
    path = save_posterior(posterior, tmp_path, softmax_temperature=found[0])
    scores = token_nll(model, load_posterior(path), BATCHES, temperature=math.inf)
    plain = token_nll(model, posterior, BATCHES, temperature=math.inf)
    again = token_nll(model, posterior, BATCHES, temperature=math.inf, softmax_temperature=found[0])
    hook.remove()
    wanted = score_probabilities((logits / best).softmax(-1), labels)
    assert float(scores.nll.mean()) == pytest.approx(wanted.nll, rel=1e-4)
    assert float(scores.nll.mean()) < float(plain.nll.mean())
    assert torch.equal(again.nll, scores.nll)


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 1}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VISION = {**BERT, "image_size": 8, "patch_size": 4, "projection_dim": 8, "model_type": "clip_vision_model"}
TEXT = {**BERT, "vocab_size": len(WORDS), "model_type": "llama"}
#: class, configuration, what gets the adapter, and whether a position predicts the label of the next one
MODELS: list[tuple[str, str, dict[str, Any], str, bool]] = [
    ("T5ForConditionalGeneration", "T5Config", T5, "q", False),
    ("BertForMaskedLM", "BertConfig", BERT, "query", False),
    ("GPT2LMHeadModel", "GPT2Config", GPT2, "c_attn", True),
    ("LlavaForConditionalGeneration", "LlavaConfig", {"vision_config": VISION, "text_config": TEXT}, "q_proj", True),
]


@pytest.mark.parametrize(("name", "config", "sizes", "target", "is_shifted"), MODELS, ids=[m[0] for m in MODELS])
def test_labels_are_shifted_where_the_models_loss_shifts_them(
    name: str, config: str, sizes: dict[str, Any], target: str, is_shifted: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    from peft import get_peft_model

    base = getattr(transformers, name)(getattr(transformers, config)(**{"vocab_size": len(WORDS), **sizes}))
    lora = lora_config(task_type=None, target_modules=[target], fan_in_fan_out=name.startswith("GPT2"))
    model: Any = get_peft_model(base, lora).eval()
    optimizer = VAdam([p for p in model.parameters() if p.requires_grad], num_examples=6)
    optimizer.attach(model)
    scores = token_nll(model, optimizer, BATCHES, temperature=math.inf)
    assert len(scores.nll) == int((LABELS[:, is_shifted:] != -100).sum())
    with torch.no_grad():
        loss = float(model(input_ids=IDS, labels=LABELS).loss)
    assert float(scores.nll.mean()) == pytest.approx(loss, rel=1e-5)
    model.train()(input_ids=IDS, labels=LABELS).loss.backward()
    assert optimizer.examples.of_step() == (6, len(scores.nll))


def test_batches_without_labels_are_named(trained: Any) -> None:
    model, optimizer, _ = trained
    with pytest.raises(ValueError, match=r"no tensor 'labels', only \['input_ids'\]"):
        token_nll(model, optimizer, [{"input_ids": IDS}])
    ignored = [{"input_ids": IDS, "labels": torch.full_like(IDS, -100)}]
    for function in (token_nll, choose_token_temperature, fit_token_temperature):
        with pytest.raises(ValueError, match="no label but -100"):
            function(model, optimizer, ignored)
