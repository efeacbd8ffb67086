"""Plain text tables for terminals and logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ivon_lora.plots.grid import rank_grid


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
    """The table of live ranks, module by layer."""
    grid = rank_grid(ranks)
    rows = [
        [module, *("" if cell is None else str(cell) for cell in cells), str(sum(cell or 0 for cell in cells))]
        for module, cells in zip(grid.modules, zip(*grid.cells, strict=True), strict=True)
    ]
    return text_table(["layer", *grid.layers, "sum"], rows)
