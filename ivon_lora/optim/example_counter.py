"""How many examples a step's gradient is the mean of: B of VAdam's curvature, counted where gradients come from.

The information of an example is that of its whole loss, the sum over its labels: one for a class, one a token for a
sequence. Losses of language models are means over labels, so that these are counted too.

A training forward of an attached model says how many examples it saw; they count when its backward begins. So a
forward without a backward does not count, a checkpointed forward counts once, and what `zero_grad` throws away is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ivon_lora.lora.names import unwrapped
from ivon_lora.optim.replicas import find_replicas

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

#: inputs of Hugging Face models whose dimension 0 is the batch's
INPUT_NAMES = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "decoder_input_ids")
#: where packed sequences begin and the last one ends: names of transformers, flash-attn and others
BORDER_NAMES = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seq_lens", "cu_seqlens")

#: what Hugging Face calls the loss of the next token: of language models, and of those that also see or hear
NEXT_TOKEN = ("ForCausalLM", "ForConditionalGeneration")

UNSURE = (
    "batch_size='auto' cannot tell how many examples {what}. Pass batch_size=, the number of examples that one step's "
    "gradient averages over, or call optimizer.count_examples(n) in every training forward."
)


DISAGREEMENT = (
    "batch_size is {stated}, but a step's gradient is the mean of {counted} examples: the posterior's precision is "
    "wrong by their ratio. Pass batch_size={counted} (all accumulated micro-batches, all replicas), or "
    "batch_size='auto'."
)


class Counts(NamedTuple):
    """What a gradient is a mean over."""

    examples: int
    labels: int

    @classmethod
    def total(cls, counts: Iterable[Iterable[int]]) -> Counts:
        """The sums of both numbers."""
        return cls(*map(sum, zip(NOTHING, *counts, strict=True)))


NOTHING = Counts(0, 0)

#: the tensor that another one is a part of, and where the part begins
Piece = tuple[int, int]


def shifts_labels(model: nn.Module) -> bool:
    """Whether a model's loss is that of the next token, so that the first label of a row belongs to no prediction.

    By the rule of Hugging Face's ``loss_function``, which also takes that of models whose class does not name a loss
    (GPT2LMHeadModel), for those that generate; an encoder-decoder shifts its inputs instead.
    """
    model = unwrapped(model)
    loss_type: Any = getattr(model, "loss_type", "")
    is_causal = loss_type in NEXT_TOKEN or (loss_type is None and getattr(model, "can_generate", bool)())
    return is_causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def labels_in(values: Mapping[str, Any], shifted: bool = False) -> int | None:
    """How many of ``labels`` (examples, length) a loss averages over: those that are not -100; None for other labels.

    Args:
        values: a batch, by the names of Hugging Face.
        shifted: see `shifts_labels`.
    """
    labels = values.get("shift_labels", values.get("labels"))
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return None
    return int((labels if "shift_labels" in values or not shifted else labels[:, 1:]).ne(-100).sum())


def is_time_major(model: nn.Module) -> bool:
    """Whether dimension 0 of a batch may be time."""
    return any(getattr(m, "batch_first", True) is False for m in model.modules())


def examples_in(args: Iterable[Any], kwargs: Mapping[str, Any], time_major: bool = False) -> tuple[int, str | None]:
    """Number of examples among a forward's arguments, and what makes it doubtful.

    Packed sequences are counted by their borders, or by the zeros of ``position_ids``. Otherwise it is the size of
    dimension 0 of the first tensor: positional arguments come first, then `INPUT_NAMES`, then other keywords.
    """
    args = tuple(args)
    named = [kwargs[name] for name in INPUT_NAMES if name in kwargs]
    ordered = [*args, *named, *kwargs.values()]
    value, found = next(((value, found) for value in ordered if (found := _first(value))), (None, None))
    if found is None:
        return 0, "a forward has: it has no tensor among its arguments"
    count, doubt = found
    packed = _packed_sequences([*args, kwargs], count)
    if packed is not None:
        return packed, None
    if doubt is None and isinstance(value, Tensor) and not any(value is x for x in named):
        sizes = {t.size(0) for t in _tensors(ordered)}
        if len(sizes) > 1 and (count == 1 or sizes != {1, count}):
            doubt = f"a forward has: its arguments have first dimensions {sorted(sizes)}"
        elif time_major and value.dim() in (2, 3):
            doubt = "a forward has: a layer has batch_first=False, so that the first dimension may be time"
    return count, doubt


def _packed_sequences(values: Iterable[Any], rows: int) -> int | None:
    for value in values:
        if not isinstance(value, Mapping):
            continue
        borders = next((value[name] for name in BORDER_NAMES if isinstance(value.get(name), Tensor)), None)
        if borders is not None:
            return int((borders.diff() > 0).sum())  # repeated where they are padded to a fixed number
        positions, index = value.get("position_ids"), value.get("seq_idx")
        if isinstance(positions, Tensor) and positions.dim() == 2 and positions.size(0) == rows:
            starts, mask = positions == 0, value.get("attention_mask")
            if isinstance(mask, Tensor) and mask.shape == starts.shape:  # padding on the left has position 0 too
                starts = starts & mask.bool()
            return max(int(starts.sum()), rows)
        if isinstance(index, Tensor) and index.dim() == 2:
            return int((index.diff() != 0).sum()) + index.size(0)
    return None


def _first(value: Any) -> tuple[int, str | None] | None:
    """Examples of the first tensor inside a value."""
    if isinstance(value, Tensor):
        return (value.size(0), None) if value.dim() else None
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return int(value.batch_sizes[0]), None
    if isinstance(value, list) and _are_alike(value):
        return len(value), "a list has: it is taken for one element per example"
    doubt = None
    if isinstance(value, Mapping):
        value = [*(value[name] for name in INPUT_NAMES if name in value), *value.values()]
    elif hasattr(value, "__dict__") and not callable(value):
        doubt, value = f"an object of class {type(value).__name__} has", list(vars(value).values())
    if not isinstance(value, list | tuple):
        return None
    found = next((found for found in map(_first, value) if found is not None), None)
    return (found[0], doubt or found[1] or _unlike_columns(value)) if found else None


def _are_alike(values: list[Any]) -> bool:
    """Whether a list holds one element per example, as detectors take images, and not the columns of a batch."""
    if values and all(isinstance(x, Mapping | list | tuple) for x in values):
        return True
    tensors = _tensors(values)
    return 0 < len(tensors) == len(values) and len({(x.dim(), x.dtype) for x in tensors}) == 1


def _unlike_columns(values: list[Any] | tuple[Any, ...]) -> str | None:
    """What speaks against the elements of a list being the columns of a batch."""
    tensors = _tensors(values)
    if len({t.size(0) for t in tensors}) > 1 or (
        len({(t.dim(), t.dtype) for t in tensors}) == 1 and len({t.shape for t in tensors}) > 1
    ):
        return "a list or tuple has: its tensors have different shapes"
    return None


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.dim() and not value.is_nested]


def piece_in(values: Iterable[Any]) -> Piece | None:
    """Which part of another tensor the first tensor among a forward's arguments is, if it is one."""
    first = next(iter(_tensors(values)), None)
    return None if first is None or first._base is None else (id(first._base), int(first.storage_offset()))


