"""Warnings that are given once per optimizer."""

from __future__ import annotations

import warnings


class Notices:
    """Remembers which warnings were given.

    Attributes:
        given: their kinds.
    """

    def __init__(self) -> None:
        self.given: set[str] = set()

    def first(self, kind: str) -> bool:
        """Whether nothing of this kind has been said before; from now on it has."""
        known = kind in self.given
        self.given.add(kind)
        return not known

    def warn(self, kind: str, message: str) -> None:
        """Warn, unless a warning of this kind was given before."""
        if self.first(kind):
            warnings.warn(message, stacklevel=4)
