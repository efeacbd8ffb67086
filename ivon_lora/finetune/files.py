"""Write files and folders so that a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["remove_scratch", "replace_file", "replace_folder"]


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside ``path``; what was written there replaces ``path`` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(descriptor)
    scratch = Path(name)
    try:
        yield scratch
        _flush(scratch)
        scratch.chmod(0o666 & ~_umask())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield an empty scratch folder beside ``path``; it replaces ``path`` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    old = scratch.with_name(scratch.name + ".old")
    try:
        yield scratch
        scratch.chmod(0o777 & ~_umask())
        if path.exists():
            path.rename(old)
        scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_scratch(path: Path) -> None:
    """Remove what writers of ``path`` have left beside it because they were killed."""
    for scratch in path.parent.glob(f".{path.name}.*"):
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    # without it a power cut can leave the new name with no content
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
