"""The course of a run: what is checked before the work, the training, and what is written after it."""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

from ivon_lora import ExportReport, PosteriorFile, export_lora, save_posterior
from ivon_lora.cli.arguments import RunSettings
from ivon_lora.cli.dataset import Examples
from ivon_lora.cli.env import choose_device, read_versions
from ivon_lora.cli.errors import InputError, TrainingError, one_line
from ivon_lora.cli.plot import PICTURES, draw_pictures
from ivon_lora.cli.report import rank_table, result_table
from ivon_lora.optim.wrappers import unwrap
from ivon_lora.plots.style import new_figure

FORMAT = 2
#: what the optimizer's numbers begin with in the Trainer's log
PREFIX = "optimizer/"
#: column of the history -> its name in the Trainer's log; a run without ranks or posterior has fewer
COLUMNS = {"step": "step", "loss": "loss", "lr": "learning_rate"}
COLUMNS |= {"live": f"{PREFIX}rank/live", "budget": f"{PREFIX}rank/budget"}
COLUMNS |= {f"snr_{p}": f"{PREFIX}snr/{p}" for p in ("p10", "p50", "p90")}
#: what a run writes, beside the Trainer's checkpoint-N
FILES = ("report.json", "settings.json", "adapter", "posterior.safetensors", "predictions.safetensors")
OUTPUTS = (*FILES, *(f"{name}.png" for name in PICTURES))


class Progress(TrainerCallback):
    """How training goes, on stderr: one live line in a terminal, elsewhere a line for every entry of the log.

    Both have the numbers of the last entry; the last step gets one too. TrainingError if its loss is not finite.
    """

    bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        columns, rows = shutil.get_terminal_size()  # tqdm itself draws nothing where a terminal tells no size
        size = {"ncols": min(columns - 1, 100), "nrows": rows}
        line = "training {n}/{total} |{bar}| {desc}  {remaining} left"
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, bar_format=line, disable=None, **size)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update()
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise TrainingError(f"the loss is {logs['loss']} at step {state.global_step}: lower --lr")
        entry = state.log_history[-1]
        numbers = f"loss {entry['loss']:.4f}  lr {entry['learning_rate']:.2e}"
        if COLUMNS["live"] in entry:
            numbers += f"  ranks {entry[COLUMNS['live']]:.0f}"
        self.bar.set_description_str(numbers)
        if self.bar.disable:
            print(f"training {state.global_step}/{state.max_steps}  {numbers}", file=sys.stderr, flush=True)


def check_out(out: Path, overwrite: bool) -> None:
    """InputError if ``out`` is a file, or holds a run that may not be replaced."""
    new_figure(1, 1)  # if matplotlib is missing, this is the time to say so
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    if (out / "report.json").exists() and not overwrite:
        raise InputError(f"--out {out} holds a finished run: give another --out, or --overwrite to replace it")
    if (out / "settings.json").exists() and not overwrite:
        raise InputError(
            f"--out {out} holds an unfinished run: --overwrite replaces it, finetune --resume goes on with it"
        )


def prepare(settings: RunSettings) -> str:
    """Set torch's threads, keep the bars, reports and warnings of other libraries quiet, and return the device."""
    device = choose_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    return device


def trainer_arguments(settings: Any, device: str) -> dict[str, Any]:
    """The arguments of the Trainer that are the same for all; its own bars and reports are off."""
    return {
        "output_dir": settings.out,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "linear",
        "seed": settings.seed,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def make_out(out: Path, settings: RunSettings, examples: Examples) -> None:
    """Create the folder with its settings.json; remove what an earlier run left there, and nothing else."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in [*(out / name for name in OUTPUTS), *out.glob("checkpoint-*")]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        content = json.dumps({"settings": asdict(settings), "data": examples.fingerprint()}, indent=1)
        (out / "settings.json").write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); give another folder") from None


def print_start(examples: Examples, trainer: Trainer, **lines: str) -> None:
    """Print what is going to happen."""
    counts = ", ".join(f"{count} {name}" for name, count in examples.counts().items())
    where = f"on {trainer.args.device.type} in {precision(trainer)}, {torch.get_num_threads()} threads"
    lines = {"data": f"{examples.source}: {counts} examples", **lines}
    lines["computing"] = f"{trainer.get_num_trainable_parameters():,} trained numbers {where}"
    print("\n".join(f"{name:<11}{text}" for name, text in lines.items()), flush=True)


@contextmanager
def interruptible(trainer: Trainer, advice: str) -> Iterator[None]:
    """Ctrl-C inside ends the run with a line that says how far it has come, and with ``advice``."""
    try:
        yield
    except KeyboardInterrupt:
        done = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
        raise KeyboardInterrupt(f"interrupted after {done}: {advice}") from None


def train(trainer: Trainer, checkpoint: Path | None = None) -> None:
    """Train to the end. InputError if the checkpoint cannot be loaded, TrainingError if the loss is not finite."""
    progress = Progress()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress)
    try:
        with logging_redirect_tqdm():  # a warning goes above the live line
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Exception as error:
        if checkpoint is None or progress.bar is not None:
            raise
        advice = "remove it to go on from an earlier one, or start again with --overwrite"
        raise InputError(f"--resume: {checkpoint} cannot be loaded ({one_line(error, 120)}); {advice}") from error
    finally:
        if progress.bar is not None:
            progress.bar.close()


def finish(
    settings: RunSettings,
    examples: Examples,
    trainer: Trainer,
    posterior: PosteriorFile | None,
    found: dict[str, Any],
    layout: str = "uniform",
) -> tuple[dict[str, Any], str]:
    """Write posterior, adapter, pictures and report; returns the report, and its tables.

    ``found`` goes into the report; of it, "results" are the table and "softmax_temperature" is the posterior's.
    """
    out = Path(str(trainer.args.output_dir))
    if posterior is not None:
        temperature = found.get("softmax_temperature") or 1.0
        save_posterior(posterior, out / "posterior.safetensors", softmax_temperature=temperature)
    assert trainer.model is not None
    try:
        exported = export_lora(trainer.model, unwrap(trainer.optimizer), out / "adapter", layout)
    except ValueError as error:  # nothing is left of it, say
        raise TrainingError(f"the adapter cannot be written: {one_line(error)}") from error
    report = build_report(settings, examples, trainer, exported, found)
    draw_pictures(report, posterior, out)
    write_report(report, out)  # its presence means that the run is complete
    tables = f"{result_table(report['results'])}\n\n{rank_table(report['ranks'])}"
    return report, f"\n{tables}\n\ntraining {report['seconds']['training']:.0f} s; everything is in {out}"


def build_report(
    settings: RunSettings, examples: Examples, trainer: Trainer, exported: ExportReport, found: dict[str, Any]
) -> dict[str, Any]:
    """The report as plain JSON values; ``found`` has at least its "results"."""
    log, optimizer, device = trainer.state.log_history, unwrap(trainer.optimizer), trainer.args.device.type
    entries = [entry for entry in log if "loss" in entry]
    about_data = {"source": examples.source, "fingerprint": examples.fingerprint(), "labels": examples.labels}
    return {
        "format": FORMAT,
        "settings": {"optimizer": "ivon", "method": "lora", **asdict(settings)},
        "runtime": {"device": device, "precision": precision(trainer), "threads": torch.get_num_threads()},
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


def write_report(report: dict[str, Any], out: Path) -> None:
    """Write report.json, whole or not at all."""
    scratch = out / ".report.json"
    scratch.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    scratch.replace(out / "report.json")
