"""How many posterior samples does a prediction need? The adapter's scores over the number averaged."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.posterior import minilm
from benchmarks.posterior.features import Split
from benchmarks.posterior.ledger import Ledger
from ivon_lora import IVON

SETS = ("test", "shifted")
#: numbers of samples whose averages are scored; 0 is the mean of the posterior
COUNTS = (0, 1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Run:
    """A trained adapter, and the number of samples averaged; the fields are the key of a row.

    Args:
        task: of `minilm.TASKS`.
        lr: peak learning rate, of our defaults.
        seed: as in `minilm.Run`.
        samples: the largest number; smaller ones of `COUNTS` get rows, too.
        steps: 0 for those of the task.
    """

    task: str
    lr: float
    seed: int
    samples: int = COUNTS[-1]
    steps: int = 0


def ledger(folder: Path) -> Ledger:
    """The file of these scores."""
    results = tuple(f"{name}_{metric}" for name in SETS for metric in minilm.SCORES)
    return Ledger(folder / "posterior_samples.csv", tuple(Run.__dataclass_fields__), results)


def execute(run: Run, folder: Path, sizes: minilm.Sizes) -> bool:
    """Train, score and write the rows, unless they are there; says whether it was done."""
    book = ledger(folder)
    if book.has(asdict(run)):
        return False
    started = time.monotonic()
    bed = minilm.load_bed(sizes)
    trained = minilm.train(minilm.Run(run.task, "ours", run.lr, run.seed, steps=run.steps), bed)
    counts = [count for count in COUNTS if count <= run.samples]
    found: dict[int, dict[str, float]] = {count: {} for count in counts}
    for name, limit in zip(SETS, (sizes.test, sizes.shifted), strict=True):
        data = bed[name].first(limit)
        for count, probabilities in averages(trained, data, counts):
            found[count] |= minilm.scores(name, probabilities, data)
    for count, scores in found.items():  # the largest, which says that all are there, is the last
        book.append(asdict(replace(run, samples=count)), scores, time.monotonic() - started)
    return True


def averages(trained: minilm.Trained, data: Split, counts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Probabilities (sentences, 2) averaged over as many samples as each of ``counts`` says (0: at the mean)."""
    optimizer = trained.optimizer
    assert isinstance(optimizer, IVON)
    if 0 in counts:
        yield 0, minilm.at_mean(trained, data)
    total = torch.zeros(len(data), 2, dtype=torch.float64)
    for count in range(1, max(counts) + 1):
        with optimizer.sampled_params():
            total += minilm.predict(trained.model, data).softmax(-1)
        if count in counts:
            yield count, total / count
