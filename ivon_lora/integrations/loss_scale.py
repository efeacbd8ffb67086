"""Notice heads that ignore `num_items_in_batch`: with them the Trainer makes accumulated gradients too large.

The Hugging Face Trainer leaves the division of the loss by the number of micro-batches to any model whose ``forward``
takes ``**kwargs``: it passes ``num_items_in_batch`` and expects the head to divide by it. Many classification heads
take the keyword and ignore it. Their gradients are then as many times too large as there are micro-batches in a step.
Adam does not see a constant factor; a posterior does, because its curvature is that of the loss.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

NAME = "num_items_in_batch"


class _Witness(Tensor):
    """A tensor that remembers whether anything was computed with it; every result is an ordinary tensor."""

    used: ClassVar[bool] = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*map(_plain, args), **{k: _plain(v) for k, v in (kwargs or {}).items()})


def _plain(value: Any) -> Any:
    if isinstance(value, _Witness):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    return value


class LossScaleCheck:
    """Hooks on one model: at its first training forward with ``num_items_in_batch``, warn if the model ignores it.

    Args:
        model: the model that the Trainer calls.
        accumulation: micro-batches per optimizer step; with one there is nothing to check.
    """

    def __init__(self, model: nn.Module, accumulation: int) -> None:
        self._accumulation = accumulation
        self._handles: list[Any] = []
        owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        is_checked = any(isinstance(owner, LossScaleCheck) for owner in owners)
        is_compiled = hasattr(model, "_orig_mod")  # torch.compile need not learn what a witness is
        if accumulation > 1 and not is_checked and not is_compiled:
            self._handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(model.register_forward_hook(self._after, with_kwargs=True))

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        items = kwargs.get(NAME)
        if not module.training or type(items) is not Tensor:
            return None
        _Witness.used = False
        return args, {**kwargs, NAME: items.as_subclass(_Witness)}

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not isinstance(kwargs.get(NAME), _Witness):
            return
        for handle in self._handles:
            handle.remove()
        if not _Witness.used:
            warnings.warn(
                f"{type(module).__name__} takes {NAME} and ignores it, so with gradient_accumulation_steps="
                f"{self._accumulation} the Trainer makes gradients {self._accumulation} times too large. Adam does not "
                "notice; the posterior does. Set trainer.model_accepts_loss_kwargs = False before trainer.train()",
                stacklevel=2,
            )
