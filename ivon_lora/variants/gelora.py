"""GeLoRA: LoRA ranks from the geometry of the hidden states, before training (arXiv:2412.09250).

A transformer block that takes hidden states of intrinsic dimension d_in to d_out gets the rank max(d_out - d_in, 0) + 1
in all its adapted layers, and all adapters have the same alpha / rank. Forward passes are enough: no labels, no
gradients. The paper says neither how it estimates dimensions nor from which vectors; here it is TwoNN
(`intrinsic_dimension`) on the hidden states of a random sample of tokens.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.optim.param_groups import integer
from ivon_lora.variants.intrinsic_dimension import IntrinsicDimension, intrinsic_dimension
from ivon_lora.variants.layers import block_of
from ivon_lora.variants.options import within

__all__ = ["GeloraBlock", "GeloraRanks", "gelora_ranks"]

#: masks by the names that transformers gives them, and words in paths of blocks that see something else than text
OF_TEXT, OF_DECODER = "attention_mask", "decoder_attention_mask"
NO_TEXT = ("vision", "visual", "image", "audio", "speech")


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
        model: a transformer before PEFT has wrapped it, with its blocks (see `block_of`) in an ``nn.ModuleList``, or in
            several. It runs in eval mode, without gradients.
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
    within("alpha_over_rank", alpha_over_rank, 1e-6)
    integer("max_points", max_points, low=3)
    modules = _modules_by_block(model, target_modules)
    recorder = _Recorder(max_points, seed)
    _record(model, modules, batches, recorder)
    found: dict[_TokenSample, IntrinsicDimension] = {}

    def dimension(name: str, end: str) -> IntrinsicDimension:
        sample = recorder.samples[name, end]
        if sample not in found:
            try:
                found[sample] = intrinsic_dimension(sample.points(), method, trim)
            except ValueError as error:
                raise ValueError(f"hidden states at the {end} of {name!r}: {error}") from error
        return found[sample]

    blocks = []
    for name, inside in modules.items():
        d_in, d_out = dimension(name, "input"), dimension(name, "output")
        rank = max(round(d_out.estimate - d_in.estimate), 0) + 1
        blocks.append(GeloraBlock(name, d_in, d_out, rank, tuple(inside)))
    return GeloraRanks(tuple(blocks), alpha_over_rank)


def _modules_by_block(model: nn.Module, target_modules: str | Sequence[str] | None) -> dict[str, list[str]]:
    """Paths of the layers to adapt, by the path of the block that they lie in."""
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise ValueError("model already has adapters: give the base model, before peft.get_peft_model")
    wanted = [name for name, module in model.named_modules() if name and _is_target(name, module, target_modules)]
    blocks: dict[str, list[str]] = {}
    for name in wanted:
        block = block_of(model, name)
        if block is not None and block != name:
            blocks.setdefault(block, []).append(name)
    if not blocks:
        what = "linear layers" if target_modules is None else f"modules that match target_modules={target_modules!r}"
        raise ValueError(
            f"{type(model).__name__} has no ModuleList of blocks with {what} ({len(wanted)} in the whole model): give "
            "a transformer and modules of its blocks"
        )
    return blocks


def _is_target(name: str, module: nn.Module, target_modules: str | Sequence[str] | None) -> bool:
    if target_modules is None or target_modules == "all-linear":
        return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's, in transformers
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith("." + target) for target in target_modules)


def _record(model: nn.Module, names: Iterable[str], batches: Iterable[Mapping[str, Any]], recorder: _Recorder) -> None:
    """Run the model on the batches, without dropout and gradients; its modes and hooks are then what they were."""
    device = next(model.parameters()).device
    with torch.no_grad(), ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        for name in names:
            block = model.get_submodule(name)
            enter, leave = functools.partial(recorder.enter, name), functools.partial(recorder.leave, name)
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        for number, batch in enumerate(batches):
            if not isinstance(batch, Mapping):
                raise ValueError(f"batch {number} is a {type(batch).__name__}: give a mapping of the model's arguments")
            on_device = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            recorder.masks = _Masks(on_device, getattr(model, "config", None))
            model(**on_device)


class _Recorder:
    """Keeps samples of the hidden states at both ends of blocks; those that go from block to block are kept once."""

    def __init__(self, size: int, seed: int) -> None:
        self.samples: dict[tuple[str, str], _TokenSample] = defaultdict(functools.partial(_TokenSample, size, seed))
        self.masks = _Masks({}, None)  # of the batch that is running
        self._left: tuple[str, Tensor | None] = "", None  # the last block that was left, and its output

    def enter(self, name: str, block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Forward pre-hook."""
        first = named.get("hidden_states")
        hidden = _hidden([first] if first is not None else [*arguments, *named.values()], f"input of {name!r}")
        before, output = self._left
        is_next = output is hidden and before.rpartition(".")[0] == name.rpartition(".")[0]
        if is_next and (name, "input") not in self.samples:
            self.samples[name, "input"] = self.samples[before, "output"]
        sample = self.samples[name, "input"]
        if not (is_next and sample is self.samples[before, "output"]):
            sample.add(self._counted(name, hidden))

    def leave(self, name: str, block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """Forward hook."""
        hidden = _hidden([output] if isinstance(output, Tensor) else list(output), f"output of {name!r}")
        self.samples[name, "output"].add(self._counted(name, hidden))
        self._left = name, hidden

    def _counted(self, name: str, hidden: Tensor) -> Tensor:
        """The states of the tokens that count, (n, features)."""
        if hidden.is_nested:  # torch's own encoder, which leaves out what is masked
            return torch.cat(hidden.unbind())
        mask = self.masks.of(name, hidden)
        return hidden.flatten(0, -2) if mask is None else hidden[mask.to(hidden.device)]


def _hidden(values: Iterable[Any], where: str) -> Tensor:
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            return value
    raise ValueError(f"no hidden states in the {where}: only blocks of transformers work")


class _TokenSample:
    """A uniform sample of the vectors that pass by: those with the ``size`` smallest random keys, in their order.

    Two samples that see equally many vectors keep the same ones.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._generator = size, torch.Generator().manual_seed(seed)
        self._keys, self._vectors = torch.empty(0, dtype=torch.float64), list[Tensor]()

    def add(self, vectors: Tensor) -> None:
        """``vectors``: shape (n, features)."""
        keys = torch.rand(len(vectors), generator=self._generator, dtype=torch.float64)
        self._keys = torch.cat([self._keys, keys])
        stays = self._keys.argsort()[: self._size].sort().values
        self._keys = self._keys[stays]
        self._vectors = [torch.cat([*self._vectors, vectors])[stays.to(vectors.device)]]

    def points(self) -> Tensor:
        """The sample, shape (at most size, features)."""
        if not self._vectors:
            raise ValueError("no vectors: the block was never called; give batches that reach it")
        return self._vectors[0]


class _Masks:
    """Which tokens of a batch count, for every tower of a model.

    Args:
        batch: keyword arguments of the model.
        config: of a transformers model, else None.
    """

    def __init__(self, batch: Mapping[str, Any], config: Any) -> None:
        given = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        self._masks = {name: value != 0 for name, value in given.items() if "mask" in name and value.dim() == 2}
        labels = given.get("labels")
        if labels is not None and labels.dim() == 2 and "decoder_input_ids" not in given:
            # the model shifts the labels by one: position t of the decoder predicts label t
            self._masks.setdefault(OF_DECODER, labels != -100)
        self._two_sided = bool(getattr(config, "is_encoder_decoder", False))
        inputs = [n for n, value in given.items() if "mask" not in n and "label" not in n and value.is_floating_point()]
        self._single = len(inputs) + ("input_ids" in given) == 1
        windows = [getattr(config, name, None) for name in ("attention_window", "block_size")]
        self._window = max((max(w) if isinstance(w, list) else w for w in windows if w), default=0)

    def of(self, block: str, hidden: Tensor) -> Tensor | None:
        """The mask for the hidden states (..., features) of a block, bool (batch, tokens); None if all count.

        Raises:
            ValueError: there is but one tower, and the mask does not fit it.
        """
        others = [name for name in self._masks if name not in (OF_TEXT, OF_DECODER)]
        if self._two_sided and "decoder" in block:
            names = [OF_DECODER]
        elif not self._single and any(word in block for word in NO_TEXT):
            names = others
        else:
            names = [OF_TEXT, *others]
        masks, shape = [self._masks[name] for name in names if name in self._masks], hidden.shape[:-1]
        turned = [mask.t() for mask in masks]  # for (tokens, batch), as XLNet has them
        fitting = next((mask for mask in (*masks, *turned) if mask.shape == shape), None)
        if fitting is not None or not masks or not self._single:
            return fitting
        mask = masks[0]
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


def _whole(number: float) -> float:
    """An int where it is one: what PEFT's configs hold."""
    return int(number) if float(number).is_integer() else number
