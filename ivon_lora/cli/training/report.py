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

FORMAT = 2
#: column of the history -> how its name ends in the Trainer's log
COLUMNS = {"step": "step", "loss": "loss", "lr": "learning_rate", "live": "/rank/live", "budget": "/rank/budget"}
COLUMNS |= {f"snr_{p}": f"/snr/{p}" for p in ("p10", "p50", "p90")}


def build_report(
    settings: Settings, texts: Texts, trainer: Trainer, exported: ExportReport, found: dict[str, Any]
) -> dict[str, Any]:
    """The report as plain JSON values; ``found`` has its "results" and the "events" of the method."""
    log, optimizer = trainer.state.log_history, unwrap(trainer.optimizer)
    entries = [entry for entry in log if "loss" in entry]
    history = {}  # a run without ranks or posterior has fewer columns
    for column, name in COLUMNS.items():
        for key in entries[0]:
            if key == name or (name.startswith("/") and key.endswith(name)):
                history[column] = [entry[key] for entry in entries]
    return {
        "format": FORMAT,
        "settings": asdict(settings),
        "runtime": {
            "device": trainer.args.device.type,
            "precision": "bf16 autocast" if trainer.args.bf16 else "fp32",
            "threads": torch.get_num_threads(),
        },
        "versions": read_versions(),
        "data": {"source": texts.source, "fingerprint": texts.fingerprint(), "labels": texts.labels} | texts.counts(),
        "model": {"trained_parameters": trainer.get_num_trainable_parameters(), "adapted_layers": len(exported.ranks)},
        **found,
        "ranks": exported.ranks,
        "live_ranks": sum(exported.ranks.values()),
        "adapter": {name: getattr(exported, name) for name in ("max_abs_error", "max_rank", "notes")},
        "optimizer_metrics": {} if optimizer is None else optimizer.metrics(),
        "history": history,
        "seconds": {"training": round(sum(entry.get("train_runtime", 0.0) for entry in log), 3)},
    }


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
