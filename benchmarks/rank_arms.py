"""The arms of the study of ranks: who decides how many ranks a layer gets, and which optimizer trains it.

A new arm is one function from `Setup` to `Arm` and one line in `ARMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig

from benchmarks.data import ALPHA_OVER_RANK, Sentences, adapt, encoder_linears
from benchmarks.training import make_optimizer
from ivon_lora import RankPruner, find_adapters, gelora_ranks
from ivon_lora.variants import METHODS, Diffora

WARMUP, FINAL, INTERVAL = 0.1, 0.4, 0.05  # as shares of the steps
GELORA_TEXTS = 400


@dataclass(frozen=True)
class Setup:
    """What every arm is given.

    Args:
        base: the classifier, without adapters.
        data: training set.
        lr: peak learning rate.
        rank: mean rank of a layer at the start of arms that prune.
        target: mean rank of a layer at the end of all arms.
    """

    base: Any
    data: Sentences
    steps: int
    lr: float
    seed: int = 0
    batch_size: int = 32
    rank: int = 12
    target: int = 4


@dataclass(frozen=True)
class Arm:
    """A model and its optimizer.

    Args:
        ranks: kept ranks, layer by layer.
        after_step, own_loss: as in `training.train`.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    ranks: Callable[[], list[int]]
    after_step: Callable[[int], object] = lambda step: None
    own_loss: bool = False


def optimizer_of(model: Any, setup: Setup, bayesian: bool, groups: Any = None, **options: Any) -> torch.optim.Optimizer:
    """Ours with its defaults, or AdamW."""
    given = {"num_examples": len(setup.data), "batch_size": setup.batch_size, "seed": setup.seed, **options}
    return make_optimizer("vadam" if bayesian else "adamw", model, setup.lr, groups, **given)


def uniform(setup: Setup, bayesian: bool) -> Arm:
    """The same rank everywhere."""
    return _fixed(setup, dict.fromkeys(encoder_linears(setup.base), setup.target), bayesian)


def gelora(setup: Setup, bayesian: bool) -> Arm:
    """Ranks from the intrinsic dimensions of hidden states, 1 outside GeLoRA's blocks, scaled to the same total."""
    texts = setup.data.first(GELORA_TEXTS)
    inputs = (texts.inputs(indices) for indices in texts.batches(32))
    names = encoder_linears(setup.base)
    found = gelora_ranks(setup.base, inputs, target_modules=names, alpha_over_rank=ALPHA_OVER_RANK).ranks
    return _fixed(setup, scaled({name: found.get(name, 1) for name in names}, setup.target * len(names)), bayesian)


def adalora(setup: Setup) -> Arm:
    """PEFT's AdaLoRA: its sensitivity scores, its allocator, its orthogonality penalty, and AdamW."""
    model = _triplets(setup)
    pattern = model.peft_config["default"]

    def ranks() -> list[int]:
        return [sum(mask) for mask in pattern.rank_pattern.values()]

    return Arm(model, optimizer_of(model, setup, False), ranks, model.base_model.update_and_allocate, own_loss=True)


def pruned(setup: Setup) -> Arm:
    """`RankPruner` inside the step of our optimizer, on AdaLoRA's triplets A, B, E."""
    model = _triplets(setup)
    phases: dict[str, Any] = {"warmup": WARMUP, "final": FINAL, "interval": max(1, round(INTERVAL * setup.steps))}
    pruner = RankPruner(find_adapters(model), setup.target, total_steps=setup.steps, **phases)
    optimizer: Any = optimizer_of(model, setup, True, pruner=pruner)
    return Arm(model, optimizer, lambda: [row["live"] for row in optimizer.rank_table()])


#: methods of `ivon_lora.variants`: initial rank as a multiple of the target, options, and what the posterior adds
SPENT: dict[str, tuple[float, dict[str, Any], dict[str, Any]]] = {
    "beamlora": (1, {}, {"parents": "now", "merge": "sum"}),
    "cola": (0.5, {"links": 2}, {"carry": "curvature"}),
    "diffora": (2, {"share": 0.5}, {"score": "snr"}),
    "flat-lora": (1, {}, {"top_up": True}),
    "lora-pro": (1, {}, {"damping": "prior"}),
    "rm-lora": (1, {}, {"choose": "thompson"}),
    "sora": (1, {"strength": 1e-2}, {}),
    "xgblora": (0.25, {"layers": 2 / 3}, {}),  # boosters of rank 1, each on two thirds of the blocks
}


