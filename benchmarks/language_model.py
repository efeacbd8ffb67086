"""A language model learns a dictionary: AdamW against ours, on few entries (five epochs) and on all (one epoch).

    apt install dict-jargon dict-foldoc                # the Jargon File and FOLDOC, 3 MB, in /usr/share/dictd
    python -m benchmarks.language_model --runs 3       # the next runs that benchmarks/results/language_model.csv lacks
    python -m benchmarks.language_model --report       # language_model.md from those that are there; no training

SmolLM2-135M-Instruct (the default of `ivon-lora sft`, obtained by pip), LoRA r=8 on all linear layers, fp32, batches of
8 sequences of at most 32 tokens: "Term: X\\nMeaning:" and the first words of what it means. A hash of the term splits
the Jargon File; "shifted" are entries of FOLDOC. All optimizers have their defaults but for the learning rate, which
the validation split chooses. The sums of the losses of every sequence are kept in language_model.npz, for intervals.
The few entries have the peers of `benchmarks.posterior`, but ivon-opt, Laplace (Jacobians of 49,152 classes) and
ensembles (every seed has its own entries). TS is a softmax temperature of the validation labels.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from benchmarks import ledger
from benchmarks.machine import RESULTS
from benchmarks.tables import markdown
from benchmarks.training import averaged, make_optimizer, train
from ivon_lora import VAdam, fit_temperature
from ivon_lora.cli.sft.model import load_model

BATCH, LENGTH, SAMPLES, IGNORED = 8, 32, 8, -100
DICTIONARIES = Path("/usr/share/dictd")
SIZES = {"validation": 48, "test": 64, "shifted": 32}
#: bed -> training sequences, seeds, and (method, learning rate, steps)
BEDS: dict[str, tuple[int, tuple[int, ...], tuple[tuple[str, float, int], ...]]] = {
    "small": (128, (6, 7, 8), (
        ("vadam", 1e-3, 80), ("adamw", 1e-3, 32), ("adamw", 3e-4, 80), ("swa", 3e-4, 80), ("vadam", 2.5e-3, 80),
    )),
    "full": (1283, (6,), (("vadam", 1e-3, 160), ("adamw", 1e-3, 160), ("adamw", 3e-4, 160))),
}  # fmt: skip
NAMES = {"adamw": "AdamW", "vadam": "ours", "swa": "SWA"}
WEIGHTS = {"samples": f"{SAMPLES} samples", "sure": f"mean as sure as {SAMPLES} samples", "TS": "mean + TS"}


@dataclass(frozen=True)
class Entries:
    """Token ids of sequences, and how many of the first of them are the prompt's."""

    tokens: Sequence[Sequence[int]]
    prompts: Sequence[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, count: int) -> Entries:
        """``count`` entries from the one at ``start``, from the beginning again after the last."""
        indices = [(start + i) % len(self) for i in range(count)]
        return Entries([self.tokens[i] for i in indices], [self.prompts[i] for i in indices])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels`` (-100: prompt or padding), each (batch, longest)."""
        shape = len(indices), max(len(self.tokens[i]) for i in indices)
        ids, mask, labels = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.full(shape, IGNORED)
        for row, i in enumerate(indices):
            n, prompt = len(self.tokens[i]), self.prompts[i]
            ids[row, :n], mask[row, :n] = torch.tensor(self.tokens[i]), 1
            labels[row, prompt:n] = ids[row, prompt:n]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def labels(self) -> np.ndarray[Any, Any]:
        """Number of labels of every sequence."""
        return np.array([len(ids) - prompt for ids, prompt in zip(self.tokens, self.prompts, strict=True)])

    def training_batches(self, size: int, seed: int) -> Iterator[list[int]]:
        """Endless batches, every epoch in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from (part.tolist() for part in torch.randperm(len(self), generator=generator).split(size))


