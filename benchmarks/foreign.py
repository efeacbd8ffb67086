"""What finds foreign text: samples of the weights, plain confidence, or a distance between hidden states?

    python -m benchmarks.foreign    # writes benchmarks/results/foreign.csv and .md; ten minutes

The bed of `benchmarks.posterior`: `VAdam` at its defaults, on 256 and on 7117 film-review sentences. Nonsense is
random word pieces, as long as reviews. A score is good if foreign sentences have more of it than reviews: AUROC 1;
0.5 is chance.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks import ledger
from benchmarks.data import Sentences, load_base, load_sentences
from benchmarks.machine import RESULTS, provenance
from benchmarks.posterior import BATCH, SAMPLES, TASKS, load_bed, make_model, make_optimizer, upper_states
from benchmarks.training import predict, train
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


def run(task: str, seed: int, bed: Mapping[str, Sentences]) -> dict[str, Any]:
    """AUROC of every score, for nonsense and for shop reviews against film reviews."""
    torch.set_num_threads(1)
    data = bed["train"].first(TASKS[task][0] or len(bed["train"]))
    model = make_model(seed)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer: Any = make_optimizer(
        {"method": "vadam", "lr": TASKS[task][3]["vadam"][0], "seed": seed}, named, len(data)
    )
    for _ in train(model, optimizer, data, steps=TASKS[task][1], batch_size=BATCH, seed=seed):
        pass
    model.eval()
    first = next(name for name, _ in model.named_modules() if name.endswith("encoder.layer.0"))
    inputs = data.first(1000)
    distance = InputDistance.fit(model, first, [inputs_of(inputs, indices) for indices in inputs.batches(64)])
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
            "InputDistance": torch.cat([distance(model, inputs_of(bed[name], [i])) for i in range(len(bed[name]))]),
        }
    row: dict[str, Any] = {"task": task, "seed": seed}
    for score, known in found["test"].items():
        for name in ("nonsense", "shifted"):
            labels = [0] * len(known) + [1] * len(found[name][score])
            row[f"{score}, {name}"] = roc_auc_score(labels, torch.cat([known, found[name][score]]))
    return row


def inputs_of(data: Sentences, indices: list[int]) -> dict[str, Tensor]:
    """A batch without its labels."""
    return {name: x for name, x in data.batch(indices).items() if name != "labels"}


def page(rows: pd.DataFrame) -> str:
    """A line for each score."""
    columns = [column for column in rows.columns if column.endswith(", nonsense")]
    lines = []
    for task, runs in rows.groupby("task", sort=False):
        for name in (column.removesuffix(", nonsense") for column in columns):
            lines.append([task, name, *(ledger.show(runs[f"{name}, {kind}"]) for kind in ("nonsense", "shifted"))])
    table = ledger.markdown(["task", "score", "nonsense", "shop reviews"], lines)
    return (
        "# What finds foreign text?\n\nWritten by `python -m benchmarks.foreign`; commit "
        f"{', '.join(rows.commit.unique())}. AUROC against 250 film reviews of the test set, mean of seeds 6 to 8 ± "
        f"half of the 95 % interval (Student's t); 0.5 is chance.\n\n{table}\n"
    )


def main() -> int:
    """Run from the command line; returns the exit status."""
    bed = dict(load_bed(tuple(SIZES.items())))
    bed["nonsense"] = upper_states(load_base().eval().encoder, nonsense(load_sentences("test", SIZES["test"]), seed=0))
    rows = pd.DataFrame([{**run(task, seed, bed), **provenance()} for task in TASKS for seed in SEEDS])
    rows.to_csv(RESULTS / "foreign.csv", index=False, float_format="%.4g", lineterminator="\n")
    (RESULTS / "foreign.md").write_text(page(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
