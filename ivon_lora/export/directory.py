"""Write a directory so that a reader finds the old one or the new one, never half of either."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_target(path: str | os.PathLike[str]) -> Path:
    """The directory to write. ValueError if it is empty, a file, or holds the current working directory."""
    if not os.fspath(path):
        raise ValueError("path is empty: name the directory to write the adapter into")
    target = Path(os.path.realpath(path))  # unlike resolve(), it takes a loop of links as it is
    if target.exists() and not target.is_dir():
        raise ValueError(f"path={os.fspath(path)!r} is a file: name a directory to write the adapter into")
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"path={os.fspath(path)!r} holds the current working directory: name a directory inside it")
    return target


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Yield an empty sibling directory; when the block ends without error it takes the place of ``target``.

    Files of an old ``target`` that the new directory does not have (a tokenizer, a posterior) move over with it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # siblings are on the same file system, so that renaming is atomic
    fresh, old = (target.parent / f".{target.name}.{kind}-{secrets.token_hex(4)}" for kind in ("new", "old"))
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            fresh.chmod(target.stat().st_mode)
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except BaseException:
            if old.exists():
                os.rename(old, target)
            raise
        for entry in old.iterdir() if old.exists() else ():
            if not (target / entry.name).exists():
                os.rename(entry, target / entry.name)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
