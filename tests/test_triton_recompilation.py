"""No value that changes while training leads to another compiled kernel."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ivon_lora import IVON, LoraAdapter, RankPruner
from ivon_lora.kernels.launch import TritonBackend
from tests.specialization_keys import describe, keys_of

Launched = tuple[str, str, list[Any], dict[str, Any]]


class Bed:
    """Adapters of one rank and a bias; ``new_gradients`` puts the gradients at other addresses before each step."""

    def __init__(self, n_adapters: int, rank: int, device: str, **options: Any) -> None:
        self.adapters = [
            LoraAdapter(f"a{i}", self.tensor(rank, 8, device), self.tensor(6, rank, device)) for i in range(n_adapters)
        ]
        schedule: dict[str, Any] = {"total_steps": 24, "warmup": 2, "final": 6, "interval": 4}
        self.pruner = RankPruner(self.adapters, 1, **schedule)
        self.params = [t for a in self.adapters for _, t, _ in a.tensors()] + [self.tensor(5, 1, device)]
        self.optimizer = IVON(self.params, 0.1, 50, pruner=self.pruner, backend="triton", **options)

    @staticmethod
    def tensor(rows: int, columns: int, device: str) -> torch.Tensor:
        return torch.ones(rows, columns, device=device, requires_grad=True)

    def step(self, number: int) -> None:
        for p in self.params:
            p.grad = torch.full_like(p, 0.01 * number)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / (1 + number)
            group["ess"] = 50.0 + number
            group["seed"] = number**12
            group["weight_decay"] = float(number % 2)
            group["beta1"] = 0.5 if number % 3 else 0.0
        self.optimizer.train()
        self.optimizer.step()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """What would be launched; nothing is."""
    made: list[Launched] = []

    def note(self: TritonBackend, kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        made.append((kernel.fn.__module__, kernel.__name__, [describe(a) for a in arguments], constants))

    monkeypatch.setattr(TritonBackend, "_run", note)
    return made


def constants_of(launch: Launched) -> str:
    return f"{launch[1]} {sorted(launch[3].items())}"


def test_keys_depend_on_the_constants_only(triton_device: str, launched: list[Launched]) -> None:
    """Sizes that are 1, multiples of 16 and neither; schedules, seeds, budgets and masks of 24 steps."""
    for n_adapters, rank in ((1, 1), (2, 8), (3, 5)):
        bed = Bed(n_adapters, rank, triton_device)
        launched_before = len(launched)
        for number in range(24):
            bed.step(number)
            if number == 0:
                _ = bed.optimizer.state  # soft scores, which nobody else asks for here
        kernels = [name for _, name, _, _ in launched[launched_before:]]
        assert {kernels.count(name) for name in ("sample_kernel", "step_kernel")} == {24}
        allocations = sum(bed.pruner.is_due(step) for step in range(1, 25))
        assert len(kernels) == 2 * 24 + allocations + 2, "two launches per step, three with an allocation"
        _ = bed.optimizer.state  # and final ones
    keys = keys_of(launched)
    by_constants: dict[str, set[str]] = {}
    for launch, key in zip(launched, keys, strict=True):
        by_constants.setdefault(constants_of(launch), set()).add(key)
    assert {name: len(found) for name, found in by_constants.items() if len(found) != 1} == {}
    assert len(by_constants) == len(set(keys))
    # sample: soft, final. step: soft, soft with a selection, final. scores: soft, final. The others: one.
    assert sorted(name.split()[0] for name in by_constants) == sorted(
        ["sample_kernel"] * 2 + ["step_kernel"] * 3 + ["score_kernel"] * 2 + ["importance_kernel", "zero_kernel"]
    )


def test_the_keys_see_what_triton_makes_kernels_of_their_own_for(triton_device: str) -> None:
    """Integers that are 1 or multiples of 16, and odd addresses: of a kernel that does not forbid it."""
    aligned = describe(torch.empty(8, dtype=torch.int64))
    odd = describe(torch.empty(8, dtype=torch.int64)[1:])

    def launch(out: Any, n: int) -> Launched:
        return "ivon_lora.kernels.noise", "normal_kernel", [out, aligned, n], {"N_QUADS": 64}

    keys = keys_of([launch(aligned, 5), launch(aligned, 6), launch(aligned, 1), launch(aligned, 32), launch(odd, 5)])
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
