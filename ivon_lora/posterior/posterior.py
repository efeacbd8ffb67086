"""The posterior without its optimizer: mean and standard deviation of every trained tensor, in memory or as a file.

A safetensors file with ``<name>.mean`` and ``<name>.std`` (state dtype, shape of the parameter), ``<name>.rank_mask``
(rank,) for tensors of pruned adapters, and in the string metadata: format, package version, the names in the order of
the optimizer and their places in the noise, ess and weight decay of each parameter group, seed, completed steps,
softmax temperature.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

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
        names: names of the trained parameters in the order of the optimizer; of those that share memory the first.
        mean: by name, shape of the parameter.
        std: by name, same shape; 0 for ranks that were pruned for good.
        rank_mask: by name, bool (rank,), False for pruned ranks; only tensors of pruned adapters.
        groups: per parameter group ``{"names": [...], "ess": float, "weight_decay": float}``.
        seed: seed of the run.
        completed_steps: optimizer steps of the run.
        version: version of the package that wrote the file.
        softmax_temperature: of predictions at the mean, by `fit_temperature`; 1 where none was fitted.
        places: indices of the names in the noise; empty for 0, 1, 2 ...
    """

    names: tuple[str, ...]
    mean: dict[str, Tensor]
    std: dict[str, Tensor]
    rank_mask: dict[str, Tensor]
    groups: tuple[dict[str, Any], ...]
    seed: int
    completed_steps: int
    version: str
    softmax_temperature: float = 1.0
    places: tuple[int, ...] = ()

    def normal(self, name: str) -> Normal:
        """The posterior of one parameter; KeyError for a name that is not in ``names``."""
        return Normal(self.mean[name], self.std[name], validate_args=False)  # torch's check refuses std 0

    def sample(self, seed: int, draw: int = 0, temperature: float = 1.0) -> dict[str, Tensor]:
        """One posterior sample of all parameters, a function of the posterior and the arguments alone.

        With the seed of the run, draw k is the k-th sample that the optimizer itself draws for prediction
        (``sampled_params(train=False)``), up to rounding.

        Args:
            seed: 0 <= seed < 2**64.
            draw: 0 <= draw < 2**32, number of the sample.
            temperature: tau > 0, the factor of ess: the standard deviations are divided by sqrt(tau).

        Returns:
            name -> sample, dtype and shape of the mean.

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
        """The means, or a sample, in the parameters of ``model`` inside; what they held before, bit for bit, after.

        Args:
            model: as :meth:`load_into`. If an `IVON` holds its parameters, call ``optimizer.eval()`` first.
            sample: as :meth:`load_into`.

        Raises:
            ValueError: as :meth:`load_into`.
        """
        pairs = self._pairs(model, sample)
        before = [p.detach().clone() for p, _ in pairs]
        try:
            self.load_into(model, sample)
            yield
        finally:
            with torch.no_grad():
                for (p, _), old in zip(pairs, before, strict=True):
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


def snapshot_posterior(
    optimizer: IVON, names: Sequence[str] | None = None, *, model: nn.Module | None = None
) -> PosteriorFile:
    """The posterior of all parameters that an optimizer trains, as it is now; the same in both states of the weights.

    Parameters that always were frozen, such as those of the base model, have none. Of sharded parameters (FSDP2) all
    processes must ask, and all get the whole.

    Args:
        optimizer: the `IVON`, possibly wrapped by Accelerate.
        names: one name per parameter in the order of the optimizer. Without it: the names that the optimizer was given
            (``IVON(model.named_parameters(), ...)``), else those of ``model``.
        model: the model that holds the parameters.

    Raises:
        ValueError: the parameters have no names, not one each, or the same one twice.
    """
    from ivon_lora import __version__

    optimizer = unwrapped(optimizer)
    name_of = {id(p): name for name, p in _named_parameters(optimizer, names, model).items()}
    items = [item for item in optimizer.parameters.listed() if optimizer.parameters.has_posterior(item[2])]
    named = {name_of[id(p)]: p for _, _, p in items}
    posteriors = {name: optimizer.posterior(p) for name, p in named.items()}
    masks = {name: optimizer.state.get(p, {}).get("rank_mask") for name, p in named.items()}
    return PosteriorFile(
        names=tuple(named),
        mean={name: whole(posterior.mean.detach()).cpu() for name, posterior in posteriors.items()},
        std={name: whole(posterior.stddev.detach()).cpu() for name, posterior in posteriors.items()},
        rank_mask={name: mask.detach().cpu().clone() for name, mask in masks.items() if mask is not None},
        groups=_groups(optimizer, named),
        seed=optimizer.seed,
        completed_steps=optimizer.completed_steps,
        version=__version__,
        places=tuple(index for index, _, _ in items),
    )


def save_posterior(
    optimizer: IVON | PosteriorFile,
    path: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    model: nn.Module | None = None,
    softmax_temperature: float = 1.0,
) -> Path:
    """Write what `snapshot_posterior` returns, atomically; the same file in both states of the weights.

    Under several processes, call it in one of them; if parameters are sharded (FSDP2), in all: the first one writes.

    Args:
        optimizer: the `IVON`, possibly wrapped by Accelerate; or a posterior, of `snapshot_posterior` say.
        path: the file, or an existing directory, which gets ``ivon_posterior.safetensors``.
        names: one name per parameter in the order of the optimizer. Without it: the names that the optimizer was given
            (``IVON(model.named_parameters(), ...)``), else those of ``model``.
        model: the model that holds the parameters.
        softmax_temperature: of `fit_temperature` for predictions at the mean, which `posterior_predict` then makes
            with it.

    Returns:
        the file written.

    Raises:
        ValueError: the parameters have no names, not one each, or the same one twice; a mean or standard deviation is
            not finite; softmax_temperature is not positive.
        ImportError: if safetensors is missing.
    """
    if not 0 < softmax_temperature < math.inf:
        raise ValueError(f"softmax_temperature must be positive and finite, got {softmax_temperature}")
    posterior = optimizer if isinstance(optimizer, PosteriorFile) else snapshot_posterior(optimizer, names, model=model)
    if softmax_temperature != 1:
        posterior = replace(posterior, softmax_temperature=softmax_temperature)
    if fault := _fault(posterior):
        raise ValueError(f"the posterior is not saved: {fault}; the run has diverged")
    tensors = {f"{name}.mean": mean for name, mean in posterior.mean.items()}
    tensors |= {f"{name}.std": std for name, std in posterior.std.items()}
    tensors |= {f"{name}.rank_mask": mask for name, mask in posterior.rank_mask.items()}
    groups = () if isinstance(optimizer, PosteriorFile) else optimizer.param_groups
    sharded = any(is_sharded(p) for group in groups for p in group["params"])

    def write() -> Path:
        target = _file(path)
        write_tensors(target, tensors, _metadata(posterior))
        return target

    return by_first(sharded, write)


def load_posterior(path: str | os.PathLike[str]) -> PosteriorFile:
    """Read what `save_posterior` wrote.

    Args:
        path: the file, or the directory that holds ``ivon_posterior.safetensors``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged or not a posterior; one line that says which.
        ImportError: if safetensors is missing.
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
    for name in posterior.names:
        mean, std, mask = posterior.mean[name], posterior.std[name], posterior.rank_mask.get(name)
        if mean.shape != std.shape or mean.dtype != std.dtype or not mean.is_floating_point():
            return f"mean and std of {name!r} differ in shape or dtype, or are no floating-point numbers"
        if not bool(torch.isfinite(mean).all() & torch.isfinite(std).all() & (std >= 0).all()):
            return f"{name!r} has a mean or std that is not finite, or a negative std"
        if mask is not None and (mask.dtype != torch.bool or mask.dim() != 1 or len(mask) not in mean.shape):
            return f"the rank mask of {name!r} is {mask.dtype} {tuple(mask.shape)}, its mean {tuple(mean.shape)}"
    return None


