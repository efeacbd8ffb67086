"""The exceptions that the command line turns into a single line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["InputError", "TrainingError", "input_errors", "one_line"]


class InputError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, and what to change."""


class TrainingError(RuntimeError):
    """Training went wrong with input that looked usable. The message is one line: what happened, and what to change."""


@contextmanager
def input_errors(source: object) -> Iterator[None]:
    """Make whatever goes wrong inside one line about ``source``, a file or an option: a damaged file raises anything."""
    try:
        yield
    except (InputError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise InputError(f"{source}: {one_line(error)}") from error


def one_line(error: BaseException, limit: int = 400) -> str:
    """The first line of an exception's message, cut at ``limit`` characters; the class name when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].rstrip(" :") if lines else type(error).__name__  # a colon would announce lines that are cut off
    if isinstance(error, KeyError):
        text = f"no {text}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
