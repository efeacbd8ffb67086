"""GeLoRA: LoRA ranks from the geometry of the hidden states, before training (arXiv:2412.09250).

A transformer block that takes hidden states of intrinsic dimension d_in to d_out gets the rank max(d_out - d_in, 0) + 1
in all its adapted layers, and all adapters have the same alpha / rank. Forward passes are enough: no labels, no
gradients. The paper says neither how it estimates dimensions nor from which vectors; here it is TwoNN
(`intrinsic_dimension`) on the hidden states of a random sample of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ivon_lora.variants.intrinsic_dimension import IntrinsicDimension, intrinsic_dimension

__all__ = ["GeloraBlock", "GeloraRanks", "gelora_ranks"]


@dataclass(frozen=True)
class GeloraBlock:
    """One transformer block.

    Attributes:
        name: path inside the model, e.g. ``"encoder.layer.0"``.
        d_in: intrinsic dimension of the hidden states that enter.
        d_out: intrinsic dimension of those that leave.
        rank: max(round(d_out - d_in), 0) + 1.
        modules: paths of the layers to adapt.
    """

    name: str
    d_in: IntrinsicDimension
    d_out: IntrinsicDimension
    rank: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class GeloraRanks:
    """What :func:`gelora_ranks` found, ready for PEFT: ``LoraConfig(**ranks.lora_arguments(), task_type=...)``.

    Attributes:
        blocks: in the order of the model.
        alpha_over_rank: the factor by which every adapter's product B A is multiplied (no unit).
    """

    blocks: tuple[GeloraBlock, ...]
    alpha_over_rank: float

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every layer to adapt, by its path inside the model."""
        return {module: block.rank for block in self.blocks for module in block.modules}

    @property
    def rank_pattern(self) -> dict[str, int]:
        """PEFT's ``rank_pattern``: a regular expression that means one layer -> its rank.

        PEFT tries the keys in order and also matches ends of paths, so the longest come first.
        """
        ranks = self.ranks
        return {re.escape(module): ranks[module] for module in sorted(ranks, key=len, reverse=True)}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """PEFT's ``alpha_pattern``, with the keys of `rank_pattern`: alpha = rank * alpha_over_rank."""
        return {key: _whole(rank * self.alpha_over_rank) for key, rank in self.rank_pattern.items()}

    @property
    def total(self) -> int:
        """Sum of the ranks of all layers: the initial budget of a `RankPruner` on these adapters."""
        return sum(self.ranks.values())

    def lora_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``peft.LoraConfig``: target_modules, r, lora_alpha, rank_pattern, alpha_pattern."""
        largest = max(block.rank for block in self.blocks)
        return {
            "target_modules": list(self.ranks),
            "r": largest,
            "lora_alpha": _whole(largest * self.alpha_over_rank),
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }


def gelora_ranks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    target_modules: str | Sequence[str] | None = None,
    alpha_over_rank: float = 32.0,
    max_points: int = 5000,
    method: str = "mle",
    trim: float = 0.1,
    seed: int = 0,
) -> GeloraRanks:
    """GeLoRA's rank of every block of ``model``, from the hidden states of ``batches``.

    Args:
        model: a transformer before PEFT has wrapped it. Its blocks are the entries of the outermost ``nn.ModuleList``s
            that hold layers to adapt: encoder and decoder, one list each. It runs in eval mode, without gradients.
        batches: keyword arguments of ``model``, as a tokenizer, processor or data collator makes them; tensors are
            moved to the model's device. Every tower takes the mask of the batch that has its shape: tokens whose
            ``attention_mask`` (batch, tokens) is 0 are left out; in a decoder those whose ``decoder_attention_mask`` is
            0, else those whose label is -100; of an image or audio tower none but by a mask of its own. Where a model
            pads to its window or downsamples, the mask is padded or pooled as well.
        target_modules: as PEFT's: ends of paths, or a regular expression for whole paths; None for all linear layers.
        alpha_over_rank: alpha / rank of every adapter (the paper's is 32).
        max_points: tokens in the sample, the same ones for every block where blocks keep the tokens.
        method: of `intrinsic_dimension`.
        trim: of `intrinsic_dimension`.
        seed: of the sample of tokens. The sample depends on it and on the order of tokens, not on the size of batches.

    A difference of two estimates is noisier than each of them, and is rounded to the nearest integer. A block that is
    called several times in a pass (ALBERT) is measured on the states of all its calls.

    Returns:
        dimensions and rank of every block, and the patterns for ``LoraConfig``. The adapters may then be pruned: a
        `RankPruner` counts total ranks, so they may start with different ones.

    Raises:
        ValueError: the model already has adapters, no ModuleList holds a layer to adapt, a batch is no mapping or its
            mask does not fit the hidden states, too few distinct tokens, hidden states that are not finite, or an
            argument outside its bounds.
    """
    if not alpha_over_rank > 0 or alpha_over_rank == float("inf"):
        raise ValueError(f"alpha_over_rank={alpha_over_rank} must be a positive number: give e.g. 32")
    if max_points < 3:
        raise ValueError(
            f"max_points={max_points} is too small: give 3 or more, and some thousands for a useful estimate"
        )
    modules = _block_modules(model, target_modules)
    states = _hidden_states(model, list(modules), batches, max_points, seed)
    dimensions: dict[int, IntrinsicDimension] = {}

    def dimension(name: str, end: str, sample: _TokenSample) -> IntrinsicDimension:
        if id(sample) not in dimensions:
            try:
                dimensions[id(sample)] = intrinsic_dimension(sample.points(), method, trim)
            except ValueError as error:
                raise ValueError(f"hidden states at the {end} of {name!r}: {error}") from error
        return dimensions[id(sample)]

    blocks = []
    for name, (entering, leaving) in states.items():
        d_in, d_out = dimension(name, "input", entering), dimension(name, "output", leaving)
        rank = max(round(d_out.estimate - d_in.estimate), 0) + 1
        blocks.append(GeloraBlock(name, d_in, d_out, rank, tuple(modules[name])))
    return GeloraRanks(tuple(blocks), alpha_over_rank)


def _block_modules(model: nn.Module, target_modules: str | Sequence[str] | None) -> dict[str, list[str]]:
    """Blocks, by path, with the paths of the layers to adapt in each."""
    names = [name for name, _ in model.named_modules()]
    if any(name.endswith(".base_layer") for name in names):
        raise ValueError("model already has adapters: give the base model, before peft.get_peft_model")
    wanted = [name for name, module in model.named_modules() if name and _is_target(name, module, target_modules)]
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    blocks: dict[str, list[str]] = {}
    for path in outermost:
        for block in _entries(path, model.get_submodule(path)):
            inside = [name for name in wanted if name.startswith(block + ".")]
            if inside:
                blocks[block] = inside
    if not blocks:
        what = "linear layers" if target_modules is None else f"modules that match target_modules={target_modules!r}"
        raise ValueError(
            f"{type(model).__name__} has no ModuleList of blocks with {what} ({len(wanted)} in the whole model, lists: "
            f"{', '.join(outermost) or 'none'}): give a transformer and modules of its blocks"
        )
    return blocks


def _entries(path: str, modules: nn.Module) -> Iterator[str]:
    """Paths of the entries of a ModuleList, and of lists in it (Funnel)."""
    for name, entry in modules.named_children():
        if isinstance(entry, nn.ModuleList):
            yield from _entries(f"{path}.{name}", entry)
        else:
            yield f"{path}.{name}"


def _is_target(name: str, module: nn.Module, target_modules: str | Sequence[str] | None) -> bool:
    if target_modules is None or target_modules == "all-linear":
        return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's, in transformers
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith("." + target) for target in target_modules)


class _TokenSample:
    """A uniform sample of the vectors that pass by: those with the ``size`` smallest random keys.

    Two samples that see equally many vectors keep the same ones, in the same places.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._keys = np.full(size, np.inf)
        self._vectors: Tensor | None = None

    def add(self, vectors: Tensor) -> None:
        """``vectors``: shape (n, features)."""
        size = len(self._keys)
        keys = np.concatenate([self._keys, self._generator.random(len(vectors))])
        stays = np.zeros(len(keys), dtype=bool)
        stays[np.argpartition(keys, size - 1)[:size]] = True
        incoming = np.flatnonzero(stays[size:])
        places = np.flatnonzero(~stays[:size])[: len(incoming)]
        self._keys[places] = keys[size + incoming]
        if self._vectors is None:
            self._vectors = vectors.new_zeros((size, vectors.shape[1]))
        device = vectors.device
        self._vectors[torch.from_numpy(places).to(device)] = vectors[torch.from_numpy(incoming).to(device)]

    def points(self) -> Tensor:
        """The sample, shape (at most size, features)."""
        if self._vectors is None:
            raise ValueError("no vectors: the block was never called; give batches that reach it")
        filled = np.flatnonzero(np.isfinite(self._keys))
        return self._vectors[torch.from_numpy(filled).to(self._vectors.device)]


class _BlockRecorder:
    """The hooks of one block. The states that enter are not kept twice if they are those that left the block before."""

    def __init__(self, name: str, before: _BlockRecorder | None, size: int, seed: int) -> None:
        self.name = name
        self.before = before
        self.entering: _TokenSample | None = None
        self.leaving = _TokenSample(size, seed)
        self.masks = _Masks({}, None)  # of the batch that is running
        self._fresh = lambda: _TokenSample(size, seed)
        self._left: Tensor | None = None

    def enter(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Forward pre-hook."""
        first = named.get("hidden_states")
        hidden = self._hidden([first] if first is not None else [*arguments, *named.values()], "input")
        if self.entering is None:
            shared = self.before is not None and self.before._left is hidden
            self.entering = self.before.leaving if shared and self.before is not None else self._fresh()
        if self.before is None or self.entering is not self.before.leaving:
            self._keep(self.entering, hidden)

    def leave(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """Forward hook."""
        self._left = self._hidden([output] if isinstance(output, Tensor) else list(output), "output")
        self._keep(self.leaving, self._left)

    def end_pass(self) -> None:
        """Forget the tensors of the batch."""
        self._left, self.masks = None, _Masks({}, None)

    def _hidden(self, values: list[Any], end: str) -> Tensor:
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
                return value
        raise ValueError(f"block {self.name!r} has no hidden states in its {end}: only blocks of transformers work")

    def _keep(self, sample: _TokenSample, hidden: Tensor) -> None:
        mask = self.masks.of(self.name, hidden)
        sample.add(hidden.flatten(0, -2) if mask is None else hidden[mask.to(hidden.device)])


class _Masks:
    """Which tokens of a batch count, for every tower of a model.

    Args:
        batch: keyword arguments of the model.
        config: of a transformers model, else None.
    """

    def __init__(self, batch: Mapping[str, Any], config: Any) -> None:
        found = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        self._masks = {name: value != 0 for name, value in found.items() if "mask" in name and value.dim() == 2}
        labels = found.get("labels")
        if labels is not None and labels.dim() == 2 and "decoder_input_ids" not in found:
            # the model shifts the labels by one: position t of the decoder predicts label t
            self._masks.setdefault("decoder_attention_mask", labels != -100)
        self._two_sided = bool(getattr(config, "is_encoder_decoder", False))
        inputs = [n for n, value in found.items() if "mask" not in n and "label" not in n and value.is_floating_point()]
        inputs += ["input_ids"] if "input_ids" in found else []
        self._single = len(inputs) == 1
        windows = [getattr(config, name, None) for name in ("attention_window", "block_size")]
        self._window = max((max(w) if isinstance(w, list) else w for w in windows if w), default=0)

    def of(self, block: str, hidden: Tensor) -> Tensor | None:
        """The mask for the hidden states (..., features) of a block, bool (batch, tokens); None if all count.

        Raises:
            ValueError: there is but one tower, and the mask does not fit it.
        """
        parts = block.split(".")
        if self._two_sided and any("decoder" in part for part in parts):
            names = ["decoder_attention_mask"]
        elif any(word in part for part in parts for word in ("vision", "visual", "image", "audio", "speech")):
            names = [n for n in self._masks if n not in ("attention_mask", "decoder_attention_mask")]
            names += ["attention_mask"] if self._single else []
        else:
            names = [
                "attention_mask",
                *(n for n in self._masks if n not in ("attention_mask", "decoder_attention_mask")),
            ]
        masks = [self._masks[name] for name in names if name in self._masks]
        fitting = next((mask for mask in masks if mask.shape == hidden.shape[:-1]), None)
        if fitting is not None or not masks or not self._single:
            return fitting
        mask, shape = masks[0], hidden.shape[:-1]
        if len(shape) == 2 and len(mask) == shape[0]:
            given, tokens = mask.shape[1], shape[1]
            if tokens > given and self._window and tokens % self._window == 0:
                return nn.functional.pad(mask, (0, tokens - given))
            if 2 * tokens - 1 <= given:
                return nn.functional.adaptive_max_pool1d(mask.float(), tokens) > 0
        raise ValueError(
            f"the mask of the batch has shape {tuple(mask.shape)}, but the hidden states of {block!r} are "
            f"{tuple(hidden.shape)}: give a mask of (batch, tokens), or leave it out to count all vectors"
        )


def _hidden_states(
    model: nn.Module, names: list[str], batches: Iterable[Mapping[str, Any]], size: int, seed: int
) -> dict[str, tuple[_TokenSample, _TokenSample]]:
    """Samples of the states that enter and leave each block."""
    recorders: list[_BlockRecorder] = []
    for name in names:
        follows = bool(recorders) and _list_of(recorders[-1].name) == _list_of(name)
        recorders.append(_BlockRecorder(name, recorders[-1] if follows else None, size, seed))
    device = next(model.parameters()).device
    with _evaluation(model), torch.no_grad(), _hooks(model, recorders):
        for number, batch in enumerate(batches):
            if not isinstance(batch, Mapping):
                raise ValueError(f"batch {number} is a {type(batch).__name__}: give a mapping of the model's arguments")
            on_device = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            masks = _Masks(on_device, getattr(model, "config", None))
            for recorder in recorders:
                recorder.masks = masks
            model(**on_device)
            for recorder in recorders:
                recorder.end_pass()
    return {r.name: (r.leaving if r.entering is None else r.entering, r.leaving) for r in recorders}


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _hooks(model: nn.Module, recorders: list[_BlockRecorder]) -> Iterator[None]:
    handles = []
    try:
        for recorder in recorders:
            block = model.get_submodule(recorder.name)
            handles.append(block.register_forward_pre_hook(recorder.enter, with_kwargs=True))
            handles.append(block.register_forward_hook(recorder.leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _list_of(block: str) -> str:
    return block.rpartition(".")[0]


def _whole(number: float) -> float:
    """An int where it is one: what PEFT's configs hold."""
    return int(number) if float(number).is_integer() else number
