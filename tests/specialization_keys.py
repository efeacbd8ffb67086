"""What Triton would look up in its cache of compiled kernels for given arguments: two launches share a kernel or not.

Keys depend on more than types: an integer that is 1 or a multiple of 16, and an address that is a multiple of 16, give
kernels of their own. The interpreter knows nothing of that, and Triton chooses it when it is first imported, hence the
subprocess: this file is also its script.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.offline_compile import compiler_environment


def describe(value: Any) -> Any:
    """An argument as the script can make one like it: a tensor by dtype and alignment, all others as they are."""
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "misalignment": value.data_ptr() % 16}
    return value


def keys_of(launches: Sequence[tuple[str, str, list[Any], dict[str, Any]]]) -> list[str]:
    """Cache keys, for sm_90, of launches: (module, kernel, arguments as of `describe`, constants and options)."""
    root = str(Path(__file__).resolve().parents[1])
    env = compiler_environment() | {"PYTHONPATH": root}
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, input=json.dumps(launches), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    keys: list[str] = json.loads(done.stdout)
    return keys


def _like(description: Any) -> Any:
    import torch

    if not isinstance(description, dict):
        return description
    size = torch.empty(0, dtype=getattr(torch, description["dtype"])).element_size()
    return torch.empty(32, dtype=getattr(torch, description["dtype"]))[description["misalignment"] // size :]


def _keys(launches: list[Any]) -> list[str]:
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    keys = []
    for module, name, arguments, constants in launches:
        kernel = getattr(importlib.import_module(module), name)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = bind(*map(_like, arguments), **constants)
        keys.append(f"{name} {specialization} {options}")
    return keys


if __name__ == "__main__":
    print(json.dumps(_keys(json.load(sys.stdin))))
