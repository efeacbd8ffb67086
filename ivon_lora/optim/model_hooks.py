"""Hooks that let a plain AdamW loop train with posterior samples, and keep samples out of saved models."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from ivon_lora.lora.adalora import orthogonality_in_training_only
from ivon_lora.optim.batch_size import examples_in
from ivon_lora.optim.replicas import keep_local_gradients


class TwoStates(Protocol):
    """What the hooks need of an optimizer."""

    in_context: bool

    def count_examples(self, n: int) -> None: ...
    @property
    def draws_own_noise(self) -> bool: ...
    def train(self) -> None: ...
    def eval(self) -> None: ...


class _Hook:
    """A hook that drives an optimizer. A copy or a pickle of the model drives none: it is not the one in training."""

    def __init__(self, optimizer: TwoStates | None) -> None:
        self.optimizer = optimizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)(None)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return type(self), (None,)


class _BeforeForward(_Hook):
    def __init__(self, optimizer: TwoStates | None) -> None:
        super().__init__(optimizer)
        self._act = torch.compiler.disable(self._untraced)  # or a compiled model would have the optimizer traced too

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.optimizer is not None:
            self._act(module, args, kwargs)

    def _untraced(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.optimizer is not None
        training = module.training and torch.is_grad_enabled()
        if training and self.optimizer.draws_own_noise:
            keep_local_gradients(module)
        if training:
            self.optimizer.count_examples(examples_in(args, kwargs))
        if self.optimizer.in_context:  # a context has decided already
            return
        if training:
            self.optimizer.train()
        else:
            self.optimizer.eval()


class _BeforeSaving(_Hook):
    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if self.optimizer is not None:
            self.optimizer.eval()


class Attachment:
    """Hooks on one model; :meth:`remove` takes them off.

    * Before a forward pass in training mode with gradients enabled: ``optimizer.train()``; before any other:
      ``optimizer.eval()``; inside ``sampled_params``: neither. The examples of training forwards are counted. Torch
      calls the hook of the module that the loop calls, so attach to that one.
    * If the optimizer exchanges gradients itself (``sync=True``), DistributedDataParallel leaves them alone.
    * In evaluation mode, PEFT's AdaLoRA keeps its orthogonality penalty out of the loss.
    * Before ``state_dict()`` of the model or of any of its modules: ``optimizer.eval()``. A saved model is the mean.
    """

    def __init__(self, optimizer: TwoStates, model: nn.Module) -> None:
        self._handles = [model.register_forward_pre_hook(_BeforeForward(optimizer), prepend=True, with_kwargs=True)]
        self._handles += orthogonality_in_training_only(model)
        before_saving = _BeforeSaving(optimizer)
        self._handles += [m.register_state_dict_pre_hook(before_saving) for m in model.modules()]

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
