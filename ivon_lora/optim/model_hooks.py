"""Hooks that let a plain AdamW loop train with posterior samples, and keep samples out of what is saved."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ivon_lora.lora.adalora import orthogonality_in_training_only
from ivon_lora.optim.examples import examples_in
from ivon_lora.optim.replicas import keep_local_gradients

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON


class Attachment:
    """Hooks on one model; :meth:`remove` takes them off.

    * Before a forward pass in training mode: ``optimizer.train()``. Without gradients the sample is there for the
      forward only, unless it is in use already.
    * Before a forward in evaluation mode, ``model.eval()`` and ``state_dict()``: ``optimizer.eval()``.
    * When a backward reaches the output of a training forward, the weights are the sample again, and the examples of
      the forward are counted.
    * Inside ``sampled_params`` none of this happens but the counting.
    * If the optimizer exchanges gradients itself (``sync=True``), DistributedDataParallel leaves them alone.
    * In evaluation mode, PEFT's AdaLoRA keeps its orthogonality penalty out of the loss.

    Torch calls the hook of the module that the loop calls, so attach to that one. The optimizer is not kept alive.
    """

    def __init__(self, optimizer: IVON, model: nn.Module) -> None:
        hooks = _Hooks(optimizer)
        self._handles: list[Any] = [
            model.register_forward_pre_hook(hooks.before_forward, prepend=True, with_kwargs=True),
            model.register_forward_hook(hooks.after_forward, with_kwargs=True, always_call=True),
            *orthogonality_in_training_only(model),
        ]
        self._handles += [m.register_state_dict_pre_hook(hooks.before_reading) for m in model.modules()]
        self._handles += [m.register_load_state_dict_pre_hook(hooks.before_loading) for m in model.modules()]
        self._model, self._switch = weakref.ref(model), _TrainSwitch(hooks, model)
        model.__dict__["train"] = self._switch

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        model = self._model()
        self._switch.hooks = None
        if model is not None and model.__dict__.get("train") is self._switch:
            del model.__dict__["train"]


class _Hooks:
    """Drives an optimizer. A copy or a pickle of the model drives none: it is not the one in training."""

    def __init__(self, optimizer: IVON | None) -> None:
        self._optimizer: Callable[[], IVON | None] = _nobody if optimizer is None else weakref.ref(optimizer)
        self._for_this_forward = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hooks:
        return _Hooks(None)

    def __reduce__(self) -> tuple[type[_Hooks], tuple[None]]:
        return _Hooks, (None,)

    @_disable_dynamo
    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if module.training and torch.is_grad_enabled() and optimizer.sampling.replicas() is not None:
            keep_local_gradients(module)
        if optimizer.in_context:  # a context has decided already
            return
        if not module.training:
            optimizer.eval()
        elif torch.is_grad_enabled():
            optimizer.train()
        elif not optimizer.sampling.is_in_use:
            optimizer.sampling.draw(optimizer.sampling.next_key())
            optimizer.sampling.pending, self._for_this_forward = None, True

    @_disable_dynamo
    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if self._for_this_forward:
            self._for_this_forward = False
            optimizer.sampling.restore()
        if not module.training or not torch.is_grad_enabled():
            return
        optimizer.sampling.seal()
        examples, doubt = examples_in(args, kwargs)
        optimizer.sampling.forward_was_attached = True
        mark = _Mark(optimizer, examples, doubt)
        for tensor in _differentiable(output):
            optimizer.sampling.open_graphs.add(mark)
            tensor.register_hook(mark)

    @_disable_dynamo
    def before_reading(self, *_: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and not optimizer.in_context:
            optimizer.eval()

    @_disable_dynamo
    def before_loading(self, *_: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.sampling.restore()


class _Mark:
    """Hangs on the output of a training forward: lives as long as its graph, and is called when its backward begins."""

    def __init__(self, optimizer: IVON, examples: int, doubt: str | None) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._examples, self._doubt, self._reached = examples, doubt, False

    def __call__(self, grad: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or self._reached:
            return
        self._reached = True
        optimizer.sampling.open_graphs.discard(self)
        optimizer.sampling.show()
        optimizer.count_backward(self._examples, self._doubt)


class _TrainSwitch:
    """Stands in for a module's ``train``, which ``eval`` calls too: readers of a model in evaluation mode see the mean."""

    def __init__(self, hooks: _Hooks, model: nn.Module) -> None:
        self.hooks: _Hooks | None = hooks
        self._model, self._before = model, model.__dict__.get("train")

    def __call__(self, mode: bool = True) -> nn.Module:
        if self.hooks is not None and not mode:
            self.hooks.before_reading()
        if self._before is not None:
            return self._before(mode)
        return type(self._model).train(self._model, mode)


def _nobody() -> None:
    """The optimizer of hooks that drive none."""


def _differentiable(output: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors inside a forward's output that a backward can begin at."""
    if isinstance(output, Tensor):
        if output.grad_fn is not None:
            yield output
    elif depth and isinstance(output, Mapping):
        for value in output.values():
            yield from _differentiable(value, depth - 1)
    elif depth and isinstance(output, list | tuple):
        for value in output:
            yield from _differentiable(value, depth - 1)
    elif depth and hasattr(output, "__dict__") and not isinstance(output, nn.Module | type):
        for value in vars(output).values():
            yield from _differentiable(value, depth - 1)
