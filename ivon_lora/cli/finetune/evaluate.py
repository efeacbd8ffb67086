"""Class probabilities on the test sets, at the mean of the weights and averaged over posterior samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import Trainer

from ivon_lora import PosteriorFile, fit_temperature, posterior_predict, score_probabilities
from ivon_lora.cli.finetune.options import Settings
from ivon_lora.cli.report import plain_bins
from ivon_lora.posterior.metrics import reliability
from ivon_lora.posterior.softmax_temperature import FEW, soften
from ivon_lora.posterior.tensor_file import read_tensors, write_tensors

#: tokenized texts with their labels
Texts: TypeAlias = Sequence[dict[str, Any]]
#: training texts that a temperature without labels looks at, at most
TRAINED = 256


def evaluate(
    trainer: Trainer, data: Mapping[str, Texts], posterior: PosteriorFile | None, settings: Settings, file: Path
) -> tuple[list[dict[str, Any]], float | None]:
    """Rows of scores of the trained model on each test set, and the softmax temperature of its mean.

    The mean is scored on every text; also with the temperature that the validation texts choose or, where they are too
    few, that makes it as sure of training texts as the posterior's samples are ("mean + TS"): these predictions are
    kept in ``file``. Sample averages cost ``--samples`` passes, so they are taken over the first ``--eval-limit`` texts
    of each set (0: all), and the mean is scored on the same ones for comparison.
    """
    rows: list[dict[str, Any]] = []
    kept: dict[str, Tensor] = {}
    temperature = softmax_temperature(trainer, data, posterior, settings.samples)
    for name in [name for name in data if name in ("test", "shifted")]:
        examples, labels = data[name], _labels(data[name])
        mean = at_mean(trainer, examples)
        kept |= {name: soften(mean, temperature or 1.0), f"{name}.labels": labels}
        found = [("mean", mean)]
        if temperature is not None:
            found.append(("mean + TS", kept[name]))
        if posterior is not None:
            part = examples[: settings.eval_limit or None]
            if len(part) < len(examples):
                found.append(("mean", mean[: len(part)]))
            found.append((f"{settings.samples} samples", averaged(trainer, posterior, part, settings.samples)))
        rows += [_row(name, weights, p, labels[: len(p)]) for weights, p in found]
    write_tensors(file, kept, {})
    return rows, temperature


def softmax_temperature(
    trainer: Trainer, data: Mapping[str, Texts], posterior: PosteriorFile | None, n_samples: int
) -> float | None:
    """That of the mean; None where there are neither labels nor a posterior, or fewer than `FEW` texts, to set it."""
    texts = data["validation"]
    if len(texts) >= FEW:
        return fit_temperature(at_mean(trainer, texts), _labels(texts))
    texts = data["train"][:TRAINED]
    if posterior is None or len(texts) < FEW:
        return None
    return fit_temperature(at_mean(trainer, texts), averaged(trainer, posterior, texts, n_samples))


def mixture(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows as `evaluate` has them, for the mean of the probabilities that it kept of several runs."""
    runs = [read_tensors(file)[0] for file in files]
    sets = [name for name in runs[0] if not name.endswith(".labels")]
    means = {name: torch.stack([run[name] for run in runs]).mean(0) for name in sets}
    return [_row(name, f"mixture of {len(runs)} runs", p, runs[0][f"{name}.labels"]) for name, p in means.items()]


def at_mean(trainer: Trainer, examples: Texts) -> Tensor:
    """Probabilities at the mean of the weights, which is what they are now: (n, classes)."""
    return _logits(trainer, examples).double().softmax(-1)


def averaged(trainer: Trainer, posterior: PosteriorFile, examples: Texts, n_samples: int) -> Tensor:
    """Probabilities averaged over samples of the posterior, (n, classes)."""
    assert trainer.model is not None
    return posterior_predict(trainer.model, posterior, lambda _: _logits(trainer, examples), n_samples)


def _logits(trainer: Trainer, examples: Texts) -> Tensor:
    """(n, classes), in the order of the examples; texts of like length share a batch."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    by_length: Any = [examples[i] for i in order]
    return torch.as_tensor(trainer.predict(by_length).predictions)[torch.tensor(order).argsort()]


def _labels(examples: Texts) -> Tensor:
    return torch.tensor([example["labels"] for example in examples])


def _row(name: str, weights: str, probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    scores = asdict(score_probabilities(probabilities, labels))
    return {"set": name, "weights": weights, **scores, "reliability": plain_bins(reliability(probabilities, labels))}
