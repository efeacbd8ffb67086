"""What a run found, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ivon_lora.plots.grid import rank_grid
from ivon_lora.posterior.metrics import Reliability


def plain_bins(bins: Reliability) -> dict[str, list[float | None]]:
    """The bins of a calibration diagram for a report; None where one is empty."""
    return {key: [None if x != x else x for x in column] for key, column in asdict(bins).items()}


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns padded to their widest cell; the first ``left`` columns are flush left, the others flush right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def join(line: Sequence[str]) -> str:
        cells = zip(line, widths, strict=True)
        return "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(cells)).rstrip()

    return "\n".join([join(head), "  ".join("-" * w for w in widths), *map(join, rows)])


def result_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The table of metrics."""
    heads = {"nll": "NLL", "perplexity": "perplexity", "ece": "ECE", "brier": "Brier"}
    names = [name for name in heads if name in results[0]]
    rows = [
        [row["set"], row["weights"], str(row["n"]), f"{100 * row['accuracy']:.1f} %"]
        + [f"{row[name]:.4f}" for name in names]
        for row in results
    ]
    return text_table(["set", "weights", "n", "accuracy", *(heads[name] for name in names)], rows, left=2)


def rank_table(ranks: Mapping[str, int]) -> str:
    """Live ranks: their sum, and the table of them, module by layer."""
    layers, modules = rank_grid(ranks)
    rows = [
        [module, *("" if cell is None else str(cell) for cell in cells), str(sum(cell or 0 for cell in cells))]
        for module, cells in modules.items()
    ]
    return f"ranks kept: {sum(ranks.values())}\n" + text_table(["layer", *layers, "sum"], rows)
