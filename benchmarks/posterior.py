"""Do averaged predictions help? AdamW against ours at the mean and averaged over samples, on few and on many sentences.

    python -m benchmarks.posterior --runs 2      # the next two runs that benchmarks/results/posterior_runs.csv lacks
    python -m benchmarks.posterior --report      # posterior_runs.md from that file; no training
    python -m benchmarks.posterior --quick       # short runs into a scratch folder: does it work?

results/posterior.md has what a larger study found at commit 273d074; this is the bed of its sections 3 to 6: LoRA
(r = 8) on the last two of all-MiniLM-L6-v2's six layers and a head, film-review sentences of at most 32 tokens, fp32,
batches of 32. "full": 100 steps on all 7117 sentences; "small": 64 steps on 256 of them (8 epochs). Evaluated on 1000
film-review sentences and 500 shop reviews ("shifted"). A trained posterior is also cut to a third of its ranks, by the
signal-to-noise ratio and by the magnitude. The frozen layers below run once, so that a run costs a third.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks import ledger
from benchmarks.data import ALPHA_OVER_RANK, Sentences, adapt, load_base, load_sentences
from benchmarks.machine import RESULTS
from benchmarks.training import METRICS, predict, scores, train
from ivon_lora import IVON, VAdam, find_adapters, posterior_predict

RANK, BATCH, UPPER, SAMPLES, SEEDS = 8, 32, 2, 8, (1, 2, 3, 4, 5)
SIZES = {"train": 7117, "test": 1000, "shifted": 500}
#: task -> training sentences (None: all), steps, and the (method, learning rate) that are compared
TASKS: dict[str, tuple[int | None, int, tuple[tuple[str, float], ...]]] = {
    "full": (None, 100, (("adamw", 3e-3), ("vadam", 3e-3))),
    "small": (256, 64, (("adamw", 3e-3), ("adamw", 5e-4), ("vadam", 3e-3))),  # 5e-4: AdamW's best here
}
CRITERIA = ("snr_abs", "magnitude")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.posterior", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short runs into a scratch folder")
    parser.add_argument("--runs", type=int, default=1, help="how many of the missing runs to make (default: 1)")
    parser.add_argument("--report", action="store_true", help="write the report on the runs that are done")
    parser.add_argument("--tasks", default=",".join(TASKS), help="separated by commas (default: %(default)s)")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="separated by commas (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "posterior_runs.csv", help="CSV file (default: in results/)"
    )
    options = parser.parse_args(argv)
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            return quick(Path(folder) / "posterior_runs.csv")
    if options.report:
        path = options.out.with_suffix(".md")
        path.write_text(page(ledger.read(options.out)), encoding="utf-8")
        print(f"written: {path}")
        return 0
    if set(options.tasks.split(",")) - set(TASKS):
        parser.error(f"--tasks: must be of {', '.join(TASKS)}, got {options.tasks}")
    keys = [
        {"task": task, "method": method, "lr": lr, "seed": int(seed), "steps": TASKS[task][1]}
        for seed in options.seeds.split(",")
        for task in options.tasks.split(",")
        for method, lr in TASKS[task][2]
    ]
    ledger.resume(options.out, keys, lambda key: run(key, load_bed(tuple(SIZES.items()))), options.runs)
    return 0


def run(key: Mapping[str, Any], bed: Mapping[str, Sentences]) -> list[dict[str, Any]]:
    """Train once and score every kind of weights on both test sets: one row each."""
    torch.set_num_threads(1)
    data = bed["train"].first(TASKS[key["task"]][0] or len(bed["train"]))
    base = load_base(seed=key["seed"])
    base.encoder = UpperLayers(base.encoder)
    model = adapt(base, LoraConfig, key["seed"], r=RANK, lora_alpha=ALPHA_OVER_RANK * RANK)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if key["method"] == "adamw":
        optimizer = torch.optim.AdamW([p for _, p in named], lr=key["lr"], weight_decay=0.0)
    else:
        optimizer = VAdam(named, lr=key["lr"], num_examples=len(data), batch_size=BATCH, seed=key["seed"])
    for _ in train(model, optimizer, data, steps=key["steps"], batch_size=BATCH, seed=key["seed"]):
        pass
    rows = []
    for name in ("test", "shifted"):
        for weights, probabilities in predictions(model, optimizer, bed[name]):
            rows.append({**key, "weights": weights, "set": name, **scores(probabilities, bed[name])})
    return rows


def predictions(model: Any, optimizer: torch.optim.Optimizer, data: Sentences) -> Iterator[tuple[str, Tensor]]:
    """Class probabilities at the mean; of a posterior also averaged over samples, and with a third of the ranks."""
    yield "mean", predict(model, data).softmax(-1)
    if not isinstance(optimizer, IVON):
        return
    averaged = posterior_predict(model, optimizer, lambda sampled: predict(sampled, data), n_samples=SAMPLES)
    yield f"{SAMPLES} samples", averaged
    for criterion in CRITERIA:
        with best_third(model, optimizer, criterion):
            yield f"third by {criterion}", predict(model, data).softmax(-1)


@contextmanager
def best_third(model: Any, optimizer: IVON, criterion: str) -> Iterator[None]:
    """All but the best third of the ranks are zero inside, and as before after."""
    adapters = find_adapters(model)
    ranks = []  # of every adapter the scores of its ranks: mean over each tensor, summed
    for adapter in adapters:
        parts = [optimizer.snr(p, criterion).movedim(dim, 0).flatten(1).mean(1) for _, p, dim in adapter.tensors()]
        ranks.append(torch.stack(parts).sum(0))
    kept = torch.cat(ranks).argsort(descending=True, stable=True)[: round(sum(map(len, ranks)) / 3)]
    mask = torch.zeros(sum(map(len, ranks))).index_fill(0, kept, 1.0)
    saved = [adapter.B.detach().clone() for adapter in adapters]
    try:
        with torch.no_grad():
            for adapter, part in zip(adapters, mask.split(list(map(len, ranks))), strict=True):
                adapter.B.mul_(part)
        yield
    finally:
        with torch.no_grad():
            for adapter, before in zip(adapters, saved, strict=True):
                adapter.B.copy_(before)


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
@torch.no_grad()
def load_bed(sizes: tuple[tuple[str, int], ...]) -> dict[str, Sentences]:
    """Of every split so many sentences, as the fp16 hidden states that enter the upper layers: half a minute."""
    encoder: Any = load_base().eval().encoder
    bed = {}
    for name, count in sizes:
        data = load_sentences(name, count)
        found = list(data.tokens)
        for indices in data.batches(64):
            batch = data.batch(indices)
            del batch["labels"]
            states = encoder(**batch, output_hidden_states=True).hidden_states[-1 - UPPER]
            for row, i in enumerate(indices):
                found[i] = states[row, : len(data.tokens[i])].half()
        bed[name] = Sentences(found, data.labels)
    return bed


def page(rows: pd.DataFrame) -> str:
    """One table: the means of every kind of weights, and the differences that matter, paired by seed."""
    rows = rows.assign(arm=rows.method + " " + rows.lr.map("{:g}".format) + ", " + rows.weights)
    lines = []
    for (task, name), part in rows.groupby(["task", "set"], sort=False):
        for arm, group in part.groupby("arm", sort=False):
            lines.append([task, name, arm, len(group), *(ledger.show(group[metric]) for metric in METRICS[:3])])
        for reference in part.arm.unique():
            differences = {metric: ledger.paired(part, metric, "arm", reference) for metric in METRICS[:3]}
            for arm in filter(lambda arm: is_compared(arm, reference), differences["nll"]):
                cells = [ledger.show(differences[metric][arm], sign=True) for metric in METRICS[:3]]
                lines.append([task, name, f"{arm} minus {reference}", len(differences["nll"][arm]), *cells])
    table = ledger.markdown(["task", "set", "weights", "seeds", *METRICS[:3]], lines)
    commits = ", ".join(rows.commit.unique())
    return (
        "# AdamW, and ours at the mean and averaged over samples\n\nWritten by `python -m benchmarks.posterior "
        f"--report` from `posterior_runs.csv`; commits {commits}. Means ± half of the 95 % interval (Student's t over "
        f"seeds); differences are paired by seed.\n\n{table}\n"
    )


def is_compared(arm: str, reference: str) -> bool:
    """Ours with AdamW; averaged or cut with our mean; ranks cut by one criterion with those cut by the other."""
    if not arm.startswith("vadam"):
        return False
    if reference.startswith("adamw"):
        return "third" not in arm
    return reference.endswith(("mean", f"third by {CRITERIA[1]}")) and not (
        arm.endswith("mean") or ("third" in reference and "third" not in arm)
    )


def quick(path: Path) -> int:
    """A short run of every kind and the report on them."""
    bed = load_bed((("train", 64), ("test", 40), ("shifted", 20)))
    for method, lr in TASKS["small"][2]:
        ledger.append(path, run({"task": "small", "method": method, "lr": lr, "seed": 1, "steps": 4}, bed))
    print(page(ledger.read(path)))
    print("it works; the numbers mean nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
