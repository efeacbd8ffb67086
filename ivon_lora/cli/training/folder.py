"""The folder of a run: what belongs to it, the settings it was started with, and the checkpoint to go on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.cli.finetune.options import Settings
from ivon_lora.cli.plot import PICTURES

#: what a run writes, beside the Trainer's checkpoint-N
FILES = ("report.json", "settings.json", "adapter", "posterior.safetensors", "predictions.safetensors")
OUTPUTS = (*FILES, *(f"{name}.png" for name in PICTURES))


def check_out(out: Path, overwrite: bool) -> None:
    """InputError if ``out`` is a file, or holds a run that may not be replaced."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    if (out / "report.json").exists() and not overwrite:
        raise InputError(f"--out {out} holds a finished run: give another --out, or --overwrite to replace it")
    if (out / "settings.json").exists() and not overwrite:
        raise InputError(f"--out {out} holds an unfinished run: --resume goes on with it, --overwrite replaces it")


def make_out(out: Path, settings: Settings, fingerprint: str) -> None:
    """Create the folder with its settings.json; remove what an earlier run left there, and nothing else."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in [*(out / name for name in OUTPUTS), *out.glob("checkpoint-*")]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        content = json.dumps({"settings": asdict(settings), "data": fingerprint}, indent=1)
        (out / "settings.json").write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); give another folder") from None


def read_settings(out: Path, chosen: Iterable[str]) -> tuple[Settings, str]:
    """The settings of the run in ``out`` and the fingerprint of its data, if nothing but --out was ``chosen``.

    Raises:
        InputError: there is no run, or it cannot go on.
    """
    path = out / "settings.json"
    if not path.is_file():
        raise InputError(f"--resume: no run in {out}; give the --out of an interrupted run, or drop --resume")
    if others := [name.replace("_", "-") for name in chosen if name != "out"]:
        raise InputError(f"--resume: --{others[0]} is the run's own; drop the option, or --resume")
    with input_errors(f"--resume: {path} is damaged, or of another version; start again with --overwrite"):
        content = json.loads(path.read_text(encoding="utf-8"))
        settings, fingerprint = Settings(**{**content["settings"], "out": str(out)}), str(content["data"])
        if not settings.resumable:
            raise InputError("--resume: PEFT's AdaLoRA cannot be resumed, its checkpoints are not complete")
    return settings, fingerprint


def last_checkpoint(out: Path, steps: int) -> Path | None:
    """The last complete checkpoint-N before the end; None to start from the beginning.

    The Trainer writes trainer_state.json last, so a checkpoint whose writer was killed lacks it. One at the end is
    not taken, because the Trainer would go one step too far from it; the steps since the one before are repeated.
    """
    found = {
        int(path.parent.name.partition("-")[2]): path.parent for path in out.glob("checkpoint-*/trainer_state.json")
    }
    return max(((step, folder) for step, folder in found.items() if step < steps), default=(0, None))[1]
