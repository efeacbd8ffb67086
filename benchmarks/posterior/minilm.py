"""The real bed: LoRA on the upper layers of all-MiniLM-L6-v2 for film reviews, on all training sentences or on 256."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.posterior import oneshot
from benchmarks.posterior.curvature import agreement, binary_fisher
from benchmarks.posterior.features import Split, load_splits, load_upper
from benchmarks.posterior.ledger import Ledger
from benchmarks.posterior.methods import clipped_share, make_optimizer
from benchmarks.posterior.options import parse_options
from benchmarks.posterior.statistics import spearman
from ivon_lora import IVON, find_adapters, posterior_predict
from ivon_lora.finetune.evaluate import merged
from ivon_lora.finetune.methods import SCALING, lora_config
from ivon_lora.finetune.model import wrap
from ivon_lora.finetune.runtime import step_seed
from ivon_lora.finetune.schedule import learning_rate
from ivon_lora.finetune.settings import DEFAULT_MODEL, make_settings
from ivon_lora.posterior.metrics import score_probabilities

Splits = Mapping[str, Split]

RANK, BATCH = 8, 32
SAMPLES = 8


@dataclass(frozen=True)
class Task:
    """Training sentences (0: all 7117) and steps."""

    sentences: int
    steps: int


TASKS = {"full": Task(0, 100), "over": Task(256, 64)}


@dataclass(frozen=True)
class Sizes:
    """Sentences to evaluate on: at the mean, over samples (test, shifted), for the Fisher, after cutting ranks."""

    train: int = 7117
    validation: int = 500
    test: int = 1000
    shifted: int = 500
    sampled: tuple[int, int] = (1000, 150)
    fisher: int = 96
    pruned: int = 300


QUICK_SIZES = Sizes(train=128, validation=20, test=20, shifted=10, sampled=(4, 4), fisher=4, pruned=4)


@dataclass(frozen=True)
class Run:
    """One training run; the fields are the key of its row.

    Args:
        task: of `TASKS`.
        method: of `methods.METHODS`.
        lr: peak learning rate.
        seed: of adapter, head, batches, dropout and posterior noise.
        split: "validation", or "test" (and the shifted test set).
        options: further arguments of the optimizer, as in "temperature=0.01 beta2=0.99"; "" for the defaults.
        steps: 0 for those of the task.
    """

    task: str
    method: str
    lr: float
    seed: int
    split: str = "test"
    options: str = ""
    steps: int = 0


SCORES = ("accuracy", "nll", "ece", "brier")
#: what is scored: at the mean, at the mean of the sentences that samples are averaged on, and averaged over samples
SETS = ("validation", "test", "shifted", "test_part", "test_sampled", "shifted_part", "shifted_sampled")
CURVATURE = ("spearman", "ceiling", "within", "within_ceiling", "variance_ratio", "scale")
RESULTS = (
    *(f"{name}_{metric}" for name in SETS for metric in SCORES),
    *("train_loss", "clipped", "step_rms", "sigma_1", "sigma_50", "sigma_99", "snr_like_magnitude"),
    *CURVATURE,
)


def ledger(folder: Path) -> Ledger:
    """The file of the runs of this bed."""
    return Ledger(folder / "posterior_minilm.csv", tuple(Run.__dataclass_fields__), RESULTS)


@lru_cache(maxsize=2)
def load_bed(sizes: Sizes) -> Splits:
    """The film reviews, and shop reviews as shifted test set."""
    counts = {"train": sizes.train, "validation": max(sizes.validation, sizes.fisher), "test": sizes.test}
    return load_splits({**counts, "shifted": sizes.shifted})


@dataclass
class Trained:
    """A model and its optimizer after training, and what was seen on the way."""

    model: Any
    optimizer: torch.optim.Optimizer
    params: list[Tensor]
    facts: dict[str, float]


def fresh_adapter(seed: int, encoder: str = DEFAULT_MODEL, rank: int = RANK, alpha: int = SCALING * RANK) -> Any:
    """LoRA on the upper layers of an encoder, and its head, before training."""
    base = load_upper(seed, encoder)
    config = lora_config(base, rank)
    config.lora_alpha = alpha
    return wrap(base, config, seed)


def train(run: Run, bed: Splits, model: Any = None) -> Trained:
    """Train as the run says, on one thread, in fp32: ``model``, or LoRA on MiniLM."""
    torch.set_num_threads(1)
    task = TASKS[run.task]
    data = bed["train"] if not task.sentences else bed["train"].first(task.sentences)
    steps = run.steps or task.steps
    settings = make_settings(
        {"optimizer": "adamw", "rank": RANK, "lr": run.lr, "steps": steps, "seed": run.seed, "batch_size": BATCH}
    )
    if model is None:
        model = fresh_adapter(run.seed)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(
        run.method,
        params,
        run.lr,
        num_examples=len(data),
        batch_size=BATCH,
        seed=run.seed,
        **parse_options(run.options),
    )
    peak = float(optimizer.param_groups[0]["lr"]) if run.method == "ours" else run.lr  # it may have lowered it
    order = data.order(BATCH, run.seed)
    losses, clipped, rms = [], [], []
    looks = {max(1, round(steps * share)) for share in (0.25, 0.5, 0.75)} | {steps}
    for step in range(1, steps + 1):
        torch.manual_seed(step_seed(run.seed, step))
        lr = learning_rate(settings, step, peak)
        for group in optimizer.param_groups:
            group["lr"] = lr if run.method != "published" else lr / group["clip_radius"]
        before = [p.detach().clone() for p in params] if step in looks else []
        model.train()
        if isinstance(optimizer, IVON):
            optimizer.train()
        indices = order.batch(step - 1)
        loss = torch.nn.functional.cross_entropy(model(**data.pad(indices)).logits, data.targets(indices))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if before:
            clipped.append(clipped_share(optimizer))
            rms.append(_rms([p.detach() - old for p, old in zip(params, before, strict=True)]) / lr)
    facts = {
        "train_loss": float(np.mean(losses[-25:])),
        "clipped": float(np.mean(clipped)),
        "step_rms": float(np.mean(rms)),
    }
    return Trained(model, optimizer, params, facts)


def measure(run: Run, trained: Trained, bed: Splits, sizes: Sizes, samples: bool, fisher: bool) -> dict[str, float]:
    """Every result of the run: scores at the mean and averaged over samples, and the posterior's curvature."""
    found = dict(trained.facts)
    if run.split == "validation":
        found |= scores("validation", at_mean(trained, bed["validation"].first(sizes.validation)), bed["validation"])
    else:
        for name, data, limit, part in (
            ("test", bed["test"], sizes.test, sizes.sampled[0]),
            ("shifted", bed["shifted"], sizes.shifted, sizes.sampled[1]),
        ):
            mean = at_mean(trained, data.first(limit))
            found |= scores(name, mean, data)
            if samples and isinstance(trained.optimizer, IVON):
                found |= scores(f"{name}_part", mean[:part], data)
                found |= scores(f"{name}_sampled", _averaged(trained, data.first(part)), data)
    if isinstance(trained.optimizer, IVON):
        found |= posterior_facts(trained.model, trained.optimizer, trained.params)
        if fisher:
            found |= fisher_facts(trained, bed["validation"], sizes.fisher)
    return found


