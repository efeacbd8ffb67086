"""The hooks of a model that tell a variant what it is used for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

if TYPE_CHECKING:
    from ivon_lora.variants.variant import Variant


class ForwardHook:
    """Drives a variant. A copy or a pickle of the model drives none: it is not the one in training."""

    def __init__(self, variant: Variant | None) -> None:
        self._variant: Callable[[], Variant | None] = _nobody if variant is None else weakref.ref(variant)

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHook:
        return ForwardHook(None)

    def __reduce__(self) -> tuple[type[ForwardHook], tuple[None]]:
        return ForwardHook, (None,)

    @_disable_dynamo
    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        variant = self._variant()
        if variant is not None and module.training and torch.is_grad_enabled():
            variant.forward_begins()
        elif variant is not None:
            variant.stop()

    @_disable_dynamo
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        variant = self._variant()
        if variant is not None and output is None:  # it raised
            variant.stop()

    @_disable_dynamo
    def before_reading(self, *_: Any) -> None:
        variant = self._variant()
        if variant is not None:
            variant.stop()


def _nobody() -> None:
    """The variant of hooks that drive none."""
