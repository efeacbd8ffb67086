"""Time whole optimizer steps of ivon-lora and of its peers on adapter tensors as real models have them.

    python -m benchmarks.step                                           # every case, one thread: some minutes
    python -m benchmarks.step --memory --threads 1,2 --malloc default,tuned  # everything
    python -m benchmarks.step --quick                                   # tiny shapes, seconds: does it work?

A step is all that happens between `backward()` and the next forward pass: for IVON drawing the posterior sample as well
as the update, for the pruning peers the scores and the allocation of ranks at an interval of 10 steps. Gradients are
there before. Nothing is timed until IVON has reproduced ivon-opt's trajectory with the same noise (`gate`); where it
does not, the exit status is 1 and there are no numbers.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks import gate
from benchmarks.cases import CASES, QUICK_CASES, Case
from benchmarks.machine import MALLOCS, ROOT, describe_commit, describe_machine, malloc_environment
from benchmarks.measure import Cost, interleave, steps_needed
from benchmarks.memory import peaks
from benchmarks.peers import BASELINE, INTERVAL, REFERENCE, Peer, make_peers
from benchmarks.table import LEGEND, Row, merge_csv, render, write_csv

FEW = (BASELINE, REFERENCE)
RESULTS = ROOT / "benchmarks" / "results" / "step.csv"


@dataclass(frozen=True)
class About:
    """The columns that all rows of a process have in common."""

    malloc: str
    torch: str
    machine: str
    date: str
    commit: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status: 0, 1 (wrong results), 2 (wrong arguments)."""
    parser = _parser()
    options = parser.parse_args(argv)
    backends = options.backends.split(",")
    try:
        threads = _threads(options.threads)
        cases = _choose(QUICK_CASES if options.quick else CASES, options.cases)
        environments = {setting: malloc_environment(setting, os.environ) for setting in options.malloc.split(",")}
        if options.rounds is not None and options.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    except ValueError as error:
        parser.error(str(error))
    out: Path | None = options.out
    if out is None and not (options.quick or options.cases):
        out = RESULTS
    if list(environments.values()) != [dict(os.environ)]:
        return _in_processes(options, environments, out)
    status = _ready(backends)
    if status != 0:
        return status
    about = About(options.malloc, torch.__version__, describe_machine(options.note), _today(), describe_commit())
    print(_header(about.machine))
    rows = []
    for case in cases:
        memory = peaks(case, backends) if options.memory else {}
        for n in threads:
            print(f"measuring {case.name}, threads {n}, malloc {options.malloc}", file=sys.stderr)
            new = rows_of(
                case, n, measure(case, n, options.rounds or case.rounds, backends, options.few), memory, about
            )
            print(f"\n{render(new)}", flush=True)
            rows += new
    if out is not None:
        write_csv(out, rows)
        if not options.part:
            print(f"written to {out}", file=sys.stderr)
    return 0


