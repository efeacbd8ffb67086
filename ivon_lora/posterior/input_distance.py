"""How unlike the training inputs an input is: a distance between hidden states. Samples of the weights do not tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["InputDistance"]


@dataclass(frozen=True, eq=False)
class InputDistance:
    """Mahalanobis distance of an input's hidden states, averaged over its tokens, from those of the training inputs.

    Lee et al. 2018, arXiv:1807.03888, eq. 2, with one class for all inputs. A layer at two thirds of the depth is a
    good choice: the last ones forget what the task does not need.

    Attributes:
        layer: name of the module whose input is read, e.g. "base_model.model.encoder.encoder.layer.4".
        mean: hidden states of the training inputs, (hidden,), fp64.
        precision: inverse of their covariance, which is shrunk first, (hidden, hidden), fp64.
    """

    layer: str
    mean: Tensor
    precision: Tensor

    @classmethod
    def fit(
        cls, model: nn.Module, layer: str, batches: Iterable[Mapping[str, Any]], shrinkage: float = 0.1
    ) -> InputDistance:
        """From batches of training inputs; some hundreds of inputs are enough.

        Args:
            model: in ``eval()`` mode, and at the posterior mean (``optimizer.eval()``).
            layer: a name of ``model.named_modules()``; its input has the shape (batch, tokens, hidden).
            batches: what the model takes by name, with ``attention_mask`` if there is padding.
            shrinkage: what is added to all variances, in mean variances. It keeps directions in which few inputs do
                not vary from deciding.

        Raises:
            ValueError: fewer than two inputs, a shrinkage that is not positive, no such layer or no such hidden states.
        """
        if not shrinkage > 0.0:
            raise ValueError(f"shrinkage must be positive, got {shrinkage!r}; 0.1 suits some hundreds of inputs")
        found = [_hidden(model, layer, batch) for batch in batches]
        states = torch.cat(found) if found else torch.zeros(0, 1)
        if len(states) < 2:
            raise ValueError(f"a covariance needs at least 2 training inputs, got {len(states)}")
        covariance = states.T.cov().reshape(states.shape[1], -1)
        covariance.diagonal().add_(shrinkage * covariance.diagonal().mean())
        return cls(layer, states.mean(0), torch.linalg.inv(covariance))

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Distances of the inputs of a batch, fp64 (batch,), on the CPU. Compare them with those of inputs held back.

        Raises:
            ValueError: as `fit`.
        """
        centred = _hidden(model, self.layer, batch) - self.mean
        return ((centred @ self.precision) * centred).sum(-1).sqrt()


@torch.no_grad()
def _hidden(model: nn.Module, layer: str, batch: Mapping[str, Any]) -> Tensor:
    """The input of a layer averaged over tokens, fp64 (batch, hidden), on the CPU."""
    try:
        module = model.get_submodule(layer)
    except AttributeError as error:
        raise ValueError(f"the model has no layer {layer!r}; model.named_modules() lists its layers") from error
    seen: list[Any] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs.get("hidden_states")), with_kwargs=True
    )
    try:
        device = next(model.parameters()).device
        model(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()})
    finally:
        handle.remove()
    states = seen[0] if seen else None
    if not isinstance(states, Tensor) or states.dim() != 3:
        shape = tuple(states.shape) if isinstance(states, Tensor) else None
        raise ValueError(f"the input of {layer} must be (batch, tokens, hidden), got {shape}; name another layer")
    states = states.double().cpu()
    mask = batch.get("attention_mask", torch.ones(states.shape[:2])).to(states)[..., None]
    return (states * mask).sum(1) / mask.sum(1)
