"""The posterior without its optimizer: mean and standard deviation of every trained tensor, in memory or as a file.

A safetensors file with ``<name>.mean`` and ``<name>.std`` (state dtype, shape of the parameter), ``<name>.rank_mask``
(rank,) for tensors of pruned adapters, and in the string metadata: format, package version, the names in the order of
the optimizer and their places in the noise, seed, completed steps, softmax temperature.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ivon_lora.functional.noise import NoiseKey, normal
from ivon_lora.lora.names import matched
from ivon_lora.optim.sharding import by_first, is_sharded, whole
from ivon_lora.optim.wrappers import unwrap
from ivon_lora.posterior.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

__all__ = ["PosteriorFile", "load_posterior", "save_posterior", "snapshot_posterior"]

FORMAT = "ivon-lora posterior 1"
#: file name inside a directory, e.g. beside `adapter_model.safetensors`
DEFAULT_NAME = "ivon_posterior.safetensors"


@dataclass(frozen=True, eq=False)
class PosteriorFile:
    """Independent Gaussians N(mean, std^2) per weight, of `load_posterior` or `snapshot_posterior`; on the CPU.

    Attributes:
        mean: by name, shape of the parameter, in the order of the optimizer; of those that share memory the first.
        std: by name, same shape; 0 for ranks that were pruned for good.
        rank_mask: by name, bool (rank,), False for pruned ranks; only tensors of pruned adapters.
        seed: seed of the run.
        completed_steps: optimizer steps of the run.
        softmax_temperature: of predictions at the mean, by `fit_temperature`; 1 where none was fitted.
        places: indices of the names in the noise; empty for 0, 1, 2 ...
    """

    mean: dict[str, Tensor]
    std: dict[str, Tensor]
    rank_mask: dict[str, Tensor]
    seed: int
    completed_steps: int
    softmax_temperature: float = 1.0
    places: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters, in the order of the optimizer."""
        return tuple(self.mean)

    def sample(self, seed: int, draw: int = 0, temperature: float = 1.0) -> dict[str, Tensor]:
        """One posterior sample of all parameters by name, a function of the posterior and the arguments alone.

        With the seed of the run, draw k is the k-th sample that the optimizer itself draws for prediction
        (``sampled_params(train=False)``), up to rounding.

        Args:
            seed: 0 <= seed < 2**64.
            draw: 0 <= draw < 2**32, number of the sample.
            temperature: tau > 0, the factor of ess: the standard deviations are divided by sqrt(tau).

        Raises:
            ValueError: seed, draw or temperature outside its bounds.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}: above 1 is less noise")
        key = NoiseKey(seed, draw, prediction=True)
        samples = {}
        for index, name in zip(self.places or range(len(self.names)), self.names, strict=True):
            mean, std = self.mean[name], self.std[name] / math.sqrt(temperature)
            samples[name] = mean + std * normal(key, index, mean.shape, mean.device).to(mean.dtype)
        return samples

    def load_into(self, model: nn.Module, sample: Mapping[str, Tensor] | None = None) -> None:
        """Write the means, or a sample, into the parameters of ``model`` in place.

        Args:
            model: has a parameter of every name and shape in the file (the model as trained; `export_lora` shrinks
                the ranks, so an exported adapter does not fit).
            sample: what :meth:`sample` returned; None writes the means.

        Raises:
            ValueError: a parameter is missing, has another shape, or ``sample`` lacks one. Nothing has changed then.
        """
        with torch.no_grad():
            for p, value in self._pairs(model, sample):
                p.copy_(value)

    @contextmanager
    def loaded(self, model: nn.Module, sample: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """As :meth:`load_into` inside; what the parameters held before, bit for bit, after.

        If an `IVON` holds the parameters, call ``optimizer.eval()`` first.
        """
        before = [(p, p.detach().clone()) for p, _ in self._pairs(model, sample)]
        try:
            self.load_into(model, sample)
            yield
        finally:
            with torch.no_grad():
                for p, old in before:  # also where the model has lost them meanwhile
                    p.copy_(old)

    def _pairs(self, model: nn.Module, sample: Mapping[str, Tensor] | None) -> list[tuple[nn.Parameter, Tensor]]:
        """(parameter of ``model``, value for it); raises as :meth:`load_into`."""
        values = self.mean if sample is None else sample
        parameters = dict(model.named_parameters(remove_duplicate=False))
        same = matched(self.names, parameters)
        pairs = []
        for name in self.names:
            p, value = parameters.get(same.get(name, "")), values.get(name)
            if p is None:
                raise ValueError(
                    f"{type(model).__name__} has no parameter {name!r}; load into the model that was trained"
                )
            if value is None or value.shape != p.shape:
                got = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise ValueError(f"parameter {name!r} has shape {tuple(p.shape)}, the posterior gives {got} for it")
            pairs.append((p, value))
        return pairs


def snapshot_posterior(optimizer: IVON, *, model: nn.Module | None = None) -> PosteriorFile:
    """The posterior of all parameters that an optimizer trains, as it is now; the same in both states of the weights.

    Parameters that always were frozen, such as those of the base model, have none. Of sharded parameters (FSDP2) all
    processes must ask, and all get the whole.

    Args:
        optimizer: the `IVON`, possibly wrapped by Accelerate.
        model: holds the parameters; it names them where the optimizer was not given names
            (``IVON(model.named_parameters(), ...)``).

    Raises:
        ValueError: parameters without a name, or two with the same one.
    """
    optimizer = unwrapped(optimizer)
    name_of = _names(optimizer, model)
    items = [item for item in optimizer.parameters.listed() if optimizer.parameters.has_posterior(item[2])]
    named = {name_of[id(p)]: p for _, _, p in items}
    posteriors = {name: optimizer.posterior(p) for name, p in named.items()}
    masks = {name: optimizer.state.get(p, {}).get("rank_mask") for name, p in named.items()}
    return PosteriorFile(
        mean={name: whole(posterior.mean.detach()).cpu() for name, posterior in posteriors.items()},
        std={name: whole(posterior.stddev.detach()).cpu() for name, posterior in posteriors.items()},
        rank_mask={name: mask.detach().cpu().clone() for name, mask in masks.items() if mask is not None},
        seed=optimizer.seed,
        completed_steps=optimizer.completed_steps,
        places=tuple(index for index, _, _ in items),
    )


def save_posterior(
    optimizer: IVON | PosteriorFile,
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    softmax_temperature: float = 1.0,
) -> Path:
    """Write what `snapshot_posterior` returns, atomically; the same file in both states of the weights.

    Under several processes, call it in one of them; if parameters are sharded (FSDP2), in all: the first one writes.

    Args:
        optimizer: the `IVON`, possibly wrapped by Accelerate; or a posterior, of `snapshot_posterior` say.
        path: the file, or an existing directory, which gets ``ivon_posterior.safetensors``.
        model: as `snapshot_posterior`.
        softmax_temperature: of `fit_temperature` for predictions at the mean, which `posterior_predict` then makes
            with it.

    Returns:
        the file written.

    Raises:
        ValueError: as `snapshot_posterior`; a mean or standard deviation is not finite; softmax_temperature is not
            positive.
    """
    posterior = optimizer if isinstance(optimizer, PosteriorFile) else snapshot_posterior(optimizer, model=model)
    if softmax_temperature != 1:
        posterior = replace(posterior, softmax_temperature=softmax_temperature)
    if fault := _fault(posterior):
        raise ValueError(f"the posterior is not saved: {fault}")
    groups = () if isinstance(optimizer, PosteriorFile) else optimizer.param_groups
    sharded = any(is_sharded(p) for group in groups for p in group["params"])

    def write() -> Path:
        target = _file(path)
        write_tensors(target, *_as_file(posterior))
        return target

    return by_first(sharded, write)


def load_posterior(path: str | os.PathLike[str]) -> PosteriorFile:
    """Read what `save_posterior` wrote.

    Args:
        path: the file, or the directory that holds ``ivon_posterior.safetensors``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged or not a posterior; one line that says which.
    """
    source = _file(path)
    if not source.is_file():
        raise FileNotFoundError(f"no posterior at {source}: save_posterior(optimizer, path) writes one")
    tensors, metadata = read_tensors(source)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{source} is not a posterior of this package: format {metadata.get('format')!r}")
    try:
        posterior = _parse(metadata, tensors)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} is damaged: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if fault := _fault(posterior):
        raise ValueError(f"{source} is damaged: {fault}")
    return posterior


def _fault(posterior: PosteriorFile) -> str | None:
    """What is wrong with the numbers, if anything."""
    if not 0 < posterior.softmax_temperature < math.inf:
        return f"softmax_temperature must be positive and finite, got {posterior.softmax_temperature}"
    for name in posterior.names:
        mean, std, mask = posterior.mean[name], posterior.std[name], posterior.rank_mask.get(name)
        if mean.shape != std.shape or mean.dtype != std.dtype or not mean.is_floating_point():
            return f"mean and std of {name!r} differ in shape or dtype, or are no floating-point numbers"
        if not bool(torch.isfinite(mean).all() & torch.isfinite(std).all() & (std >= 0).all()):
            return f"{name!r} has a mean or std that is not finite, or a negative std, as after a run that has diverged"
        if mask is not None and (mask.dtype != torch.bool or mask.dim() != 1 or len(mask) not in mean.shape):
            return f"the rank mask of {name!r} is {mask.dtype} {tuple(mask.shape)}, its mean {tuple(mean.shape)}"
    return None


def _as_file(posterior: PosteriorFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; `_parse` reads them."""
    from ivon_lora import __version__

    kinds = {"mean": posterior.mean, "std": posterior.std, "rank_mask": posterior.rank_mask}
    tensors = {f"{name}.{kind}": value for kind, values in kinds.items() for name, value in values.items()}
    return tensors, {
        "format": FORMAT,
        "version": __version__,
        "names": json.dumps(posterior.names),
        "seed": str(posterior.seed),
        "completed_steps": str(posterior.completed_steps),
        "softmax_temperature": repr(posterior.softmax_temperature),
        "places": json.dumps(posterior.places),
    }


