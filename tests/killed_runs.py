"""Runs `ivon-lora finetune` in forked processes and kills them (SIGKILL) at given moments; prints what happened.

A moment is a number of Python-level events (calls and returns of Python and C functions) since the run began, so it can
lie anywhere: within a step, between two tensors of a checkpoint, before its file gets its name. Run as a program, not
inside pytest: a process to fork from should have one thread.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ivon_lora.cli.main import main


class Clock:
    """Counts events; kills the process at the given one, or writes down when checkpoints were written."""

    def __init__(self, deadline: int | None) -> None:
        self.deadline = deadline
        self.events = 0
        self.checkpoints: list[list[int]] = []

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        self.events += 1
        if self.events == self.deadline:
            os.kill(os.getpid(), signal.SIGKILL)
        if frame.f_code.co_name == "write_checkpoint" and event in ("call", "return"):
            if event == "call":
                self.checkpoints.append([self.events])
            else:
                self.checkpoints[-1].append(self.events)


def attempt(arguments: list[str], deadline: int | None) -> dict[str, Any]:
    """One run in a process of its own: its exit status (negative: the signal), and what its clock saw."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        clock = Clock(deadline)
        sys.setprofile(clock)
        status = main(arguments)
        sys.setprofile(None)
        os.write(writer, json.dumps({"events": clock.events, "checkpoints": clock.checkpoints}).encode())
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return {"status": os.waitstatus_to_exitcode(status), **(json.loads(said) if said else {})}


def run_until_done(arguments: list[str], out: Path, deadlines: list[int]) -> list[dict[str, Any]]:
    """Start the run, resume it whenever it was killed, and let the last attempt finish."""
    attempts = []
    for deadline in [*deadlines, None]:
        resumes = (out / "checkpoint" / "state.pt").exists()
        now = ["finetune", "--resume", "--out", str(out)] if resumes else [*arguments, "--out", str(out)]
        attempts.append({"resumes": resumes, **attempt(now, deadline)})
        if attempts[-1]["status"] != -signal.SIGKILL:
            break
    return attempts


if __name__ == "__main__":
    warm = False
    for line in sys.stdin:
        request = json.loads(line)
        arguments, out = request["arguments"], Path(request["out"])
        if not warm:  # what is imported here once, the forked processes need not import
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                main([*arguments, "--out", str(out) + "-warm"])
            warm = True
        print(json.dumps(run_until_done(arguments, out, request["deadlines"])), flush=True)
