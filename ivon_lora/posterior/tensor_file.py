"""Files of tensors: written whole or not at all, with the mode of the user's umask; read with one-line errors."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["read_tensors", "write_tensors"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in the place of ``path``, atomically.

    Args:
        path: the file; its directory is made.
        tensors: copied to the CPU if they are elsewhere; they must not share memory.
        metadata: strings in the head of the file.
    """
    safetensors = _safetensors(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")
    try:
        fresh.touch()
        mode = fresh.stat().st_mode  # as the umask has it; safetensors makes files that only their owner can read
        content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        safetensors.torch.save_file(content, fresh, dict(metadata))
        fresh.chmod(mode)
        with open(fresh, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, or of a ``.bin`` file of torch, and the metadata.

    Raises:
        ValueError: the file is truncated, damaged or something else; one line that names it.
    """
    safetensors = _safetensors(path)
    kind = "file of torch.save" if path.suffix == ".bin" else "safetensors file"
    try:
        if path.suffix != ".bin":
            with safetensors.safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise TypeError("it holds no dictionary of tensors; save the adapter again")
        return {str(key): value for key, value in loaded.items()}, {}
    except OSError:
        raise
    except Exception as error:  # all three raise what they like for a file that is none of theirs
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is truncated or not a {kind}: {said}") from error


def _safetensors(path: Path) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{path.name} needs safetensors: pip install 'ivon-lora[peft]'") from error
    return safetensors
