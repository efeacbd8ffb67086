"""Everything a run needs to go on with the same numbers, in one file that is replaced as a whole."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ivon_lora.finetune.errors import InputError, one_line
from ivon_lora.finetune.files import replace_file
from ivon_lora.finetune.history import History
from ivon_lora.finetune.methods import Method
from ivon_lora.finetune.settings import Settings

__all__ = ["Checkpoint", "checkpoint_path", "read_checkpoint", "restore", "write_checkpoint"]

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A run after ``step`` steps. ``data`` is the fingerprint of its training texts; ``seconds`` the time trained."""

    settings: Settings
    step: int
    data: str
    seconds: float
    history: History
    tensors: dict[str, Any]


def checkpoint_path(out: Path) -> Path:
    """Where a run keeps its checkpoint."""
    return out / "checkpoint" / "state.pt"


def write_checkpoint(
    out: Path, settings: Settings, method: Method, history: History, step: int, data: str, seconds: float
) -> None:
    """Write the state after ``step`` steps. The weights in the file are the posterior mean, never a sample."""
    if hasattr(method.optimizer, "eval"):
        method.optimizer.eval()
    content = {
        "format": FORMAT,
        "settings": settings.as_dict(),
        "step": step,
        "data": data,
        "seconds": seconds,
        "history": history.as_dict(),
        "tensors": {
            "model": {name: p.detach() for name, p in method.trainable().items()},
            "optimizer": method.optimizer.state_dict(),
            "method": method.state(),
        },
    }
    with replace_file(checkpoint_path(out)) as path:
        torch.save(content, path)


def read_checkpoint(out: Path) -> Checkpoint:
    """Read the checkpoint below ``out``. Raises InputError if there is none or it cannot be used."""
    path = checkpoint_path(out)
    if not path.is_file():
        raise InputError(f"--resume: no checkpoint in {out}; give the --out of an interrupted run, or drop --resume")
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:  # torch.load does not look at the checksums it has written
                raise ValueError(f"the checksum of {part} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"--resume: {path} cannot be read ({one_line(error, 80)}); start again with --overwrite"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"--resume: {path} is of another version of ivon-lora; start again with --overwrite")
    try:
        return Checkpoint(
            settings=Settings.from_dict(content["settings"]),
            step=content["step"],
            data=content["data"],
            seconds=content["seconds"],
            history=History(**content["history"]),
            tensors=content["tensors"],
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"--resume: {path} is damaged or no checkpoint of a run ({one_line(error, 80)}); start again with "
            "--overwrite"
        ) from None


def restore(method: Method, checkpoint: Checkpoint) -> None:
    """Put the checkpoint's parameters, optimizer state and method state into ``method``.

    Raises:
        InputError: they do not fit. Nothing has changed then.
    """
    own, saved = method.trainable(), checkpoint.tensors.get("model", {})
    misfits = {n for n, p in own.items() if n not in saved or saved[n].shape != p.shape} | (saved.keys() - own.keys())
    if misfits or not {"optimizer", "method"} <= checkpoint.tensors.keys():
        what = f"{sorted(misfits)[0]} and {len(misfits) - 1} more" if misfits else "its optimizer"
        raise InputError(f"--resume: the checkpoint does not fit the model: {what}; start again with --overwrite")
    try:
        method.optimizer.load_state_dict(
            checkpoint.tensors["optimizer"]
        )  # checks everything before it changes anything
    except (ValueError, KeyError) as error:
        raise InputError(
            f"--resume: the optimizer's state does not fit ({one_line(error, 120)}); start again with --overwrite"
        ) from None
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(saved[name])
    method.load_state(checkpoint.tensors["method"])
