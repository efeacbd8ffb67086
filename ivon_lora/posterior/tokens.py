"""Language models, token by token: the loss, the entropy and the calibration of predictions averaged over samples.

Batches stream: of one batch the probabilities of all classes are held, of all batches a few numbers a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ivon_lora.optim.example_counter import shifts_labels
from ivon_lora.posterior.metrics import Reliability, bins_of
from ivon_lora.posterior.posterior import PosteriorFile
from ivon_lora.posterior.predict import TEMPERATURES, TemperatureCurve, choose_temperature, posterior_predict
from ivon_lora.posterior.softmax_temperature import BOUNDS, floored_log, mean_log, warn_if_few

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

__all__ = ["TokenScores", "choose_token_temperature", "fit_token_temperature", "token_nll"]

IGNORED = -100


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Predictions of tokens, in the order of the batches; every tensor is fp32 ``(n,)`` on the CPU.

    Attributes:
        nll: -log p(label), nats.
        entropy: of the prediction, nats.
        confidence: probability of the most probable token.
        right: 1 where that is the label, else 0.
    """

    nll: Tensor
    entropy: Tensor
    confidence: Tensor
    right: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean nll."""
        return float(self.nll.double().mean().exp())

    def reliability(self, bins: int = 15) -> Reliability:
        """Tokens binned by confidence; its ``gap`` is the expected calibration error of the most probable token."""
        return bins_of(self.confidence, self.right, bins)


@torch.no_grad()
def token_nll(
    model: nn.Module,
    posterior: IVON | PosteriorFile,
    batches: Iterable[Mapping[str, Any]],
    n_samples: int = 8,
    temperature: float = 1.0,
    softmax_temperature: float | None = None,
) -> TokenScores:
    """Scores of all labels but those that are -100, of probabilities averaged over posterior samples.

    Args:
        model: a language model of Hugging Face; put it in ``eval()`` mode first if it has dropout. Labels of a causal
            one are those of the next position.
        posterior: as `posterior_predict`. An optimizer draws new samples for every batch.
        batches: what the model takes by name, with ``labels``; moved to the model's device. A batch needs room for its
            labels times the vocabulary, three times in fp32.
        n_samples, temperature, softmax_temperature: as `posterior_predict`; temperature ``math.inf`` is the mean alone.

    Raises:
        ValueError: a batch has no labels, all of them are -100, or as `posterior_predict`.
    """
    columns = []
    for forward, labels in _labelled(model, batches):
        p = posterior_predict(model, posterior, forward, n_samples, temperature, softmax_temperature)
        confidence, predicted = p.max(-1)
        p.clamp_(min=torch.finfo(torch.float32).tiny)
        nll = -p.gather(-1, labels[:, None])[:, 0].log()
        entropy = torch.special.entr(p).sum(-1)
        columns.append(torch.stack([nll, entropy, confidence, (predicted == labels).to(nll)]).float().cpu())
    return TokenScores(*torch.cat(columns, 1))


def choose_token_temperature(
    model: nn.Module,
    posterior: IVON | PosteriorFile,
    batches: Iterable[Mapping[str, Any]],
    n_samples: int = 8,
    temperatures: Sequence[float] = TEMPERATURES,
) -> TemperatureCurve:
    """`choose_temperature` for `token_nll`, with the arguments and errors of both; the nll is a mean over labels."""
    total, n = torch.zeros(len(temperatures), dtype=torch.float64), 0
    for forward, labels in _labelled(model, batches):
        curve = choose_temperature(model, posterior, forward, labels, n_samples, temperatures)
        total, n = total + len(labels) * torch.tensor(curve.nll, dtype=torch.float64), n + len(labels)
    return TemperatureCurve(tuple(map(float, temperatures)), tuple((total / n).tolist()))


@torch.no_grad()
def fit_token_temperature(
    model: nn.Module,
    posterior: IVON | PosteriorFile,
    batches: Iterable[Mapping[str, Any]],
    n_samples: int = 8,
    temperature: float = math.inf,
) -> float:
    """`fit_temperature` for `token_nll`, by default at the mean; arguments and errors are those of `token_nll`.

    One pass over batches that were not trained on, e.g. of a validation set: the slope of the loss is summed at 33
    values of 1 / t, and is zero between two of them, which gives t to a percent.

    Returns:
        t in [0.05, 20], for ``softmax_temperature`` of `token_nll`, `posterior_predict` and `save_posterior`. A warning
        below 50 labels.
    """
    sharpness = np.geomspace(1 / BOUNDS[1], 1 / BOUNDS[0], 33)
    slopes, n = np.zeros(len(sharpness)), 0
    for forward, labels in _labelled(model, batches):
        log_p = floored_log(posterior_predict(model, posterior, forward, n_samples, temperature, 1.0))
        aim = log_p.gather(-1, labels[:, None])[:, 0]
        slopes += [float((mean_log(log_p, x) - aim).double().sum()) for x in sharpness]
        n += len(labels)
    warn_if_few(n, "labels")
    return math.exp(-np.interp(0.0, slopes, np.log(sharpness)))  # slopes rise: the loss is convex in 1 / t


def _labelled(
    model: nn.Module, batches: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Callable[[nn.Module], Tensor], Tensor]]:
    """Of every batch a forward to the logits (n, vocabulary) of the positions with a label, and the labels (n,)."""
    device, ahead, found = next(model.parameters()).device, int(shifts_labels(model)), False
    for batch in batches:
        if not isinstance(batch.get("labels"), Tensor):
            raise ValueError(f"a batch has no tensor 'labels', only {sorted(batch)}: token losses need them")
        moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        labels = moved["labels"][:, ahead:]
        wanted = labels != IGNORED

        def forward(model: nn.Module, moved: dict[str, Any] = moved, wanted: Tensor = wanted) -> Tensor:
            logits: Tensor = model(**moved).logits
            return logits[:, : logits.shape[1] - ahead][wanted]

        if wanted.any():
            found = True
            yield forward, labels[wanted]
    if not found:
        raise ValueError("batches have no label but -100: give at least one batch with labels")
