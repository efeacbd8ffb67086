"""The exceptions that the command line turns into a single line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, and what to change."""


class TrainingError(RuntimeError):
    """Training went wrong with input that looked usable. The message is one line: what happened, and what to change."""


@contextmanager
def input_errors(source: object) -> Iterator[None]:
    """Whatever goes wrong inside is one line about ``source``, a file or an option: damaged files raise anything."""
    try:
        yield
    except (InputError, ModuleNotFoundError):
        raise
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC:  # not the input: the disk is full
            raise
        raise InputError(f"{source}: {one_line(error)}") from error


def one_line(error: BaseException, limit: int = 400) -> str:
    """The first line of an exception's message, cut at ``limit`` characters; the class name when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].rstrip(" :") if lines else type(error).__name__  # a colon would announce lines that are cut off
    text = f"no {text}" if isinstance(error, KeyError) else text
    return text if len(text) <= limit else text[: limit - 3] + "..."
