"""What a folder holds: a run of `ivon-lora finetune`, or an adapter with its posterior or optimizer beside it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora import IVON, PosteriorFile, VAdam, load_posterior, snapshot_posterior
from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.export.saved import read_adapter

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
POSTERIORS = ("posterior.safetensors", "ivon_posterior.safetensors")
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0.bin")
#: what the verbs read of a report
REPORT = {"settings": dict, "results": list, "ranks": dict, "history": dict}
FACTOR = re.compile(r"^(?P<layer>.+)\.lora_(?:embedding_)?(?P<factor>[ABE])(?:\.weight)?$")


@dataclass(frozen=True, eq=False)
class SavedRun:
    """What was found; ``tensors`` are the adapter's, by name without the wrapper's path and the adapter's name.

    The posterior of a run is that of the adapter before pruned ranks were dropped.
    """

    report: dict[str, Any] | None
    adapter_folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    posterior: PosteriorFile | None

    def ranks(self) -> dict[str, int]:
        """Live ranks by path of the layer: of the posterior's masks, or those whose product is not exactly zero."""
        if self.report is not None:
            return dict(self.report["ranks"])
        masks = {} if self.posterior is None else {plain(n): m for n, m in self.posterior.rank_mask.items()}
        live: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            if match := FACTOR.match(name):
                rows = tensor.transpose(0, 1) if match["factor"] == "B" else tensor
                alive = masks.get(name, rows.flatten(1).any(1))
                live[match["layer"]] = live.get(match["layer"], True) & alive
        return {layer: int(alive.sum()) for layer, alive in live.items()}


def read_run(folder: Path, posterior: Path | None = None, optimizer: Path | None = None) -> SavedRun:
    """Read the --out of a run, or an adapter directory such as a checkpoint of the Trainer.

    Posterior (of `save_posterior`) and optimizer (the saved ``state_dict()`` of an `IVON` whose parameters were given
    with their names) are looked for beside the adapter unless they are given.

    Raises:
        InputError: it is neither, or a file cannot be used.
    """
    report = _read_report(folder / "report.json")
    adapter = folder if report is None else folder / "adapter"
    if not (adapter / CONFIG).is_file():
        raise InputError(f"{folder}: no {CONFIG} and no report.json; give an adapter directory, or a finished run")
    with input_errors(adapter):
        read_adapter(adapter)  # checks what is there
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        tensors = {plain(name): tensor for name, tensor in _read_weights(adapter).items()}
        if not any(map(FACTOR.match, tensors)):
            raise ValueError("the file of weights has no LoRA tensors")
    known = None
    if file := posterior or _beside(folder, POSTERIORS):
        with input_errors(file):
            known = load_posterior(file)
    elif file := optimizer or _beside(folder, OPTIMIZERS):
        known = _posterior_of_state(file, tensors, asked_for=optimizer is not None)
    return SavedRun(report, adapter, config, tensors, known)


def plain(name: str) -> str:
    """A parameter's name without what PEFT adds: the wrapper's path and the name of the adapter."""
    name = re.sub(r"\.modules_to_save\.[^.]+", "", name.removeprefix("base_model.model."))
    return re.sub(r"(\.lora_(?:embedding_)?[ABE])\.(?!weight$|bias$)[^.]+", r"\1", name)


def _beside(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_report(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    with input_errors(path):
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(report[key], kind) for key, kind in REPORT.items()):
            raise ValueError("not a report of ivon-lora finetune")
    return report


def _read_weights(adapter: Path) -> dict[str, Tensor]:
    file = _beside(adapter, WEIGHTS)
    if file is None:
        raise ValueError(f"no {WEIGHTS[0]}: give a directory that PEFT's save_pretrained wrote")
    if file.suffix == ".bin":
        loaded: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return loaded
    from safetensors.torch import load_file

    return load_file(file)


def _posterior_of_state(path: Path, tensors: dict[str, Tensor], asked_for: bool) -> PosteriorFile | None:
    """The posterior in the saved state of an `IVON`; the means of fp32 parameters are the tensors of the adapter.

    None if the file is of another optimizer and was not asked for.
    """
    with input_errors(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        groups = saved["param_groups"]
        if any("ess" not in group for group in groups):
            if not asked_for:
                return None
            raise ValueError("not the state of an IVON: save optimizer.state_dict() of the one that trained")
        if any("param_names" not in group for group in groups):
            raise ValueError("it does not name its parameters: build IVON(model.named_parameters(), ...)")
        named = [[(name, nn.Parameter(tensors[plain(name)])) for name in group["param_names"]] for group in groups]
        params: list[Any] = [{"params": params} for params in named]
        by_vadam = groups[0].get("algorithm") == "vadam" or groups[0].get("hess_approx") == "fisher"
        optimizer = VAdam(params, num_examples=1) if by_vadam else IVON(params, lr=1.0, ess=1.0)
        optimizer.load_state_dict(saved)
        posterior = snapshot_posterior(optimizer)
        for name, mask in posterior.rank_mask.items():  # masked and zero: pruned for good, and without noise
            dim = 1 if FACTOR.match(plain(name))["factor"] == "B" else 0  # type: ignore[index]
            mean, std = (x.transpose(0, dim) for x in (posterior.mean[name], posterior.std[name]))
            std[~mask & ~mean.flatten(1).any(1)] = 0.0
    return posterior
