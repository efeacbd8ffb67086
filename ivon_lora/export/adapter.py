"""Exact export: a plain PEFT LoRA adapter from any supported layer kind, or the base model with the update merged in.

PEFT, vLLM, llama.cpp and diffusers compute the scale of an adapter from different numbers (the rank of the
configuration, of a pattern, of the tensor). Here the scale is folded into B and alpha equals r, so all of them get 1.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ivon_lora.export.changed_base import on_original_base
from ivon_lora.export.contents import Adapter
from ivon_lora.export.directory import check_target, replaced_directory
from ivon_lora.export.layout import adapter_config, check_layout, diffusers_prefix, file_ranks, file_tensors
from ivon_lora.export.merge import merge_lora
from ivon_lora.export.read_model import read_model
from ivon_lora.export.read_saved import check_files_suffice, read_adapter
from ivon_lora.export.verify import verify
from ivon_lora.lora.config import CONFIG_FILE
from ivon_lora.optim.sharding import by_first, is_sharded
from ivon_lora.optim.wrappers import unwrap
from ivon_lora.posterior.posterior import PosteriorFile, snapshot_posterior, unwrapped
from ivon_lora.posterior.tensor_file import write_tensors

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

__all__ = ["ExportReport", "export_lora", "export_samples", "export_saved", "merge_lora"]

logger = logging.getLogger(__name__)

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportReport:
    """What `export_lora` wrote; `print` it.

    Attributes:
        path: the adapter directory.
        layout: ``"uniform"``, ``"compact"`` or ``"gguf"``.
        max_rank: largest rank in the file.
        ranks: surviving ranks by module path in the base model; 0 for a module that was left out.
        max_abs_error: max |delta' - delta| over all weights of all modules (units of the weights).
        bytes: size of the files.
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
    *,
    base: nn.Module | None = None,
) -> ExportReport:
    """Write the posterior mean of an adapter as a plain PEFT LoRA adapter directory, exactly and atomically.

    Pruned ranks are dropped, AdaLoRA's E and the scale (alpha / r, alpha / sqrt(r), ...) are folded into B, modules
    without ranks are left out; what was trained whole goes along. The files are read back and compared with the model
    before they replace anything; other files in an existing directory stay. docs/export.md says what loads the result.
    Under several processes, call it in one; if parameters are sharded (FSDP2), in all: the first one writes.

    Args:
        model: a PeftModel, a model with injected adapters, or a wrapper around one (compiled, checkpointed, DDP).
        optimizer: the `IVON` that trained it (its means and rank masks are used, never a sample), or None: then only
            ranks that are exactly zero count as pruned.
        path: directory to write; made with its parents.
        layout: ``"uniform"`` pads all modules with zeros to one rank, which is right for every consumer; ``"compact"``
            keeps each module's own rank: smallest, but wrong for llama.cpp; ``"gguf"`` is as small, and right for PEFT,
            transformers and llama.cpp, but not for vLLM.
        adapter_name: which adapter of the model.
        base: the base model as it was before ``get_peft_model``, where PEFT has changed its weights
            (``init_lora_weights`` of PiSSA, OLoRA, CorDA, LoRA-GA): the export is then an update of that, with up to
            twice the rank.

    Raises:
        ValueError: unknown layout or adapter; several PEFT models inside ``model``; no rank left anywhere; a layer that
            plain LoRA cannot express; a number that is not finite; a path that is a file; ``base`` is missing where
            PEFT has changed it; an update that is not reproduced to 1e-6 * max(1, max |delta|), or, in a 16-bit dtype,
            to its rounding. Nothing is written then.
        ImportError: if peft or safetensors is missing.
    """
    check_layout(layout)
    sharded = any(is_sharded(p) for p in model.parameters())
    target = by_first(sharded, lambda: check_target(path))
    adapter = on_original_base(read_model(model, optimizer, adapter_name), base)
    ivon = unwrap(optimizer)
    unfinished = ivon.pruner.unfinished(ivon.completed_steps) if ivon is not None and ivon.pruner is not None else None
    return _export(adapter, target, layout, sharded, unfinished)


