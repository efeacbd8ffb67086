"""What a run found, as JSON for programs and as tables for people."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ivon_lora import ExportReport
from ivon_lora.cli.arguments import RunSettings
from ivon_lora.cli.env import read_versions
from ivon_lora.optim.wrappers import unwrap
from ivon_lora.plots.grid import rank_grid
from ivon_lora.posterior.metrics import Reliability

if TYPE_CHECKING:
    from transformers import Trainer

    from ivon_lora.cli.examples import Examples

FORMAT = 2
#: what the optimizer's numbers begin with in the Trainer's log
PREFIX = "optimizer/"
#: column of the history -> its name in the Trainer's log; a run without ranks or posterior has fewer
COLUMNS = {"step": "step", "loss": "loss", "lr": "learning_rate"}
COLUMNS |= {"live": f"{PREFIX}rank/live", "budget": f"{PREFIX}rank/budget"}
COLUMNS |= {f"snr_{p}": f"{PREFIX}snr/{p}" for p in ("p10", "p50", "p90")}


def build_report(
    settings: RunSettings, examples: Examples, trainer: Trainer, exported: ExportReport, found: dict[str, Any]
) -> dict[str, Any]:
    """The report as plain JSON values; ``found`` has at least its "results"."""
    log, optimizer = trainer.state.log_history, unwrap(trainer.optimizer)
    entries = [entry for entry in log if "loss" in entry]
    about_data = {"source": examples.source, "fingerprint": examples.fingerprint(), "labels": examples.labels}
    return {
        "format": FORMAT,
        "settings": {"optimizer": "ivon", "method": "lora", **asdict(settings)},
        "runtime": {
            "device": trainer.args.device.type,
            "precision": precision(trainer),
            "threads": torch.get_num_threads(),
        },
        "versions": read_versions(),
        "data": about_data | examples.counts(),
        "model": {"trained_parameters": trainer.get_num_trainable_parameters(), "adapted_layers": len(exported.ranks)},
        **found,
        "ranks": exported.ranks,
        "live_ranks": sum(exported.ranks.values()),
        "adapter": {name: getattr(exported, name) for name in ("max_abs_error", "max_rank", "notes")},
        "optimizer_metrics": {} if optimizer is None else optimizer.metrics(),
        "history": {new: [entry[name] for entry in entries] for new, name in COLUMNS.items() if name in entries[0]},
        "seconds": {"training": round(sum(entry.get("train_runtime", 0.0) for entry in log), 3)},
    }


def precision(trainer: Trainer) -> str:
    """In what the forward passes are computed."""
    return "bf16 autocast" if trainer.args.bf16 else "fp32"


def plain_bins(bins: Reliability) -> dict[str, list[float | None]]:
    """The bins of a calibration diagram for a report; None where one is empty."""
    return {key: [None if x != x else x for x in column] for key, column in asdict(bins).items()}


def write_report(report: dict[str, Any], out: Path) -> None:
    """Write report.json, whole or not at all."""
    scratch = out / ".report.json"
    scratch.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    scratch.replace(out / "report.json")


def run_and_show(as_json: bool, run: Callable[..., Path], *given: Any) -> None:
    """Run; ``as_json`` all that it prints goes to stderr, and to stdout the report in the folder that it returns."""
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        out = run(*given)
    if as_json:
        print((out / "report.json").read_text(encoding="utf-8"), end="")


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
    layers, modules = rank_grid(ranks)
    rows = [
        [module, *("" if cell is None else str(cell) for cell in cells), str(sum(cell or 0 for cell in cells))]
        for module, cells in modules.items()
    ]
    return text_table(["layer", *layers, "sum"], rows)
