"""IVON in the Hugging Face Trainer, and in the trainers that inherit from it (TRL's).

:func:`attach_trainer` is one call on a trainer that exists. :class:`IVONFactory` does the same where a trainer is made,
through ``optimizer_cls_and_kwargs``. :func:`watch` adds the optimizer's numbers to every log. None of them is needed:
``Trainer(..., optimizers=(IVON(model.named_parameters(), ...), None))`` trains, evaluates, saves and resumes as it
should, because the Trainer itself calls ``optimizer.train()`` and ``optimizer.eval()``.
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
from ivon_lora.optim.examples import examples_in, labels_in, shifts_labels
from ivon_lora.optim.wrappers import unwrap

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON
    from ivon_lora.variants import Variant

__all__ = ["IVONFactory", "attach_trainer", "total_steps", "watch"]


def attach_trainer(
    trainer: Any,
    target_rank: float | None = None,
    *,
    num_examples: int | None = None,
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
        prefix: put before the names of the logged numbers.
        options: as for :class:`IVONFactory`.

    Returns:
        the optimizer; also ``trainer.optimizer``, which the Trainer wraps when it starts.

    Raises:
        ValueError: the trainer has an optimizer already, or a ``model_init``; its training set has no length and
            ``num_examples`` is None; or as :class:`IVONFactory`.
    """
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError(
            "the trainer has an optimizer already: make it without optimizers= and optimizer_cls_and_kwargs=, and call "
            "attach_trainer before train()"
        )
    if trainer.model_init is not None:
        raise ValueError(
            "train() makes the model anew (model_init=), after its optimizer: pass optimizer_cls_and_kwargs="
            "(IVONFactory, {...}) to the trainer, and call watch(trainer)"
        )
    if num_examples is None:
        num_examples = _examples_of(trainer)
    if target_rank is not None:
        options["pruner_options"] = {"total_steps": _steps_of(trainer), **options.get("pruner_options", {})}
    optimizer = IVONFactory()(
        trainer.model, args=trainer.args, num_examples=num_examples, target_rank=target_rank, **options
    )
    trainer.optimizer = optimizer
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
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    with torch.random.fork_rng(devices=[]):  # the order of the examples stays what it is
        return _steps(trainer.args, len(trainer.get_train_dataloader()))


def _steps(args: Any, forwards: int) -> int:
    """Optimizer steps of epochs that have so many forward passes each."""
    return math.ceil(args.num_train_epochs * max(math.ceil(forwards / args.gradient_accumulation_steps), 1))