class ExampleCounter:
    """Counts examples between two steps; a step may have several samples, each with a batch of its own."""

    def __init__(self) -> None:
        self._counts = [NOTHING]  # at each sample of this step; the last one is the present one
        self._task = -1  # the backward that was seen last, and the examples that it reached
        self._in_task = NOTHING
        self._pieces: dict[int, int] = {}  # that its forwards saw
        self._by_user = False  # somebody calls `add`
        self._short_steps = 0

    def add(self, counts: Counts) -> None:
        """The user says that the gradient averages over that many more; from now on only what users say counts."""
        if not self._by_user:
            self.drop()
        self._by_user = True
        self._counts[-1] = Counts.total([self._counts[-1], counts])

    def add_backward(self, optimizer: IVON, counts: Counts, doubt: str | None, piece: Piece | None) -> None:
        """A backward has reached the output of a training forward of so many examples.

        Several forwards that one backward reaches (the towers of a contrastive loss, two views of a batch) belong to
        one loss over the same examples; it is in doubt where they saw pieces of one tensor. Where no parameter has a
        gradient, what was counted before belongs to none.
        """
        if self._by_user:
            return
        task = torch._C._current_graph_task_id()
        if task != self._task:
            if all(p.grad is None for p in optimizer.parameters):
                self.drop()
            self._task, self._in_task, self._pieces = task, NOTHING, {}
        if piece is not None and self._pieces.setdefault(*piece) != piece[1]:
            doubt = "one backward has: its forwards saw pieces of one tensor, chunks of a batch perhaps, or time steps"
        if doubt is not None and any(group["batch_size"] == "auto" for group in optimizer.param_groups):
            optimizer.warn_once("examples", UNSURE.format(what=doubt))
        if counts.examples > self._in_task.examples:
            more = Counts(counts.examples - self._in_task.examples, counts.labels - self._in_task.labels)
            self._counts[-1], self._in_task = Counts.total([self._counts[-1], more]), counts

    def on_all_processes(self, groups: list[dict[str, Any]], pending: bool) -> Counts | None:
        """What the gradient is a mean over, summed over the processes; None where nobody asks, or nothing was counted.

        Args:
            pending: at the present sample; else the mean over those of the step.

        Raises:
            RuntimeError: a group counts its examples, and none were seen at the present sample.
        """
        if all(group["batch_size"] is None for group in groups):
            return None
        counts = self._counts[-1] if pending else self.of_step() or NOTHING
        replicas = find_replicas()
        if replicas is not None:
            counts = Counts.total(replicas.gather(counts))
        if pending and not counts.examples and any(group["batch_size"] == "auto" for group in groups):
            raise RuntimeError(
                "batch_size='auto' counts the examples of training forwards, and there was none since the last step: "
                "call optimizer.attach(model) once, for the model whose forward the loop calls, or pass batch_size=, "
                "the number of examples that one step's gradient averages over"
            )
        return counts if counts.examples else None

    def of_step(self) -> Counts | None:
        """The mean over the samples of this step, in this process; None if no example was seen."""
        counts = self._counts if self._counts[-1].examples else self._counts[:-1]
        mean = Counts(*(number // max(len(counts), 1) for number in Counts.total(counts)))
        return mean if mean.examples else None

    def drop(self) -> None:
        """What was counted at the present sample belongs to no gradient."""
        self._counts[-1] = self._in_task = NOTHING
        self._task = -1

    def drop_gradients(self, had_any: bool) -> None:
        """The gradients are cleared; what a user has counted for gradients to come stays."""
        if had_any or not self._by_user:
            self.drop()

    def next_sample(self) -> None:
        """The gradient at the present sample is complete."""
        self._counts.append(NOTHING)
        self.drop()

    def next_step(self) -> None:
        """Start again at zero."""
        self._counts = [NOTHING]
        self.drop()

    def check(self, optimizer: IVON, n_samples: int) -> None:
        """Before a step is over: warn if the examples counted contradict a ``batch_size`` that was stated.

        Twice as many examples or more are wrong at once; half of them or fewer the second time in a row, because the
        last batch of an epoch may be short. Two micro-batches or two processes left out of account are a factor of 2.
        """
        stated = next((g["batch_size"] for g in optimizer.param_groups if isinstance(g["batch_size"], int)), None)
        replicas = find_replicas()
        n_replicas = 1 if replicas is None else replicas.size
        counted = sum(counts.examples for counts in self._counts) * n_replicas / max(n_samples, 1)
        if stated is None or counted == 0:
            return
        self._short_steps = self._short_steps + 1 if counted <= stated / 2 else 0
        if counted >= 2 * stated or self._short_steps == 2:
            optimizer.warn_once("batch_size", DISAGREEMENT.format(stated=stated, counted=round(counted)))
