"""The exceptions that the command line turns into a single line."""

from __future__ import annotations

__all__ = ["InputError", "TrainingError", "one_line"]


class InputError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, and what to change."""


class TrainingError(RuntimeError):
    """Training went wrong with input that looked usable. The message is one line: what happened, and what to change."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's message, cut at ``limit`` characters; the class name when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].rstrip(" :") if lines else type(error).__name__  # a colon would announce lines that are cut off
    return text if len(text) <= limit else text[: limit - 3] + "..."
