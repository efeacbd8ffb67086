"""What Accelerate, DeepSpeed and Lightning put around optimizers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ivon_lora.optimizer import IVON


def unwrap(optimizer: Any) -> IVON | None:
    """The IVON at the end of the chain of ``.optimizer`` attributes; None if another optimizer is there."""
    from ivon_lora.optimizer import IVON

    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, IVON) else None


def write_through(cls: type) -> None:
    """If ``cls`` is a class that Lightning makes for its wrapper of an optimizer, let it write where it reads.

    Lightning's and Fabric's wrappers derive a class from themselves and from that of the optimizer they wrap. Methods
    called on the wrapper (``self.optimizers().train()``) then read the wrapped optimizer's attributes, but would set
    the wrapper's: the weights would hold a sample of which the optimizer that steps knows nothing.
    """
    wrapper = cls.__bases__[0]
    if issubclass(wrapper, torch.optim.Optimizer) or not isinstance(getattr(wrapper, "optimizer", None), property):
        return

    def setattr_inside(wrapper: Any, name: str, value: Any) -> None:
        if name in wrapper.__dict__:  # its own, all set before it changes its class
            object.__setattr__(wrapper, name, value)
        else:
            setattr(wrapper.optimizer, name, value)

    cls.__setattr__ = setattr_inside  # type: ignore[method-assign, assignment]


def evaluates_nothing(closure: Callable[[], Any]) -> bool:
    """Whether it is what Lightning passes to ``step`` in manual optimization, where the gradients are there already."""
    if isinstance(closure, functools.partial):  # with hooks around it
        return any(callable(arg) and evaluates_nothing(arg) for arg in closure.args)
    return getattr(closure, "__name__", "") == "do_nothing_closure"
