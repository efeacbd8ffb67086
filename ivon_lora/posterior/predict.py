"""Prediction with the posterior: probabilities averaged over samples of the weights, and over runs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import torch
from torch import Tensor, nn

from ivon_lora.posterior.metrics import nll
from ivon_lora.posterior.posterior import DEFAULT_NAME, PosteriorFile, load_posterior, unwrapped
from ivon_lora.posterior.softmax_temperature import soften

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

#: of one run: its optimizer, its posterior, or where its posterior or its adapter is
Run: TypeAlias = Union["IVON", PosteriorFile, str, os.PathLike[str]]
#: the same, opened; a path is an adapter's
Source: TypeAlias = Union["IVON", PosteriorFile, Path]

__all__ = ["TEMPERATURES", "TemperatureCurve", "choose_temperature", "posterior_predict"]

#: what `choose_temperature` tries: half decades around the trained posterior, and the mean alone
TEMPERATURES = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0, 10**1.5, 100.0, math.inf)


@dataclass(frozen=True)
class TemperatureCurve:
    """What `choose_temperature` measured.

    Attributes:
        temperatures: tau, as given.
        nll: mean negative log-likelihood at each of them, nats an example.
    """

    temperatures: tuple[float, ...]
    nll: tuple[float, ...]

    @property
    def temperature(self) -> float:
        """The best of ``temperatures``; of equals the highest, which has the least noise."""
        return -min(zip(self.nll, (-tau for tau in self.temperatures), strict=True))[1]


@torch.no_grad()
def posterior_predict(
    model: nn.Module,
    posterior: Run | Sequence[Run],
    forward: Callable[[nn.Module], Tensor],
    n_samples: int = 8,
    temperature: float = 1.0,
    softmax_temperature: float | None = None,
) -> Tensor:
    """Posterior predictive probabilities: the mean over samples of softmax(logits), not the softmax of mean logits.

    Args:
        model: the model whose parameters the posterior is of; put it in ``eval()`` mode first if it has dropout.
        posterior: an optimizer, whose draws for prediction never disturb training; the model holds the mean afterwards.
            Or a posterior without its optimizer, or the path of its file: draws 0, 1, ... of its seed, after which the
            model holds what it held before. Or a folder with nothing but a PEFT adapter: its weights, without noise. Or
            a list of these, one for each run: the mean of their probabilities.
        forward: ``forward(model)`` returns logits of shape (..., classes).
        n_samples: posterior samples of each run, at least 1. One predicts worse than the mean; 8 are most of the way.
        temperature: tau > 0, the factor of the effective sample size (lambda_test = tau lambda, arXiv:2506.14280): the
            standard deviations are divided by sqrt(tau). ``math.inf`` is the mean alone, in one pass.
        softmax_temperature: t > 0 of `fit_temperature`, for what is averaged here: the result is the softmax of log(p)
            / t. None: that saved with each posterior where ``temperature`` is ``math.inf``, else 1.

    Returns:
        probabilities of shape (..., classes), fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: ``n_samples`` is less than 1, a temperature is not positive, or there is no run.
        FileNotFoundError: there is neither a posterior nor an adapter at a path.
    """
    _check(n_samples, temperature)
    runs: list[Any] = list(posterior) if isinstance(posterior, list | tuple) else [posterior]
    if not runs:
        raise ValueError("posterior is an empty list: give at least one run")
    total: Any = 0
    for source in map(_opened, runs):
        p = _average(model, source, forward, n_samples, temperature, _next_draw(source))
        if softmax_temperature is None and math.isinf(temperature) and isinstance(source, PosteriorFile):
            p = soften(p, source.softmax_temperature)
        total = total + p
    return soften(total / len(runs), 1.0 if softmax_temperature is None else softmax_temperature)


@torch.no_grad()
def choose_temperature(
    model: nn.Module,
    posterior: IVON | PosteriorFile,
    forward: Callable[[nn.Module], Tensor],
    labels: Tensor,
    n_samples: int = 8,
    temperatures: Sequence[float] = TEMPERATURES,
) -> TemperatureCurve:
    """Find the temperature of `posterior_predict` with the least negative log-likelihood on validation data.

    Every temperature sees the same noise, scaled, so that the curve is smooth in spite of few samples. The cost is
    ``n_samples`` forward passes for each temperature, and one for ``math.inf``.

    Args:
        model, posterior, n_samples: as `posterior_predict`, of one run.
        forward: ``forward(model)`` returns the logits (n, classes) of validation examples; never of the test set.
        labels: integers (n,), the right class of every example.
        temperatures: what is tried.

    Raises:
        ValueError: no temperature, or one that is not positive; ``n_samples`` less than 1; labels that do not fit.
    """
    if not temperatures:
        raise ValueError("temperatures is empty: give at least one, e.g. (1.0, math.inf)")
    for temperature in temperatures:
        _check(n_samples, temperature)
    source = _opened(posterior)
    first = _next_draw(source)
    losses = [nll(_average(model, source, forward, n_samples, tau, first), labels) for tau in temperatures]
    return TemperatureCurve(tuple(map(float, temperatures)), tuple(losses))


def _opened(run: Run) -> Source:
    """The posterior of a run; a path only where it is a folder with an adapter and no posterior."""
    if isinstance(run, PosteriorFile):
        return run
    if not isinstance(run, str | os.PathLike):
        return unwrapped(run)
    path = Path(run)
    is_adapter = (path / "adapter_config.json").is_file() and not (path / DEFAULT_NAME).is_file()
    return path if is_adapter else load_posterior(path)


def _next_draw(source: Source) -> int:
    """The number of the next sample: an optimizer goes on in its stream, a posterior without one begins again."""
    return 0 if isinstance(source, PosteriorFile | Path) else int(source.param_groups[0]["prediction_draws"])


def _average(
    model: nn.Module,
    source: Source,
    forward: Callable[[nn.Module], Tensor],
    n_samples: int,
    temperature: float,
    first: int,
) -> Tensor:
    """Mean probabilities over the samples of one run, numbered from ``first`` on."""
    count = 1 if math.isinf(temperature) or isinstance(source, Path) else n_samples
    total: Any = 0
    for draw in range(first, first + count):
        with _sampled(model, source, temperature, draw):
            logits = forward(model)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        total = total + logits.to(dtype).softmax(-1)
    return total / count


def _sampled(model: nn.Module, source: Source, temperature: float, draw: int) -> AbstractContextManager[None]:
    """The weights of one draw in the model."""
    if isinstance(source, Path):
        return _adapter(model, source)
    if isinstance(source, PosteriorFile):
        return source.loaded(model, None if math.isinf(temperature) else source.sample(source.seed, draw, temperature))
    return _tempered(source, temperature, draw)


@contextmanager
def _adapter(model: Any, path: Path) -> Iterator[None]:
    """The adapter in a folder active inside, those that were so before after; ranks may differ from theirs."""
    if not hasattr(model, "load_adapter"):
        raise ValueError(f"{path} is an adapter and {type(model).__name__} no PeftModel: get_peft_model() makes one")
    active, name = model.active_adapter, f"of {path}".replace(".", "_")
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.load_adapter(str(path), adapter_name=name)
        model.set_adapter(name)
        yield
    finally:
        model.set_adapter(active)
        model.delete_adapter(name)
        for p, before in trained:
            p.requires_grad_(before)


@contextmanager
def _tempered(optimizer: IVON, temperature: float, draw: int) -> Iterator[None]:
    """A prediction sample with the effective sample size times ``temperature``, or the mean if that is infinite."""
    was_sampled = optimizer.is_sampled
    optimizer.eval()  # before ess changes: a sample that is live was drawn with the true one
    before = [(group, group["ess"]) for group in optimizer.param_groups]
    try:
        if math.isinf(temperature):
            yield
        else:
            for group, ess in before:
                group["ess"], group["prediction_draws"] = ess * temperature, draw
            with optimizer.sampled_params():
                yield
    finally:
        for group, ess in before:
            group["ess"] = ess
        if was_sampled:
            optimizer.train()


def _check(n_samples: int, temperature: float) -> None:
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")
    if not temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {temperature}: above 1 is less noise, math.inf the mean alone"
        )
