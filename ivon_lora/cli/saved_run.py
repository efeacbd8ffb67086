"""What a folder holds: a run of `ivon-lora finetune`, or an adapter with its posterior or optimizer beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ivon_lora.export.saved import CONFIG_FILE, SavedAdapter, read_adapter
from ivon_lora.finetune.errors import InputError, one_line
from ivon_lora.functional.ivon import posterior_std
from ivon_lora.posterior.posterior import DEFAULT_NAME, PosteriorFile, load_posterior

__all__ = ["SavedRun", "read_run"]

POSTERIORS = ("posterior.safetensors", DEFAULT_NAME)
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0.bin")


@dataclass(frozen=True, eq=False)
class SavedRun:
    """What was found.

    Attributes:
        folder: as given.
        report: report.json of `ivon-lora finetune`, or None.
        adapter_folder: where the adapter is.
        adapter: the adapter as saved.
        posterior: mean and standard deviation, or None. Of a run it is that of the adapter before pruned ranks were
            dropped.
    """

    folder: Path
    report: dict[str, Any] | None
    adapter_folder: Path
    adapter: SavedAdapter
    posterior: PosteriorFile | None

    def ranks(self) -> dict[str, int]:
        """Live ranks by path of the layer."""
        if self.report is not None:
            ranks: dict[str, int] = self.report["ranks"]
            return ranks
        if self.posterior is not None and self.posterior.rank_mask:
            try:
                return self.adapter.with_posterior(self.posterior).ranks()
            except ValueError as error:
                raise InputError(one_line(error, 400)) from error
        return self.adapter.ranks()


def read_run(folder: Path, posterior: Path | None = None, optimizer: Path | None = None) -> SavedRun:
    """Read a folder; posterior and optimizer are looked for beside the adapter unless they are given.

    Args:
        folder: the --out of a run, or an adapter directory such as a checkpoint of the Trainer.
        posterior: a file of `save_posterior`.
        optimizer: the saved ``state_dict()`` of an `IVON` whose parameters were given with their names.

    Raises:
        InputError: it is neither, or a file cannot be used.
    """
    report = _report(folder / "report.json")
    adapter_folder = folder / "adapter" if report is not None else folder
    if not (adapter_folder / CONFIG_FILE).is_file():
        raise InputError(
            f"{folder}: no {CONFIG_FILE} and no report.json; give an adapter directory, or the --out of a finished run"
        )
    try:
        adapter = read_adapter(adapter_folder)
        found = posterior or next((folder / name for name in POSTERIORS if (folder / name).is_file()), None)
        if found is not None:
            return SavedRun(folder, report, adapter_folder, adapter, load_posterior(found))
        state = optimizer or next((folder / name for name in OPTIMIZERS if (folder / name).is_file()), None)
        known = None if state is None else posterior_of_checkpoint(state, adapter, asked_for=optimizer is not None)
    except (ValueError, ImportError, OSError) as error:
        raise InputError(one_line(error, 400)) from error
    return SavedRun(folder, report, adapter_folder, adapter, known)


def posterior_of_checkpoint(path: Path, adapter: SavedAdapter, asked_for: bool = True) -> PosteriorFile | None:
    """The posterior in the saved state of an `IVON`; the means of fp32 parameters are the tensors of ``adapter``.

    Returns:
        None if the file is of another optimizer and was not asked for.

    Raises:
        ValueError: the file is damaged, of another optimizer, or has no names of parameters.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give the optimizer's saved state_dict()") from None
    except Exception as error:  # torch and pickle raise what they like for a file that is none of theirs
        raise ValueError(f"{path} is not a saved state_dict ({one_line(error, 80)})") from error
    groups = saved.get("param_groups", []) if isinstance(saved, dict) else []
    if not groups or any("ess" not in group for group in groups):
        if asked_for:
            raise ValueError(f"{path} is not the state of an IVON: save optimizer.state_dict() of the one that trained")
        return None
    if any("param_names" not in group for group in groups):
        raise ValueError(
            f"{path} does not name its parameters: build IVON(model.named_parameters(), ...), or use save_posterior"
        )
    mean: dict[str, Tensor] = {}
    std: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for group in groups:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            state = saved["state"].get(index, {})
            value = state.get("mean", adapter.tensor(name))
            if value is None or "hess" not in state or value.shape != state["hess"].shape:
                continue
            mean[name] = value.to(state["hess"].dtype)
            decay = float(state["weight_decay"]) if group.get("prior") == "empirical" else float(group["weight_decay"])
            std[name] = posterior_std(state["hess"], float(group["ess"]), decay)
            if "rank_mask" in state:
                masks[name] = state["rank_mask"].bool()
                std[name] = torch.where(_pruned_for_good(name, mean[name], masks[name]), 0.0, std[name])
    if not mean:
        raise ValueError(f"{path} and the adapter have no parameter in common")
    described = tuple(_described(group, saved["state"], mean) for group in groups)
    counts = {key: int(groups[0].get(key, 0)) for key in ("seed", "completed_steps")}
    return PosteriorFile(tuple(mean), mean, std, masks, described, version="", **counts)


def _described(group: dict[str, Any], states: dict[int, Any], mean: dict[str, Tensor]) -> dict[str, Any]:
    """The entry of `PosteriorFile.groups` of a saved parameter group."""
    indices = {name: i for i, name in zip(group["params"], group["param_names"], strict=True) if name in mean}
    found = {"names": list(indices), "ess": group["ess"], "weight_decay": group["weight_decay"]}
    if group.get("prior") == "empirical":
        found["weight_decays"] = {name: float(states[i]["weight_decay"]) for name, i in indices.items()}
    return found


def _pruned_for_good(name: str, mean: Tensor, mask: Tensor) -> Tensor:
    """Where a masked rank is zero in all of a tensor, it is no longer sampled either."""
    dim = 1 if ".lora_B." in name or ".lora_embedding_B." in name else 0
    others = [d for d in range(mean.dim()) if d != dim]
    dead = ~mask & ((mean == 0).all(dim=others) if others else mean == 0)
    return dead.reshape([-1 if d == dim else 1 for d in range(mean.dim())]).expand_as(mean)


def _report(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in ("settings", "results", "ranks", "history") if name not in report]
    except (OSError, ValueError, TypeError):
        missing = ["everything"]
    if missing:
        raise InputError(f"{path} is not a report of ivon-lora finetune; give the --out of a finished run")
    return report
