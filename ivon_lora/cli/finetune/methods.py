"""What `--method` and `--optimizer` stand for: one table, and how its rows get into a model and the Trainer."""

from __future__ import annotations

import ast
import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ivon_lora.cli.arguments import as_steps
from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.integrations.trainer import optimizer_for
from ivon_lora.variants import METHODS as VARIANTS
from ivon_lora.variants import Variant
from ivon_lora.variants.gelora import gelora_ranks

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import TrainingArguments

    from ivon_lora.cli.finetune.options import Settings

SCALING = 2  # lora_alpha / rank: the update is B A times this
ORTHOGONALITY = 0.1  # weight of AdaLoRA's penalty, as in its paper (arXiv:2303.10512)
GELORA_TEXTS = 1000  # whose hidden states are measured
#: arguments that other options give, or none
GIVEN = {"model", "batches", "target_modules", "alpha_over_rank", "total_steps", "adapter_name", "seed"}


@dataclass(frozen=True)
class Method:
    """A way to train LoRA.

    Attributes:
        text: a line of the help.
        make: the variant, or the function that proposes ranks: --option gives its further arguments.
        rank, lr: defaults of --rank and --lr.
    """

    text: str
    make: Callable[..., Any] | None = None
    rank: int = 8
    lr: float = 3e-3

    def arguments(self, given: Sequence[str]) -> dict[str, Any]:
        """What --option gave, as NAME=VALUE; values as in Python. InputError for a name that ``make`` lacks."""
        known = set() if self.make is None else set(signature(self.make).parameters) - GIVEN
        found: dict[str, Any] = {}
        for name, separator, value in (pair.partition("=") for pair in given):
            if name not in known or not separator:
                names = ", ".join(sorted(known)) or "no options"
                raise InputError(f"--option {name}: this method has {names}; give NAME=VALUE")
            found[name] = value
            with contextlib.suppress(ValueError, SyntaxError):
                found[name] = ast.literal_eval(value)
        return found


#: each with --optimizer ivon and adamw
METHODS = {
    "adalora": Method("AdaLoRA: A, B and a gate E for each rank; ranks are pruned (adamw: by PEFT)", None, 12, 1e-2),
    "lora": Method("LoRA: A and B alone; ranks are pruned by ivon only"),
    "gelora": Method("GeLoRA: LoRA with ranks from the hidden states of the data (arXiv:2412.09250)", gelora_ranks),
    **{
        name: Method(str(sys.modules[variant.__module__].__doc__), variant, rank=1 if name == "xgblora" else 8)
        for name, variant in VARIANTS.items()
    },
}


def adapt(base: nn.Module, settings: Settings, batches: Iterable[Any]) -> Any:
    """A PEFT model, initialised by torch's generator with the run's seed; GeLoRA measures on ``batches``."""
    import peft

    rank, targets = settings.rank, _lora_targets(base)
    if settings.method == "gelora":
        options = METHODS["gelora"].arguments(settings.option)
        with input_errors("--method gelora"):
            ranks = gelora_ranks(base, batches, alpha_over_rank=SCALING, seed=settings.seed, **options)
        config = peft.LoraConfig(**{**targets, **ranks.lora_arguments()})
    elif settings.method == "adalora":
        config = peft.AdaLoraConfig(
            init_r=rank,
            lora_alpha=SCALING * rank,
            target_r=settings.target_rank,
            total_step=settings.steps,
            tinit=as_steps(settings.warmup, settings.steps),
            tfinal=as_steps(settings.final, settings.steps),
            deltaT=max(1, as_steps(settings.interval, settings.steps)),
            orth_reg_weight=ORTHOGONALITY if settings.optimizer == "adamw" else 0.0,
            **targets,
        )
    else:
        config = peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, **targets)
    torch.manual_seed(settings.seed)
    return peft.get_peft_model(base, config)


def _lora_targets(base: nn.Module) -> dict[str, Any]:
    """Arguments of a PEFT configuration: LoRA on all linear layers of the encoder, and the head trained whole.

    The encoder is what lies below ``base.base_model_prefix``. InputError if it has no linear layer.
    """
    import transformers

    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    prefix = str(getattr(base, "base_model_prefix", ""))
    names = [name for name, layer in base.named_modules() if isinstance(layer, kinds) and name.startswith(prefix + ".")]
    if not names:
        raise InputError(f"{type(base).__name__} has no linear layer under {prefix!r}: choose another --model")
    head = [name for name, child in base.named_children() if name != prefix and any(True for _ in child.parameters())]
    return {"task_type": "SEQ_CLS", "target_modules": names, "modules_to_save": head}


def make_optimizer(
    model: nn.Module, args: TrainingArguments, settings: Settings, examples: int
) -> tuple[Optimizer | None, Variant | None]:
    """What trains an adapted model (None: the AdamW that the Trainer makes itself), and the variant attached to it."""
    method, variant = METHODS[settings.method], None
    with input_errors(f"--method {settings.method}"):
        if isinstance(method.make, type):
            steps = {"total_steps": settings.steps} if "total_steps" in signature(method.make).parameters else {}
            variant = method.make(model, **{"seed": settings.seed, **method.arguments(settings.option), **steps})
        if settings.optimizer == "adamw":
            if variant is None:
                return None, None
            optimizer = torch.optim.AdamW(variant.param_groups(), settings.lr, weight_decay=args.weight_decay)
            variant.attach(optimizer)
            return optimizer, variant
        options: dict[str, Any] = {"temperature": settings.temperature, "prior_std": settings.prior_std}
        if settings.recipe == "published":
            options = {name: getattr(settings, name) for name in ("ess", "hess_init", "clip_radius", "beta2")}
            options |= {"weight_decay": settings.weight_decay or 0.0, "rescale_lr": False}
        schedule = {name: getattr(settings, name) for name in ("criterion", "warmup", "final")}
        schedule |= {"interval": max(1, as_steps(settings.interval, settings.steps)), "total_steps": settings.steps}
        options |= {"seed": settings.seed, "pruner_options": schedule, "variant": variant}
        target = settings.target_rank if settings.prunes else None
        return optimizer_for(model, args, examples, target, **options), variant
