"""The mode in which an optimizer works: no gradients, no tracing, and not while somebody records what the GPU does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])


def no_autograd(method: F) -> F:
    """No gradients, ordinary tensors even inside ``torch.inference_mode()``, and not traced by ``torch.compile``."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return _disable_dynamo(run)  # type: ignore[no-any-return]


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
