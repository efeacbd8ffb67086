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
from ivon_lora.cli.finetune.model import lora_targets
from ivon_lora.cli.finetune.options import Settings, as_steps
from ivon_lora.integrations.trainer import attach_trainer

SCALING = 2  # lora_alpha / rank: the update is B A times this
ORTHOGONALITY = 0.1  # weight of AdaLoRA's penalty, as in its paper (arXiv:2303.10512)


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        config: PEFT's configuration for a base model.
        attach: is given the Trainer and the number of training texts; sets its optimizer, adds callbacks. A Trainer
            without an optimizer trains with AdamW.
        resumable: whether the Trainer's checkpoints hold everything.
    """

    config: Callable[[nn.Module, Settings], peft.PeftConfig]
    attach: Callable[[Trainer, Settings, int], Any] = lambda trainer, settings, examples: None
    resumable: bool = True


def add_adapter(base: nn.Module, config: peft.PeftConfig, seed: int) -> Any:
    """`peft.get_peft_model` with an initialisation that depends on ``seed`` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(base, config)


def lora_config(base: nn.Module, settings: Settings) -> peft.LoraConfig:
    """Plain LoRA on all linear layers of the encoder, head trained whole."""
    return peft.LoraConfig(r=settings.rank, lora_alpha=SCALING * settings.rank, **lora_targets(base))


def adalora_config(base: nn.Module, settings: Settings, penalty: float = ORTHOGONALITY) -> peft.AdaLoraConfig:
    """PEFT's AdaLoRA with the pruning schedule of the settings."""
    return peft.AdaLoraConfig(
        init_r=settings.rank,
        target_r=settings.target_rank,
        lora_alpha=SCALING * settings.rank,
        total_step=settings.steps,
        tinit=as_steps(settings.warmup, settings.steps),
        tfinal=as_steps(settings.final, settings.steps),
        deltaT=max(1, as_steps(settings.interval, settings.steps)),
        orth_reg_weight=penalty,
        **lora_targets(base),
    )


def ivon_config(base: nn.Module, settings: Settings) -> peft.PeftConfig:
    """LoRA, or AdaLoRA's layers without its penalty and its allocator."""
    return lora_config(base, settings) if settings.layers == "lora" else adalora_config(base, settings, penalty=0.0)


def attach_ivon(trainer: Trainer, settings: Settings, examples: int) -> None:
    """IVON with its pruner, through the integration that any script would use."""
    options: dict[str, Any] = {"temperature": settings.temperature, "prior_std": settings.prior_std}
    if settings.recipe == "published":
        options = {name: getattr(settings, name) for name in ("ess", "hess_init", "clip_radius", "beta2")}
        options |= {"weight_decay": settings.weight_decay or 0.0, "rescale_lr": False}
    schedule = {name: getattr(settings, name) for name in ("criterion", "warmup", "final")}
    schedule["interval"] = max(1, as_steps(settings.interval, settings.steps))
    options |= {"num_examples": examples, "pruner_options": schedule, "seed": settings.seed}
    attach_trainer(trainer, settings.target_rank, **options)


def attach_allocator(trainer: Trainer, settings: Settings, examples: int) -> None:
    """PEFT's AdaLoRA: sensitivity scores and allocator, with AdamW."""
    trainer.add_callback(AllocateRanks())


METHODS = {
    "ivon": Method(ivon_config, attach_ivon),
    "adamw": Method(lora_config),
    # PEFT saves an AdaLoRA model without the ranks that are masked for now, and its allocator not at all
    "adalora": Method(adalora_config, attach_allocator, resumable=False),
}
