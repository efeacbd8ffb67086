"""Two processes that form a gloo group and run the functions they are sent, for all tests of a session."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

WORLD = 2
PATIENCE = 60  # seconds until a collective, or the parent, gives up
GRACE = 5  # seconds that a process may take to fail after another one has


class Pool:
    """The processes, started when they are first needed, and again after a failure."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(rank, *arguments)`` in every process (pickled by name); results by rank, or what failed first."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        failure = ""
        waiting = list(self._pipes)
        while waiting:
            ready = wait(waiting, timeout=GRACE if failure else 2 * PATIENCE)
            if not ready:  # those left wait in a collective
                self.close()
                raise AssertionError(failure or "the processes do not answer")
            for pipe in [pipe for pipe in waiting if pipe in ready]:
                waiting.remove(pipe)
                try:
                    ok, result = pipe.recv()
                except EOFError:
                    self.close()
                    raise AssertionError(failure or "a process has died") from None
                if not ok:
                    failure = failure or result
                results[self._pipes.index(pipe)] = result
        if failure:
            raise AssertionError(failure)
        return [results[rank] for rank in range(WORLD)]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "peft", "ivon_lora"])  # imported once for both
        store = tempfile.mktemp(prefix="store-")  # must not exist: the processes meet by creating it
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(rank: int, store: str, pipe: Connection) -> None:
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as tests/conftest.py: unwritten memory is NaN
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *arguments)))
        except BaseException:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
