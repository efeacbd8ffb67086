"""Whole optimizer steps on the CPU against their peers, and what the optimizer takes of a real training step.

    python -m benchmarks.step                              # writes results/step.csv and step.md: some minutes
    python -m benchmarks.step --cases minilm-lora-r8,training --backends eager --out /tmp    # some of it, elsewhere
    python -m benchmarks.step --report                     # the page again, from step.csv
    python -m benchmarks.step --quick                      # tiny shapes, seconds, a scratch folder: does it work?

A step is all that happens between `backward()` and the next forward pass: for IVON drawing the posterior sample as well
as the update; for peers that prune also scores and the allocation of ranks, one step in ten. Peers are interleaved in
one process. Nothing is timed until IVON has reproduced ivon-opt's trajectory with the same noise (`parity`).
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ledger, parity
from benchmarks.cases import CASES, QUICK_CASES, Case
from benchmarks.data import ALPHA_OVER_RANK, Sentences, adapt
from benchmarks.machine import RESULTS, peak_extra_mib
from benchmarks.peers import BASELINE, INTERVAL, MEASURED_INTERVAL, Peer, make_peers, make_pruner, ours
from benchmarks.step_report import TRAINING, write_report
from benchmarks.training import Step, train
from ivon_lora import VAdam, find_adapters

WARMUP = 2  # untimed steps at the start: they create the state
MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
QUICK_MINILM = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
TRAINING_RANK, TRAINING_TARGET, BATCH, TOKENS, TRAINING_ROUNDS = 12, 4, 32, 48, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status: 0, 1 (wrong results), 2 (wrong arguments)."""
    known = [*(case.name for case in CASES), TRAINING]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes into a scratch folder")
    parser.add_argument("--report", action="store_true", help="write the page from the CSV file that is there")
    parser.add_argument("--cases", default=",".join(known), help="separated by commas (default: %(default)s)")
    parser.add_argument("--backends", default="eager,cpp", help="separated by commas (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="per case (default: as many as the case needs)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: in benchmarks/)")
    options = parser.parse_args(argv)
    cases, backends = options.cases.split(","), options.backends.split(",")
    if set(cases) - set(known):
        parser.error(f"--cases: there is no {', '.join(sorted(set(cases) - set(known)))}; there are {', '.join(known)}")
    if options.report:
        write_report(options.out)
        return 0
    missing = [name for name in ("ivon", "peft") if find_spec(name) is None]
    if missing:
        parser.error(f"cannot import {' and '.join(missing)}: pip install 'ivon-lora[bench]' brings the peers")
    try:
        for backend in backends:
            parity.check(backend)
    except parity.ParityError as error:
        print(f"parity with ivon-opt: {error}", file=sys.stderr)
        return 1
    except ValueError as error:  # an unknown backend, or one that cannot run here
        parser.error(f"--backends: {error}")
    torch.set_num_threads(options.threads)
    if not options.quick:
        run(options.out, cases, backends, options.rounds)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), cases, backends, options.rounds or 2, quick=True)
    print("it works; the numbers mean nothing")
    return 0


def run(out: Path, cases: Sequence[str], backends: Sequence[str], rounds: int | None, quick: bool = False) -> None:
    """Measure, write step.csv and step.md into the folder ``out``, and print the page."""
    rows: list[dict[str, Any]] = []
    for case in QUICK_CASES if quick else CASES:
        if case.name in cases:
            print(f"measuring {case.name}", file=sys.stderr)
            rows += measure(case, rounds or case.rounds, backends)
    if TRAINING in cases:
        print(f"measuring {TRAINING}", file=sys.stderr)
        rows += measure_training(QUICK_MINILM if quick else MINILM, rounds or TRAINING_ROUNDS, backends)
    (out / "step.csv").unlink(missing_ok=True)
    ledger.append(out / "step.csv", [{**row, "threads": torch.get_num_threads()} for row in rows])
    print(write_report(out))


