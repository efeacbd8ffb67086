"""Hooks that let a plain AdamW loop train with posterior samples, and keep samples out of what is saved."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ivon_lora.lora.adalora import orthogonality_in_training_only
from ivon_lora.optim.example_counter import (
    Counts,
    Piece,
    examples_in,
    is_time_major,
    labels_in,
    piece_in,
    shifts_labels,
)
from ivon_lora.optim.guards import in_backward, is_exporting, is_transformed, read_in_traces, untraced
from ivon_lora.optim.replicas import prepare_ddp

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON
    from ivon_lora.optim.sampling import Sampling

OF_THE_MEAN = (
    "a backward reaches a forward in evaluation mode that saw the posterior mean, and the weights have been a sample "
    "since: make that forward after the one in training mode, or call optimizer.train() before it"
)

OF_ANOTHER = (
    "this loss was computed at a sample of an optimizer whose parameters another one has taken over since: compute the "
    "loss again"
)


class Attachment:
    """Hooks on one model; :meth:`remove` takes them off.

    * Before a forward pass in training mode: ``optimizer.train()``. Without gradients the sample is there for the
      forward only, unless it is in use already.
    * Before a forward in evaluation mode, ``model.eval()`` and ``state_dict()``: ``optimizer.eval()``; but a forward
      with gradients, made while the backward of a training forward is still to come, belongs to the same loss, and
      sees the same sample.
    * When a backward reaches the output of a forward, the weights are the sample again that it saw, and its examples
      are counted.
    * Inside ``sampled_params`` none of this happens but the counting, and nothing at all while a model is only traced
      or transformed (``torch.export``, ``vmap``).
    * If the optimizer exchanges gradients itself (``sync=True``), DistributedDataParallel leaves them alone.
    * In evaluation mode, PEFT's AdaLoRA keeps its orthogonality penalty out of the loss.

    Torch calls the hook of the module that the loop calls, so attach to that one. The optimizer is not kept alive.
    """

    def __init__(self, optimizer: IVON, model: nn.Module) -> None:
        hooks = _Hooks(optimizer, is_time_major(model), shifts_labels(model))
        self._handles: list[Any] = [
            model.register_forward_pre_hook(hooks.before_forward, prepend=True, with_kwargs=True),
            model.register_forward_hook(hooks.after_forward, with_kwargs=True, always_call=True),
            *orthogonality_in_training_only(model),
        ]
        self._handles += [m.register_state_dict_pre_hook(hooks.before_state_dict) for m in model.modules()]
        self._handles += [m._register_state_dict_hook(hooks.after_state_dict) for m in model.modules()]
        self._handles += [m.register_load_state_dict_pre_hook(hooks.before_loading) for m in model.modules()]
        for hook in (_Hooks.before_forward, _Hooks.after_forward):
            read_in_traces(hook)
        self._hooks, self._model = hooks, weakref.ref(model)
        self._methods = [_Method(model, "train", hooks.before_evaluation), _Method(model, "zero_grad", hooks.zero_grad)]
        model.__dict__["__prepare_scriptable__"] = _refuse_script
        weakref.finalize(optimizer, self.remove).atexit = False

    def remove(self) -> None:
        """Take all hooks off the model; its weights are the mean."""
        self._hooks.before_state_dict()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        model = self._model()
        for method in self._methods:
            method.remove(model)
        if model is not None and not isinstance(model.__dict__.get("train"), _Method):
            model.__dict__.pop("__prepare_scriptable__", None)


class _Hooks:
    """Drives an optimizer. A copy or a pickle of the model drives none: it is not the one in training."""

    def __init__(self, optimizer: IVON | None, time_major: bool = False, shifted: bool = False) -> None:
        self._optimizer: Callable[[], IVON | None] = (lambda: None) if optimizer is None else weakref.ref(optimizer)
        self._for_this_forward, self._time_major, self._shifted = False, time_major, shifted

    def __reduce__(self) -> tuple[type[_Hooks], tuple[None]]:
        return _Hooks, (None,)

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_exporting():  # which would stop at what is not traced
            self._before_forward(module, args, kwargs)

    @untraced
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        optimizer = self._optimizer()
        if optimizer is None or is_transformed():
            return
        with_gradients, sampling = torch.is_grad_enabled(), optimizer.sampling
        self._end_forward(sampling)  # of one that was interrupted
        if module.training and with_gradients:
            prepare_ddp(module, optimizer.param_groups)
        if optimizer.in_context:  # a context has decided already
            return
        if module.training and with_gradients:
            optimizer.train()
        elif (module.training and sampling.is_in_use) or (with_gradients and sampling.has_open_graph):
            sampling.show()
        elif not module.training:
            sampling.eval()
        else:
            pending = sampling.pending
            optimizer.train()
            sampling.pending, self._for_this_forward = pending, True

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not is_exporting():
            self._after_forward(module, args, kwargs, output)

    @untraced
    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is None or is_transformed():
            return
        sampling = optimizer.sampling
        self._end_forward(sampling)
        if in_backward():
            sampling.show()
        if not torch.is_grad_enabled():
            return
        if module.training:
            sampling.seal()
        kwargs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        count, doubt = examples_in(args, kwargs, self._time_major)
        mark = _Mark(optimizer, count, doubt, labels_in(kwargs, self._shifted), piece_in([*args, *kwargs.values()]))
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        kept = [value for name, value in vars(module).items() if name[0] != "_"]
        for tensor in list(_differentiable(output)) or _differentiable(kept):
            if mark.key is not None:
                sampling.open_graphs.add(mark)
                sampling.forward_was_attached = True
            tensor.register_hook(mark.at_loss if tensor is loss else mark)

    def _end_forward(self, sampling: Sampling) -> None:
        if self._for_this_forward:
            self._for_this_forward = False
            sampling.restore()

    @untraced
    def before_state_dict(self, *_: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and not optimizer.in_context:
            optimizer.sampling.eval()

    @untraced
    def after_state_dict(self, *_: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and in_backward():
            optimizer.sampling.show()

    @untraced
    def before_evaluation(self, module: nn.Module, mode: bool = True) -> None:
        if not mode and not in_backward():  # there only a forward sees the mean
            self.before_state_dict()

    @untraced
    def zero_grad(self, module: nn.Module, set_to_none: bool = True) -> None:
        """The optimizer hears of it, if all that it trains is the module's."""
        optimizer = self._optimizer()
        if optimizer is not None and {p for *_, p in optimizer.parameters.trained()} <= set(module.parameters()):
            optimizer.zero_grad(set_to_none)

    @untraced
    def before_loading(self, *_: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.sampling.restore()


class _Mark:
    """Hangs on the output of a forward: lives as long as its graph, and is called when its backward begins.

    Attributes:
        key: the sample that the forward saw; None for the mean.
    """

    def __init__(
        self, optimizer: IVON, examples: int, doubt: str | None, labels: int | None, piece: Piece | None
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.key = optimizer.sampling.key
        self._counts, self._doubt, self._counted = Counts(examples, examples), doubt, False
        self._labels, self._piece = labels or examples, piece

    @untraced
    def at_loss(self, grad: Tensor) -> None:
        """The backward begins at the loss that the model has made of its labels, a mean over them."""
        self._counts = self._counts._replace(labels=self._labels)
        self(grad)

    @untraced
    def __call__(self, grad: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        sampling = optimizer.sampling
        if self.key is not None:
            sampling.show()
            if optimizer.superseded and sampling.key is None:
                raise RuntimeError(OF_ANOTHER)
            if not torch._C._autograd._get_current_graph_task_keep_graph():
                sampling.open_graphs.discard(self)
        elif sampling.key is not None:
            optimizer.warn_once("mean", OF_THE_MEAN)
        if not self._counted and _reaches(p for *_, p in optimizer.parameters.listed() if p.requires_grad):
            self._counted = True
            sampling.backward_began = sampling.backward_began or self.key is not None
            optimizer.examples.add_backward(optimizer, self._counts, self._doubt, self._piece)


class _Method:
    """Stands in for a method of a module, and calls ``first`` with its arguments before it.

    ``eval`` calls ``train``: a model in evaluation mode shows the mean.
    """

    def __init__(self, model: nn.Module, name: str, first: Callable[..., None]) -> None:
        self._model, self._name, self._first = model, name, first
        self._active, self._before = True, model.__dict__.get(name)
        model.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._active:
            self._first(self._model, *args, **kwargs)
        if self._before is not None:
            return self._before(*args, **kwargs)
        return getattr(type(self._model), self._name)(self._model, *args, **kwargs)

    def remove(self, model: nn.Module | None) -> None:
        """Do nothing more; give the module back what was there before, unless somebody has put another one there."""
        self._active = False
        if model is not None and model.__dict__.get(self._name) is self:
            del model.__dict__[self._name]
            if self._before is not None:
                model.__dict__[self._name] = self._before


def _refuse_script() -> None:
    raise RuntimeError(
        "torch.jit.script cannot read the hooks of an attached model: call remove() on what attach() returned, script "
        "the model, and attach again"
    )


def _differentiable(output: Any, depth: int = 9) -> Iterator[Tensor]:
    """The tensors inside a forward's output that a backward can begin at; objects are deeper than containers."""
    if isinstance(output, Tensor):
        if output.grad_fn is not None:
            yield output
    elif depth and isinstance(output, Mapping):
        for value in output.values():
            yield from _differentiable(value, depth - 1)
    elif depth and isinstance(output, list | tuple):
        for value in output:
            yield from _differentiable(value, depth - 1)
    elif depth and not isinstance(output, nn.Module | type):
        for name in (*getattr(output, "__dict__", ()), *getattr(type(output), "__slots__", ())):
            yield from _differentiable(getattr(output, name, None), max(depth - 3, 0))


def _reaches(params: Iterable[Tensor]) -> bool:
    """Whether the backward that is running brings gradients to parameters, and not only to inputs that it was given."""
    params = list(params)
    if torch.autograd._is_checkpoint_valid():  # it was given none
        return bool(params)
    with torch.enable_grad():
        views: list[Any] = [p.view_as(p).grad_fn for p in params]
        leaves = [view.next_functions[0][0] for view in views]
    try:
        return any(map(torch._C._will_engine_execute_node, leaves))
    except RuntimeError:  # autograd.grad returns the gradient of this one
        return True