class IVONFactory:
    """Builds the optimizer when the Trainer knows its model, with all that the Trainer's arguments already say::

        Trainer(
            model=model, args=args, train_dataset=data,
            optimizer_cls_and_kwargs=(IVONFactory, {"args": args, "num_examples": len(data), "target_rank": 4}),
        )

    Raises:
        TypeError: this version of transformers calls the class with groups, as it does for optimizers.
    """

    def __init__(self, *groups: Any, **options: Any) -> None:
        if groups or options:
            raise TypeError(
                "this version of transformers has no optimizer factories: update it, or call attach_trainer(trainer)"
            )

    def __call__(
        self,
        model: nn.Module,
        *,
        args: Any,
        num_examples: int,
        target_rank: float | None = None,
        adapter_name: str = "default",
        pruner_options: dict[str, Any] | None = None,
        variant: Variant | None = None,
        **options: Any,
    ) -> IVON:
        """The optimizer of ``model``'s trainable parameters, attached to it.

        Args:
            model: given by the Trainer.
            args: the Trainer's ``TrainingArguments``: learning rate, betas and number of steps are read there.
            num_examples: examples in the training set.
            target_rank: mean rank per adapter at the end of the run; None prunes nothing.
            adapter_name: PEFT's name of the adapter whose ranks are pruned.
            pruner_options: further arguments of :class:`~ivon_lora.RankPruner`, e.g. ``{"min_rank": 1}``.
            variant: a method of `ivon_lora.variants`, built on ``model``, to attach to the optimizer.
            options: further arguments of :class:`~ivon_lora.VAdam`, which takes
                ``TrainingArguments.learning_rate``, ``adam_beta1`` and ``adam_beta2`` as they stand; with ``ess`` among
                them, of :class:`~ivon_lora.optim.ivon.IVON` itself.

        The Trainer's own groups, and with them its ``weight_decay`` of 0, play no part. The examples of a step are
        counted in the model's forward passes.

        Raises:
            ValueError: no trainable parameters, no LoRA layer to prune, or an argument outside its bounds.
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
            schedule = {"total_steps": total_steps(args, num_examples), **(pruner_options or {})}
            options["pruner"] = RankPruner(find_adapters(model, adapter_name), target_rank, **schedule)
        groups: list[Any] = params
        if variant is not None:
            names = {id(p): name for name, p in params}
            groups = [{**g, "params": [(names[id(p)], p) for p in g["params"]]} for g in variant.param_groups()]
        options = {"lr": args.learning_rate, **options}
        if "ess" in options:
            optimizer = IVON(groups if variant is None else [{"params": g["params"]} for g in groups], **options)
        else:
            options = {"betas": (args.adam_beta1, args.adam_beta2), **options}
            optimizer = VAdam(groups, num_examples=num_examples, **options)
        optimizer.attach(model)
        if variant is not None:
            variant.attach(optimizer)
        if not args.torch_compile:
            LossScaleCheck(model, args.gradient_accumulation_steps)
        return optimizer


def total_steps(args: Any, num_examples: int) -> int:
    """Optimizer steps of a Trainer run: ``max_steps``, or those of ``num_train_epochs``.

    Args:
        args: ``TrainingArguments``.
        num_examples: examples in the training set.
    """
    if args.max_steps > 0:
        return int(args.max_steps)
    per_forward = args.train_batch_size * args.world_size
    forwards = num_examples // per_forward if args.dataloader_drop_last else math.ceil(num_examples / per_forward)
    return _steps(args, forwards)


def watch(trainer: Any, prefix: str = "ivon/") -> Any:
    """Add ranks, SNR and curvature to everything the Trainer logs; guard skipped steps. Call it before ``train()``.

    Args:
        trainer: a ``transformers.Trainer`` or a subclass of it (TRL's trainers).
        prefix: put before the keys of :meth:`IVON.metrics`.

    Returns:
        the callback, first in the trainer's list, so that every reporter sees the added numbers.

    What a loss is a mean over is counted in the batches that the trainer trains on: examples, pairs of them for
    preferences (DPO, rewards), and the labels of token losses. The callback restores the mean after an optimizer
    step that an fp16 scaler skipped, and the optimizer's state with the model of ``load_best_model_at_end``. It warns
    if the run's length is not the pruner's, if a stated ``batch_size`` is not that of the Trainer's steps, and if the
    model ignores ``num_items_in_batch`` (see `loss_scale`).

    Raises:
        ModuleNotFoundError: transformers is missing.
        ValueError: (at ``train()``) the Trainer's optimizer is not IVON.
    """
    callback = _callback_class()(trainer, prefix)
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


@functools.cache
def _callback_class() -> Any:
    try:
        from transformers import TrainerCallback
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("watch() needs transformers: pip install 'ivon-lora[hf]'") from error

    class IVONCallback(TrainerCallback):
        """See :func:`watch`."""

        def __init__(self, trainer: Any, prefix: str) -> None:
            self._trainer = trainer
            self._prefix = prefix

        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            ivon = unwrap(optimizer)
            if ivon is None:
                raise ValueError(
                    f"the Trainer's optimizer is {type(getattr(optimizer, 'optimizer', optimizer)).__name__}, not "
                    "IVON; call attach_trainer(trainer), or pass Trainer(..., optimizers=(IVON(...), None))"
                )
            ivon.eval()
            ivon.examples.next_step()  # what a run has left that was interrupted, or had no memory for its batch
            _warn_of_misfits(ivon, args, state.max_steps)
            if not args.torch_compile and getattr(self._trainer, "loss_is_scaled_for_ga", None) is None:
                LossScaleCheck(self._trainer.model, args.gradient_accumulation_steps)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            if (ivon := unwrap(optimizer)) is not None:
                ivon.eval()  # a step that the scaler skipped has left its sample
                ivon.examples.next_step()  # and what was counted for it

        def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            ivon = unwrap(optimizer)
            if ivon is None:
                return
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                _load_best(ivon, Path(state.best_model_checkpoint))
            pruner = ivon.pruner
            if pruner is not None and not pruner.is_hard(ivon.completed_steps):
                warnings.warn(
                    f"the model is that of step {ivon.completed_steps}, and its ranks are at the target from step "
                    f"{pruner.total_steps - pruner.final} on only: stop later, and compare models from then on",
                    stacklevel=3,
                )

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            ivon = unwrap(optimizer)
            if ivon is None or logs is None or "loss" not in logs:
                return
            numbers = {self._prefix + name: value for name, value in ivon.metrics().items()}
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)  # the Trainer has put its own copy there

    return IVONCallback


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
