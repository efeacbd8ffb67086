"""What a folder holds: a run of `ivon-lora finetune`, or an adapter with its posterior or optimizer beside it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ivon_lora import PosteriorFile, load_posterior
from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.functional.ivon import posterior_std

__all__ = ["SavedRun", "read_run"]

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
POSTERIORS = ("posterior.safetensors", "ivon_posterior.safetensors")
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0.bin")
#: keys of a report that the verbs read
REPORT = {"settings": dict, "results": list, "ranks": dict, "history": dict}
FACTOR = re.compile(r"^(?P<layer>.+)\.lora_(?:embedding_)?(?P<factor>[ABE])(?:\.weight)?$")


@dataclass(frozen=True, eq=False)
class SavedRun:
    """What was found.

    Attributes:
        folder: as given.
        report: report.json of `ivon-lora finetune`, or None.
        adapter_folder: where the adapter is.
        config: its adapter_config.json.
        tensors: its weights, by name without what PEFT puts before and into it.
        posterior: mean and standard deviation, or None. Of a run it is that of the adapter before pruned ranks were
            dropped.
    """

    folder: Path
    report: dict[str, Any] | None
    adapter_folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    posterior: PosteriorFile | None

    def ranks(self) -> dict[str, int]:
        """Live ranks by path of the layer: of the posterior's masks, or those whose product is not exactly zero."""
        if self.report is not None:
            return dict(self.report["ranks"])
        masks = {} if self.posterior is None else {_plain(n): m for n, m in self.posterior.rank_mask.items()}
        live: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            if match := FACTOR.match(name):
                rows = tensor.transpose(0, 1) if match["factor"] == "B" else tensor
                alive = masks[name] if name in masks else rows.flatten(1).any(1)
                before = live.get(match["layer"], alive)
                if before.shape != alive.shape:
                    raise InputError(
                        f"{self.adapter_folder}: ranks of {match['layer']!r} differ; is it another adapter's?"
                    )
                live[match["layer"]] = before & alive
        return {layer: int(alive.sum()) for layer, alive in live.items()}


def read_run(folder: Path, posterior: Path | None = None, optimizer: Path | None = None) -> SavedRun:
    """Read a folder; posterior and optimizer are looked for beside the adapter unless they are given.

    Args:
        folder: the --out of a run, or an adapter directory such as a checkpoint of the Trainer.
        posterior: a file of `save_posterior`.
        optimizer: the saved ``state_dict()`` of an `IVON` whose parameters were given with their names.

    Raises:
        InputError: it is neither, or a file cannot be used.
    """
    report = _read_report(folder / "report.json")
    adapter = folder / "adapter" if report is not None else folder
    if not (adapter / CONFIG).is_file():
        raise InputError(f"{folder}: no {CONFIG} and no report.json; give an adapter directory, or a finished run")
    with input_errors(adapter):
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        if config["peft_type"] not in ("LORA", "ADALORA"):
            raise InputError(f"{adapter / CONFIG} is of type {config['peft_type']}: LORA and ADALORA are supported")
        tensors = {_plain(name): tensor for name, tensor in _read_weights(adapter).items()}
        if not any(map(FACTOR.match, tensors)):
            raise InputError(f"{adapter}: the file of weights has no LoRA tensors")
    known = None
    if file := posterior or _beside(folder, POSTERIORS):
        with input_errors(file):
            known = load_posterior(file)
    elif file := optimizer or _beside(folder, OPTIMIZERS):
        known = _posterior_of_state(file, tensors, asked_for=optimizer is not None)
    return SavedRun(folder, report, adapter, config, tensors, known)


def _read_report(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    with input_errors(f"{path} cannot be read"):
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict) or not all(isinstance(report.get(key), kind) for key, kind in REPORT.items()):
        raise InputError(f"{path} is not a report of ivon-lora finetune; give the --out of a finished run")
    return report


def _read_weights(adapter: Path) -> dict[str, Tensor]:
    file = _beside(adapter, WEIGHTS)
    if file is None:
        raise InputError(f"{adapter} has no {WEIGHTS[0]}: give a directory that PEFT's save_pretrained wrote")
    if file.suffix == ".bin":
        loaded: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return loaded
    from safetensors.torch import load_file

    return load_file(file)


def _beside(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _posterior_of_state(path: Path, tensors: dict[str, Tensor], asked_for: bool) -> PosteriorFile | None:
    """The posterior in the saved state of an `IVON`; the means of fp32 parameters are the tensors of the adapter.

    Returns:
        None if the file is of another optimizer and was not asked for.

    Raises:
        InputError: the file is damaged, of another optimizer, or has no names of parameters.
    """
    with input_errors(f"{path} is not a saved state_dict"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        groups, states = saved["param_groups"], saved["state"]
        is_ivon = bool(groups) and all("ess" in group for group in groups)
    if not is_ivon and not asked_for:
        return None
    if not is_ivon:
        raise InputError(f"{path} is not the state of an IVON: save optimizer.state_dict() of the one that trained")
    if any("param_names" not in group for group in groups):
        raise InputError(f"{path} does not name its parameters: build IVON(model.named_parameters(), ...)")
    mean: dict[str, Tensor] = {}
    std: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    described = []
    with input_errors(f"{path} does not fit the adapter"):
        for group in groups:
            decays: dict[str, float] = {}
            for index, name in zip(group["params"], group["param_names"], strict=True):
                state = states.get(index, {})
                value = state.get("mean", tensors.get(_plain(name)))
                if value is None or "hess" not in state or value.shape != state["hess"].shape:
                    continue
                decays[name] = float(state.get("weight_decay", group["weight_decay"]))
                mean[name] = value.to(state["hess"].dtype)
                std[name] = posterior_std(state["hess"], float(group["ess"]), decays[name])
                if "rank_mask" in state:
                    masks[name] = state["rank_mask"].bool()
                    std[name] = torch.where(_pruned_for_good(name, mean[name], masks[name]), 0.0, std[name])
            entry = {"names": list(decays), "ess": group["ess"], "weight_decay": group["weight_decay"]}
            described.append(entry | ({"weight_decays": decays} if group.get("prior") == "empirical" else {}))
        if not mean:
            raise ValueError("they have no parameter in common")
        counts = {key: int(groups[0].get(key, 0)) for key in ("seed", "completed_steps")}
    return PosteriorFile(tuple(mean), mean, std, masks, tuple(described), version="", **counts)


def _pruned_for_good(name: str, mean: Tensor, mask: Tensor) -> Tensor:
    """Where a masked rank is zero in all of a tensor, it is no longer sampled either."""
    dim = 1 if ".lora_B." in name or ".lora_embedding_B." in name else 0
    rows = mean.transpose(0, dim)
    dead = ~mask & ~rows.flatten(1).any(1)
    return dead.reshape(-1, *[1] * (rows.dim() - 1)).expand_as(rows).transpose(0, dim)


def _plain(name: str) -> str:
    """A parameter's name without the parts that PEFT adds: the wrapper's path and the name of the adapter."""
    name = re.sub(r"\.modules_to_save\.[^.]+", "", name.removeprefix("base_model.model."))
    return re.sub(r"(\.lora_(?:embedding_)?[ABE])\.(?!weight$|bias$)[^.]+", r"\1", name)
