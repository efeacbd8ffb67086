"""What a run found, as text for people and as JSON for programs."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ivon_lora import __version__
from ivon_lora.finetune.corpus import Corpus
from ivon_lora.finetune.evaluate import Result
from ivon_lora.finetune.files import replace_file
from ivon_lora.finetune.history import History
from ivon_lora.finetune.methods import Method
from ivon_lora.finetune.runtime import Runtime
from ivon_lora.finetune.settings import Settings
from ivon_lora.finetune.text_table import text_table
from ivon_lora.plots.grid import rank_grid
from ivon_lora.posterior.metrics import Reliability

__all__ = ["build_report", "rank_text", "read_versions", "result_text", "write_report"]

FORMAT = 1
PACKAGES = ("torch", "numpy", "peft", "transformers", "tokenizers", "safetensors", "matplotlib", "triton")


def build_report(
    settings: Settings,
    runtime: Runtime,
    corpus: Corpus,
    fingerprint: str,
    method: Method,
    history: History,
    results: list[Result],
    adapter: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The report as plain JSON values: settings, versions, data, model, ranks, results, history, times."""
    ranks = method.kept_ranks()
    return {
        "format": FORMAT,
        "settings": settings.as_dict(),
        "runtime": runtime.as_dict(),
        "versions": read_versions(),
        "data": {
            "source": corpus.source,
            "fingerprint": fingerprint,
            "labels": list(corpus.labels),
            "train": len(corpus.train),
            "validation": len(corpus.validation),
            "test": len(corpus.test),
            "shifted": None if corpus.shifted is None else len(corpus.shifted),
        },
        "model": {
            "trained_parameters": sum(p.numel() for p in method.trainable().values()),
            "adapted_layers": len(ranks),
        },
        "results": [
            {"set": r.set, "weights": r.weights, **asdict(r.scores), "reliability": _bins(r.reliability)}
            for r in results
        ],
        "ranks": ranks,
        "live_ranks": sum(ranks.values()),
        "adapter": adapter,
        "optimizer_metrics": method.metrics(),
        "history": history.as_dict(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def _bins(bins: Reliability) -> dict[str, list[float | None]]:
    """As JSON: an empty bin has neither confidence nor accuracy."""
    columns: dict[str, tuple[float, ...]] = asdict(bins)
    return {name: [None if x != x else x for x in column] for name, column in columns.items()}


def read_versions() -> dict[str, str | None]:
    """Versions of Python, the system and the packages a run depends on; None for what is not installed."""
    found: dict[str, str | None] = {
        "ivon-lora": __version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # says what it was built for, which the package's metadata may leave out
    return found


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON. Its presence means that the run is complete, so it is written last."""
    with replace_file(path) as scratch:
        scratch.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def result_text(results: list[dict[str, Any]]) -> str:
    """The table of metrics."""
    rows = [
        [
            row["set"],
            row["weights"],
            str(row["n"]),
            f"{100 * row['accuracy']:.1f} %",
            f"{row['nll']:.4f}",
            f"{row['ece']:.4f}",
            f"{row['brier']:.4f}",
        ]
        for row in results
    ]
    return text_table(["set", "weights", "n", "accuracy", "NLL", "ECE", "Brier"], rows, left=2)


def rank_text(ranks: dict[str, int]) -> str:
    """The table of live ranks, module by layer."""
    grid = rank_grid(ranks)
    columns = list(zip(*grid.cells, strict=True))
    rows = [
        [module, *("" if cell is None else str(cell) for cell in cells), str(sum(cell or 0 for cell in cells))]
        for module, cells in zip(grid.modules, columns, strict=True)
    ]
    return text_table(["layer", *grid.layers, "sum"], rows)
