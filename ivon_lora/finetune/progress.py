"""One line that shows how far a run is: redrawn in place on a terminal, printed now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

__all__ = ["Progress"]

BAR_WIDTH = 24
REDRAW_SECONDS = 0.1


class Progress:
    """A progress bar.

    Args:
        label: what is going on.
        total: number of steps.
        every: off a terminal, print a line at multiples of this many steps (and at the last one).
        done: steps done before this run, which do not count for the speed.
        stream: where to write; stderr if None.
    """

    def __init__(self, label: str, total: int, every: int, done: int = 0, stream: TextIO | None = None) -> None:
        self._label = label
        self._total = total
        self._every = max(1, every)
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._first = done
        self._start = time.monotonic()
        self._drawn = 0.0

    def update(self, done: int, note: str = "") -> None:
        """Show that ``done`` steps are done."""
        now = time.monotonic()
        last = done >= self._total
        if self._live:
            if last or now - self._drawn >= REDRAW_SECONDS:
                self._drawn = now
                width = shutil.get_terminal_size().columns - 1
                self._stream.write("\r" + self._line(done, note, now, bar=True)[:width].ljust(width))
                self._stream.flush()
        elif last or done % self._every == 0:
            print(self._line(done, note, now, bar=False), file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the line as it is and start a new one."""
        if self._live and self._drawn:
            print(file=self._stream, flush=True)

    def _line(self, done: int, note: str, now: float, bar: bool) -> str:
        fresh = done - self._first
        left = (now - self._start) / fresh * (self._total - done) if fresh > 0 else 0.0
        filled = BAR_WIDTH * done // max(1, self._total)
        drawing = " [" + "#" * filled + "." * (BAR_WIDTH - filled) + "]" if bar else ""
        return f"{self._label}{drawing} {done}/{self._total}  {note}  {_clock(left)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