def execute(run: Run, folder: Path, sizes: Sizes, samples: bool, fisher: bool, prune: bool) -> bool:
    """Make a run and write its row, unless the row is there; says whether it was made.

    Args:
        samples: also average predictions over posterior samples.
        fisher: also compare the learned precision with the Fisher information.
        prune: also prune the trained adapter at one stroke, in rows of a file of its own.
    """
    book = ledger(folder)
    if book.has(asdict(run)):
        return False
    started = time.monotonic()
    bed = load_bed(sizes)
    trained = train(run, bed)
    found = measure(run, trained, bed, sizes, samples, fisher)
    if prune:
        prune_at_once(run, trained, bed, folder, sizes.pruned)
    book.append(asdict(run), found, time.monotonic() - started)
    return True


def prune_at_once(run: Run, trained: Trained, bed: Splits, folder: Path, count: int) -> None:
    """Cut the trained adapter to smaller budgets by each criterion, without further training, and score the mean."""
    assert isinstance(trained.optimizer, IVON)
    data = bed["test"].first(count)
    for cut in oneshot.cuts(trained.model, trained.optimizer, run.seed):
        started = time.monotonic()
        key = {**asdict(run), "criterion": cut.criterion, "kept": cut.kept}
        with cut.applied():
            found = scores("test", at_mean(trained, data), bed["test"])
        oneshot.ledger(folder).append(key, found, time.monotonic() - started)


