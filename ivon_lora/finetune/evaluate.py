"""Class probabilities on the test sets, at the mean of the weights and averaged over posterior samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ivon_lora.finetune.batches import Encoded, evaluation_batches, pad
from ivon_lora.finetune.methods import Method
from ivon_lora.finetune.runtime import Runtime
from ivon_lora.posterior.metrics import ProbabilityScores, Reliability, reliability, score_probabilities

__all__ = ["Result", "evaluate", "merged", "predict_logits"]

BATCH_SIZE = 64


@dataclass(frozen=True)
class Result:
    """Scores on one set (``"test"`` or ``"shifted"``) with one kind of weights (``"mean"`` or ``"8 samples"``)."""

    set: str
    weights: str
    scores: ProbabilityScores
    reliability: Reliability


def evaluate(
    method: Method,
    sets: dict[str, Encoded],
    runtime: Runtime,
    samples: int,
    limit: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Result]:
    """Score ``method.model`` on each set.

    The mean is scored on every sentence. Sample averages cost ``samples`` passes, so they are taken over the first
    ``limit`` sentences of each set (0: all), and the mean is scored on the same ones again for comparison.

    Args:
        method: its model holds the mean of the weights.
        sets: by name.
        runtime: device and precision.
        samples: posterior samples to average over.
        limit: see above.
        progress: called with (what, sentences done, sentences in all); may raise to stop.
    """
    results: list[Result] = []
    subsets = {name: data if limit == 0 else data.first(limit) for name, data in sets.items()}
    mean: dict[str, Tensor] = {}
    for name, data in sets.items():
        logits = predict_logits(method.model, data, runtime, partial(progress, name))
        mean[name] = logits.double().softmax(-1)
    averaged = _sample_averages(method, subsets, runtime, samples, progress)
    for name, data in sets.items():
        results.append(_result(name, "mean", mean[name], torch.tensor(data.labels)))
        if averaged is None:
            continue
        part = subsets[name]
        labels = torch.tensor(part.labels)
        if len(part) < len(data):
            results.append(_result(name, "mean", mean[name][: len(part)], labels))
        results.append(_result(name, f"{samples} samples", averaged[name], labels))
    return results


def _result(name: str, weights: str, probabilities: Tensor, labels: Tensor) -> Result:
    return Result(name, weights, score_probabilities(probabilities, labels), reliability(probabilities, labels))


def predict_logits(
    model: Any, data: Encoded, runtime: Runtime, progress: Callable[[int, int], None] = lambda done, total: None
) -> Tensor:
    """Logits of every sentence, shape (n, classes), fp32 on the CPU, with dropout off and in the given order."""
    model.eval()
    rows: list[Tensor] = []
    order: list[int] = []
    with torch.no_grad(), merged(model, runtime.device):
        for indices in evaluation_batches(data, BATCH_SIZE):
            batch = pad(data, indices, runtime.device)
            with runtime.autocast():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            rows.append(logits.float().cpu())
            order += indices
            progress(len(order), len(data))
    shuffled = torch.cat(rows)
    restored = torch.empty_like(shuffled)
    restored[torch.tensor(order)] = shuffled
    return restored


@contextmanager
def merged(model: Any, device: torch.device) -> Iterator[None]:
    """Fold the adapters into the base weights, a third faster on a CPU; all weights are the same bits afterwards."""
    if device.type != "cpu":
        yield
        return
    bases = [m.get_base_layer().weight for m in model.modules() if hasattr(m, "get_base_layer") and hasattr(m, "merge")]
    before = [weight.detach().clone() for weight in bases]
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()
        with torch.no_grad():
            for weight, old in zip(bases, before, strict=True):  # subtracting again would leave rounding errors
                weight.copy_(old)


def _sample_averages(
    method: Method,
    subsets: dict[str, Encoded],
    runtime: Runtime,
    samples: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, Tensor] | None:
    """Averaged probabilities by set; every set sees the same samples."""
    total = sum(map(len, subsets.values())) * samples
    done = 0

    def report(start: int, count: int, _: int) -> None:
        progress(f"{samples} samples", start + count, total)

    def forward() -> Tensor:
        nonlocal done
        logits = []
        for data in subsets.values():
            logits.append(predict_logits(method.model, data, runtime, partial(report, done)))
            done += len(data)
        return torch.cat(logits)

    probabilities = method.sampled_probabilities(forward, samples)
    if probabilities is None:
        return None
    parts = probabilities.split([len(data) for data in subsets.values()])
    return dict(zip(subsets, parts, strict=True))
