"""What one step of the kernels executes and moves per element, counted on the emulated GPU of the tests.

Without a GPU, `python -m benchmarks.kernels` writes and shows it.

Instructions are those of PTX, of which an assembler makes more (a division, a root) or fewer: what matters is the ratio
of two kernels. Bytes are 32-byte sectors, each counted once per launch.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from benchmarks.cases import Case, many_linears
from benchmarks.machine import ROOT, describe_commit

EXECUTED_RESULTS = ROOT / "benchmarks" / "results" / "kernels_executed.csv"
#: large enough that tables and the selection are little, and small enough for an emulator
CASE = Case("counted", 1, many_linears(4, features=1024), rank=16)
CAPABILITY = 90


@dataclass(frozen=True)
class ExecutedRow:
    """One kernel in the steps of one peer; the fields are the columns. Add columns at the end only.

    Launches, instructions (per element, all threads together) and bytes (per element) of a mean step.
    """

    peer: str
    dtype: str
    kernel: str
    launches: float
    instructions: float
    bytes: float
    target: str
    triton: str
    commit: str


def executed_rows() -> list[ExecutedRow]:
    """Count in a process of its own, in which Triton launches on the emulated GPU; takes a minute or two."""
    from tests.offline_compile import compiler_environment

    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.executed"]
    done = subprocess.run(command, cwd=ROOT, env=compiler_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return [ExecutedRow(**row) for row in json.loads(done.stdout)]


def count() -> Iterable[ExecutedRow]:
    """Every peer of ours in `benchmarks.kernels`, in fp32 and bf16."""
    from benchmarks.kernels import INTERVAL, elements_of, make_peers
    from tests.emulated_gpu.driver import activate

    emulated = activate(CAPABILITY)
    emulated.checks_order = False  # the tests do
    commit, triton = describe_commit(), importlib.metadata.version("triton")
    for dtype in (torch.float32, torch.bfloat16):
        for name, make in make_peers(CASE, dtype, torch.device("cpu")):
            if not name.startswith("ivon-lora"):
                continue
            peer = make()
            for _ in range(INTERVAL):  # creates the state
                peer.step()
            emulated.counted = []
            for _ in range(INTERVAL):
                peer.step()
            counted, emulated.counted = emulated.counted, None
            per_element = INTERVAL * elements_of(CASE)
            for kernel in dict.fromkeys(name for name, _ in counted):
                mine = [counter for name, counter in counted if name == kernel]
                yield ExecutedRow(
                    peer=name,
                    dtype=str(dtype).removeprefix("torch."),
                    kernel=kernel,
                    launches=len(mine) / INTERVAL,
                    instructions=round(sum(c.instructions for c in mine) / per_element, 1),
                    bytes=round(sum(c.bytes for c in mine) / per_element, 2),
                    target=f"sm_{CAPABILITY}",
                    triton=triton,
                    commit=commit,
                )


def render(rows: list[ExecutedRow]) -> str:
    """A table, with the sums of each peer."""
    lines = [
        f"{'a mean step, per element':34} {'dtype':9} {'kernel':18} {'launches':>8} {'instructions':>13} {'bytes':>6}"
    ]
    for key in dict.fromkeys((r.peer, r.dtype) for r in rows):
        mine = [r for r in rows if (r.peer, r.dtype) == key]
        sums = [round(sum(getattr(r, name) for r in mine), 2) for name in ("launches", "instructions", "bytes")]
        for kernel, numbers in [(r.kernel, (r.launches, r.instructions, r.bytes)) for r in mine] + [("together", sums)]:
            lines.append(f"{key[0]:34} {key[1]:9} {kernel:18} {numbers[0]:8.1f} {numbers[1]:13.1f} {numbers[2]:6.2f}")
    lines.append("Instructions: PTX, executed on an emulated GPU. Bytes: 32-byte sectors, each once per launch.")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in count()]))
