"""The same run on the eager backend and on Triton's kernels, for tests that the bits are equal."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora import IVON, LoraAdapter, RankPruner, VAdam
from tests.optimizer_problem import differing, make_params, photo

#: what an optimizer is made of, given the parameters and the backend
Make = Callable[[Sequence[Tensor], str], IVON]
#: gradient of a parameter, given its index, the number of the backward pass and its present value
Gradient = Callable[[int, int, Tensor], Tensor | None]

IVON_OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 300.0, "hess_init": 0.7, "beta2": 0.85, "weight_decay": 0.01}
VADAM_OPTIONS: dict[str, Any] = {"lr": 0.01, "num_examples": 120, "batch_size": 8, "noise_warmup": 0, "prior_std": 0.2}


def make_pruner(
    params: Sequence[Tensor], target_rank: float = 2, criterion: str = "snr_abs", **options: Any
) -> RankPruner:
    """Of A and B, and E where it follows, which lie one behind another; a last tensor alone has no ranks."""
    schedule = {"total_steps": 8, "warmup": 0, "final": 3, "interval": 2, **options}
    adapters: list[LoraAdapter] = []
    rest = list(params)
    while len(rest) > 1:
        a, b, *others = rest
        e = others[0] if others and others[0].shape == (a.shape[0], 1) else None
        adapters.append(LoraAdapter(f"layer{len(adapters)}", a, b, e))
        rest = others if e is None else others[1:]
    return RankPruner(adapters, target_rank, criterion, **schedule)


def default_gradient(index: int, number: int, value: Tensor) -> Tensor:
    """Not linear, and different in every pass; made on the CPU."""
    p = value.detach().cpu().float()
    target = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * number + index))
    return ((p - target) * (1 + 0.25 * index)).to(value.dtype).to(value.device)


def run(
    optimizer: IVON, params: Sequence[Tensor], steps: int, samples: int = 1, gradient: Gradient = default_gradient
) -> None:
    """Train; more than one sample come from contexts."""

    def backward(number: int) -> None:
        for index, p in enumerate(params):
            p.grad = gradient(index, number, p) if p.requires_grad else None

    for step in range(steps):
        if samples == 1:
            optimizer.train()
            backward(step)
        else:
            for sample in range(samples):
                with optimizer.sampled_params(train=True):
                    backward(samples * step + sample)
        optimizer.step()


def assert_equal_runs(
    make: Make,
    shapes: Sequence[tuple[int, ...]],
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    steps: int = 2,
    **options: Any,
) -> tuple[IVON, list[nn.Parameter]]:
    """Run on both backends; bits and metrics must be equal. Returns what ran on Triton; ``options`` are `run`'s."""
    pairs = []
    for backend, where in (("eager", "cpu"), ("triton", device)):
        params = make_params(shapes, dtype, device=where)
        optimizer = make(params, backend)
        run(optimizer, params, steps, **options)
        optimizer.train()
        pairs.append((optimizer, params))
    (expected, _), (found, params) = pairs
    assert differing(photo(expected), photo(found)) == []
    assert expected.metrics()["grad/nonfinite"] == found.metrics()["grad/nonfinite"]
    return found, params


def ivon(**options: Any) -> Make:
    return lambda params, backend: IVON(params, backend=backend, **{**IVON_OPTIONS, **options})


def vadam(**options: Any) -> Make:
    return lambda params, backend: VAdam(params, backend=backend, **{**VADAM_OPTIONS, **options})


def pruned(make: Callable[..., Make] = ivon, **options: Any) -> Make:
    """With a pruner."""
    return lambda params, backend: make(pruner=make_pruner(params, **options))(params, backend)
