"""Exact export: a plain PEFT LoRA adapter from any supported layer kind, or the base model with the update merged in.

PEFT, vLLM, llama.cpp and diffusers compute the scale of an adapter from different numbers (the rank of the
configuration, of a pattern, of the tensor). Here the scale is folded into B and alpha equals r, so all of them get 1.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ivon_lora.export.directory import check_target, replaced_directory
from ivon_lora.export.layout import LAYOUTS, PREFIX, adapter_config, adapter_tensors, file_ranks, tensor_keys
from ivon_lora.export.means import Means
from ivon_lora.export.merge import merge_lora
from ivon_lora.export.plan import PlannedLayer, plan_layers
from ivon_lora.export.saved import read_adapter, skeleton
from ivon_lora.export.source import Source, extra_tensors, find_source
from ivon_lora.export.verify import check_layer, consumer_rank_and_scale
from ivon_lora.optim.sharding import by_first, is_sharded

if TYPE_CHECKING:
    from ivon_lora.posterior.posterior import PosteriorFile

__all__ = ["ExportReport", "export_lora", "export_saved", "merge_lora"]

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: initialisations of PEFT that also change the frozen weights
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class ExportReport:
    """What `export_lora` wrote.

    Attributes:
        path: the adapter directory.
        layout: ``"uniform"`` or ``"compact"``.
        max_rank: largest rank in the file.
        ranks: surviving ranks by module path in the base model; 0 for a module that was left out.
        max_abs_error: max |delta' - delta| over all weights of all modules (units of the weights).
        bytes: size of the two files.
        suggestion: the flag a vLLM server needs, e.g. ``"--max-lora-rank 16"``.
        notes: what else a reader should know, e.g. a consumer that will refuse this adapter.
    """

    path: Path
    layout: str
    max_rank: int
    ranks: dict[str, int]
    max_abs_error: float
    bytes: int
    suggestion: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for people, and one for each note."""
        total, kept = sum(self.ranks.values()), sum(rank > 0 for rank in self.ranks.values())
        head = (
            f"{self.path}: {self.layout}, {total} ranks in {kept} of {len(self.ranks)} modules, {self.bytes} bytes, "
            f"max |delta' - delta| = {self.max_abs_error:.1e}; vllm serve {self.suggestion}"
        )
        return "\n".join([head, *(f"note: {note}" for note in self.notes)])


