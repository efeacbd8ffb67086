"""The page of the step benchmark, from its CSV file."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from benchmarks.cases import FLAT, LLAMA, MANY, MINILM
from benchmarks.ledger import read
from benchmarks.peers import BASELINE, REFERENCE, ours
from benchmarks.tables import Goal, goals_table, markdown

TRAINING = "training"

PAGE = """\
# Whole optimizer steps on CPU

Written by `python -m benchmarks.step`: commit {commit}, {machine}, torch {torch}, {threads} thread{s}.

Times are milliseconds of processor time, medians over the rounds with 20th and 80th percentiles, because the machine
may be shared; peers are interleaved in one process, as pip installs them. A step is sample and update, with "+prune"
(and for PEFT's AdaLoRA) also scores and an allocation of ranks in one step of ten. Memory is what a step needs at its
peak beyond what is there before, as the operating system sees it.

## Goals

{goals}

## Every peer

{peers}

## A training step

MiniLM's shapes with LoRA r=12 on every linear layer, 32 sentences of 48 tokens, fp32; ours is `VAdam`.

{training}
"""


def write_report(folder: Path) -> str:
    """Write step.md beside step.csv; returns the page."""
    text = page(read(folder / "step.csv"))
    (folder / "step.md").write_text(text, encoding="utf-8")
    return text


def page(rows: pd.DataFrame) -> str:
    """The page in Markdown."""
    one = rows.iloc[0]
    return PAGE.format(
        commit=one.commit,
        machine=one.machine,
        torch=one.torch,
        threads=one.threads,
        s="" if one.threads == 1 else "s",
        goals=goals_table(goals(rows)),
        peers=peers_table(rows[rows.case != TRAINING]),
        training=training_table(rows[rows.case == TRAINING]),
    )


def goals(rows: pd.DataFrame) -> list[Goal]:
    """What the house asks of a step."""
    cpu = rows.set_index(["case", "peer"]).cpu_ms

    def ms(case: str, peer: str) -> float:
        return float(cpu.get((case, peer), math.nan))

    def speed(case: str, backend: str) -> float:
        return ms(case, REFERENCE) / ms(case, ours(backend))

    def bookkeeping(peer: str) -> float:  # the two cases have as many elements
        return (ms(MANY, peer) - ms(FLAT, peer)) / 3999 * 1e3

    shares = share(rows[rows.case == TRAINING])
    return [
        Goal("392 tensors: cpp against ivon-opt", ">=", 12, speed(LLAMA, "cpp"), "x"),
        Goal("MiniLM adapter: cpp against ivon-opt", ">=", 4, speed(MINILM, "cpp"), "x"),
        Goal("392 tensors: eager against ivon-opt", ">=", 1, speed(LLAMA, "eager"), "x"),
        Goal("training step: eager's share", "<=", 3, shares.get(ours("eager"), math.nan), " %"),
        Goal("training step: cpp's share", "<=", 0.6, shares.get(ours("cpp"), math.nan), " %"),
        Goal("bookkeeping per tensor, cpp (AdamW's)", "<=", bookkeeping(BASELINE), bookkeeping(ours("cpp")), " us"),
    ]


def share(training: pd.DataFrame) -> dict[str, float]:
    """Per cent of a training step that each peer takes."""
    per_cent = 100 * training.cpu_ms / (training.cpu_ms + training.get("passes_ms", math.nan))
    return dict(zip(training.peer, per_cent, strict=True))


def peers_table(rows: pd.DataFrame) -> str:
    """Cost and ratios of every peer, the fastest of a case first."""
    head = ("case", "peer", "tensors", "rounds", "ms", "p20", "p80", "ns/element", "x ivon-opt", "/ AdamW", "MiB")
    lines = []
    for _, group in rows.groupby("case", sort=False):
        ms = group.set_index("peer").cpu_ms
        for row in group.sort_values("cpu_ms").itertuples():
            cells = [row.cpu_ms, row.p20_ms, row.p80_ms, row.cpu_ms * 1e6 / row.elements]
            cells += [ms.get(REFERENCE, math.nan) / row.cpu_ms, row.cpu_ms / ms.get(BASELINE, math.nan)]
            shown = [f"{cell:.3g}" for cell in cells]
            lines.append((row.case, row.peer, int(row.tensors), row.rounds, *shown, f"{row.peak_mib:.1f}"))
    return markdown(head, lines)


def training_table(rows: pd.DataFrame) -> str:
    """Passes, optimizer, and its share."""
    shares = share(rows)
    lines = [
        (row.peer, row.rounds, f"{row.passes_ms:.0f}", f"{row.cpu_ms:.3g}", f"{row.p20_ms:.3g}", f"{row.p80_ms:.3g}",
         f"{shares[row.peer]:.2f} %") for row in rows.itertuples()
    ]  # fmt: skip
    return markdown(("peer", "rounds", "passes, ms", "optimizer, ms", "p20", "p80", "its share"), lines)
