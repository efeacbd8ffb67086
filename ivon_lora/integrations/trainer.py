"""IVON in the Hugging Face Trainer, and in the trainers that inherit from it (TRL's).

:func:`attach_trainer` is one call. With an optimizer of your own, ``Trainer(..., optimizers=(optimizer, None))``
trains, evaluates, saves and resumes as it should, because the Trainer itself calls ``optimizer.train()`` and
``optimizer.eval()``; :func:`watch` then adds the optimizer's numbers to every log.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ivon_lora.integrations.loss_scale import LossScaleCheck
from ivon_lora.optim.example_counter import examples_in, labels_in, shifts_labels
from ivon_lora.optim.wrappers import unwrap

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON
    from ivon_lora.variants import Variant

__all__ = ["attach_trainer", "optimizer_for", "watch"]


def attach_trainer(
    trainer: Any,
    target_rank: float | None = None,
    *,
    num_examples: int | None = None,
    pruner_options: dict[str, Any] | None = None,
    prefix: str = "ivon/",
    **options: Any,
) -> IVON:
    """Let a trainer train with IVON: make the optimizer, prune ranks, log its numbers. Call it before ``train()``::

        trainer = Trainer(model=model, args=args, train_dataset=data)
        optimizer = attach_trainer(trainer, target_rank=4)
        trainer.train()
        export_lora(model, optimizer, "my-adapter")

    Args:
        trainer: a ``transformers.Trainer`` or a subclass of it, whose model is a PEFT model if ranks are to be pruned.
        target_rank: mean rank per adapter at the end of the run; None prunes nothing.
        num_examples: examples in the training set; None: those of the trainer's. They are the rows of its data set; of
            one that TRL has packed, the sequences in it; of TRL's online trainers (GRPO), ``num_generations`` a prompt.
        pruner_options: further arguments of `RankPruner`, e.g. ``{"min_rank": 1}``.
        prefix: put before the names of the logged numbers.
        options: further arguments of `VAdam`, which reads learning rate and betas in the ``TrainingArguments``; with
            ``ess`` among them, of `IVON`. ``adapter_name``: PEFT's name of the adapter whose ranks are pruned.
            ``variant``: a method of `ivon_lora.variants`, built on the trainer's model, to attach to the optimizer.

    Returns:
        the optimizer; also ``trainer.optimizer``, which the Trainer wraps when it starts. A trainer with a
        ``model_init`` makes model and optimizer anew in every ``train()``: read ``trainer.model`` and
        ``trainer.optimizer.optimizer`` after it.

    Raises:
        ValueError: the trainer has an optimizer already; its training set has no length and ``num_examples`` is None;
            no trainable parameters, no LoRA layer to prune, or an argument outside its bounds.
    """
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError(
            "the trainer has an optimizer already: make it without optimizers= and optimizer_cls_and_kwargs=, and call "
            "attach_trainer before train()"
        )

    def create_optimizer(*_: Any) -> Any:
        if trainer.optimizer is None:
            count = _examples_of(trainer) if num_examples is None else num_examples
            schedule = None if target_rank is None else {"total_steps": _steps_of(trainer), **(pruner_options or {})}
            given = {"pruner_options": schedule, **options}
            trainer.optimizer = optimizer_for(trainer.model, trainer.args, count, target_rank, **given)
        return trainer.optimizer

    optimizer: IVON = create_optimizer()
    trainer.create_optimizer = create_optimizer
    watch(trainer, prefix)
    return optimizer


def _examples_of(trainer: Any) -> int:
    data = trainer.train_dataset
    if "seq_lengths" in (getattr(data, "column_names", None) or ()):  # packed by TRL's "bfd": those of every row
        return sum(map(len, data["seq_lengths"]))
    try:
        return len(data) * int(getattr(trainer.args, "num_generations", 1))
    except TypeError:
        raise ValueError(f"train_dataset ({type(data).__name__}) has no length: pass num_examples=") from None


def _steps_of(trainer: Any) -> int:
    """Optimizer steps of the run, as the trainer's own data loader makes them."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    with torch.random.fork_rng(devices=[]):  # the order of the examples stays what it is
        batches = len(trainer.get_train_dataloader())
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))


def optimizer_for(
    model: nn.Module,
    args: Any,
    num_examples: int,
    target_rank: float | None = None,
    *,
    adapter_name: str = "default",
    pruner_options: dict[str, Any] | None = None,
    variant: Variant | None = None,
    **options: Any,
) -> IVON:
    """The optimizer that `attach_trainer` makes, for a Trainer of these ``TrainingArguments`` that may not exist yet.

    Its arguments are those of `attach_trainer`, but ``pruner_options`` has to have ``total_steps``. The Trainer's own
    groups, and with them its ``weight_decay`` of 0, play no part.
    """
    from ivon_lora import IVON, RankPruner, VAdam, find_adapters

    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not params:
        raise ValueError("the model has no parameter with requires_grad=True; wrap it with peft.get_peft_model")
    if args.weight_decay and not {"weight_decay", "prior_std"} & options.keys():
        warnings.warn(
            f"TrainingArguments.weight_decay={args.weight_decay} is AdamW's and is not used: the prior takes its "
            'place, pass "prior_std"',
            stacklevel=2,
        )
    if target_rank is not None:
        options["pruner"] = RankPruner(find_adapters(model, adapter_name), target_rank, **(pruner_options or {}))
    groups: list[Any] = [{"params": params}]
    if variant is not None:
        names = {id(p): name for name, p in params}
        groups = [{**g, "params": [(names[id(p)], p) for p in g["params"]]} for g in variant.param_groups()]
    options = {"lr": args.learning_rate, **options}
    if "ess" in options:
        optimizer = IVON([{"params": g["params"]} for g in groups], **options)
    else:
        options = {"betas": (args.adam_beta1, args.adam_beta2), **options}
        optimizer = VAdam(groups, num_examples=num_examples, **options)
    optimizer.attach(model)
    if variant is not None:
        variant.attach(optimizer)
    return optimizer


