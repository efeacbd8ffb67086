"""Hooks that let a plain AdamW loop train with posterior samples, and keep samples out of saved models."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from ivon_lora.integrations.adalora import orthogonality_in_training_only


class TwoStates(Protocol):
    """What the hooks need of an optimizer."""

    def train(self) -> None: ...
    def eval(self) -> None: ...


class Attachment:
    """Hooks on one model; :meth:`remove` takes them off.

    * Before a forward pass in training mode with gradients enabled: ``optimizer.train()``; before any other:
      ``optimizer.eval()``. Torch calls the hook of the module that the loop calls, so attach to that one.
    * In evaluation mode, PEFT's AdaLoRA keeps its orthogonality penalty out of the loss.
    * Before ``state_dict()`` of the model or of any of its modules: ``optimizer.eval()``. A saved model is the mean.
    """

    def __init__(self, optimizer: TwoStates, model: nn.Module) -> None:
        def before_forward(module: nn.Module, args: Any) -> None:
            if module.training and torch.is_grad_enabled():
                optimizer.train()
            else:
                optimizer.eval()

        def before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
            optimizer.eval()

        self._handles = [model.register_forward_pre_hook(before_forward, prepend=True)]
        self._handles += orthogonality_in_training_only(model)
        self._handles += [m.register_state_dict_pre_hook(before_saving) for m in model.modules()]

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