def measure(case: Case, rounds: int, backends: Sequence[str]) -> list[dict[str, Any]]:
    """One row per peer; in every round each does `MEASURED_INTERVAL` steps, in shuffled order."""
    n_steps = WARMUP + MEASURED_INTERVAL * (rounds + 1)  # the last ones for the memory
    peers = make_peers(case, n_steps, backends)
    for peer in peers:
        for _ in range(WARMUP):
            peer.step()
    times: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer in peers}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for peer in order.sample(peers, len(peers)):
                steps = [_timed(peer) for _ in range(MEASURED_INTERVAL)]
                cpu, wall = zip(*steps, strict=True)
                times[peer.name].append((mean_step(cpu), mean_step(wall)))
    finally:
        gc.enable()
    rows = []
    for peer in peers:
        peaks = [peak_extra_mib(peer.step) for _ in range(MEASURED_INTERVAL)]
        if not all(bool(torch.isfinite(p).all()) for p in peer.tensors):
            raise RuntimeError(f"{peer.name} ended with parameters that are not finite: its times mean nothing")
        cpu, wall = zip(*times[peer.name], strict=True)
        facts = {
            "wall_ms": 1e3 * float(np.median(wall)),
            "tensors": len(peer.tensors),
            "elements": sum(p.numel() for p in peer.tensors),
            "peak_mib": max((peak for peak in peaks if peak is not None), default=None),
        }
        rows.append(_row(case.name, peer.name, cpu) | facts)
    return rows


def mean_step(pair: Sequence[float]) -> float:
    """Mean over `INTERVAL` steps of which one allocates ranks, from a step without and a step with an allocation."""
    return ((INTERVAL - 1) * pair[0] + pair[1]) / INTERVAL


def measure_training(dimensions: dict[str, Any], rounds: int, backends: Sequence[str]) -> list[dict[str, Any]]:
    """One row per peer: the optimizer's part of training LoRA of rank 12 on every linear layer of a BERT.

    Args:
        dimensions: of the model; its weights are random, which costs the same.
    """
    from transformers import BertConfig, BertForSequenceClassification

    base = BertForSequenceClassification(BertConfig(**dimensions))
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1000, 30_000, (TOKENS,), generator=generator) for _ in range(BATCH)]
    data = Sentences(tokens, [i % 2 for i in range(BATCH)])
    steps = WARMUP + MEASURED_INTERVAL * rounds
    runs: dict[str, Iterator[Step]] = {}
    kinds = [(BASELINE, "", False), *((ours(b, pruned), b, pruned) for b in backends for pruned in (False, True))]
    for name, backend, pruned in kinds:
        model, optimizer = _trainable(copy.deepcopy(base), backend, pruned, steps)
        runs[name] = train(model, optimizer, data, steps=steps, batch_size=BATCH)
    rounds_of_all = list(zip(*runs.values(), strict=True))  # peer after peer, step by step
    rows = []
    for name, records in zip(runs, zip(*rounds_of_all, strict=True), strict=True):
        pairs = list(zip(records[WARMUP::MEASURED_INTERVAL], records[WARMUP + 1 :: MEASURED_INTERVAL], strict=True))
        passes = [mean_step([step.passes for step in pair]) for pair in pairs]
        row = _row(TRAINING, name, [mean_step([step.optimizer for step in pair]) for pair in pairs])
        rows.append(row | {"passes_ms": 1e3 * float(np.median(passes))})
    return rows


def _trainable(base: Any, backend: str, pruned: bool, steps: int) -> tuple[Any, torch.optim.Optimizer]:
    """LoRA on ``base``, and AdamW where there is no backend, else our optimizer as users have it."""
    from peft import LoraConfig

    model = adapt(base, LoraConfig, 0, r=TRAINING_RANK, lora_alpha=ALPHA_OVER_RANK * TRAINING_RANK)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not backend:
        return model, torch.optim.AdamW([p for _, p in named], lr=1e-3, fused=True)
    make = partial(VAdam, named, lr=1e-3, num_examples=7117, batch_size=BATCH, backend=backend)
    return model, make(pruner=make_pruner(find_adapters(model), TRAINING_TARGET, steps) if pruned else None)


def _timed(peer: Peer) -> tuple[float, float]:
    """Seconds of processor time of all threads, and by the clock, of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    peer.step()
    return time.process_time() - cpu, time.perf_counter() - wall


def _row(case: str, peer: str, seconds: Sequence[float]) -> dict[str, Any]:
    low, median, high = 1e3 * np.percentile(seconds, (20, 50, 80))
    return {"case": case, "peer": peer, "rounds": len(seconds), "cpu_ms": median, "p20_ms": low, "p80_ms": high}


if __name__ == "__main__":
    sys.exit(main())
