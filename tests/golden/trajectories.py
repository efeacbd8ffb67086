"""Runs of the optimizer on gradients that every machine computes alike, and hashes of the bits they leave behind.

Tests that compare backends with each other do not see all of them drift together; these do. The gradient of a parameter
p is p a + b c, with arrays a and b of small fractions and a power of two c: fp32 products and sums, each rounded on its
own, whatever the processor, BLAS or number of threads. So only the optimizer can move a hash.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ivon_lora import IVON, LoraAdapter, RankPruner, VAdam

#: odd sizes, a scalar and a single element, a convolution's weights; last, more elements than a block of 2^16
SHAPES: tuple[tuple[int, ...], ...] = ((7, 5), (), (3, 2, 3, 3), (1,), (2, 129), (65_573,))
#: a tensor without ranks; A, B (and E) of LoRA in a linear layer and in a convolution, and of AdaLoRA
ADAPTERS: tuple[tuple[int, ...], ...] = ((37,), (5, 13), (9, 5), (3, 2, 3, 3), (7, 3, 1, 1), (4, 11), (6, 4), (4, 1))
SEED = 2**40 + 3
STEPS = 20
NONFINITE = (math.inf, math.nan, -math.inf)


@dataclass(frozen=True)
class Scenario:
    """What a run is like.

    Attributes:
        options: of the optimizer.
        group: what the second half of the parameters has of its own; None: there is one group.
        criterion: of a pruner that goes through its soft and its hard phase on `ADAPTERS`; None: `SHAPES`, no pruner.
        samples: contexts of `sampled_params` in a step; 0: `train()` draws the sample.
        partial: the first tensor is frozen, and two others have no gradient in some steps.
        bad: values that some elements of the gradient have, one of them in a step.
        schedule: the learning rate changes from step to step.
        counted: `count_examples` says how many examples a step has, not always the same number.
    """

    options: dict[str, Any]
    group: dict[str, Any] | None = None
    criterion: str | None = None
    samples: int = 0
    partial: bool = False
    bad: tuple[float, ...] = ()
    schedule: bool = False
    counted: bool = False


def _of_every_algorithm(options: dict[str, Any], group: dict[str, Any]) -> dict[str, Scenario]:
    return {
        "plain": Scenario(options),
        "ranks": Scenario(options, criterion="snr_abs"),
        "ranks_by_sensitivity": Scenario(options, criterion="sensitivity"),
        "two_samples": Scenario(options, samples=2),
        "two_groups": Scenario(options, group),
        "partial": Scenario(options, partial=True),
        "nonfinite": Scenario(options, bad=(*NONFINITE, 2.0**127)),
        "maximize": Scenario({**options, "maximize": True}),  # of the negative: the hashes are those of "plain"
        "schedule": Scenario(options, schedule=True),
        "together": Scenario(options, group, "snr", samples=2, partial=True, bad=NONFINITE, schedule=True),
    }


def _ivon(hess_approx: str) -> dict[str, Scenario]:
    options: dict[str, Any] = {"lr": 0.1, "ess": 300.0, "hess_init": 0.7, "beta2": 0.85, "weight_decay": 0.01}
    options |= {"hess_approx": hess_approx, "seed": SEED}
    clipped = {**options, "clip_radius": 0.02, "debias": False, "rescale_lr": False}
    return {
        **_of_every_algorithm(options, {"lr": 0.03, "weight_decay": 0.2}),
        "clip_radius": Scenario(clipped, bad=NONFINITE),  # an infinite step would be finite once it is clipped
    }


def _vadam() -> dict[str, Scenario]:
    # in the 16th step noise and prior are all there
    options = {"lr": 0.002, "num_examples": 120, "noise_warmup": 120, "seed": SEED}
    warm = {**options, "temperature": 0.01 * (0.002 / 0.003) ** 2}  # stated, for defaults change
    stated = {**warm, "batch_size": 8, "prior_std": 0.2}
    return {
        **_of_every_algorithm(stated, {"lr": 0.01, "ess": 120 / 0.01, "betas": (0.8, 0.99)}),
        "default": Scenario(options, counted=True),
        "default_ranks": Scenario(options, criterion="snr_abs", counted=True),
        "default_two_samples": Scenario(options, samples=2, counted=True),
        "prior_std": Scenario({**warm, "prior_std": 0.05}, counted=True),
        "batch_size": Scenario({**warm, "batch_size": 8, "prior_std": 0.04}),
        "temperature": Scenario({**stated, "temperature": 0.1, "noise_warmup": 0}),
    }


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALGORITHMS = {"price": _ivon("price"), "gradsq": _ivon("gradsq"), "vadam": _vadam()}
#: "algorithm-dtype-scenario"
CASES = [f"{a}-{dtype}-{name}" for a, scenarios in ALGORITHMS.items() for dtype in DTYPES for name in scenarios]


def fractions(shape: Sequence[int], salt: int) -> Tensor:
    """Multiples of 2^-16 in [-1/16, 1/16), in no order."""
    words = np.arange(math.prod(shape), dtype=np.uint64) * 2654435761 + salt * 40503
    return torch.from_numpy((words // 512 % 8192 / 65536 - 0.0625).astype(np.float32).reshape(shape))


class Gradients:
    """The gradients of one parameter, as functions of its value."""

    def __init__(self, index: int, p: Tensor, scenario: Scenario) -> None:
        self.index, self.p, self.scenario = index, p, scenario
        self.a = fractions(p.shape, 3 * index + 1) * 8.0 + 1.25
        self.b = fractions(p.shape, 3 * index + 2)
        for factors in (self.a, self.b):
            factors.view(-1)[7::11] = 0.0  # there is nothing to learn of these elements

    def at(self, number: int) -> Tensor | None:
        """The ``number``-th of the run, at the parameter's present value."""
        if not self.p.requires_grad or (self.scenario.partial and self.index in (1, 4) and number % 5 < 2):
            return None
        grad = self.p.detach().float() * self.a + self.b * (1.0, -0.5, 0.25, -2.0)[number % 4]
        if bad := self.scenario.bad:
            grad.view(-1)[5 * number % 41 :: 41] = bad[(number + self.index) % len(bad)]
        return (-grad if self.scenario.options.get("maximize") else grad).to(self.p.dtype)


