"""What Accelerate, DeepSpeed and Lightning put around optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON


def unwrap(optimizer: Any) -> IVON | None:
    """The IVON at the end of the chain of ``.optimizer`` attributes; None if another optimizer is there."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer if hasattr(optimizer, "sampled_params") else None


def act_inside(cls: type) -> None:
    """If ``cls`` is a class that Lightning makes for its wrapper of an optimizer, let its methods be the optimizer's.

    Lightning's and Fabric's wrappers derive a class from themselves and from that of the optimizer they wrap. Methods
    called on the wrapper (``self.optimizers().train()``) then run on the wrapper, which can read the optimizer's
    attributes but sets its own: the weights would hold a sample of which the optimizer that steps knows nothing.
    """
    wrapper = cls.__bases__[0]
    if issubclass(wrapper, torch.optim.Optimizer) or not isinstance(getattr(wrapper, "optimizer", None), property):
        return

    def is_its_own(self: Any, name: str) -> bool:
        return name.startswith("__") or hasattr(wrapper, name) or name in object.__getattribute__(self, "__dict__")

    def get(self: Any, name: str) -> Any:
        return object.__getattribute__(self, name) if is_its_own(self, name) else getattr(self.optimizer, name)

    def set_(self: Any, name: str, value: Any) -> None:
        if is_its_own(self, name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.optimizer, name, value)

    cls.__getattribute__ = get  # type: ignore[method-assign, assignment]
    cls.__setattr__ = set_  # type: ignore[method-assign, assignment]
