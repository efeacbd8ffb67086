"""The verb `inspect`: what a run reached, or what an adapter holds."""

from __future__ import annotations

import argparse
from typing import Any

from ivon_lora.cli.arguments import add_folder, add_json, add_verb, print_json
from ivon_lora.cli.saved_run import SavedRun, read_run
from ivon_lora.finetune.report import rank_text, result_text
from ivon_lora.finetune.text_table import text_table
from ivon_lora.plots.snr import snr_by_module

__all__ = ["register_inspect"]

EXAMPLES = """\
ivon-lora inspect runs/finetune            settings, metrics and ranks of a finished run
ivon-lora inspect my-adapter               ranks, and with a posterior or optimizer beside it signal-to-noise ratios
ivon-lora inspect runs/finetune --json     the whole report
"""
QUANTILES = (0.05, 0.5, 0.95)


def register_inspect(verbs: Any) -> None:
    """Add the verb `inspect`."""
    parser = add_verb(
        verbs,
        "inspect",
        _run,
        summary="show the tables of a finished run or of an adapter",
        description="Print settings, metrics and ranks of a finished run, or what an adapter directory holds.",
        examples=EXAMPLES,
    )
    add_folder(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    run = read_run(arguments.folder, arguments.posterior, arguments.optimizer)
    if arguments.json:
        print_json(describe(run) if run.report is None else run.report)
    elif run.report is None:
        print(adapter_text(run))
    else:
        settings = "\n".join(
            f"{name:<14}{'-' if value is None else value}" for name, value in run.report["settings"].items()
        )
        print(f"{settings}\n\n{result_text(run.report['results'])}\n\n{_ranks(run)}")
    return 0


def describe(run: SavedRun) -> dict[str, Any]:
    """What an adapter directory holds, as plain JSON values; quantiles of |mean| / std by module and factor."""
    ranks = run.ranks()
    config = run.adapter.config
    found: dict[str, Any] = {
        "peft_type": config["peft_type"],
        "base_model": config.get("base_model_name_or_path"),
        "ranks": ranks,
        "live_ranks": sum(ranks.values()),
        "parameters": sum(t.numel() for tensors in run.adapter.layers.values() for t in tensors.values()),
        "other_tensors": sorted(run.adapter.extras),
    }
    if run.posterior is not None:
        found["completed_steps"] = run.posterior.completed_steps
        found["snr"] = [
            {"module": module, "factor": factor, **dict(zip(("p5", "p50", "p95"), quantiles(x), strict=True))}
            for (module, factor), x in snr_by_module(run.posterior).items()
        ]
    return found


def adapter_text(run: SavedRun) -> str:
    """The same for people."""
    found = describe(run)
    head = f"{found['peft_type']} adapter of {found['base_model'] or 'an unnamed base model'}, "
    head += f"{found['parameters']:,} parameters in {len(found['ranks'])} layers"
    if found["other_tensors"]:
        head += f"; also {', '.join(found['other_tensors'])}"
    text = f"{head}\n\n{_ranks(run)}"
    if "snr" in found:
        rows = [
            [row["module"], row["factor"] or "-", *(f"{row[name]:.3g}" for name in ("p5", "p50", "p95"))]
            for row in found["snr"]
        ]
        table = text_table(["module", "factor", "5 %", "median", "95 %"], rows, left=2)
        text += f"\n\n|mean| / std of the weights\n{table}"
    return text


def quantiles(x: Any) -> list[float]:
    """Of a tensor (n,): its 5, 50 and 95 % points, each an element of it."""
    ordered = x.double().sort().values
    return [float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES]


def _ranks(run: SavedRun) -> str:
    ranks = run.ranks()
    return f"ranks kept: {sum(ranks.values())}\n{rank_text(ranks)}"
