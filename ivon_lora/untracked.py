"""The mode in which an optimizer works: without gradients, and not while somebody records what the GPU does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untracked(method: Callable[P, R]) -> Callable[P, R]:
    """No gradients, and ordinary tensors even inside ``torch.inference_mode()``: training goes on with them."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return method(*args, **kwargs)
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        torch._C._set_grad_enabled(False)  # `torch.no_grad()` takes ten calls
        try:
            return method(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    return run


def refuse_capture() -> None:
    """Before weights change.

    Raises:
        RuntimeError: a CUDA graph is being captured: each replay would draw the same noise, as the first of all steps.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and would repeat the noise, learning rate and bias correction of this one "
            "step for ever: let ivon_lora.graphs.GraphedStep capture train(), forward, backward and step(), or call "
            "train() and step() outside the captured part"
        )