def trajectory(case: str, backend: str) -> dict[str, str]:
    """Hashes of parameters, posterior, state and a prediction at the end, and of every allocation; by name."""
    algorithm, dtype, name = case.split("-")
    scenario = ALGORITHMS[algorithm][name]
    shapes = ADAPTERS if scenario.criterion else SHAPES
    params = [nn.Parameter(fractions(s, 3 * i).to(DTYPES[dtype])) for i, s in enumerate(shapes)]
    params[0].requires_grad_(not scenario.partial)
    pruner = _pruner(params, scenario.criterion) if scenario.criterion else None
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], **(scenario.group or {})}]
    make = VAdam if algorithm == "vadam" else IVON
    optimizer = make(groups if scenario.group else params, **scenario.options, backend=backend, pruner=pruner)
    scheduler = LambdaLR(optimizer, lambda step: 2.0 ** -(step % 3)) if scenario.schedule else None
    gradients = [Gradients(i, p, scenario) for i, p in enumerate(params)]
    hashes: defaultdict[str, Any] = defaultdict(hashlib.sha256)

    def record(what: str, x: Tensor) -> None:
        hashes[what].update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    def backward(number: int) -> None:
        optimizer.zero_grad()
        for gradient in gradients:
            gradient.p.grad = gradient.at(number)
        if scenario.counted:
            optimizer.count_examples(8 if number % 4 else 5)

    for step in range(STEPS):
        if scenario.samples:
            for sample in range(scenario.samples):
                with optimizer.sampled_params(train=True):
                    backward(scenario.samples * step + sample)
        else:
            optimizer.train()
            backward(step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if pruner is not None and pruner.is_due(optimizer.param_groups[0]["completed_steps"]):
            for p in params[1:]:
                record("rank_snr", optimizer.state[p]["rank_snr"])
                record("rank_mask", optimizer.state[p]["rank_mask"])
    for p in params:
        record("param", p)
        posterior = optimizer.posterior(p)
        record("mean", posterior.mean)
        record("std", posterior.stddev)
        for key in ("momentum", "hess"):
            if p.requires_grad and key in optimizer.state[p]:
                record(key, optimizer.state[p][key])
    with optimizer.sampled_params():
        for p in params:
            record("prediction", p)
    return {what: h.hexdigest()[:16] for what, h in hashes.items()}


def _pruner(params: list[nn.Parameter], criterion: str) -> RankPruner:
    """Allocations after 6, 9, 12 and 14 steps, then the mask is frozen."""
    _, a, b, conv_a, conv_b, ada_a, ada_b, ada_e = params
    adapters = [
        LoraAdapter("linear", a, b),
        LoraAdapter("convolution", conv_a, conv_b),
        LoraAdapter("adalora", ada_a, ada_b, ada_e),
    ]
    return RankPruner(adapters, 2, criterion, total_steps=STEPS, warmup=3, final=6, interval=3, min_rank=1)