def related(setup: Setup, method: str, bayesian: bool) -> Arm:
    """A method of `ivon_lora.variants`: the paper's with AdamW, or with our optimizer and what the posterior adds."""
    share, options, more = SPENT[method]
    options = {**options, **(more if bayesian else {}), "seed": setup.seed}
    if method == "xgblora":
        options["booster_steps"] = max(1, round(setup.steps * 2 / 3 / setup.target))
    elif method not in ("lora-pro", "rm-lora"):
        options["total_steps"] = setup.steps
    rank = max(1, round(share * setup.target))
    model = adapt(setup.base, LoraConfig, setup.seed, r=rank, lora_alpha=ALPHA_OVER_RANK * rank)
    variant = METHODS[method](model, **options)
    optimizer = optimizer_of(model, setup, bayesian, variant.param_groups())
    variant.attach(optimizer)
    # DiffoRA's gates: batches that training sees after the search only
    held_out = islice(setup.data.training_batches(setup.batch_size, setup.seed), getattr(variant, "search", 0), None)

    def after_step(step: int) -> None:
        if isinstance(variant, Diffora) and variant.gates is not None and step < variant.search:
            batch = setup.data.batch(next(held_out))
            labels = batch.pop("labels")
            with variant.architecture():
                torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()

    def ranks() -> list[int]:
        variant.detach()
        return [int((a.A.any(1) & a.B.any(0)).sum()) for a in find_adapters(model)]

    return Arm(model, optimizer, ranks, after_step)


#: chosen for AdamW on the validation split: plain LoRA, and A, B with a gate E
LORA_LR, TRIPLETS_LR = 3e-3, 1e-2

_BOTH = {"adamw": False, "ivon": True}
#: name -> (function, peak learning rate); the name ends with optimizer and layers
ARMS: dict[str, tuple[Callable[[Setup], Arm], float]] = {
    "adalora adamw triplets": (adalora, TRIPLETS_LR),
    "snr_abs ivon triplets": (pruned, TRIPLETS_LR),
    **{f"uniform {name} lora": (partial(uniform, bayesian=is_ours), LORA_LR) for name, is_ours in _BOTH.items()},
    **{f"gelora {name} lora": (partial(gelora, bayesian=is_ours), LORA_LR) for name, is_ours in _BOTH.items()},
    **{
        f"{method} {name} lora": (partial(related, method=method, bayesian=is_ours), LORA_LR)
        for method in SPENT
        for name, is_ours in _BOTH.items()
    },
}


def _fixed(setup: Setup, ranks: Mapping[str, int], bayesian: bool) -> Arm:
    largest = max(ranks.values())
    by_length = sorted(ranks, key=len, reverse=True)  # PEFT takes the first name that is the end of a path
    patterns = {
        "rank_pattern": {name: ranks[name] for name in by_length},
        "alpha_pattern": {name: ALPHA_OVER_RANK * ranks[name] for name in by_length},
    }
    model = adapt(setup.base, LoraConfig, setup.seed, r=largest, lora_alpha=ALPHA_OVER_RANK * largest, **patterns)
    return Arm(model, optimizer_of(model, setup, bayesian), lambda: list(ranks.values()))


def _triplets(setup: Setup) -> Any:
    phases = {"tinit": round(WARMUP * setup.steps), "tfinal": round(FINAL * setup.steps), "total_step": setup.steps}
    options = {"deltaT": max(1, round(INTERVAL * setup.steps)), "orth_reg_weight": 0.1}  # the paper's penalty
    options |= {"init_r": setup.rank, "target_r": setup.target, "lora_alpha": ALPHA_OVER_RANK * setup.rank}
    return adapt(setup.base, AdaLoraConfig, setup.seed, lora_dropout=0.0, **phases, **options)


def scaled(ranks: Mapping[str, int], total: int) -> dict[str, int]:
    """Ranks in proportion to ``ranks``, at least 1 each, with sum ``total``: largest remainder, ties in order."""
    share = {name: rank * (total - len(ranks)) / sum(ranks.values()) for name, rank in ranks.items()}
    found = {name: 1 + int(value) for name, value in share.items()}
    by_remainder = sorted(share, key=lambda name: int(share[name]) - share[name])
    for name in by_remainder[: total - sum(found.values())]:
        found[name] += 1
    return found
