"""Time whole optimizer steps of ivon-lora and of its peers on adapter tensors as real models have them.

    python -m benchmarks.step                                           # every case, one thread: some minutes
    python -m benchmarks.step --threads 1,2 --malloc default,tuned      # every setting
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
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks import gate
from benchmarks.cases import CASES, QUICK_CASES, Case
from benchmarks.machine import MALLOCS, ROOT, describe_commit, describe_machine, malloc_environment
from benchmarks.measure import interleave, peak_memory, steps_needed
from benchmarks.peers import BACKENDS, BASELINE, INTERVAL, REFERENCE, make_peers
from benchmarks.table import Row, merge_csv, render, write_csv

RESULTS = ROOT / "benchmarks" / "results" / "step.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status: 0, 1 (wrong results), 2 (wrong arguments)."""
    parser = _parser()
    options = parser.parse_args(argv)
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
    missing = [name for name in ("ivon", "peft") if find_spec(name) is None]
    if missing:
        print(
            f"cannot import {' and '.join(missing)}: pip install 'ivon-lora[bench]' brings the peers", file=sys.stderr
        )
        return 2
    try:
        for backend in BACKENDS:
            gate.check(backend)
    except gate.GateError as error:
        print(f"gate: {error}", file=sys.stderr)
        return 1
    print(_header())
    rows = []
    for case in cases:
        for n in threads:
            print(f"measuring {case.name}, threads {n}, malloc {options.malloc}", file=sys.stderr)
            rows += (new := measure(case, n, options.rounds or case.rounds, options.malloc, options.note))
            print(f"\n{render(new)}", flush=True)
    if out is not None:
        write_csv(out, rows)
        if not options.part:
            print(f"written to {out}", file=sys.stderr)
    return 0


def measure(case: Case, threads: int, rounds: int, malloc: str, note: str = "") -> list[Row]:
    """Measure one case with one number of threads: one row per peer, the fastest first."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peers = make_peers(case, steps_needed(rounds))
        costs = interleave(peers, rounds)
        memory = {peer.name: peak_memory(peer) for peer in peers}
    finally:
        torch.set_num_threads(before)
    medians = {name: statistics.median(c.wall_ms for c in values) for name, values in costs.items()}
    about = {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "commit": describe_commit()}
    rows = []
    for peer in sorted(peers, key=lambda peer: medians[peer.name]):
        p20, p80 = np.percentile([c.wall_ms for c in costs[peer.name]], (20, 80))
        peak = memory[peer.name]
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
                rounds=rounds,
                ratio_to_adamw_fused=medians[peer.name] / medians[BASELINE],
                speedup_over_ivon_opt=medians[REFERENCE] / medians[peer.name],
                malloc=malloc,
                torch=torch.__version__,
                machine=describe_machine(note),
                peak_extra_mib=None if peak is None else peak / 2**20,
                median_cpu_ms=statistics.median(c.cpu_ms for c in costs[peer.name]),
                **about,
            )
        )
    return rows


def _in_processes(options: argparse.Namespace, environments: dict[str, dict[str, str]], out: Path | None) -> int:
    """One process per malloc setting, because glibc reads its variables when a process starts."""
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for setting, environment in environments.items():
            part = Path(folder) / f"{setting}.csv"
            command = [sys.executable, "-m", "benchmarks.step", "--malloc", setting, "--part", "--out", str(part)]
            command += ["--threads", options.threads, "--note", options.note]
            command += ["--quick"] if options.quick else []
            command += ["--cases", options.cases] if options.cases else []
            command += ["--rounds", str(options.rounds)] if options.rounds else []
            status = subprocess.run(command, cwd=ROOT, env=environment).returncode
            if status != 0:
                return status
            parts.append(part)
        if out is not None:
            merge_csv(out, parts)
            print(f"written to {out}", file=sys.stderr)
    return 0


def _header() -> str:
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"Whole optimizer steps, fp32, gradients in place; torch {torch.__version__}, {describe_machine()}{load}.\n"
        f"Medians over rounds, 20th and 80th percentiles; peers interleaved; ranks allocated every {INTERVAL} steps."
    )


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
    parser.add_argument("--rounds", type=int, help="rounds per case (default: as many as the case needs)")
    parser.add_argument("--note", default="", help="said after the machine in the CSV file, like 'shared'")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # started for one of several settings
    return parser


if __name__ == "__main__":
    sys.exit(main())
