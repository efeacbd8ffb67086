"""An adapter directory as PEFT saved it, read and exported without the base model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ivon_lora.export.layout import PREFIX
from ivon_lora.export.plan import contributing_ranks
from ivon_lora.export.verify import consumer_rank_and_scale

if TYPE_CHECKING:
    from ivon_lora.posterior.posterior import PosteriorFile

__all__ = ["SavedAdapter", "read_adapter", "skeleton"]

CONFIG_FILE, WEIGHTS_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
#: `base_model.model.encoder.layer.0.query.lora_A.weight`, with or without the name of the adapter, and its relatives
KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<layer>.+)\.(?P<part>lora_(?:embedding_)?[ABE]|lora_magnitude_vector)"
    r"(?P<adapter>\.(?!weight$|bias$)[^.]+)?(?P<bias>\.bias)?(?:\.weight)?$"
)
#: settings that make a layer more than a product of two matrices
INEXACT = ("use_qalora", "kasa_config", "use_bdlora", "arrow_config", "monteclora_config", "target_parameters")


@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """The files of a LoRA or AdaLoRA adapter.

    Attributes:
        config: adapter_config.json.
        layers: path of the layer in the base model -> its tensors: ``lora_A``, ``lora_B``, ``lora_E`` (AdaLoRA),
            ``lora_embedding_A``, ``lora_embedding_B``, ``lora_magnitude_vector``, ``lora_B.bias``.
        extras: all other tensors, by path in the base model (a head that was trained whole).
        masks: path -> bool (rank,), False for pruned ranks, where a posterior knows them.
    """

    config: dict[str, Any]
    layers: dict[str, dict[str, Tensor]]
    extras: dict[str, Tensor]
    masks: dict[str, Tensor]

    def ranks(self) -> dict[str, int]:
        """Live ranks by path of the layer: of the mask, or else those whose product is not exactly zero."""
        return {name: int(self.live(name).sum()) for name in self.layers}

    def live(self, name: str) -> Tensor:
        """Live ranks of one layer, bool (rank,)."""
        a, b, e = self.factors(name)
        return self.masks[name] if name in self.masks else contributing_ranks(a, b, e)

    def factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and, in AdaLoRA layers, E."""
        tensors = self.layers[name]
        prefix = "lora_embedding_" if "lora_embedding_A" in tensors else "lora_"
        return tensors[prefix + "A"], tensors[prefix + "B"], tensors.get("lora_E")

    def tensor(self, name: str) -> Tensor | None:
        """The saved tensor of a parameter, by its name in the PeftModel; None if it is not in the files."""
        match = KEY.match(name)
        if match is None or match["layer"] not in self.layers:
            return self.extras.get(re.sub(r"\.modules_to_save\.[^.]+", "", name).removeprefix(PREFIX))
        return self.layers[match["layer"]].get(match["part"] + (match["bias"] or ""))

    def with_posterior(self, posterior: PosteriorFile) -> SavedAdapter:
        """The posterior's means in the place of the saved tensors, and its rank masks.

        Raises:
            ValueError: the posterior does not fit this adapter.
        """
        layers = {name: dict(tensors) for name, tensors in self.layers.items()}
        masks, used = dict(self.masks), 0
        for name in posterior.names:
            match = KEY.match(name)
            if match is None or match["layer"] not in layers:
                continue
            layer, part = match["layer"], match["part"] + (match["bias"] or "")
            mean = posterior.mean[name]
            if part not in layers[layer] or layers[layer][part].shape != mean.shape:
                shape = "no such tensor" if part not in layers[layer] else tuple(layers[layer][part].shape)
                raise ValueError(
                    f"the posterior does not fit the adapter: {name!r} has shape {tuple(mean.shape)} there, "
                    f"{shape} here; an exported adapter has lost its pruned ranks already and needs no posterior"
                )
            layers[layer][part] = mean.to(layers[layer][part].dtype)
            used += 1
            if name in posterior.rank_mask:
                masks[layer] = posterior.rank_mask[name]
        if not used:
            raise ValueError("the posterior does not fit the adapter: they have no tensor in common")
        return replace(self, layers=layers, masks=masks)