@lru_cache(maxsize=1)
def load_entries() -> dict[str, Entries]:
    """The splits of the Jargon File, and FOLDOC without its terms, each in the order of a hash."""
    tokenizer = load_model()[1]
    jargon, foldoc = (_definitions(DICTIONARIES / f"{name}.dict.dz") for name in ("jargon", "foldoc"))
    rows: dict[str, list[tuple[list[int], int]]] = {name: [] for name in ("train", *SIZES)}
    known = jargon.keys()
    for source, terms in ((jargon, known), (foldoc, foldoc.keys() - known)):
        for term in sorted(terms, key=lambda term: hashlib.sha256(term.encode()).hexdigest()):
            percent = int(hashlib.sha256(term.encode()).hexdigest()[-8:], 16) % 100
            split = "train" if percent < 65 else "validation" if percent < 75 else "test"
            prompt = tokenizer(f"Term: {term}\nMeaning:")["input_ids"]
            ids = (prompt + tokenizer(f" {source[term]}")["input_ids"])[:LENGTH]
            if len(ids) - len(prompt) >= 4:
                rows["shifted" if source is foldoc else split].append((ids, len(prompt)))
    return {name: Entries(*map(list, zip(*found, strict=True))) for name, found in rows.items()}


def _definitions(path: Path) -> dict[str, str]:
    """Term -> meaning in one line, of a dictionary in dictd's format: terms at the margin, meanings indented."""
    found: dict[str, str] = {}
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    for term, body in re.findall(r"^(\S.*)\n((?:(?:[ \t].*)?\n)+)", text, flags=re.MULTILINE):
        meaning = re.sub(r"^(?:(?:\[[^]]*]|<[^>]*>|/[^/]*/|\d+\.)\s*)+", "", " ".join(re.sub("[{}]", "", body).split()))
        if len(meaning.split()) >= 8 and len(term) < 40 and not term.startswith("00-"):
            found.setdefault(term.strip(), meaning)
    return found


def run(key: Mapping[str, Any], sets: Mapping[str, Entries], out: Path) -> list[dict[str, Any]]:
    """Train once; a row for each way to predict, whose losses go into the .npz."""
    torch.manual_seed(key["seed"])
    torch.set_num_threads(1)
    count = BEDS[key["bed"]][0]
    data = sets["train"].part(key["seed"] * count, count)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(load_model()[0], config)
    optimizer = make_optimizer(key["method"], model, key["lr"], num_examples=len(data), seed=key["seed"])
    ours = optimizer if isinstance(optimizer, VAdam) else None
    if ours:
        ours.attach(model)
    average, seconds = AveragedModel(model) if key["method"] == "swa" else None, 0.0
    schedule = "decay" if average is None else "constant"
    options = {"steps": key["steps"], "batch_size": BATCH, "seed": key["seed"], "second_half": schedule}
    for number, step in enumerate(train(model, optimizer, data, own_loss=True, **options), start=1):
        seconds += step.passes + step.optimizer
        if average is not None and number > key["steps"] // 2:
            average.update_parameters(model)
    model = (model if average is None else average.module).eval()
    share = ours.metrics()["data/share"] if ours else None
    rows: list[dict[str, Any]] = []
    validation = sets["validation"].part(0, SIZES["validation"])
    for weights, softmax_temperature in temperatures(model, validation, data, ours).items():
        row = {**key, "weights": weights, "train_cpu_s": seconds, "data_share": share}
        for name, size in SIZES.items():
            part = sets[name].part(0, size)
            found = losses(model, part, ours if weights == "samples" else None, softmax_temperature)
            ledger.keep(out, {array_name(row, name): found})
            row[name] = found.sum() / part.labels().sum()
        rows.append({**row, "nll": row["test"]})
    return rows


def array_name(row: Mapping[str, Any], split: str) -> str:
    """The name of the losses of a run in the archive."""
    return ledger.array_name(*(row[name] for name in ("bed", "method", "lr", "seed", "weights")), split)


def temperatures(model: Any, validation: Entries, data: Entries, posterior: VAdam | None) -> dict[str, float]:
    """Every way to predict, and its softmax temperature: by labels, or as sure as samples of training data."""
    found = {"mean": 1.0, "TS": fit_temperature(*_predictions(model, validation))}
    if posterior is not None:
        part = data.part(0, len(validation))
        average = averaged(lambda: _predictions(model, part)[0], posterior, SAMPLES)
        found |= {"samples": 1.0, "sure": fit_temperature(_predictions(model, part)[0], average)}
    return found


def losses(model: Any, data: Entries, posterior: VAdam | None, softmax_temperature: float) -> np.ndarray[Any, Any]:
    """Sum of the losses of every sequence, nats, (sequences,); of probabilities averaged over samples, if any."""

    def of_labels() -> Tensor:
        return _of_labels(model, data, softmax_temperature)

    p = of_labels() if posterior is None else averaged(of_labels, posterior, SAMPLES)
    found: np.ndarray[Any, Any] = np.array([row.log().neg().sum() for row in p.split(data.labels().tolist())])
    return found


