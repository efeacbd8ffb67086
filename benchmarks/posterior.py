"""What is the posterior worth? AdamW with what practitioners add to it, two peers and ours, on few and many sentences.

    python -m benchmarks.posterior --runs 2    # the next two runs that benchmarks/results/posterior_runs.csv lacks
    python -m benchmarks.posterior --report    # posterior_runs.md from those that are there; no training

The bed of sections 3 to 6 of results/posterior.md: LoRA (r = 8) on the last two of all-MiniLM-L6-v2's six layers and a
head, film-review sentences of at most 32 tokens, fp32, batches of 32. "full": 100 steps on all 7117 sentences;
"small": 64 steps on 256 of them (8 epochs). 1000 film-review sentences test, 500 shop reviews are "shifted"; 500
sentences validate: they choose AdamW's learning rate, stop it early, and set the softmax temperature (TS). The frozen
layers below run once, so that a run costs a third. Predictions are kept in posterior_runs.npz, to be combined.
Laplace's approximation is that of laplace-torch 0.3, which is to be installed for it.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig
from scipy import stats
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from benchmarks import ledger
from benchmarks.data import ALPHA_OVER_RANK, Sentences, adapt, load_base, load_sentences
from benchmarks.machine import RESULTS
from benchmarks.tables import markdown
from benchmarks.training import averaged, make_optimizer, predict, scores, train
from ivon_lora import VAdam, fit_temperature, posterior_predict
from ivon_lora.posterior.metrics import nll
from ivon_lora.posterior.softmax_temperature import soften

RANK, BATCH, UPPER, SAMPLES, EVERY, TRAINED = 8, 32, 2, 8, 4, 256
FISHER_SAMPLES = 32  # with 8 the correlation is .05 lower, for want of samples
SIZES = {"train": 7117, "validation": 500, "test": 1000, "shifted": 500}
#: task -> training sentences (None: all), steps, seeds, and the learning rates of every method
TASKS: dict[str, tuple[int | None, int, tuple[int, ...], dict[str, tuple[float, ...]]]] = {
    "small": (256, 64, (6, 7, 8, 9, 10), {
        "vadam": (3e-3,), "adamw": (5e-4, 1e-3, 3e-3), "early": (1e-3,), "swa": (1e-3,), "laplace": (5e-4,),
        "ivon-opt": (3e-4,),
    }),
    "full": (None, 100, (6, 7, 8), {
        "vadam": (3e-3,), "adamw": (3e-3,), "early": (3e-3,), "swa": (3e-3,), "laplace": (3e-3,),
        "ivon-opt": (1e-3,),
    }),
}  # fmt: skip
LABELLED = ("validation", "test", "shifted")
EVALUATED = (*LABELLED, "train")  # 256 of the training sentences: for the temperature that needs no others
Predictions = dict[str, Tensor]  # of every set, probabilities (sentences, classes)


def run(key: Mapping[str, Any], bed: Mapping[str, Sentences], out: Path) -> list[dict[str, Any]]:
    """Train once, keep what every kind of weights predicts; a row with the test scores of each."""
    torch.set_num_threads(1)
    task, method, lr, seed = (key[name] for name in ("task", "method", "lr", "seed"))
    data = bed["train"].first(TASKS[task][0] or len(bed["train"]))
    sets = {**{name: bed[name] for name in LABELLED}, "train": data.first(TRAINED)}
    model = make_model(seed)
    options = {"num_examples": len(data), "batch_size": BATCH, "seed": seed}
    optimizer: Any = make_optimizer(method, model, lr, **options)
    average, best, seconds = AveragedModel(model), (math.inf, model), 0.0
    schedule = "constant" if method == "swa" else "decay"
    steps = train(model, optimizer, data, steps=key["steps"], batch_size=BATCH, seed=seed, second_half=schedule)
    for number, step in enumerate(steps, start=1):
        seconds += step.passes + step.optimizer
        if method == "swa" and number > key["steps"] // 2:
            average.update_parameters(model)
        if method == "early" and number % EVERY == 0:
            loss = nll(predict(model, bed["validation"]).softmax(-1), torch.tensor(bed["validation"].labels))
            best = min(best, (loss, copy.deepcopy(model)), key=lambda pair: pair[0])
            model.train()
    model = {"swa": average.module, "early": best[1]}.get(method, model)
    found = {"mean": {name: predict(model, part).softmax(-1) for name, part in sets.items()}}
    if method == "laplace":
        found["linearised"] = linearised(model, data, sets)
    elif isinstance(optimizer, VAdam):
        found["samples"] = {
            name: posterior_predict(model, optimizer, lambda m, d=part: predict(m, d), SAMPLES)  # type: ignore[misc]
            for name, part in sets.items()
        }
    elif method == "ivon-opt":
        found["samples"] = {
            name: averaged(lambda d=part: predict(model, d).softmax(-1), optimizer, SAMPLES)  # type: ignore[misc]
            for name, part in sets.items()
        }
    for weights, predictions in found.items():
        keep(out, (task, method, lr, seed, weights), predictions)
    facts: dict[str, Any] = {"seconds": seconds}
    if isinstance(optimizer, VAdam):
        correlations = fisher_correlations(model, optimizer, bed["validation"].first(100))
        facts |= {"share": optimizer.metrics()["data/share"], **correlations}
    return [
        {**key, "weights": weights, **facts, **scores(predictions["test"], bed["test"])}
        for weights, predictions in found.items()
    ]


def fisher_correlations(model: Any, optimizer: VAdam, data: Sentences) -> dict[str, float]:
    """Spearman's correlation of the adapters' curvature with their true Fisher: at the mean, and over samples.

    VAdam's curvature is an average over the posterior. The true Fisher is of labels that the model itself gives: with
    two classes p (1 - p) times the square of the gradient of their log odds.
    """
    params = [p for name, p in model.named_parameters() if "lora_" in name]

    def fisher() -> Tensor:
        found = torch.zeros(())
        for i in range(len(data)):
            log_odds = model(**data.inputs([i])).logits[0].diff()
            grads = torch.cat([g.flatten() for g in torch.autograd.grad(log_odds, params)])
            found = found + log_odds.detach().sigmoid() * (-log_odds.detach()).sigmoid() * grads.square()
        return found

    found = {"fisher_mean": fisher(), "fisher_samples": averaged(fisher, optimizer, FISHER_SAMPLES)}
    curvature = torch.cat([optimizer.state[p]["hess"].flatten() for p in params])
    return {name: float(stats.spearmanr(curvature, x).statistic) for name, x in found.items()}


def make_model(seed: int) -> Any:
    """The upper layers with LoRA and a head."""
    base = load_base(seed=seed)
    base.encoder = UpperLayers(base.encoder)
    return adapt(base, LoraConfig, seed, r=RANK, lora_alpha=ALPHA_OVER_RANK * RANK)


def linearised(model: Any, train: Sentences, sets: Mapping[str, Sentences]) -> Predictions:
    """Probabilities under a diagonal Laplace approximation of all that was trained, its prior by the evidence."""
    from laplace import Laplace

    batches: Any = DataLoader(range(len(train)), 2, collate_fn=train.batch)  # type: ignore[arg-type]
    laplace = Laplace(Logits(model).eval(), "classification", subset_of_weights="all", hessian_structure="diag")
    laplace.fit(batches)
    laplace.optimize_prior_precision(method="marglik")
    found = {}
    for name, data in sets.items():
        found[name] = torch.zeros(len(data), 2)
        for indices in data.batches(2):  # each costs the square of its size
            found[name][indices] = laplace(data.batch(indices), pred_type="glm", link_approx="probit")
    return found


class Logits(nn.Module):
    """A classifier as laplace-torch wants it: a batch with its labels in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(batch, classes)."""
        logits: Tensor = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits


class UpperLayers(nn.Module):
    """The last layers of a BERT encoder, from the hidden states that enter them."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.config = encoder.config
        self.layer = nn.ModuleList(list(encoder.encoder.layer)[-UPPER:])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Hidden states (batch, tokens, hidden) to ``last_hidden_state`` of the same shape."""
        hidden = input_ids
        bias = (1 - attention_mask[:, None, None, :].to(hidden)) * torch.finfo(hidden.dtype).min
        for layer in self.layer:
            hidden = layer(hidden, bias)
        return SimpleNamespace(last_hidden_state=hidden)


@lru_cache(maxsize=1)
def load_bed(sizes: tuple[tuple[str, int], ...]) -> dict[str, Sentences]:
    """Of every split so many sentences, as the fp16 hidden states that enter the upper layers: half a minute."""
    encoder = load_base().eval().encoder
    return {name: upper_states(encoder, load_sentences(name, count)) for name, count in sizes}


@torch.no_grad()
def upper_states(encoder: Any, data: Sentences) -> Sentences:
    """Sentences as the fp16 hidden states that enter the upper layers."""
    found = list(data.tokens)
    for indices in data.batches(64):
        states = encoder(**data.inputs(indices), output_hidden_states=True).hidden_states[-1 - UPPER]
        for row, i in enumerate(indices):
            found[i] = states[row, : len(data.tokens[i])].half()
    return Sentences(found, data.labels)


def keep(out: Path, run: tuple[object, ...], predictions: Predictions) -> None:
    """Add the logits of class 1 (fp32) of a run to the archive beside the CSV file."""
    logits = {name: p.double().logit()[:, 1].clamp(-30, 30).float().numpy() for name, p in predictions.items()}
    ledger.keep(out, {ledger.array_name(*run, name): values for name, values in logits.items()})


class Archive:
    """The predictions that `keep` kept, and the labels."""

    def __init__(self, out: Path, labels: Mapping[str, Tensor]) -> None:
        self.kept = dict(np.load(out.with_suffix(".npz")))
        self.labels = labels

    def of(self, task: str, method: str, lr: float, seed: int, weights: str = "mean") -> Predictions:
        """The probabilities of a run."""
        logits = {name: self.kept[ledger.array_name(task, method, lr, seed, weights, name)] for name in EVALUATED}
        return {name: torch.from_numpy(np.stack([0 * z, z], -1)).double().softmax(-1) for name, z in logits.items()}

    def scaled(self, predictions: Predictions) -> Predictions:
        """With the softmax temperature of the validation labels."""
        t = fit_temperature(predictions["validation"], self.labels["validation"])
        return {name: soften(p, t) for name, p in predictions.items()}

    def as_sure_as(self, predictions: Predictions, others: Predictions) -> Predictions:
        """With the softmax temperature at which they are as sure of the training sentences as others are."""
        t = fit_temperature(predictions["train"], others["train"])
        return {name: soften(p, t) for name, p in predictions.items()}

    def best(self, candidates: Sequence[Predictions]) -> Predictions:
        """That with the least NLL of validation labels."""
        return min(candidates, key=lambda predictions: nll(predictions["validation"], self.labels["validation"]))


def mixed(members: Sequence[Predictions]) -> Predictions:
    """The mean of their probabilities."""
    return {name: sum((m[name] for m in members[1:]), members[0][name]) / len(members) for name in EVALUATED}


def rivals(task: str, seed: int, archive: Archive) -> dict[tuple[str, str, str], Predictions]:
    """(method, passes, what labels choose) -> predictions; of three: this seed and the next two, in turn."""
    seeds, rates = TASKS[task][2:]
    three = [seeds[(seeds.index(seed) + k) % len(seeds)] for k in range(3)]

    def runs(method: str, seed: int, weights: str = "mean") -> list[Predictions]:
        return [archive.of(task, method, lr, seed, weights) for lr in rates[method]]

    def best_adamw(seed: int) -> Predictions:
        return archive.best([archive.scaled(run) for run in runs("adamw", seed)])

    def one(method: str, weights: str = "mean", seed: int = seed) -> Predictions:
        return runs(method, seed, weights)[0]

    def sure(method: str) -> Predictions:
        return archive.as_sure_as(one(method), one(method, "samples"))

    ways: dict[tuple[str, str, str], Callable[[], Predictions]] = {
        ("AdamW at our learning rate", "1", ""): lambda: runs("adamw", seed)[-1],
        ("AdamW", "1", "lr"): lambda: archive.best(runs("adamw", seed)),
        (BASE, "1", "lr, TS"): lambda: best_adamw(seed),
        ("AdamW stopped early + TS", "1", "lr, stop, TS"): lambda: archive.scaled(one("early")),
        ("SWA + TS", "1", "lr, TS"): lambda: archive.scaled(one("swa")),
        ("Laplace", "3", "lr"): lambda: one("laplace", "linearised"),
        ("Laplace + TS", "3", "lr, TS"): lambda: archive.scaled(one("laplace", "linearised")),
        ("ivon-opt, 8 samples", "8", "lr"): lambda: one("ivon-opt", "samples"),
        ("ivon-opt, 8 samples + TS", "8", "lr, TS"): lambda: archive.scaled(one("ivon-opt", "samples")),
        ("3 AdamW + TS", "3", "lr, TS"): lambda: archive.scaled(mixed([best_adamw(s) for s in three])),
        ("ours, mean", "1", ""): lambda: one("vadam"),
        ("ours, 8 samples", "8", ""): lambda: one("vadam", "samples"),
        ("ours, mean as sure as 8 samples", "1", ""): lambda: sure("vadam"),
        ("ours + TS", "1", "TS"): lambda: archive.scaled(one("vadam")),
        ("ours, 8 samples + TS", "8", "TS"): lambda: archive.scaled(one("vadam", "samples")),
        ("3 of ours + TS", "3", "TS"): lambda: archive.scaled(mixed([one("vadam", seed=s) for s in three])),
    }
    found = {}
    for how, make in ways.items():
        with suppress(KeyError):  # a run that is not made yet
            found[how] = make()
    return found


BASE = "AdamW + TS"
FACTS = {"share": "data's part", "fisher_mean": "correlation, mean", "fisher_samples": "correlation, samples"}
COLUMNS = ["task", "method", "training runs, passes", "labels choose", "accuracy", "NLL", "SD of it", "ECE"]
COLUMNS += ["shifted accuracy", "shifted NLL", f"NLL minus {BASE}", "shifted", "minus 3 AdamW + TS", "shifted"]


def page(out: Path) -> str:
    """One table of all methods; differences are paired by seed."""
    labels = {name: torch.tensor(load_sentences(name, SIZES[name]).labels) for name in LABELLED}
    data = {name: Sentences([], labels[name].tolist()) for name in LABELLED}
    archive, rows = Archive(out, labels), []
    for task, (_, _, seeds, _) in TASKS.items():
        if not any(key.startswith(f"{task} ") for key in archive.kept):
            continue
        frame = pd.DataFrame(
            {"how": how, "seed": seed, "set": name, **scores(predictions[name], data[name])}
            for seed in seeds
            for how, predictions in rivals(task, seed, archive).items()
            for name in ("test", "shifted")
        )
        frame["method"] = [how[0] for how in frame.how]
        test, shifted = (frame[frame.set == name] for name in ("test", "shifted"))
        against = [
            ledger.paired(part, "nll", "method", rival) for rival in (BASE, f"3 {BASE}") for part in (test, shifted)
        ]
        for (method, passes, needs), part in test.groupby("how", sort=False):
            other = shifted[shifted.method == method]
            differences = [
                ledger.show(found[method], sign=True) if method in found else "0" if found else "" for found in against
            ]
            numbers = [part.accuracy.mean(), part.nll.mean(), part.nll.std(), part.ece.mean()]
            numbers += [other.accuracy.mean(), other.nll.mean()]
            runs = "3" if method.startswith("3") else "1"
            rows.append([task, method, f"{runs}, {passes}", needs or "-", *map("{:.4f}".format, numbers), *differences])
    runs = ledger.read(out)
    commits, ours = ", ".join(runs.commit.unique()), runs[(runs.method == "vadam") & (runs.weights == "mean")]
    facts = [[task, *(ledger.show(part[name]) for name in FACTS)] for task, part in ours.groupby("task", sort=False)]
    return (
        "# What is the posterior worth?\n\nWritten by `python -m benchmarks.posterior --report` from "
        f"`posterior_runs.csv` and `.npz`; commits {commits}. Means over seeds; differences ± half of "
        "their 95 % interval (Student's t), paired by seed. TS: one softmax temperature of 500 validation labels. "
        "Passes are forward passes at prediction.\n\n"
        f"{markdown(COLUMNS, rows)}\n\nThe data's part of the precision, median weight; Spearman's correlation of the "
        f"adapters' curvature with their true Fisher, at the mean and averaged over {FISHER_SAMPLES} samples:\n\n"
        f"{markdown(['task', *FACTS.values()], facts)}\n"
    )


def main() -> int:
    """Run from the command line; returns the exit status."""
    keys = [
        {"task": task, "method": method, "lr": lr, "seed": seed, "steps": steps}
        for task, (_, steps, seeds, methods) in TASKS.items()
        for seed in seeds
        for method, rates in methods.items()
        for lr in rates
    ]
    path, bed = RESULTS / "posterior_runs.csv", tuple(SIZES.items())
    return ledger.command("posterior_runs", lambda _: keys, lambda key: run(key, load_bed(bed), path), page)


if __name__ == "__main__":
    sys.exit(main())