def export_lora(
    model: nn.Module,
    optimizer: Any | None,
    path: str | os.PathLike[str],
    layout: str = "uniform",
    adapter_name: str = "default",
) -> ExportReport:
    """Write the posterior mean of an adapter as a plain PEFT LoRA adapter directory, exactly and atomically.

    Pruned ranks are dropped, AdaLoRA's E and the scale (alpha / r, alpha / sqrt(r), ...) are folded into B, modules
    without ranks are left out. The files are read back and compared with the model before they replace anything.
    Files of other names in an existing directory stay. Under several processes, call it in one of them; if parameters
    are sharded (FSDP2), in all of them: the first one writes, and all get its report or its error.

    Args:
        model: a PeftModel, a model with injected adapters, or a wrapper around one (compiled, DDP).
        optimizer: the `IVON` that trained it (its means and rank masks are used, never a sample), or None: then only
            ranks that are exactly zero count as pruned.
        path: directory to write; made with its parents.
        layout: ``"uniform"`` pads all modules with zeros to one rank, which satisfies the scaling rules of PEFT, vLLM,
            llama.cpp and diffusers at once; ``"compact"`` keeps each module's own rank (`rank_pattern`): smallest, and
            right for PEFT, vLLM and present versions of diffusers, but not for llama.cpp.
        adapter_name: which adapter of the model.

    Returns:
        An `ExportReport`; `print` it.

    Raises:
        ValueError: unknown layout or adapter; no rank left anywhere; a layer that plain LoRA cannot express; a path
            that is a file; an update that is not reproduced to 1e-6 * max(1, max |delta|), or, in a 16-bit dtype, to
            its rounding. Nothing is written then.
        ImportError: if peft or safetensors is missing.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown: use 'uniform' or 'compact'")
    sharded = any(is_sharded(p) for p in model.parameters())
    target = by_first(sharded, lambda: check_target(path))
    means = Means(optimizer)
    source = find_source(model, adapter_name)
    layers = plan_layers(source.base, means, adapter_name)
    ranks = file_ranks(layers, layout)
    if not ranks:
        raise ValueError(
            f"adapter {adapter_name!r} has no rank left in any of its {len(layers)} modules (an untrained adapter is "
            "zero): there is nothing to export, use the base model"
        )
    config = adapter_config(source, ranks)
    tensors = adapter_tensors(layers, ranks)
    left_out = [layer.name for layer in layers if layer.target not in ranks]
    extras = extra_tensors(source, means, adapter_name, left_out)
    tensors.update({PREFIX + name: tensor.cpu().clone().contiguous() for name, tensor in extras.items()})
    notes = _notes(source, layers, config, extras)

    def write() -> tuple[float, int]:
        with replaced_directory(target) as fresh:
            _write(fresh, config, tensors)
            return _verify(fresh, layers), sum(file.stat().st_size for file in fresh.iterdir())

    error, size = by_first(sharded, write)
    report = ExportReport(
        path=target,
        layout=layout,
        max_rank=max(ranks.values()),
        ranks={layer.name: layer.rank for layer in layers},
        max_abs_error=error,
        bytes=size,
        suggestion=_suggestion(max(ranks.values())),
        notes=tuple(notes),
    )
    logger.info("%s", report)
    return report


def export_saved(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    layout: str = "uniform",
    posterior: PosteriorFile | None = None,
) -> ExportReport:
    """`export_lora` of an adapter that PEFT has saved, from its files alone: no base model is needed.

    Turns AdaLoRA, rsLoRA and DoRA adapters into plain ones, drops ranks that are exactly zero or masked, and changes
    the layout of an adapter that was exported before.

    Args:
        folder: what ``save_pretrained`` or `export_lora` wrote: a LoRA or AdaLoRA adapter. AdaLoRA on convolutions
            needs the model, because the files do not have the size of the kernel.
        path: directory to write; not ``folder`` itself if that is still needed.
        layout: as `export_lora`.
        posterior: of the same parameters; its means take the place of the saved tensors, and its masks say which
            ranks are pruned.

    Returns:
        An `ExportReport`.

    Raises:
        ValueError: as `export_lora`; files that are missing, damaged, of another kind of adapter, or that the
            posterior does not fit.
        ImportError: if peft or safetensors is missing.
    """
    saved = read_adapter(folder)
    model, masks = skeleton(saved if posterior is None else saved.with_posterior(posterior))
    return export_lora(model, masks, path, layout)


def _write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("export_lora needs safetensors: pip install 'ivon-lora[peft]'") from error
    save_file(dict(tensors), directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _verify(directory: Path, layers: Sequence[PlannedLayer]) -> float:
    """Read the files as a consumer does and return max |delta' - delta| over all layers."""
    from safetensors.torch import load_file

    config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    tensors = load_file(directory / WEIGHTS_FILE)
    worst = 0.0
    for layer in layers:
        a, b = (tensors.get(key) for key in tensor_keys(layer))
        rank, scale = consumer_rank_and_scale(config, layer.target)
        if a is not None and a.shape[0] != rank:
            raise ValueError(f"layer {layer.name!r}: the file has rank {a.shape[0]}, its configuration {rank}")
        worst = max(worst, check_layer(layer, a, b, scale))
    return worst


def _suggestion(rank: int) -> str:
    size = next((size for size in VLLM_RANKS if size >= rank), None)
    return f"--max-lora-rank {size or rank}"


def _notes(
    source: Source, layers: Sequence[PlannedLayer], config: Mapping[str, Any], extras: Mapping[str, Tensor]
) -> list[str]:
    notes: list[str] = []
    doubts: list[str] = []
    if config["r"] > VLLM_RANKS[-1]:
        notes.append(f"vLLM serves ranks up to {VLLM_RANKS[-1]}, this adapter has {config['r']}")
    reasons = [name for name in ("use_dora", "lora_bias") if config.get(name)]
    reasons += ["modules_to_save or trained biases"] if extras else []
    if reasons:
        notes.append(f"vLLM and llama.cpp refuse adapters with {', '.join(reasons)}: give them a merged model")
    initialisation = str(source.config_value("init_lora_weights", True)).lower()
    if initialisation.startswith(CHANGED_BASE):
        doubts.append(
            f"init_lora_weights={initialisation!r} changed the frozen weights: this adapter belongs to the changed "
            "base model, save that too or use merge_lora(...)"
        )
    dropped = max(layers, key=lambda layer: layer.dropped)
    if dropped.dropped > 0:
        doubts.append(
            f"pruning is not final: masked ranks still made an update of up to {dropped.dropped:.3g} "
            f"(in {dropped.name}), which the export drops; train through the final phase first"
        )
    for doubt in doubts:
        warnings.warn(doubt, UserWarning, stacklevel=3)
    return notes + doubts
