"""Ctrl-C as a request that is honoured between two steps, not in the middle of one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupt", "interrupts"]


class Interrupt:
    """``asked`` becomes True at the first SIGINT; a second one raises KeyboardInterrupt where the program is."""

    def __init__(self) -> None:
        self.asked = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed; for places where stopping loses nothing."""
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Install an `Interrupt` for SIGINT; outside the main thread, where that is not allowed, it never triggers."""
    interrupt = Interrupt()
    try:
        previous = signal.signal(signal.SIGINT, interrupt.handle)
    except ValueError:
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
