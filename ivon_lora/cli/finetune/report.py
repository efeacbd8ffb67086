"""What a run found, as JSON for programs and as tables for people."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ivon_lora import ExportReport
from ivon_lora.cli.env import read_versions
from ivon_lora.cli.finetune.data import Texts
from ivon_lora.cli.finetune.options import Settings
from ivon_lora.cli.tables import rank_table, result_table
from ivon_lora.optim.wrappers import unwrap

__all__ = ["build_report", "print_report", "write_report"]

FORMAT = 2
#: column of the history -> how its name ends in the Trainer's log
COLUMNS = {
    "step": "step",
    "loss": "loss",
    "lr": "learning_rate",
    "live": "rank/live",
    "budget": "rank/budget",
    "snr_p10": "snr/p10",
    "snr_p50": "snr/p50",
    "snr_p90": "snr/p90",
}


def build_report(
    settings: Settings, texts: Texts, trainer: Trainer, exported: ExportReport, results: list[dict[str, Any]]
) -> dict[str, Any]:
    """The report as plain JSON values: settings, versions, data, model, results, ranks, history, times.

    Args:
        settings: of the run.
        texts: the data.
        trainer: after training and evaluation.
        exported: what `export_lora` said.
        results: of `evaluate`.
    """
    log = trainer.state.log_history
    optimizer = unwrap(trainer.optimizer)
    return {
        "format": FORMAT,
        "settings": asdict(settings),
        "runtime": {
            "device": trainer.args.device.type,
            "precision": "bf16 autocast" if trainer.args.bf16 else "fp32",
            "threads": torch.get_num_threads(),
        },
        "versions": read_versions(),
        "data": {
            "source": texts.source,
            "fingerprint": texts.fingerprint(),
            "labels": list(texts.labels),
            **texts.counts(),
        },
        "model": {
            "trained_parameters": trainer.get_num_trainable_parameters(),
            "adapted_layers": len(exported.ranks),
        },
        "results": results,
        "ranks": exported.ranks,
        "live_ranks": sum(exported.ranks.values()),
        "adapter": {
            "max_abs_error": exported.max_abs_error,
            "max_rank": exported.max_rank,
            "notes": list(exported.notes),
        },
        "optimizer_metrics": {} if optimizer is None else optimizer.metrics(),
        "history": history([entry for entry in log if "loss" in entry]),
        "seconds": {"training": round(sum(entry.get("train_runtime", 0.0) for entry in log), 3)},
    }


def history(entries: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The course of training, column by column; an optimizer without ranks or posterior has fewer columns."""
    found = {}
    for column, ending in COLUMNS.items():
        for name in entries[0]:
            if name == ending or ("/" in ending and name.endswith("/" + ending)):
                found[column] = [entry[name] for entry in entries]
    return found


def write_report(report: dict[str, Any], out: Path) -> None:
    """Write report.json, whole or not at all."""
    scratch = out / ".report.json"
    scratch.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    scratch.replace(out / "report.json")


def print_report(report: dict[str, Any], out: Path) -> None:
    """Print the tables and where everything is."""
    print(f"\n{result_table(report['results'])}\n")
    print(f"ranks kept: {report['live_ranks']}\n{rank_table(report['ranks'])}\n")
    print(f"training {report['seconds']['training']:.0f} s; everything is in {out}")
