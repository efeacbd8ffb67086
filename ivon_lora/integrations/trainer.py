"""The Hugging Face Trainer: a factory for `optimizer_cls_and_kwargs`, and a callback for logs and skipped steps.

Neither is needed: ``Trainer(..., optimizers=(IVON(model.named_parameters(), ...), None))`` trains, evaluates, saves and
resumes as it should, because the Trainer itself calls ``optimizer.train()`` and ``optimizer.eval()``.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from ivon_lora.integrations.loss_scale import LossScaleCheck
from ivon_lora.optim.examples import disagreement
from ivon_lora.optim.wrappers import unwrap

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON


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
                "this version of transformers has no optimizer factories: update it, or pass "
                "Trainer(..., optimizers=(IVON(model.named_parameters(), ...), None))"
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
        **options: Any,
    ) -> IVON:
        """The optimizer of ``model``'s trainable parameters, attached to it.

        Args:
            model: given by the Trainer.
            args: the Trainer's ``TrainingArguments``: learning rate, batch size and number of steps are read there.
            num_examples: examples in the training set.
            target_rank: mean rank per adapter at the end of the run; None prunes nothing.
            adapter_name: PEFT's name of the adapter whose ranks are pruned.
            pruner_options: further arguments of :class:`~ivon_lora.RankPruner`, e.g. ``{"min_rank": 1}``.
            options: further arguments of :meth:`IVON.from_adamw <ivon_lora.optim.ivon.IVON.from_adamw>`, which takes
                ``TrainingArguments.learning_rate``, ``adam_beta1`` and ``adam_beta2`` as they stand; with ``ess`` among
                them, of :class:`~ivon_lora.optim.ivon.IVON` itself.

        The Trainer's own groups, and with them its ``weight_decay`` of 0, play no part. The examples of a step are
        counted in the model's forward passes.

        Raises:
            ValueError: no trainable parameters, no LoRA layer to prune, or an argument outside its bounds.
        """
        from ivon_lora import IVON, RankPruner, find_adapters

        params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not params:
            raise ValueError("the model has no parameter with requires_grad=True; wrap it with peft.get_peft_model")
        if args.weight_decay and not {"weight_decay", "prior_std"} & options.keys():
            warnings.warn(
                f"TrainingArguments.weight_decay={args.weight_decay} is AdamW's and is not used: the prior takes its "
                'place, pass "weight_decay" or "prior_std" to the factory',
                stacklevel=2,
            )
        if target_rank is not None:
            options["pruner"] = RankPruner(
                find_adapters(model, adapter_name),
                target_rank,
                **{"total_steps": total_steps(args, num_examples), **(pruner_options or {})},
            )
        options = {"lr": args.learning_rate, **options}
        if "ess" in options:
            optimizer = IVON(params, **options)
        else:
            options = {"betas": (args.adam_beta1, args.adam_beta2), **options}
            optimizer = IVON.from_adamw(params, num_examples=num_examples, **options)
        optimizer.attach(model)
        if not getattr(args, "torch_compile", False):
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
    return math.ceil(args.num_train_epochs * max(math.ceil(forwards / args.gradient_accumulation_steps), 1))


def watch(trainer: Any, prefix: str = "ivon/") -> Any:
    """Add ranks, SNR and curvature to everything the Trainer logs; guard skipped steps. Call it before ``train()``.

    Args:
        trainer: a ``transformers.Trainer`` or a subclass of it (TRL's trainers).
        prefix: put before the keys of :meth:`IVON.metrics`.

    Returns:
        the callback, first in the trainer's list, so that every reporter sees the added numbers.

    The callback restores the mean after an optimizer step that an fp16 scaler skipped; it warns if the run's length is
    not the pruner's, if the optimizer's ``batch_size`` is not that of the Trainer's steps, and if the model ignores
    ``num_items_in_batch`` (see `loss_scale`). A beta2 too slow for the length of the run is logged.

    Raises:
        ModuleNotFoundError: transformers is missing.
        ValueError: (at ``train()``) the Trainer's optimizer is not IVON.
    """
    callback = _callback_class()(trainer, prefix)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


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
                    "IVON; pass Trainer(..., optimizers=(IVON(...), None))"
                )
            pruner = ivon.pruner
            if pruner is not None and pruner.total_steps != state.max_steps:
                warnings.warn(
                    f"the pruner's schedule ends at step {pruner.total_steps}, the Trainer's run at {state.max_steps}: "
                    f"pass RankPruner(..., total_steps={state.max_steps})",
                    stacklevel=2,
                )
            accumulated = args.gradient_accumulation_steps * args.world_size
            _check_batch_size(ivon, args.train_batch_size * accumulated)
            if not args.torch_compile and getattr(self._trainer, "loss_is_scaled_for_ga", None) is None:
                LossScaleCheck(self._trainer.model, args.gradient_accumulation_steps)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            if (ivon := unwrap(optimizer)) is not None:
                ivon.eval()  # a step that the scaler skipped has left its sample

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


def _check_batch_size(optimizer: IVON, expected: int) -> None:
    """Warn if a ``batch_size`` that was stated is not that of the Trainer's steps."""
    for group in optimizer.param_groups:
        if isinstance(group["batch_size"], int) and group["batch_size"] != expected:
            optimizer.warn_once("batch_size", disagreement(group["batch_size"], expected))