def _parse(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> PosteriorFile:
    numbers = ("ess", "weight_decay")  # version 0.1.0 also wrote the priors of single tensors, which are in their std
    saved = json.loads(metadata["groups"])
    groups = tuple({"names": group["names"], **{name: float(group[name]) for name in numbers}} for group in saved)
    names = tuple(str(name) for group in groups for name in group["names"])
    return PosteriorFile(
        names=names,
        mean={name: tensors[f"{name}.mean"] for name in names},
        std={name: tensors[f"{name}.std"] for name in names},
        rank_mask={name: tensors[f"{name}.rank_mask"] for name in names if f"{name}.rank_mask" in tensors},
        groups=groups,
        seed=int(metadata["seed"]),
        completed_steps=int(metadata["completed_steps"]),
        version=metadata["version"],
        softmax_temperature=float(metadata.get("softmax_temperature", 1.0)),
        places=tuple(map(int, json.loads(metadata.get("places", "[]")))),
    )


def _metadata(posterior: PosteriorFile) -> dict[str, str]:
    return {
        "format": FORMAT,
        "version": posterior.version,
        "groups": json.dumps(posterior.groups),
        "seed": str(posterior.seed),
        "completed_steps": str(posterior.completed_steps),
        "softmax_temperature": repr(posterior.softmax_temperature),
        "places": json.dumps(posterior.places),
    }


def _groups(optimizer: IVON, named: Mapping[str, Tensor]) -> tuple[dict[str, Any], ...]:
    name_of = {id(p): name for name, p in named.items()}
    return tuple(
        {
            "names": [name_of[id(p)] for p in group["params"] if id(p) in name_of],
            "ess": float(group["ess"]),
            "weight_decay": float(group["weight_decay"]),
        }
        for group in optimizer.param_groups
    )


def _named_parameters(optimizer: IVON, names: Sequence[str] | None, model: nn.Module | None) -> dict[str, Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if names is None and all("param_names" in group for group in optimizer.param_groups):
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
    if names is None:
        if model is None:
            raise ValueError(
                "the optimizer's parameters have no names: pass model=, or build IVON(model.named_parameters(), ...)"
            )
        name_of = {id(p): name for name, p in model.named_parameters()}
        strangers = sum(id(p) not in name_of for p in params)
        if strangers:
            raise ValueError(
                f"{strangers} of the optimizer's {len(params)} parameters are not in model=: pass the model they are in"
            )
        names = [name_of[id(p)] for p in params]
    if len(names) != len(params):
        raise ValueError(
            f"names has {len(names)} entries, the optimizer {len(params)} parameters: give one name each, in its order"
        )
    named = dict(zip(names, params, strict=True))
    if len(named) != len(params):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"names must differ, got {twice!r} twice")
    return named


def unwrapped(optimizer: Any) -> IVON:
    """The `IVON` inside what Accelerate made of it. ValueError if there is none."""
    found = unwrap(optimizer)
    if found is None:
        raise ValueError(f"{type(optimizer).__name__} has no posterior: pass the ivon_lora.IVON that trained the model")
    return found


def _file(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    return target / DEFAULT_NAME if target.is_dir() else target
