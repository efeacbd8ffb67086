"""The mode in which an optimizer works: no gradients, no tracing, one thread, and no recording of what the GPU does."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo

P = ParamSpec("P")
R = TypeVar("R")

#: whether torch.export traces: before 2.7 torch does not say
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)

#: forwards of one model may run in several threads; nobody waits for a backward while holding it
LOCK = threading.RLock()


def no_autograd(method: Callable[P, R]) -> Callable[P, R]:
    """No gradients, ordinary tensors even inside ``torch.inference_mode()``, and not traced by ``torch.compile``."""

    @_disable_dynamo
    def enter(*args: P.args, **kwargs: P.kwargs) -> R:
        with LOCK, torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        entered = not (torch.is_grad_enabled() or torch.is_inference_mode_enabled() or torch.compiler.is_compiling())
        if not entered:
            return enter(*args, **kwargs)
        with LOCK:
            return method(*args, **kwargs)

    return run


def untraced(method: Callable[P, R]) -> Callable[P, R]:
    """For hooks: as a whole in one thread, in the mode of gradients that they find."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with LOCK:
            return method(*args, **kwargs)

    return _disable_dynamo(run)


def read_in_traces(function: Callable[..., object]) -> None:
    """Let ``torch.export`` read a function as a part of what calls it; ``torch.compile`` shall not compile it alone."""
    skip = getattr(torch._dynamo.eval_frame, "skip_code", None)  # torch's own, and not in every release of it
    if skip is not None:
        skip(function.__code__)


def in_backward() -> bool:
    """Whether this thread runs a backward: in a hook of a tensor or a module."""
    return torch._C._current_graph_task_id() != -1


def is_transformed() -> bool:
    """Whether a model is only traced (export, jit.trace, make_fx, FakeTensorMode), or transformed (vmap, grad)."""
    keys = torch._C._TorchDispatchModeKey
    marks = (
        torch._C._get_dispatch_mode(keys.FAKE),
        torch._C._get_dispatch_mode(keys.PROXY),
        torch._C._functorch.peek_interpreter_stack(),
        torch._C._get_tracing_state(),
    )
    return any(mark is not None for mark in marks)


def refuse_capture() -> None:
    """RuntimeError, before weights change, where a CUDA graph is captured or FakeTensorMode is on."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise RuntimeError("FakeTensorMode is on, where weights have no values: call train() and step() outside of it")
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and would repeat the noise, learning rate and bias correction of this one "
            "step for ever: call train() and step() outside the captured part"
        )