def _predictions(model: Any, data: Entries) -> tuple[Tensor, Tensor]:
    """Probabilities (labels, vocabulary), and the labels (labels,)."""
    logits, labels = zip(*_logits(model, data), strict=True)
    return torch.cat(logits).softmax(-1), torch.cat(labels)


def _of_labels(model: Any, data: Entries, softmax_temperature: float) -> Tensor:
    """The probability of every label (labels,), in double precision."""
    losses = [cross_entropy(z / softmax_temperature, y, reduction="none") for z, y in _logits(model, data)]
    return torch.cat(losses).neg().double().exp()


@torch.no_grad()
def _logits(model: Any, data: Entries) -> Iterator[tuple[Tensor, Tensor]]:
    """Of batch after batch the logits (labels, vocabulary), and the labels (labels,)."""
    for start in range(0, len(data), BATCH):
        batch = data.batch(range(start, min(start + BATCH, len(data))))
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        yield logits[labels != IGNORED], labels[labels != IGNORED]


def page(out: Path) -> str:
    """A table of both beds; the differences are to the AdamW that the validation split chooses."""
    rows, kept, sets, lines = ledger.read(out), np.load(out.with_suffix(".npz")), load_entries(), []
    arm = ["bed", "method", "lr", "steps", "weights"]
    for bed, runs in rows.groupby("bed", sort=False):
        means = runs.groupby(arm, sort=False)[[*SIZES, "data_share"]].mean().reset_index()
        rival = means.loc[means[means.method == "adamw"].validation.idxmin()]
        for _, row in means.iterrows():
            seeds = sorted(set(runs.seed[runs.lr == row.lr]) & set(runs.seed[runs.lr == rival.lr]))
            differences = []
            for name in ("test", "shifted"):
                own, other = (sum(kept[array_name({**r, "seed": s}, name)] for s in seeds) for r in (row, rival))
                differences.append(difference(own - other, sets[name].part(0, SIZES[name]).labels(), len(seeds)))
            share = f"{100 * row.data_share:.0f} %" if row.data_share == row.data_share else ""
            if row[arm].equals(rival[arm]):
                differences = ["0", "0"]
            weights = WEIGHTS.get(row.weights, row.weights)
            facts = [bed, NAMES[row.method], f"{row.lr:g}", row.steps, weights]
            lines.append([*facts, *(f"{row[name]:.3f}" for name in SIZES), *differences, share])
    listed = {f"{name}s": ", ".join(map(str, rows[name].unique())) for name in ("seed", "commit")}
    return HEAD.format(**listed) + markdown(COLUMNS, lines) + "\n"


def difference(sums: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], seeds: int) -> str:
    """Mean difference a label, ± half of its 95 % interval over sequences, whose losses are averaged over seeds."""
    a_label = sums / seeds / labels.mean()
    return f"{a_label.mean():+.3f} ± {1.96 * a_label.std(ddof=1) / len(sums) ** 0.5:.3f}"


COLUMNS = ["bed", "method", "learning rate", "steps", "weights", *SIZES, "test minus AdamW", "shifted", "share of data"]
HEAD = """\
# Language models

Written by `python -m benchmarks.language_model --report` from `language_model.csv` and `.npz`; commits {commits}.

SmolLM2-135M-Instruct, LoRA r=8 on all linear layers, batches of 8 sequences of at most 32 tokens. small: 128 entries of
the Jargon File, 80 steps (5 epochs) or 32; full: 1,283 entries, one epoch. NLL in nats a label
(mean over seeds: {seeds}) on 48 validation, 64 test and 32 shifted sequences (FOLDOC). Differences to the AdamW
run with the least NLL on the validation split, ± half of the 95 % interval over sequences, each averaged over seeds.
Share of data: the likelihood's part of the posterior precision, median weight.

"""


def main() -> int:
    """Run from the command line; returns the exit status."""
    path = RESULTS / "language_model.csv"
    keys = [
        {"bed": bed, "method": method, "lr": lr, "steps": steps, "seed": seed}
        for bed, (_, seeds, arms) in BEDS.items()
        for seed in seeds
        for method, lr, steps in arms
    ]
    return ledger.command("language_model", lambda _: keys, lambda key: run(key, load_entries(), path), page)


if __name__ == "__main__":
    sys.exit(main())
