"""The mode in which an optimizer works: no gradients, no tracing, and not while somebody records what the GPU does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo

P = ParamSpec("P")
R = TypeVar("R")


def no_autograd(method: Callable[P, R]) -> Callable[P, R]:
    """No gradients, ordinary tensors even inside ``torch.inference_mode()``, and not traced by ``torch.compile``."""

    @_disable_dynamo
    def enter(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        entered = not (torch.is_grad_enabled() or torch.is_inference_mode_enabled() or torch.compiler.is_compiling())
        return method(*args, **kwargs) if entered else enter(*args, **kwargs)

    return run


def in_backward() -> bool:
    """Whether this thread runs a backward: in a hook of a tensor or a module."""
    return torch._C._current_graph_task_id() != -1


def is_transformed() -> bool:
    """Whether a model is only traced (export, jit.trace, FakeTensorMode), or transformed (vmap, grad)."""
    marks = (
        torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE),
        torch._C._functorch.peek_interpreter_stack(),
        torch._C._get_tracing_state(),
    )
    return any(mark is not None for mark in marks)


def refuse_capture() -> None:
    """Before weights change.

    Raises:
        RuntimeError: a CUDA graph is being captured: each replay would draw the same noise, as the first of all steps.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and would repeat the noise, learning rate and bias correction of this one "
            "step for ever: call train() and step() outside the captured part"
        )
