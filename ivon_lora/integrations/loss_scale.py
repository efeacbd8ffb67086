"""Notice heads that ignore `num_items_in_batch`: with them the Trainer makes accumulated gradients too large.

The Hugging Face Trainer leaves the division of the loss by the number of micro-batches to any model whose ``forward``
takes ``**kwargs``: it passes ``num_items_in_batch`` and expects the head to divide by it. Many classification heads
take the keyword and ignore it. Their gradients are then as many times too large as there are micro-batches in a step.
Adam does not see a constant factor; a posterior does, because its curvature is that of the loss.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class _Witness(Tensor):
    """A tensor that remembers whether anything was computed with it; every result is an ordinary tensor."""

    used: ClassVar[bool] = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.used |= func.__name__ not in ("__get__", "is_floating_point")  # DDP and FSDP look at what it is
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})


def check_loss_scale(trainer: Any, training_step: Callable[..., Any]) -> Callable[..., Any]:
    """The trainer's ``training_step``, which the first time warns if nothing divides by ``num_items_in_batch``."""
    is_checked = False

    @functools.wraps(training_step)
    def checked(model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        nonlocal is_checked
        args, accumulation = trainer.args, trainer.args.gradient_accumulation_steps
        is_wanted = accumulation > 1 and getattr(trainer, "loss_is_scaled_for_ga", None) is None
        # torch.compile need not learn what a witness is, and DataParallel makes copies of it
        is_possible = not (args.torch_compile or hasattr(trainer.model, "_orig_mod") or args.n_gpu > 1)
        if is_checked or not (is_wanted and is_possible and type(num_items_in_batch) is Tensor):
            return training_step(model, inputs, num_items_in_batch)
        is_checked, _Witness.used = True, False
        loss = training_step(model, inputs, num_items_in_batch.as_subclass(_Witness))
        if not _Witness.used:
            warnings.warn(
                f"{type(trainer.model).__name__} takes num_items_in_batch and ignores it, so with "
                f"gradient_accumulation_steps={accumulation} the Trainer makes gradients {accumulation} times too "
                "large. Adam does not notice; the posterior does. Set trainer.model_accepts_loss_kwargs = False before "
                "trainer.train()",
                stacklevel=2,
            )
        return loss

    return checked
