"""Loops that frameworks write: cached contrastive losses, two trainers of one model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import VAdam
from ivon_lora.integrations.trainer import attach_trainer
from tests.tiny_language_model import make_tokenizer, texts
from tests.tiny_trainer import arguments, make_data, make_model

transformers = pytest.importorskip("transformers")
N = 32


def means(optimizer: VAdam) -> list[Tensor]:
    return [optimizer.posterior(p).mean for p in optimizer.parameters]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_cached_contrastive_losses_are_the_plain_ones(tmp_path: Path) -> None:
    """sentence-transformers' GradCache: representations without gradients, then each piece again in the backward."""
    library = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Pooling

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=12, **sizes, **options)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    pairs = datasets.Dataset.from_dict({"anchor": texts(N), "positive": texts(N)[3:] + texts(3)})

    def train(loss: str, **options: Any) -> VAdam:
        encoder = Transformer(str(tmp_path))
        model = library.SentenceTransformer(modules=[encoder, Pooling(16)], device="cpu")
        for name, p in model.named_parameters():
            p.requires_grad_(not name.endswith("key.bias"))  # its gradient is rounding, which Adam makes large
        args = library.SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=8,
            num_train_epochs=5,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
        )
        made = getattr(losses, loss)(model, **options)
        trainer = library.SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=made)
        optimizer = attach_trainer(trainer, noise_warmup=N)
        trainer.train()
        assert isinstance(optimizer, VAdam)
        assert optimizer.param_groups[0]["examples_seen"] == 5 * N
        return optimizer

    plain = train("MultipleNegativesRankingLoss")
    cached = train("CachedMultipleNegativesRankingLoss", mini_batch_size=4)
    for p, q in zip(cached.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(cached.posterior(p).mean, plain.posterior(q).mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(cached.posterior(p).stddev, plain.posterior(q).stddev, rtol=1e-3, atol=1e-6)


def test_a_second_trainer_of_a_model_takes_over(tmp_path: Path) -> None:
    """It trains as if the first one had never been: from where that one has left the means."""

    def train(model: nn.Module) -> VAdam:
        trainer = transformers.Trainer(model, arguments(tmp_path, max_steps=14), train_dataset=make_data())
        optimizer = attach_trainer(trainer, noise_warmup=0)
        trainer.train()
        assert isinstance(optimizer, VAdam)
        return optimizer

    model = make_model()
    first = train(model)
    left = copy.deepcopy(model)
    second, alone = train(model), train(left)
    torch.testing.assert_close(means(second), means(alone), rtol=0, atol=0)
    assert first.completed_steps == 14
    assert first.superseded == {id(p) for p in first.parameters}