def posterior_facts(model: Any, optimizer: IVON, params: list[Tensor]) -> dict[str, float]:
    """Quantiles of sigma over all elements, and how alike the SNR and the magnitude order the ranks."""
    sigma = torch.cat([optimizer.posterior(p).stddev.flatten() for p in params]).double().numpy()
    quantiles = np.quantile(sigma, (0.01, 0.5, 0.99))
    adapters = find_adapters(model)
    by_snr, by_magnitude = (oneshot.rank_scores(adapters, optimizer, name) for name in ("snr_abs", "magnitude"))
    names = ("sigma_1", "sigma_50", "sigma_99")
    return dict(zip(names, map(float, quantiles), strict=True)) | {
        "snr_like_magnitude": spearman(by_snr.double().numpy(), by_magnitude.double().numpy())
    }


def fisher_facts(trained: Trained, data: Split, count: int) -> dict[str, float]:
    """Agreement of the learned precision with the Fisher information on ``count`` sentences of ``data``."""
    optimizer = trained.optimizer
    assert isinstance(optimizer, IVON)
    optimizer.eval()
    trained.model.eval()

    def logits(i: int) -> Tensor:
        return trained.model(**data.pad([i])).logits[0]

    halves = [binary_fisher(trained.params, logits, range(start, count, 2)) for start in (0, 1)]
    return asdict(agreement(optimizer, trained.params, (halves[0], halves[1])))


def predict(model: Any, data: Split) -> Tensor:
    """Logits (sentences, 2) in double precision, in the order of ``data``, with dropout off."""
    model.eval()
    logits = torch.empty(len(data), 2, dtype=torch.float64)
    with torch.no_grad(), merged(model, torch.device("cpu")):
        for indices in data.batches(64):
            logits[indices] = model(**data.pad(indices)).logits.double()
    return logits


def at_mean(trained: Trained, data: Split) -> Tensor:
    """Probabilities (sentences, 2) at the mean of the posterior, or of a method without one."""
    if isinstance(trained.optimizer, IVON):
        trained.optimizer.eval()
    return predict(trained.model, data).softmax(-1)


def _averaged(trained: Trained, data: Split) -> Tensor:
    assert isinstance(trained.optimizer, IVON)
    return posterior_predict(trained.model, trained.optimizer, lambda model: predict(model, data), n_samples=SAMPLES)


def scores(name: str, probabilities: Tensor, data: Split) -> dict[str, float]:
    """`SCORES` of predictions (n, 2) for the first n sentences of ``data``, in columns of the set ``name``."""
    found = score_probabilities(probabilities, torch.tensor(data.labels[: len(probabilities)]))
    values: Mapping[str, float] = asdict(found)
    return {f"{name}_{metric}": values[metric] for metric in SCORES}


def _rms(tensors: list[Tensor]) -> float:
    total = sum(float(t.double().square().sum()) for t in tensors)
    return (total / sum(t.numel() for t in tensors)) ** 0.5
