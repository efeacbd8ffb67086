"""Why does the criterion matter when a trained adapter is cut, and not when ranks go during training?

    python -m benchmarks.pruning --runs 12    # the next runs that benchmarks/results/pruning.csv lacks
    python -m benchmarks.pruning --report     # pruning.md; no training

`VAdam` on LoRA r=12 of all 36 linear layers of all-MiniLM-L6-v2, 512 film-review sentences of at most 24 tokens, 192
steps of 8. `RankPruner` cuts to 4 ranks a layer at one step, half-way or at the end. Runs that differ in the criterion
only are equal up to the cut. Scores are those of the posterior mean on 800 test sentences.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig

from benchmarks import ledger
from benchmarks.data import ALPHA_OVER_RANK, Sentences, adapt, load_base, load_sentences
from benchmarks.machine import RESULTS
from benchmarks.training import predict, scores, train
from ivon_lora import RankPruner, VAdam, find_adapters

STEPS, BATCH, TOKENS, LR, RANK, TARGET = 192, 8, 24, 1e-3, 12, 4
CRITERIA, SEEDS, CUTS, LATER = ("snr_abs", "magnitude"), (1, 2, 3), (96, 190), (8, 24)


def run(key: Mapping[str, Any], data: Sentences, test: Sentences) -> list[dict[str, Any]]:
    """Train once; a row for each time that the mean was evaluated: before the cut, after it, and later."""
    torch.set_num_threads(1)
    model = adapt(load_base(seed=key["seed"]), LoraConfig, key["seed"], r=RANK, lora_alpha=ALPHA_OVER_RANK * RANK)
    cut, adapters = key["cut"], find_adapters(model)
    pruner = RankPruner(
        adapters, TARGET, key["criterion"], total_steps=STEPS, warmup=cut - 1, final=STEPS - cut, interval=STEPS
    )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = VAdam(named, lr=LR, num_examples=len(data), batch_size=BATCH, seed=key["seed"], pruner=pruner)
    rows: list[dict[str, Any]] = []
    due = {cut - 1, cut, STEPS, *(cut + later for later in LATER)}

    def evaluate(step: int) -> None:
        if step in due:
            optimizer.eval()
            found = scores(predict(model, test).softmax(-1), test)
            rows.append({**key, "step": step, **found, "kept": " ".join(map(str, kept_ranks(optimizer, adapters)))})
            model.train()

    steps = train(model, optimizer, data, steps=STEPS, batch_size=BATCH, seed=key["seed"], after_step=evaluate)
    for _ in steps:
        pass
    return rows


def kept_ranks(optimizer: VAdam, adapters: Sequence[Any]) -> list[int]:
    """Positions of the ranks that are left, among those of all layers."""
    masks = torch.cat([optimizer.state[adapter.A]["rank_mask"].flatten() for adapter in adapters])
    found: list[int] = masks.nonzero().flatten().tolist()
    return found


def page(rows: pd.DataFrame) -> str:
    """A table of costs: NLL minus that just before the cut, and the difference between the criteria, paired by seed."""
    lines = []
    for cut, runs in rows.groupby("cut"):
        before = runs[runs.step == cut - 1].set_index(["criterion", "seed"]).nll
        for step in sorted(set(runs.step) - {cut - 1}):
            cost = (runs[runs.step == step].set_index(["criterion", "seed"]).nll - before).unstack("criterion")
            gap = ledger.show(cost.magnitude - cost.snr_abs, sign=True)
            lines.append([cut, step - cut, *(ledger.show(cost[c], sign=True) for c in CRITERIA), gap])
    kept = rows[rows.step == rows.cut].assign(kept=lambda frame: frame.kept.map(lambda text: set(text.split())))
    pairs = kept.pivot(index=["cut", "seed"], columns="criterion", values="kept")
    same = [len(a & b) / len(a) for a, b in zip(pairs.snr_abs, pairs.magnitude, strict=True)]
    return HEAD.format(
        commits=", ".join(rows.commit.unique()),
        same=100 * sum(same) / len(same),
        table=ledger.markdown(["cut after step", "steps later", *CRITERIA, "magnitude - snr_abs"], lines),
    )


HEAD = """\
# A cut, and what training makes of it

Written by `python -m benchmarks.pruning --report` from `pruning.csv`; commits {commits}. NLL in nats minus that of the
same run just before its ranks were cut from 12 to 4 a layer, at the mean of the weights on 800 test sentences; means of
three seeds, ± half of the 95 % interval (Student's t), differences paired by seed. After the cut, training goes on with
the ranks that are left (192 steps in all, linear decay). `snr_abs` and `magnitude` keep the same ranks to {same:.0f} %.

{table}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    options, path = ledger.arguments("pruning").parse_args(argv), RESULTS / "pruning.csv"
    if options.report:
        path.with_suffix(".md").write_text(page(ledger.read(path)), encoding="utf-8")
        return 0
    data, test = load_sentences("train", 512, TOKENS), load_sentences("test", 800, TOKENS)
    keys = [{"criterion": c, "cut": cut, "seed": seed} for seed in SEEDS for cut in CUTS for c in CRITERIA]
    ledger.resume(path, keys, lambda key: run(key, data, test), options.runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