def watch(trainer: Any, prefix: str = "ivon/") -> Any:
    """Add ranks, SNR and curvature to everything the Trainer logs; guard skipped steps. Call it before ``train()``.

    What a loss is a mean over is counted in the batches that the trainer trains on: examples, pairs of them for
    preferences (DPO, rewards), and the labels of token losses. The callback restores the mean after an optimizer
    step that an fp16 scaler skipped, and the optimizer's state with the model of ``load_best_model_at_end``. It warns
    if the run's length is not the pruner's, if a stated ``batch_size`` is not that of the Trainer's steps, and if the
    model ignores ``num_items_in_batch`` (see `loss_scale`).

    Args:
        trainer: a ``transformers.Trainer`` or a subclass of it (TRL's trainers).
        prefix: put before the keys of :meth:`IVON.metrics`.

    Returns:
        the callback, first in the trainer's list, so that every reporter sees the added numbers.

    Raises:
        ValueError: (at ``train()``) the Trainer's optimizer is not IVON.
    """
    from transformers import TrainerCallback

    class IVONCallback(_Callback, TrainerCallback):
        """See :func:`watch`."""

    callback = IVONCallback(trainer, prefix)
    trainer.training_step = _counting(trainer, trainer.training_step)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


def _counting(trainer: Any, training_step: Callable[..., Any]) -> Callable[..., Any]:
    """``training_step``, which first tells the optimizer what the loss of its batch is a mean over.

    A batch that tells nothing, as the prompts of GRPO, is left to the hooks of the model.
    """
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    paired = all(any(name.startswith(kind) for name in columns) for kind in ("chosen", "rejected"))

    @functools.wraps(training_step)
    def counted(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = unwrap(trainer.optimizer)
        examples, doubt = examples_in((), inputs) if isinstance(inputs, Mapping) else (0, None)
        if optimizer is not None and examples and doubt is None:
            examples = examples // 2 if paired and "input_ids" in inputs else examples
            optimizer.count_examples(examples, labels_in(inputs, shifts_labels(trainer.model)))
        return training_step(model, inputs, *args, **kwargs)

    return counted


class _Callback:
    """What the Trainer calls; made a ``TrainerCallback`` by :func:`watch`."""

    def __init__(self, trainer: Any, prefix: str) -> None:
        self._trainer, self._prefix = trainer, prefix

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        ivon = unwrap(optimizer)
        if ivon is None:
            raise ValueError(
                f"the Trainer's optimizer is {type(getattr(optimizer, 'optimizer', optimizer)).__name__}, not "
                "IVON; call attach_trainer(trainer), or pass Trainer(..., optimizers=(IVON(...), None))"
            )
        self._clear(ivon)  # what a run has left that was interrupted, or had no memory for its batch
        _warn_of_misfits(ivon, args, state.max_steps)
        if not args.torch_compile and getattr(self._trainer, "loss_is_scaled_for_ga", None) is None:
            LossScaleCheck(self._trainer.model, args.gradient_accumulation_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if (ivon := unwrap(optimizer)) is not None:
            self._clear(ivon)  # what is left of a step that the scaler skipped

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        ivon = unwrap(optimizer)
        if ivon is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            _load_best(ivon, Path(state.best_model_checkpoint))
        if ivon.pruner is not None and (unfinished := ivon.pruner.unfinished(ivon.completed_steps)):
            warnings.warn(unfinished, stacklevel=3)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **_: Any) -> None:
        ivon = unwrap(optimizer)
        if ivon is None or logs is None or "loss" not in logs:
            return
        numbers = {self._prefix + name: value for name, value in ivon.metrics().items()}
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)  # the Trainer has put its own copy there

    @staticmethod
    def _clear(optimizer: IVON) -> None:
        """The mean in the weights, and no example counted."""
        optimizer.eval()
        optimizer.examples.next_step()


def _load_best(optimizer: IVON, checkpoint: Path) -> None:
    """The posterior and the ranks that belong to the weights of the best model, which the Trainer has loaded."""
    file = checkpoint / "optimizer.pt"
    if file.is_file():
        optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    else:
        warnings.warn(
            f"load_best_model_at_end has loaded the weights of {checkpoint}, which has no optimizer.pt: posterior and "
            "ranks are those of the last step, and of other weights. Set save_only_model=False",
            stacklevel=4,
        )


def _warn_of_misfits(optimizer: IVON, args: Any, max_steps: int) -> None:
    """Warn if the optimizer was told of another run than the Trainer's."""
    pruner = optimizer.pruner
    if pruner is not None and pruner.total_steps != max_steps:
        warnings.warn(
            f"the pruner's schedule ends at step {pruner.total_steps}, the Trainer's run at {max_steps}: pass "
            f"RankPruner(..., total_steps={max_steps})",
            stacklevel=3,
        )
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    stated = optimizer.param_groups[0].get("batch_size")
    if isinstance(stated, int) and stated != batch_size:
        warnings.warn(
            f"batch_size is {stated}, but a step's gradient is the mean of {batch_size} examples: the posterior's "
            f"precision is wrong by their ratio. Pass batch_size={batch_size}, or batch_size='auto'.",
            stacklevel=3,
        )
