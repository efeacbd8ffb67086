"""How many examples a step's gradient is the mean of: B of the curvature "fisher", counted at training forwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

#: inputs of Hugging Face models whose dimension 0 is the batch's
INPUT_NAMES = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")


def examples_in(args: Iterable[Any], kwargs: Mapping[str, Any]) -> int:
    """Size of dimension 0 of the first tensor among a forward's arguments; 0 if there is none.

    Positional arguments come first, then `INPUT_NAMES`, then the other keyword arguments; lists and mappings count as
    their first tensor.
    """
    named = (kwargs[name] for name in INPUT_NAMES if name in kwargs)
    for value in (*args, *named, *kwargs.values()):
        tensor = _first_tensor(value)
        if tensor is not None:
            return tensor.shape[0]
    return 0


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.dim() else None
    if isinstance(value, Mapping):
        value = [*(value[name] for name in INPUT_NAMES if name in value), *value.values()]
    if isinstance(value, list | tuple):
        return next((t for t in map(_first_tensor, value) if t is not None), None)
    return None


def replicas() -> int:
    """Processes whose gradients are averaged: the size of the default process group, 1 without one."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


class ExampleCounter:
    """Counts examples between two steps; a step may have several samples, each with a batch of its own."""

    def __init__(self) -> None:
        self._seen = 0
        self._earlier = 0  # at the samples of this step before the last
        self._samples = 0  # before the last
        self._short_steps = 0

    def add(self, examples: int) -> None:
        """A training forward saw ``examples``."""
        self._seen += examples

    @property
    def batch(self) -> int | None:
        """Examples that the gradient at the present sample is the mean of, on all replicas; None if none was seen."""
        return self._seen * replicas() if self._seen else None

    @property
    def batch_of_step(self) -> int | None:
        """The mean of `batch` over the samples before the present one; None if no example was seen."""
        return self._earlier * replicas() // max(self._samples, 1) or None

    def next_sample(self) -> None:
        """The gradient at the present sample is complete."""
        self._earlier += self._seen
        self._samples += 1
        self._seen = 0

    def next_step(self) -> None:
        """Start again at zero."""
        self._seen = self._earlier = self._samples = 0

    def complaint(self, batch_size: int, n_samples: int) -> str | None:
        """What is wrong with a ``batch_size`` that was stated, before :meth:`next_step`; None if nothing is.

        Twice as many examples or more are wrong at once; half of them or fewer the second time in a row, because the
        last batch of an epoch may be short. Two micro-batches or two processes left out of account are a factor of 2.
        """
        counted = (self._seen + self._earlier) * replicas() / max(n_samples, 1)
        if counted == 0:
            return None
        self._short_steps = self._short_steps + 1 if counted <= batch_size / 2 else 0
        if counted < 2 * batch_size and self._short_steps < 2:
            return None
        return disagreement(batch_size, round(counted))


def disagreement(batch_size: int, examples: int) -> str:
    """What to say where ``batch_size`` was stated, and a step averages over ``examples``."""
    return (
        f"batch_size is {batch_size}, but a step's gradient is the mean of {examples} examples: the posterior's "
        f"precision is wrong by their ratio. Pass batch_size={examples} (all accumulated micro-batches, all replicas), "
        "or batch_size='auto'."
    )
