"""What `--optimizer` stands for: which layers the model gets, and what the Trainer is told.

A method is a row of :data:`METHODS`. The loop is the same for all of them, the Trainer's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn
from transformers import Trainer

from ivon_lora.cli.finetune.callbacks import AllocateRanks
from ivon_lora.cli.finetune.model import encoder_linears, head_modules, quiet
from ivon_lora.cli.finetune.options import Settings, as_steps
from ivon_lora.integrations.trainer import attach_trainer

__all__ = ["METHODS", "SCALING", "Method", "add_adapter"]

SCALING = 2  # lora_alpha / rank: the update is B A times this
ORTHOGONALITY = 0.1  # weight of AdaLoRA's penalty, as in its paper (arXiv:2303.10512)


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        config: PEFT's configuration for a base model.
        attach: is given the Trainer and the number of training texts, before training; the optimizer that it does not
            set is the Trainer's AdamW.
        resumable: whether the Trainer's checkpoints hold everything.
    """

    config: Callable[[nn.Module, Settings], peft.PeftConfig]
    attach: Callable[[Trainer, Settings, int], None] = lambda trainer, settings, examples: None
    resumable: bool = True


def add_adapter(base: nn.Module, settings: Settings) -> Any:
    """The PeftModel of a run; its initialisation depends on the seed alone."""
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(settings.seed)
        return peft.get_peft_model(base, METHODS[settings.optimizer].config(base, settings))


def lora_config(base: nn.Module, settings: Settings) -> peft.LoraConfig:
    """Plain LoRA on all linear layers of the encoder, head trained whole."""
    return peft.LoraConfig(r=settings.rank, lora_alpha=SCALING * settings.rank, lora_dropout=0.0, **_targets(base))


def adalora_config(base: nn.Module, settings: Settings, penalty: float = ORTHOGONALITY) -> peft.AdaLoraConfig:
    """PEFT's AdaLoRA with the pruning schedule of the settings."""
    return peft.AdaLoraConfig(
        init_r=settings.rank,
        target_r=settings.target_rank,
        lora_alpha=SCALING * settings.rank,
        lora_dropout=0.0,
        total_step=settings.steps,
        tinit=as_steps(settings.warmup, settings.steps),
        tfinal=as_steps(settings.final, settings.steps),
        deltaT=max(1, as_steps(settings.interval, settings.steps)),
        orth_reg_weight=penalty,
        **_targets(base),
    )


def ivon_config(base: nn.Module, settings: Settings) -> peft.PeftConfig:
    """LoRA, or AdaLoRA's layers without its penalty and its allocator."""
    return lora_config(base, settings) if settings.layers == "lora" else adalora_config(base, settings, penalty=0.0)


def attach_ivon(trainer: Trainer, settings: Settings, examples: int) -> None:
    """IVON with its pruner, through the integration that any script would use."""
    options: dict[str, Any] = {"temperature": settings.temperature, "prior_std": settings.prior_std}
    if settings.recipe == "published":
        names = ("ess", "hess_init", "clip_radius", "beta2")
        options = {name: getattr(settings, name) for name in names}
        options |= {"weight_decay": settings.weight_decay or 0.0, "rescale_lr": False}
    schedule = {
        "criterion": settings.criterion,
        "warmup": settings.warmup,
        "final": settings.final,
        "interval": max(1, as_steps(settings.interval, settings.steps)),
    }
    attach_trainer(
        trainer,
        settings.target_rank,
        num_examples=examples,
        pruner_options=schedule,
        seed=settings.seed,
        **options,
    )


METHODS = {
    "ivon": Method(ivon_config, attach_ivon),
    "adamw": Method(lora_config),
    # PEFT saves an AdaLoRA model without the ranks that are masked for now, and its allocator not at all
    "adalora": Method(adalora_config, lambda trainer, *_: trainer.add_callback(AllocateRanks()), resumable=False),
}


def _targets(base: nn.Module) -> dict[str, Any]:
    return {
        "task_type": "SEQ_CLS",
        "target_modules": encoder_linears(base),
        "modules_to_save": head_modules(base),
    }
