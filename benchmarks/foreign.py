"""What finds foreign text: samples of the weights, plain confidence, or a distance between hidden states?

    python -m benchmarks.foreign --runs 6    # the runs that benchmarks/results/foreign.csv lacks: ten minutes
    python -m benchmarks.foreign --report    # foreign.md from them

The bed of `benchmarks.posterior`: `VAdam` at its defaults, on 256 and on 7117 film-review sentences. Nonsense is
random word pieces, as long as reviews. A score is good if foreign sentences have more of it than reviews: AUROC 1;
0.5 is chance.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks import ledger
from benchmarks.data import Sentences, load_base, load_sentences
from benchmarks.posterior import BATCH, SAMPLES, TASKS, make_model, upper_states
from benchmarks.posterior import load_bed as load_reviews
from benchmarks.tables import markdown
from benchmarks.training import make_optimizer, predict, train
from ivon_lora import InputDistance

SIZES, SEEDS, PIECES = {"train": 7117, "test": 250, "shifted": 250}, (6, 7, 8), range(1000, 30000)


def nonsense(like: Sentences, seed: int) -> Sentences:
    """Random word pieces between the first and last token of sentences."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for tokens in like.tokens:
        ids = torch.randint(PIECES.start, PIECES.stop, (len(tokens),), generator=generator)
        ids[0], ids[-1] = tokens[0], tokens[-1]
        found.append(ids)
    return Sentences(found, [0] * len(found))


@lru_cache(maxsize=1)
def load_bed() -> dict[str, Sentences]:
    """The bed of `benchmarks.posterior`, and nonsense."""
    made = nonsense(load_sentences("test", SIZES["test"]), seed=0)
    return {**load_reviews(tuple(SIZES.items())), "nonsense": upper_states(load_base().eval().encoder, made)}


def run(key: Mapping[str, Any], bed: Mapping[str, Sentences]) -> dict[str, Any]:
    """AUROC of every score, for nonsense and for shop reviews against film reviews."""
    torch.set_num_threads(1)
    count, n_steps, _, rates = TASKS[key["task"]]
    data, seed = bed["train"].first(count or len(bed["train"])), key["seed"]
    model = make_model(seed)
    options = {"num_examples": len(data), "batch_size": BATCH, "seed": seed}
    optimizer: Any = make_optimizer("vadam", model, rates["vadam"][0], **options)
    for _ in train(model, optimizer, data, steps=n_steps, batch_size=BATCH, seed=seed):
        pass
    model.eval()
    first = next(name for name, _ in model.named_modules() if name.endswith("encoder.layer.0"))
    known = data.first(1000)
    distance = InputDistance.fit(model, first, [known.inputs(indices) for indices in known.batches(64)])
    found: dict[str, dict[str, Tensor]] = {}
    for name in ("test", "nonsense", "shifted"):
        mean, samples = predict(model, bed[name]).softmax(-1), []
        for _ in range(SAMPLES):
            with optimizer.sampled_params():
                samples.append(predict(model, bed[name]).softmax(-1))
        average = torch.stack(samples).mean(0)
        entropy = torch.special.entr(average).sum(-1)
        found[name] = {
            "1 - largest probability": 1 - mean.max(-1).values,
            "entropy, 8 samples": entropy,
            "mutual information, 8 samples": entropy - torch.special.entr(torch.stack(samples)).sum(-1).mean(0),
            "InputDistance": torch.cat([distance(model, bed[name].inputs([i])) for i in range(len(bed[name]))]),
        }
    row = dict(key)
    for score, reviews in found["test"].items():
        for name in ("nonsense", "shifted"):
            labels = [0] * len(reviews) + [1] * len(found[name][score])
            row[f"{score}, {name}"] = roc_auc_score(labels, torch.cat([reviews, found[name][score]]))
    return row


def page(path: Path) -> str:
    """A line for each score."""
    rows, lines = ledger.read(path), []
    columns = [column for column in rows.columns if column.endswith(", nonsense")]
    for task, runs in rows.groupby("task", sort=False):
        for name in (column.removesuffix(", nonsense") for column in columns):
            lines.append([task, name, *(ledger.show(runs[f"{name}, {kind}"]) for kind in ("nonsense", "shifted"))])
    table = markdown(["task", "score", "nonsense", "shop reviews"], lines)
    return (
        "# What finds foreign text?\n\nWritten by `python -m benchmarks.foreign --report` from `foreign.csv`; commit "
        f"{', '.join(rows.commit.unique())}. AUROC against 250 film reviews of the test set, mean of seeds 6 to 8 ± "
        f"half of the 95 % interval (Student's t); 0.5 is chance.\n\n{table}\n"
    )


def main() -> int:
    """Run from the command line; returns the exit status."""
    keys = [{"task": task, "seed": seed} for task in TASKS for seed in SEEDS]
    return ledger.command("foreign", lambda _: keys, lambda key: [run(key, load_bed())], page)


if __name__ == "__main__":
    sys.exit(main())
