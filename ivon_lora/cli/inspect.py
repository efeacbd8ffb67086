"""Show the tables of a finished run or of an adapter.

Prints settings, metrics and ranks of a finished run, or what an adapter directory holds.

examples:
  ivon-lora inspect runs/finetune            settings, metrics and ranks of a finished run
  ivon-lora inspect my-adapter               ranks, and with a posterior or optimizer beside it signal-to-noise ratios
  ivon-lora inspect runs/finetune --json     the whole report
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from ivon_lora.cli.arguments import add_folder
from ivon_lora.cli.errors import input_errors
from ivon_lora.cli.report import rank_table, result_table, text_table
from ivon_lora.cli.saved_run import SavedRun, read_run
from ivon_lora.plots.snr import snr_by_module

QUANTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_folder(parser)


def run(arguments: argparse.Namespace) -> tuple[Any, str]:
    """Do what the module's docstring says."""
    run = read_run(arguments.folder, arguments.posterior, arguments.optimizer)
    with input_errors(arguments.folder):
        if run.report is not None:
            return run.report, run_text(run.report)
        found = describe(run)
        return found, adapter_text(found)


def describe(run: SavedRun) -> dict[str, Any]:
    """What an adapter directory holds, as plain JSON values; quantiles of |mean| / std by module and factor."""
    adapter, ranks = run.adapter, run.adapter.ranks
    found: dict[str, Any] = {
        "peft_type": adapter.config["peft_type"],
        "base_model": adapter.config.get("base_model_name_or_path"),
        "ranks": ranks,
        "live_ranks": sum(ranks.values()),
        "parameters": sum(tensor.numel() for layer in adapter.layers for tensor in layer.tensors.values()),
        "other_tensors": sorted(adapter.extras),
    }
    if run.posterior is not None:
        found["completed_steps"] = run.posterior.completed_steps
        found["snr"] = [
            {"module": module, "factor": factor}
            | {name: float(np.quantile(ratios.double(), q, method="nearest")) for name, q in QUANTILES.items()}
            for (module, factor), ratios in snr_by_module(run.posterior).items()
        ]
    return found


def adapter_text(found: dict[str, Any]) -> str:
    """The same for people."""
    text = f"{found['peft_type']} adapter of {found['base_model'] or 'an unnamed base model'}, "
    text += f"{found['parameters']:,} parameters in {len(found['ranks'])} layers"
    if found["other_tensors"]:
        text += f"; also {', '.join(found['other_tensors'])}"
    text += f"\n\n{rank_table(found['ranks'])}"
    if "snr" in found:
        rows = [[row["module"], row["factor"] or "-", *(f"{row[p]:.3g}" for p in QUANTILES)] for row in found["snr"]]
        table = text_table(["module", "factor", "5 %", "median", "95 %"], rows, left=2)
        text += f"\n\n|mean| / std of the weights\n{table}"
    return text


def run_text(report: dict[str, Any]) -> str:
    """Settings, results and ranks of a run."""
    lines = [f"{name:<14}{'-' if value is None else value}" for name, value in report["settings"].items()]
    return "\n".join([*lines, "", result_table(report["results"]), "", rank_table(report["ranks"])])