def _ready(backends: Sequence[str]) -> int:
    """Exit status that forbids measuring, with its reason printed, or 0."""
    missing = [name for name in ("ivon", "peft") if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        print(f"cannot import {names}: pip install 'ivon-lora[bench]' brings the peers", file=sys.stderr)
        return 2
    try:
        for backend in backends:
            gate.check(backend)
    except gate.GateError as error:
        print(f"gate: {error}", file=sys.stderr)
        return 1
    except ValueError as error:  # an unknown backend, or one that cannot run here
        print(f"--backends: {error}", file=sys.stderr)
        return 2
    return 0


def measure(
    case: Case, threads: int, rounds: int, backends: Sequence[str], few: bool = False
) -> list[tuple[Peer, list[Cost]]]:
    """Every peer with the costs of its rounds, the fastest first.

    Args:
        few: without the slower ways of AdamW, and AdaLoRA.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peers = make_peers(
            case, steps_needed(rounds), backends, lambda name: not few or name in FEW or name.startswith("ivon-lora")
        )
        costs = interleave(peers, rounds)
    finally:
        torch.set_num_threads(before)
    return sorted(((peer, costs[peer.name]) for peer in peers), key=lambda result: _median_ms(result[1]))


def rows_of(
    case: Case, threads: int, results: list[tuple[Peer, list[Cost]]], memory: Mapping[str, int], about: About
) -> list[Row]:
    """One row per result. ``memory``: peak bytes by peer, of those that are known."""
    medians = {peer.name: _median_ms(costs) for peer, costs in results}
    rows = []
    for peer, costs in results:
        p20, p80 = np.percentile([c.wall_ms for c in costs], (20, 80))
        peak = memory.get(peer.name)
        rows.append(
            Row(
                case=case.name,
                peer=peer.name,
                threads=threads,
                elements=sum(t.numel() for t in peer.tensors),
                tensors=len(peer.tensors),
                median_ms=medians[peer.name],
                p20_ms=float(p20),
                p80_ms=float(p80),
                rounds=len(costs),
                ratio_to_adamw_fused=medians[peer.name] / medians[BASELINE],
                speedup_over_ivon_opt=medians[REFERENCE] / medians[peer.name],
                peak_extra_mib=None if peak is None else peak / 2**20,
                median_cpu_ms=statistics.median(c.cpu_ms for c in costs),
                **asdict(about),
            )
        )
    return rows


def _median_ms(costs: Sequence[Cost]) -> float:
    return statistics.median(c.wall_ms for c in costs)


def _in_processes(options: argparse.Namespace, environments: dict[str, dict[str, str]], out: Path | None) -> int:
    """One process per malloc setting, because glibc reads its variables when a process starts."""
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for setting, environment in environments.items():
            part = Path(folder) / f"{setting}.csv"
            command = [sys.executable, "-m", "benchmarks.step", "--malloc", setting, "--part", "--out", str(part)]
            command += ["--threads", options.threads, "--note", options.note, "--backends", options.backends]
            command += ["--quick"] if options.quick else []
            command += ["--cases", options.cases] if options.cases else []
            command += ["--memory"] if options.memory else []
            command += ["--few"] if options.few else []
            command += ["--rounds", str(options.rounds)] if options.rounds else []
            status = subprocess.run(command, cwd=ROOT, env=environment).returncode
            if status != 0:
                return status
            parts.append(part)
        if out is not None:
            merge_csv(out, parts)
            print(f"written to {out}", file=sys.stderr)
    return 0


def _header(machine: str) -> str:
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"Whole optimizer steps, fp32, gradients in place; torch {torch.__version__}, {machine}{load}.\n"
        f"Peers interleaved; ranks allocated every {INTERVAL} steps.\n{LEGEND}"
    )


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _threads(text: str) -> list[int]:
    try:
        threads = [int(part) for part in text.split(",")]
    except ValueError:
        threads = [0]
    if min(threads) < 1:
        raise ValueError(f"--threads must be numbers of at least 1, like 1,2; got {text!r}")
    return threads


def _choose(cases: Sequence[Case], names: str | None) -> list[Case]:
    if not names:
        return list(cases)
    known = {case.name: case for case in cases}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise ValueError(f"--cases: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds; the numbers mean nothing")
    parser.add_argument(
        "--out",
        type=lambda text: Path(text).absolute(),
        help="CSV file to write (default: benchmarks/results/step.csv, and none with --quick or --cases)",
    )
    parser.add_argument("--threads", default="1", help="numbers of torch threads, like 1,2 (default: 1)")
    parser.add_argument(
        "--malloc", default="default", help=f"settings of glibc's malloc: {', '.join(MALLOCS)}, or both"
    )
    parser.add_argument("--cases", help="names of cases, separated by commas (default: all)")
    parser.add_argument("--backends", default="eager", help="of ivon-lora, separated by commas (default: eager)")
    parser.add_argument("--rounds", type=int, help="rounds per case (default: as many as the case needs)")
    parser.add_argument(
        "--memory", action="store_true", help="also measure the peak memory of a step, once, with one thread"
    )
    parser.add_argument("--few", action="store_true", help="only ivon-lora, ivon-opt and AdamW fused")
    parser.add_argument("--note", default="", help="said after the machine in the CSV file, like 'shared'")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # started for one of several settings
    return parser


if __name__ == "__main__":
    sys.exit(main())
