"""The methods of the study of ranks: who decides how many ranks a layer gets, and which optimizer trains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ivon_lora import IVON, RankPruner, find_adapters, gelora_ranks
from ivon_lora.finetune.batches import Encoded, evaluation_batches, pad
from ivon_lora.finetune.methods import SCALING, AdaLora, AdamW, Method, adalora_config, base_path, lora_config
from ivon_lora.finetune.model import encoder_linears, wrap
from ivon_lora.finetune.settings import CRITERIA, Settings, as_steps, make_settings

LORA_LR, TRIPLET_LR = 3e-3, 1e-2  # chosen for AdamW on the validation split: plain LoRA, and A, B with a gate E
GELORA_TEXTS = 400
TRAINING_SENTENCES, BATCH_SIZE = 7117, 32
#: entries of a parameter group that say how the optimizer works
OPTIONS = (
    *("betas", "beta1", "beta2", "ess", "hess_init", "weight_decay", "prior", "noise_warmup"),
    *("hess_approx", "step_rule"),
)
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Arm:
    """One method.

    Attributes:
        allocation: "uniform", "gelora", "adalora" (PEFT's), or a criterion of `RankPruner`.
        optimizer: "adamw" or "ivon".
        layers: "lora" (A and B) or "triplets" (A, B and a gate E per rank, as in AdaLoRA).
        lr: peak learning rate.
    """

    allocation: str
    optimizer: str
    layers: str
    lr: float

    @property
    def name(self) -> str:
        """Unique among the arms."""
        return f"{self.allocation} {self.optimizer} {self.layers}"

    @property
    def options(self) -> str:
        """What `options_of` says of its optimizer in the study."""
        weight = nn.Parameter(torch.zeros(1))
        if self.optimizer == "adamw":
            return options_of(torch.optim.AdamW([weight], weight_decay=0.0))
        return options_of(IVON.from_adamw([weight], self.lr, num_examples=TRAINING_SENTENCES, batch_size=BATCH_SIZE))

    @property
    def prunes(self) -> bool:
        """Whether ranks are taken away in training."""
        return self.allocation not in {"uniform", "gelora"}


def options_of(optimizer: torch.optim.Optimizer) -> str:
    """How an optimizer works, learning rate and seed aside: the numbers that its defaults stand for."""
    group = optimizer.param_groups[0]
    shown = {name: group[name] for name in OPTIONS if name in group}
    return " ".join(f"{name}={f'{v:.4g}' if isinstance(v, float) else v}" for name, v in shown.items())


CONTROLS = (
    Arm("uniform", "adamw", "lora", LORA_LR),
    Arm("adalora", "adamw", "triplets", TRIPLET_LR),
    Arm("gelora", "adamw", "lora", LORA_LR),
)
OURS = (
    Arm("uniform", "ivon", "lora", LORA_LR),
    *(Arm(criterion, "ivon", "triplets", TRIPLET_LR) for criterion in CRITERIA),
)
#: not in the study unless asked for; pruning plain LoRA was compared with pruning triplets on the validation split
OTHERS = (
    Arm("gelora", "ivon", "lora", LORA_LR),
    *(Arm(criterion, "ivon", "lora", LORA_LR) for criterion in CRITERIA),
)
ARMS = {arm.name: arm for arm in (*CONTROLS, *OURS, *OTHERS)}


def settings_of(arm: Arm, seed: int, steps: int, rank: int, target: int) -> Settings:
    """Settings of one run; ranks start at ``rank`` where they are pruned, else at ``target``."""
    optimizer = "adalora" if arm.allocation == "adalora" else arm.optimizer
    chosen: dict[str, Any] = {"optimizer": optimizer, "lr": arm.lr, "seed": seed, "steps": steps, "max_length": 32}
    chosen["batch_size"] = BATCH_SIZE
    chosen["rank"], chosen["target_rank"] = (rank, target) if arm.prunes else (target, target)
    return make_settings({**chosen, "weight_decay": 0.0})


def build(arm: Arm, base: nn.Module, settings: Settings, data: Encoded) -> Method:
    """The method of an arm on ``base``, whose training set is ``data``."""
    if arm.allocation == "adalora":
        return AdaLora(base, settings)
    if arm.optimizer == "adamw" and arm.allocation == "uniform":
        return AdamW(base, settings)
    if arm.optimizer == "adamw":
        return FixedRanks(base, settings, gelora_pattern(base, data, settings.target_rank))
    return Ivon(base, settings, arm, data)


class FixedRanks(AdamW):
    """LoRA with its own rank for every layer, trained with AdamW.

    Args:
        ranks: by path of the layer in the base model.
    """

    def __init__(self, base: nn.Module, settings: Settings, ranks: dict[str, int]) -> None:
        self.model = wrap(base, patterned(lora_config(base, settings.rank), ranks), settings.seed)
        self.optimizer = torch.optim.AdamW(self.trainable().values(), lr=settings.lr, weight_decay=0.0)
        self._ranks = ranks


class Ivon(Method):
    """`IVON.from_adamw` on fixed ranks, or with a `RankPruner`."""

    has_posterior = True

    def __init__(self, base: nn.Module, settings: Settings, arm: Arm, data: Encoded) -> None:
        config = adalora_config(base, settings) if arm.layers == "triplets" else lora_config(base, settings.rank)
        if arm.allocation == "gelora":
            patterned(config, gelora_pattern(base, data, settings.target_rank))
        self.model = wrap(base, config, settings.seed)
        self.adapters = find_adapters(self.model)
        self.pruner: RankPruner | None = None
        if arm.prunes:
            self.pruner = RankPruner(
                self.adapters,
                settings.target_rank,
                criterion=arm.allocation,
                total_steps=settings.steps,
                warmup=settings.warmup,
                final=settings.final,
                interval=max(1, as_steps(settings.interval, settings.steps)),
            )
        self.optimizer: IVON = IVON.from_adamw(
            self.trainable().items(),
            lr=settings.lr,
            num_examples=len(data),
            batch_size=settings.batch_size,
            seed=settings.seed,
            pruner=self.pruner,
        )

    def begin_step(self) -> None:
        self.optimizer.train()

    def budget(self, step: int) -> int:
        return sum(a.rank for a in self.adapters) if self.pruner is None else self.pruner.budget(step)

    def kept_ranks(self) -> dict[str, int]:
        if self.pruner is None:
            return {base_path(a.name): a.rank for a in self.adapters}
        return {base_path(a.name): int(self.pruner.mask(a).sum()) for a in self.adapters}


def patterned(config: Any, ranks: Mapping[str, int]) -> Any:
    """Give the PEFT configuration a rank for every layer, with the same alpha / rank everywhere."""
    config.r, config.lora_alpha = max(ranks.values()), SCALING * max(ranks.values())
    config.rank_pattern = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True)}
    config.alpha_pattern = {name: SCALING * rank for name, rank in config.rank_pattern.items()}
    return config


def gelora_pattern(base: nn.Module, data: Encoded, target: int) -> dict[str, int]:
    """GeLoRA's ranks of the layers (1 outside its blocks), scaled to a mean of ``target`` so that budgets are equal."""
    device = next(base.parameters()).device
    part = data.first(GELORA_TEXTS)
    batches = (
        {name: batch[name] for name in ("input_ids", "attention_mask")}
        for batch in (pad(part, indices, device) for indices in evaluation_batches(part, 32))
    )
    names = encoder_linears(base)
    found = gelora_ranks(base, batches, target_modules=names, alpha_over_rank=SCALING).ranks
    return scaled_ranks({name: found.get(name, 1) for name in names}, target * len(names))


def scaled_ranks(ranks: Mapping[str, int], total: int) -> dict[str, int]:
    """Ranks in proportion to ``ranks``, at least 1 each, with sum ``total``: largest remainder, ties in order.

    Raises:
        ValueError: ``total`` is less than one rank a layer.
    """
    if total < len(ranks):
        raise ValueError(f"total={total} is less than one rank for each of the {len(ranks)} layers")
    share = {name: rank * (total - len(ranks)) / sum(ranks.values()) for name, rank in ranks.items()}
    scaled = {name: 1 + int(value) for name, value in share.items()}
    by_remainder = sorted(share, key=lambda name: int(share[name]) - share[name])
    for name in by_remainder[: total - sum(scaled.values())]:
        scaled[name] += 1
    return scaled