def _parse(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> PosteriorFile:
    if "names" in metadata:
        names = [str(name) for name in json.loads(metadata["names"])]
    else:  # of version 0.1.0, by parameter group
        names = [str(name) for group in json.loads(metadata["groups"]) for name in group["names"]]
    return PosteriorFile(
        mean={name: tensors[f"{name}.mean"] for name in names},
        std={name: tensors[f"{name}.std"] for name in names},
        rank_mask={name: tensors[f"{name}.rank_mask"] for name in names if f"{name}.rank_mask" in tensors},
        seed=int(metadata["seed"]),
        completed_steps=int(metadata["completed_steps"]),
        softmax_temperature=float(metadata.get("softmax_temperature", 1.0)),
        places=tuple(map(int, json.loads(metadata.get("places", "[]")))),
    )


def _names(optimizer: IVON, model: nn.Module | None) -> dict[int, str]:
    """The name of every parameter, by its identity."""
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    if all("param_names" in group for group in groups):
        found = dict(zip(map(id, params), (name for group in groups for name in group["param_names"]), strict=True))
    elif model is not None:
        found = {id(p): name for name, p in model.named_parameters()}
    else:
        raise ValueError(
            "the optimizer's parameters have no names: pass model=, or build IVON(model.named_parameters(), ...)"
        )
    if strangers := sum(id(p) not in found for p in params):
        raise ValueError(
            f"{strangers} of the optimizer's {len(params)} parameters are not in model=: pass the model they are in"
        )
    (name, count), *_ = Counter(found.values()).most_common(1)
    if count > 1:
        raise ValueError(f"{count} parameters are called {name!r}: name them by their path in the model")
    return found


def unwrapped(optimizer: Any) -> IVON:
    """The `IVON` inside what Accelerate made of it. ValueError if there is none."""
    found = unwrap(optimizer)
    if found is None:
        raise ValueError(f"{type(optimizer).__name__} has no posterior: pass the ivon_lora.IVON that trained the model")
    return found


def _file(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    return target / DEFAULT_NAME if target.is_dir() else target