def read_adapter(folder: str | os.PathLike[str]) -> SavedAdapter:
    """Read adapter_config.json and its weights.

    Raises:
        ValueError: a file is missing or damaged, or the adapter is neither LoRA nor AdaLoRA.
        ImportError: if safetensors is missing.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{folder / CONFIG_FILE} cannot be read ({error.strerror}): give an adapter directory"
        ) from None
    except ValueError:
        raise ValueError(f"{folder / CONFIG_FILE} is not JSON: save the adapter again") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in ("LORA", "ADALORA"):
        raise ValueError(f"{folder / CONFIG_FILE} is of an adapter of type {kind}: LORA and ADALORA are supported")
    layers: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for key, tensor in _tensors(folder).items():
        match = KEY.match(key)
        if match is None:
            extras[key.removeprefix(PREFIX)] = tensor
        else:
            layers.setdefault(match["layer"], {})[match["part"] + (match["bias"] or "")] = tensor
    for name, tensors in layers.items():
        if not ({"lora_A", "lora_B"} <= tensors.keys() or {"lora_embedding_A", "lora_embedding_B"} <= tensors.keys()):
            raise ValueError(f"{folder}: layer {name!r} lacks lora_A or lora_B: save the adapter again")
    if not layers:
        raise ValueError(f"{folder}: the file of weights has no LoRA tensors")
    return SavedAdapter(config, layers, extras, masks={})


def skeleton(saved: SavedAdapter) -> tuple[nn.Module, Any]:
    """A stand-in for the model, made of the adapter's tensors alone, and one for its optimizer, which has the masks.

    `export_lora` reads nothing else of them. One thing is not in the files: the kernel size of AdaLoRA on convolutions,
    which need the model itself.

    Raises:
        ValueError: the update is more than a product of matrices, biases of the base model were trained, or tensors
            and configuration differ in rank.
    """
    config = saved.config
    reasons = [name for name in INEXACT if config.get(name)]
    reasons += [f"bias={config['bias']!r}"] if config.get("bias", "none") != "none" else []
    if reasons:
        raise ValueError(
            f"an adapter with {', '.join(reasons)} cannot be exported from its files alone: load the model and use "
            "export_lora(model, ...)"
        )
    root = _Node()
    root.peft_config = {"default": SimpleNamespace(**config)}  # type: ignore[assignment]
    state: dict[Tensor, dict[str, Tensor]] = {}
    for name, tensors in saved.layers.items():
        rank = saved.factors(name)[0].shape[0]
        if rank == 0:  # as PEFT saves a layer from which AdaLoRA took everything
            continue
        layer = _descend(root, name)
        for part, tensor in tensors.items():
            if part != "lora_B.bias":
                layer.add_module(part, _factor(tensor, tensors.get("lora_B.bias") if part == "lora_B" else None))
        layer.scaling, ranknum = _scaling(config, name, rank)
        if ranknum is not None:
            layer.add_module("ranknum", _factor(ranknum, None))
        if name in saved.masks:
            state.update((p, {"rank_mask": saved.masks[name]}) for p in layer.parameters(recurse=True))
    for key, tensor in saved.extras.items():
        path, _, field = key.rpartition(".")
        _descend(root, path).saved[field] = tensor
    return root, SimpleNamespace(param_groups=[{"params": list(state)}], state=state)


def _scaling(config: Mapping[str, Any], name: str, rank: int) -> tuple[dict[str, float], Tensor | None]:
    """PEFT's `scaling` of a layer, and for AdaLoRA `ranknum`: the initial rank, whatever ranks survived."""
    if config["peft_type"] == "ADALORA":
        alpha = float(config.get("lora_alpha", 1))
        return {"default": alpha if alpha > 0 else float(config["init_r"])}, torch.tensor(float(config["init_r"]))
    declared, scale = consumer_rank_and_scale(config, name)
    if declared != rank:
        raise ValueError(f"layer {name!r} has rank {rank}, its configuration says {declared}: save the adapter again")
    return {"default": float(scale)}, None


class _Node(nn.Module):
    """A place in the tree of modules; the tensors in ``saved`` are trained ones that are no LoRA factors."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[str, Tensor] = {}

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As PEFT's wrappers around modules that are trained whole."""
        return self.saved


def _descend(root: nn.Module, path: str) -> Any:
    """The node at ``path``, made if it is not there."""
    node = root
    for name in path.split(".") if path else ():
        if name not in node._modules:
            node.add_module(name, _Node())
        node = node._modules[name]  # type: ignore[assignment]
    return node


def _factor(tensor: Tensor, bias: Tensor | None) -> nn.Module:
    """A tensor as PEFT keeps it: a parameter, or with a bias a module."""
    weight = nn.Parameter(tensor, requires_grad=False)
    if bias is None:
        return nn.ParameterDict({"default": weight})
    holder = nn.Module()
    holder.weight, holder.bias = weight, nn.Parameter(bias, requires_grad=False)
    return nn.ModuleDict({"default": holder})


def _tensors(folder: Path) -> dict[str, Tensor]:
    for name in WEIGHTS_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix == ".bin":
            loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
            return loaded
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError("reading an adapter needs safetensors: pip install 'ivon-lora[peft]'") from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged: {' '.join(str(error).split())}") from error
    raise ValueError(f"{folder} has no {WEIGHTS_FILES[0]}: give a directory that PEFT's save_pretrained wrote")
