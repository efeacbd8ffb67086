"""Class probabilities on the test sets, at the mean of the weights and averaged over posterior samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ivon_lora import posterior_predict, score_probabilities, snapshot_posterior
from ivon_lora.cli.finetune.options import Settings
from ivon_lora.posterior.metrics import reliability

__all__ = ["evaluate", "predict"]


def evaluate(
    trainer: Trainer, sets: Mapping[str, Sequence[dict[str, Any]]], settings: Settings
) -> list[dict[str, Any]]:
    """Score the trained model on each set.

    The mean is scored on every text. Sample averages cost ``settings.samples`` passes, so they are taken over the
    first ``settings.eval_limit`` texts of each set (0: all), and the mean is scored on the same ones for comparison.

    Args:
        trainer: after training.
        sets: tokenized texts by the name of their set.
        settings: of the run.

    Returns:
        a row for each set and kind of weights: ``set``, ``weights`` ("mean" or e.g. "8 samples"), ``n``, ``accuracy``,
        ``nll`` (nats), ``ece``, ``brier`` and ``reliability``, the bins of the calibration diagram.
    """
    posterior = snapshot_posterior(trainer.optimizer) if settings.optimizer == "ivon" else None
    rows = []
    for name, examples in sets.items():
        labels = torch.tensor([example["labels"] for example in examples])
        mean = predict(trainer, examples).double().softmax(-1)
        rows.append(_row(name, "mean", mean, labels))
        if posterior is None:
            continue
        part = examples[: settings.eval_limit or None]
        if len(part) < len(examples):
            rows.append(_row(name, "mean", mean[: len(part)], labels[: len(part)]))
        averaged = posterior_predict(
            trainer.model, posterior, lambda _, part=part: predict(trainer, part), n_samples=settings.samples
        )
        rows.append(_row(name, f"{settings.samples} samples", averaged, labels[: len(part)]))
    return rows


def predict(trainer: Trainer, examples: Sequence[dict[str, Any]]) -> Tensor:
    """Logits at the present weights, (n, classes), in the order of the examples; texts of like length share a batch."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    logits = torch.as_tensor(trainer.predict([examples[i] for i in order]).predictions)
    return logits[torch.tensor(order).argsort()]


def _row(name: str, weights: str, probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    bins = asdict(reliability(probabilities, labels))
    plain = {key: [None if x != x else x for x in column] for key, column in bins.items()}  # nan: an empty bin
    scores = asdict(score_probabilities(probabilities, labels))
    return {"set": name, "weights": weights, **scores, "reliability": plain}
