"""Compare ways to spend a budget of LoRA ranks: real sentences, one final budget, several seeds.

    python -m benchmarks.ranks --runs 2          # the next two runs that benchmarks/results/ranks.csv lacks
    python -m benchmarks.ranks --list            # what is done and what is not
    python -m benchmarks.ranks --report          # ranks.md and ranks.png from ranks.csv; no training
    python -m benchmarks.ranks --quick           # two short runs into a scratch folder: does it work?

The task is that of `ivon-lora finetune`, made cheaper: rated film-review sentences of at most 32 tokens,
all-MiniLM-L6-v2, 100 steps of 32 sentences, bf16 autocast where it is fast, one thread. Every method ends with 4 ranks
per layer on average (144 of 36 layers); pruning methods start with 12. A run appends one row; a row that is there is
not run again unless a default of its optimizer has changed since.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.machine import ROOT, describe_commit, describe_machine
from benchmarks.rank_methods import ARMS, CONTROLS, OURS, SEEDS, Arm, build, options_of, settings_of
from benchmarks.rank_report import write_report
from benchmarks.rank_table import Row, append, read
from ivon_lora.finetune.batches import Encoded, TrainingOrder, encode, pad
from ivon_lora.finetune.evaluate import predict_logits
from ivon_lora.finetune.methods import Method
from ivon_lora.finetune.model import load_base, load_tokenizer
from ivon_lora.finetune.reviews import load_reviews
from ivon_lora.finetune.runtime import Runtime, step_seed
from ivon_lora.finetune.schedule import learning_rate
from ivon_lora.finetune.settings import Settings
from ivon_lora.posterior.metrics import score_probabilities

RESULTS = ROOT / "benchmarks" / "results"
RANK, TARGET, STEPS, TEST_LIMIT = 12, 4, 100, 1000


@dataclass(frozen=True)
class Run:
    """One training run to be made: the key of a row."""

    arm: Arm
    seed: int
    split: str = "test"
    steps: int = STEPS

    @property
    def key(self) -> tuple[str, int, str, int, str, str]:
        """What makes two runs the same one; where a default of the optimizer has changed, it is another."""
        return self.arm.name, self.seed, self.split, self.steps, f"{self.arm.lr:g}", self.arm.options


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.quick:
        return _quick()
    path: Path = options.out
    try:
        runs = plan(options.methods, options.seeds, options.lr, options.split)
    except ValueError as error:
        parser.error(str(error))
    done = {row.key for row in read(path)}
    missing = [run for run in runs if run.key not in done]
    if options.list:
        for run in runs:
            print("done   " if run.key in done else "missing", *run.key)
        return 0
    if options.report:
        for written in write_report(read(path), path):
            print(f"written: {written}")
        return 0
    for run in missing[: options.runs]:
        row = train(run, TEST_LIMIT)
        append(path, row)
        print(f"{run.arm.name}, seed {run.seed}: accuracy {row.accuracy:.4f}, NLL {row.nll:.4f}", flush=True)
    print(f"left: {max(0, len(missing) - options.runs)}")
    return 0


def plan(methods: str | None, seeds: str | None, lr: float | None, split: str) -> list[Run]:
    """The runs asked for, seed by seed, so that methods can be compared whenever the study is stopped.

    Raises:
        ValueError: an unknown method.
    """
    names = [arm.name for arm in (*CONTROLS, *OURS)] if methods is None else methods.split(",")
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ValueError(f"--methods: there is no {', '.join(unknown)}; there are {', '.join(ARMS)}")
    arms = [ARMS[name] if lr is None else replace(ARMS[name], lr=lr) for name in names]
    numbers = SEEDS if seeds is None else [int(seed) for seed in seeds.split(",")]
    return [Run(arm, seed, split) for seed in numbers for arm in arms]


def train(run: Run, limit: int) -> Row:
    """Train, evaluate at the mean of the weights, and say what it cost."""
    runtime = Runtime("cpu", "auto", threads=1)
    settings = settings_of(run.arm, run.seed, run.steps, RANK, TARGET)
    corpus = load_reviews()
    tokenizer = load_tokenizer()
    data = encode(corpus.train, tokenizer, settings.max_length)
    rows = corpus.test if run.split == "test" else corpus.validation
    method = build(run.arm, load_base(seed=run.seed), settings, data)
    if options_of(method.optimizer) != run.arm.options:
        raise ValueError(f"{run.arm.name} would train with {options_of(method.optimizer)}, not {run.arm.options}")
    passes, updates, losses = _steps(method, data, settings, runtime)
    if hasattr(method.optimizer, "eval"):
        method.optimizer.eval()
    part = encode(rows[:limit], tokenizer, settings.max_length)
    scores = score_probabilities(
        predict_logits(method.model, part, runtime).double().softmax(-1), torch.tensor(part.labels)
    )
    kept = method.kept_ranks()
    return Row(
        method=run.arm.name,
        seed=run.seed,
        split=run.split,
        steps=run.steps,
        lr=f"{run.arm.lr:g}",
        options=run.arm.options,
        n=scores.n,
        accuracy=scores.accuracy,
        nll=scores.nll,
        ece=scores.ece,
        brier=scores.brier,
        train_loss=statistics.fmean(losses[-25:]),
        ranks=sum(kept.values()),
        passes_cpu_ms=1e3 * statistics.median(passes),
        optimizer_cpu_ms=1e3 * statistics.fmean(updates),
        ranks_by_layer=" ".join(map(str, kept.values())),
        torch=torch.__version__,
        precision=str(runtime.as_dict()["precision"]),
        machine=describe_machine("shared"),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        commit=describe_commit(),
    )


def _steps(
    method: Method, data: Encoded, settings: Settings, runtime: Runtime
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of processor time for the passes and for the optimizer with its pruner, and the losses, step by step."""
    order = TrainingOrder([len(ids) for ids in data.ids], settings.batch_size, settings.seed)
    passes: list[float] = []
    updates: list[float] = []
    losses: list[float] = []
    peak = float(method.optimizer.param_groups[0]["lr"])  # which it may have lowered
    for step in range(1, settings.steps + 1):
        torch.manual_seed(step_seed(settings.seed, step))
        for group in method.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, peak)
        method.model.train()
        batch = pad(data, order.batch(step - 1), runtime.device)
        start = time.process_time()
        method.begin_step()
        sampled = time.process_time()
        with runtime.autocast():
            loss, data_loss = method.loss(batch)
        loss.backward()
        backward = time.process_time()
        method.finish_step(step)
        end = time.process_time()
        method.optimizer.zero_grad()
        passes.append(backward - sampled)
        updates.append(sampled - start + end - backward)
        losses.append(float(data_loss.detach()))
    return passes, updates, losses


def _quick() -> int:
    """Two runs of a few steps and the report on them, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranks.csv"
        for arm in (CONTROLS[0], OURS[2]):
            append(path, train(Run(arm, 0, steps=6), limit=50))
        for written in write_report(read(path), path):
            if written.suffix == ".md":
                print(written.read_text(encoding="utf-8"))
    print("it works; the numbers mean nothing")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two short runs into a scratch folder")
    parser.add_argument("--runs", type=int, default=1, help="how many of the missing runs to make (default: 1)")
    parser.add_argument("--list", action="store_true", help="say which runs are done")
    parser.add_argument("--report", action="store_true", help="write the report on the runs that are done")
    parser.add_argument("--methods", metavar="M,M", help="names of methods, separated by commas (see --list)")
    parser.add_argument("--seeds", metavar="N,N", help=f"separated by commas (default: {','.join(map(str, SEEDS))})")
    parser.add_argument("--lr", type=float, help="another learning rate than the method's own")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="what is evaluated")
    parser.add_argument("--out", type=Path, default=RESULTS / "ranks.csv", help="CSV file (default: in results/)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