def export_samples(
    model: nn.Module,
    posterior: IVON | PosteriorFile,
    path: str | os.PathLike[str],
    n_samples: int,
    layout: str = "uniform",
    adapter_name: str = "default",
) -> list[ExportReport]:
    """`export_lora` of posterior samples, each as an adapter: an ensemble for servers that hold several adapters.

    Average the *probabilities* of their answers. The mean is no part of it; `export_lora` writes that.

    Args:
        model, layout, adapter_name: as `export_lora`; the model holds what it held before afterwards.
        posterior: the optimizer that trained it, or the posterior of `load_posterior`.
        path: directory of the directories ``sample-0``, ``sample-1`` ...
        n_samples: how many; draws 0, 1, ... of the posterior's seed.

    Raises:
        ValueError: as `export_lora`, or ``n_samples`` is less than 1.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")
    if not isinstance(posterior, PosteriorFile):
        unwrapped(posterior).eval()
        posterior = snapshot_posterior(posterior, model=model)
    reports = []
    for k in range(n_samples):
        with posterior.loaded(model, posterior.sample(posterior.seed, k)):
            reports.append(export_lora(model, None, Path(path) / f"sample-{k}", layout, adapter_name))
    return reports


def export_saved(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    layout: str = "uniform",
    posterior: PosteriorFile | None = None,
) -> ExportReport:
    """`export_lora` of an adapter that PEFT has saved, from its files alone: no base model is needed.

    Turns AdaLoRA, rsLoRA and DoRA adapters, and raw training states (``lora_A.default``, ``_orig_mod``, ``module``),
    into plain adapters, drops ranks that are exactly zero or masked, and changes the layout of an earlier export.

    Args:
        folder: what ``save_pretrained`` or `export_lora` wrote: a LoRA or AdaLoRA adapter. AdaLoRA on convolutions
            needs the model, because the files do not have the size of the kernel.
        path, layout: as `export_lora`; another directory than ``folder`` if that is still needed.
        posterior: of the same parameters; its means take the place of the saved tensors, its masks prune ranks.

    Raises:
        ValueError, ImportError: as `export_lora`; or files are missing, damaged, of another kind of adapter, or the
            posterior does not fit them.
    """
    check_layout(layout)
    target, adapter = check_target(path), read_adapter(folder, posterior)
    check_files_suffice(adapter)
    return _export(adapter, target, layout)


def _export(
    adapter: Adapter, target: Path, layout: str, sharded: bool = False, unfinished: str | None = None
) -> ExportReport:
    layers = adapter.layers
    ranks = file_ranks(layers, layout) or ({layers[0].target: 1} if adapter.extras else {})  # PEFT needs a layer
    if not ranks:
        raise ValueError(
            f"the adapter has no rank left in any of its {len(layers)} modules (an untrained adapter is zero): there "
            "is nothing to export, use the base model"
        )
    config = adapter_config(adapter, ranks, layout)
    files, largest = file_tensors(adapter, ranks, config), max(ranks.values())

    def write() -> tuple[float, int]:
        with replaced_directory(target) as fresh:
            for name, tensors in files.items():
                write_tensors(fresh / name, tensors, {"format": "pt"})
            (fresh / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            return verify(fresh, layers, files), sum(file.stat().st_size for file in fresh.iterdir())

    error, size = by_first(sharded, write)
    flag = f"--max-lora-rank {next((allowed for allowed in VLLM_RANKS if allowed >= largest), largest)}"
    notes = (*_notes(adapter, config, layout), *([unfinished] if unfinished else []))
    report = ExportReport(target, layout, largest, adapter.ranks, error, size, flag, notes)
    logger.info("%s", report)
    return report


def _notes(adapter: Adapter, config: Mapping[str, Any], layout: str) -> list[str]:
    of_diffusers, rank = diffusers_prefix(config) is not None, config["r"]
    unread = [name for name in ("use_dora", "lora_bias", "target_parameters") if config.get(name)]
    unread += ["convolutions"] if any(layer.A.dim() > 2 for layer in adapter.layers) else []
    unread = [] if of_diffusers else unread
    unread += ["tensors that are no LoRA factors (heads, biases, rows of a vocabulary)"] if adapter.extras else []
    notes = [f"vLLM serves ranks up to {VLLM_RANKS[-1]}, this adapter has {rank}"] if rank > VLLM_RANKS[-1] else []
    if unread:
        who = "diffusers ignores" if of_diffusers else "vLLM and llama.cpp refuse or ignore"
        notes.append(f"{who} {', '.join(unread)}: merge_lora(...) makes a model of all")
    elif not of_diffusers and (layout == "gguf" or config["rank_pattern"]):
        who, other = ("vLLM", "compact") if layout == "gguf" else ("llama.cpp", "gguf")
        notes.append(f"{who} gives layers of this layout wrong scales, without a word: use {other!r} or 'uniform'")
    worst = max(adapter.layers, key=lambda layer: layer.dropped)
    if worst.dropped > 0:
        notes.append(
            f"pruning is not final: masked ranks still made an update of up to {worst.dropped:.3g} "
            f"(in {worst.key}), which the export drops; train through the final phase first"
        )
        warnings.warn(notes[-1], UserWarning, stacklevel=4)
    return notes
