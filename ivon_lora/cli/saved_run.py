"""What a folder holds: a run of `ivon-lora finetune`, or an adapter with its posterior or optimizer beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ivon_lora import IVON, PosteriorFile, VAdam, load_posterior, snapshot_posterior
from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.export.contents import Adapter
from ivon_lora.export.read_saved import read_adapter, read_weights
from ivon_lora.lora.config import CONFIG_FILE
from ivon_lora.lora.names import matched, tensor_name

POSTERIORS = ("posterior.safetensors", "ivon_posterior.safetensors")
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0.bin")
#: what the verbs read of a report
REPORT = {"settings": dict, "results": list, "ranks": dict, "history": dict}


@dataclass(frozen=True, eq=False)
class SavedRun:
    """What was found. The posterior of a run is that of the adapter before pruned ranks were dropped; that of any other
    adapter is in ``adapter`` already: its means, without the ranks that its masks prune."""

    report: dict[str, Any] | None
    folder: Path
    adapter: Adapter
    posterior: PosteriorFile | None


def read_run(folder: Path, posterior: Path | None = None, optimizer: Path | None = None) -> SavedRun:
    """Read the --out of a run, or an adapter directory such as a checkpoint of the Trainer.

    Posterior (of `save_posterior`) and optimizer (the saved ``state_dict()`` of an `IVON` whose parameters were given
    with their names) are looked for beside the adapter unless they are given.

    Raises:
        InputError: it is neither, or a file cannot be used.
    """
    inside, report, known = folder, None, None
    if (path := folder / "report.json").is_file():
        inside = folder / "adapter"
        with input_errors(path):
            report = json.loads(path.read_text(encoding="utf-8"))
            if not all(isinstance(report.get(key), kind) for key, kind in REPORT.items()):
                raise ValueError("not the report of one run of ivon-lora finetune or sft")
    if not (inside / CONFIG_FILE).is_file():
        raise InputError(f"{inside}: no {CONFIG_FILE}; give an adapter directory, or the --out of a finished run")
    beside = {path.name: path for path in folder.iterdir() if path.is_file()}
    found = None if optimizer else next((beside[name] for name in POSTERIORS if name in beside), None)
    if file := posterior or found:
        with input_errors(file):
            known = load_posterior(file)
    elif file := optimizer or next((beside[name] for name in OPTIMIZERS if name in beside), None):
        with input_errors(file):
            known = _posterior_of_state(file, inside, asked_for=optimizer is not None)
    with input_errors(inside):
        adapter = read_adapter(inside, known if report is None else None)
    return SavedRun(report, inside, adapter, known)


def _posterior_of_state(path: Path, folder: Path, asked_for: bool) -> PosteriorFile | None:
    """The posterior in the saved state of an `IVON`; the means of fp32 parameters are the tensors in the folder.

    None if the file is of another optimizer and was not asked for.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    groups = saved["param_groups"]
    if any("ess" not in group for group in groups):
        if not asked_for:
            return None
        raise ValueError("not the state of an IVON: save optimizer.state_dict() of the one that trained")
    if any("param_names" not in group for group in groups):
        raise ValueError("it does not name its parameters: build IVON(model.named_parameters(), ...)")
    tensors, names = read_weights(folder)[1], [name for group in groups for name in group["param_names"]]
    same = matched(names, tensors)
    if absent := [name for name in names if name not in same]:
        raise ValueError(f"it is of another adapter: this one has no {absent[0]}")
    values = {name: nn.Parameter(tensors[key]) for name, key in same.items()}
    params: list[Any] = [{"params": [(name, values[name]) for name in group["param_names"]]} for group in groups]
    by_vadam = groups[0].get("algorithm") == "vadam" or groups[0].get("hess_approx") == "fisher"
    optimizer = VAdam(params, num_examples=1) if by_vadam else IVON(params, lr=1.0, ess=1.0)
    optimizer.load_state_dict(saved)
    posterior = snapshot_posterior(optimizer)
    for name, mask in posterior.rank_mask.items():  # masked and zero: pruned for good, and without noise
        dim = int(tensor_name(name).part.endswith("B"))
        mean, std = (x.transpose(0, dim) for x in (posterior.mean[name], posterior.std[name]))
        std[~mask & ~mean.flatten(1).any(1)] = 0.0
    return posterior
