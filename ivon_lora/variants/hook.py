"""Hooks of a model that its copies do not take along."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch._compile import _disable_dynamo


class Hook:
    """Calls a method, whose object it does not keep alive. A copy or a pickle of the model is not the one in training,
    and its hook calls nothing.
    """

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()

    @_disable_dynamo
    def __call__(self, *args: Any) -> Any:
        method = None if self._method is None else self._method()
        return None if method is None else method(*args)
