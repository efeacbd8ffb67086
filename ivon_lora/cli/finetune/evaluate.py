"""Class probabilities on the test sets, at the mean of the weights and averaged over posterior samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ivon_lora import PosteriorFile, fit_temperature, posterior_predict, score_probabilities
from ivon_lora.cli.report import plain_bins
from ivon_lora.posterior.metrics import reliability
from ivon_lora.posterior.softmax_temperature import FEW, soften
from ivon_lora.posterior.tensor_file import read_tensors, write_tensors


def evaluate(
    trainer: Trainer,
    sets: Mapping[str, Sequence[dict[str, Any]]],
    posterior: PosteriorFile | None,
    samples: int,
    limit: int,
    temperature: float | None,
    file: Path,
) -> list[dict[str, Any]]:
    """Score the trained model on each set of tokenized texts, and keep the predictions of its mean in ``file``.

    The mean is scored on every text, with the softmax ``temperature`` too ("mean + TS") if there is one. Sample
    averages cost ``samples`` passes, so they are taken over the first ``limit`` texts of each set (0: all), and the
    mean is scored on the same ones for comparison. Each of these is a row of the table.
    """
    rows, kept, model = [], {}, trainer.model
    assert model is not None
    for name, examples in sets.items():
        labels = torch.tensor([example["labels"] for example in examples])
        found = {"mean": predict(trainer, examples).double().softmax(-1)}
        rows.append({"set": name, **_row("mean", found["mean"], labels)})
        kept[name], kept[f"{name}.labels"] = soften(found["mean"], temperature or 1.0), labels
        if temperature is not None:
            rows.append({"set": name, **_row("mean + TS", soften(found["mean"], temperature), labels)})
        if posterior is None:
            continue
        part = examples[: limit or None]
        if len(part) == len(examples):
            del found["mean"]

        def forward(_: object, part: Sequence[dict[str, Any]] = part) -> Tensor:
            return predict(trainer, part)

        found[f"{samples} samples"] = posterior_predict(model, posterior, forward, samples)
        rows += [{"set": name, **_row(kind, p[: len(part)], labels[: len(part)])} for kind, p in found.items()]
    write_tensors(file, kept, {})
    return rows


def mixture(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows as `evaluate` has them, for the mean of the probabilities that it kept of several runs."""
    runs = [read_tensors(file)[0] for file in files]
    sets = [name for name in runs[0] if not name.endswith(".labels")]
    kind = f"mixture of {len(runs)} runs"
    means = {name: torch.stack([run[name] for run in runs]).mean(0) for name in sets}
    return [{"set": name, **_row(kind, means[name], runs[0][f"{name}.labels"])} for name in sets]


def softmax_temperature(trainer: Trainer, examples: Sequence[dict[str, Any]]) -> float | None:
    """`fit_temperature` for the present weights on validation texts; None for too few of them."""
    if len(examples) < FEW:
        return None
    labels = torch.tensor([example["labels"] for example in examples])
    return fit_temperature(predict(trainer, examples).double().softmax(-1), labels)


def predict(trainer: Trainer, examples: Sequence[dict[str, Any]]) -> Tensor:
    """Logits at the present weights, (n, classes), in the order of the examples; texts of like length share a batch."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    by_length: Any = [examples[i] for i in order]
    return torch.as_tensor(trainer.predict(by_length).predictions)[torch.tensor(order).argsort()]


def _row(weights: str, probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    scores = asdict(score_probabilities(probabilities, labels))
    return {"weights": weights, **scores, "reliability": plain_bins(reliability(probabilities, labels))}
