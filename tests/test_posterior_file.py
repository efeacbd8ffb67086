"""A posterior read from its file is the optimizer's, and gives the same samples without it."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import __version__
from ivon_lora.lora.adapters import LoraAdapter
from ivon_lora.lora.rank_pruner import RankPruner
from ivon_lora.optim.ivon import IVON
from ivon_lora.posterior.posterior import load_posterior, save_posterior, snapshot_posterior

safetensors_torch = pytest.importorskip("safetensors.torch")


class LowRank(nn.Module):
    """Two hand-made adapters, a bias and a head in double precision."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a1, self.b1 = nn.Parameter(torch.randn(4, 6, dtype=dtype)), nn.Parameter(torch.randn(5, 4, dtype=dtype))
        self.a2, self.b2 = nn.Parameter(torch.randn(4, 5, dtype=dtype)), nn.Parameter(torch.randn(3, 4, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.head = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x.to(self.a1.dtype) @ self.a1.T @ self.b1.T) @ self.a2.T @ self.b2.T + self.bias
        return hidden.double() @ self.head.T


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(5))


def trained(named: bool = True, dtype: torch.dtype = torch.float32) -> tuple[LowRank, IVON]:
    model = LowRank(dtype)
    adapters = [LoraAdapter("one", model.a1, model.b1), LoraAdapter("two", model.a2, model.b2)]
    pruner = RankPruner(adapters, 2, total_steps=20, warmup=2, final=8, interval=3)
    first: list[Any] = [(n, p) for n, p in model.named_parameters() if n != "head"]
    last: list[Any] = [("head", model.head)]
    if not named:
        first, last = [p for _, p in first], [p for _, p in last]
    groups = [{"params": first, "ess": 50.0}, {"params": last, "weight_decay": 0.3}]
    optimizer = IVON(groups, lr=0.05, ess=200, hess_init=0.5, weight_decay=0.01, seed=2**63 + 1, pruner=pruner)
    for _ in range(20):
        optimizer.train()
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_holds_the_posterior(dtype: torch.dtype, tmp_path: Path) -> None:
    model, optimizer = trained(dtype=dtype)
    path = save_posterior(optimizer, tmp_path / "deep" / "p.safetensors")
    file = load_posterior(path)
    names = [name for name, _ in model.named_parameters()]
    assert list(file.names) == [*(n for n in names if n != "head"), "head"]
    for name, p in model.named_parameters():
        posterior = optimizer.posterior(p)
        assert torch.equal(file.mean[name], posterior.mean)
        assert torch.equal(file.std[name], posterior.stddev)
        assert file.mean[name].dtype == (torch.float64 if name == "head" else torch.float32)
    assert set(file.rank_mask) == {"a1", "b1", "a2", "b2"}
    assert torch.equal(file.rank_mask["b1"], optimizer.state[model.b1]["rank_mask"])
    dead = ~file.rank_mask["b1"]
    assert 0 < int(dead.sum() + (~file.rank_mask["b2"]).sum()) == 4
    assert not file.std["b1"][:, dead].any()
    assert (file.seed, file.completed_steps) == (2**63 + 1, 20)
    with safetensors_torch.safe_open(path, framework="pt") as raw:
        metadata = raw.metadata()
    assert metadata["version"] == __version__
    del metadata["names"], metadata["places"]
    metadata["groups"] = json.dumps([{"names": file.names[:-1], "ess": 50.0}, {"names": ["head"]}])  # of 0.1.0
    safetensors_torch.save_file(safetensors_torch.load_file(path), path, metadata)
    assert load_posterior(path).names == file.names


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_are_those_of_the_optimizer_without_it(dtype: torch.dtype, frozen: bool, tmp_path: Path) -> None:
    """Also where a trained model was frozen for its predictions."""
    model, optimizer = trained(dtype=dtype)
    model.requires_grad_(not frozen)
    file = load_posterior(save_posterior(optimizer, tmp_path / "p"))
    fresh = LowRank(dtype)
    mean = model(X).detach()
    file.load_into(fresh)
    assert torch.equal(fresh(X), mean)
    for draw in range(3):
        file.load_into(fresh, file.sample(optimizer.seed, draw))
        with optimizer.sampled_params(train=False):
            wanted = model(X).detach()
            # one rounding of sigma apart, at most one more in a 16-bit parameter
            unit = max(torch.finfo(dtype).eps, 1e-6)
            for name, p in fresh.named_parameters():
                torch.testing.assert_close(p, model.get_parameter(name), rtol=unit, atol=1e-6)
        torch.testing.assert_close(fresh(X), wanted, rtol=10 * unit, atol=10 * unit)
        assert not torch.equal(fresh(X), mean)
    assert torch.equal(model(X), mean)


def test_what_was_always_frozen_is_not_in_it_and_counts_in_the_noise() -> None:
    """`VAdam(model.named_parameters())` of a PEFT model: the file is as small as the adapter."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).requires_grad_(False)
    model[1].requires_grad_(True)
    optimizer = IVON(model.named_parameters(), lr=0.1, ess=100)
    file = snapshot_posterior(optimizer)
    assert file.names == ("1.weight", "1.bias")
    with optimizer.sampled_params(train=False):
        torch.testing.assert_close(dict(model[1].named_parameters(prefix="1")), file.sample(optimizer.seed))


def test_names_come_from_the_optimizer_or_the_model(tmp_path: Path) -> None:
    model, optimizer = trained(named=False)
    with pytest.raises(ValueError, match=r"parameters have no names: pass model=, or build IVON"):
        save_posterior(optimizer, tmp_path / "p")
    names = [*(n for n, _ in model.named_parameters() if n != "head"), "head"]
    assert load_posterior(save_posterior(optimizer, tmp_path / "p", model=model)).names == tuple(names)
    with pytest.raises(ValueError, match="6 of the optimizer's 6 parameters are not in model="):
        save_posterior(optimizer, tmp_path / "p", model=LowRank())
    twins = [nn.Linear(2, 2), nn.Linear(2, 2)]
    groups: list[Any] = [{"params": twin.named_parameters()} for twin in twins]
    with pytest.raises(ValueError, match="2 parameters are called 'weight': name them by their path"):
        snapshot_posterior(IVON(groups, lr=0.1, ess=10))
    with pytest.raises(ValueError, match="AdamW has no posterior"):
        save_posterior(torch.optim.AdamW(model.parameters()), tmp_path / "p")  # type: ignore[arg-type]


def test_loading_checks_everything_before_it_writes(tmp_path: Path) -> None:
    model, optimizer = trained()
    file = load_posterior(save_posterior(optimizer, tmp_path / "p"))
    other = LowRank()
    other.head = nn.Parameter(torch.zeros(1, 3, dtype=torch.float64))  # the last one
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    with pytest.raises(ValueError, match=r"parameter 'head' has shape \(1, 3\), the posterior gives shape \(2, 3\)"):
        file.load_into(other)
    with pytest.raises(ValueError, match="Linear has no parameter 'a1'; load into the model that was trained"):
        file.load_into(nn.Linear(2, 2))
    sample = file.sample(0)
    del sample["head"]
    with pytest.raises(ValueError, match=r"parameter 'head' has shape .* the posterior gives nothing for it"):
        file.load_into(model, sample)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    for prefix in ("module", "_orig_mod"):  # the names under DDP and torch.compile
        wrapped = nn.ModuleDict({prefix: LowRank()})
        file.load_into(wrapped)
        assert torch.equal(wrapped.get_parameter(f"{prefix}.a1"), file.mean["a1"])


Change = Callable[[dict[str, Tensor], dict[str, str]], Any]
DAMAGED: dict[str, tuple[Change, str]] = {
    "newer format": (lambda t, m: m.update(format="ivon-lora posterior 2"), "is not a posterior of this package"),
    "missing tensor": (lambda t, m: t.pop("bias.std"), "is damaged: KeyError: 'bias.std'"),
    "missing seed": (lambda t, m: m.pop("seed"), "is damaged: KeyError: 'seed'"),
    "broken names": (lambda t, m: m.update(names="[{"), "is damaged: JSONDecodeError"),
    "names that are a number": (lambda t, m: m.update(names="1"), "is damaged: TypeError"),
    "shape": (lambda t, m: t.update({"bias.std": torch.ones(2)}), "mean and std of 'bias' differ in shape or dtype"),
    "not finite": (lambda t, m: t["bias.mean"].fill_(math.nan), "'bias' has a mean or std that is not finite"),
    "negative": (lambda t, m: t["bias.std"].fill_(-1.0), "or a negative std"),
}


@pytest.mark.parametrize("case", [*DAMAGED, "truncated"])
def test_damaged_and_foreign_files_give_one_line(case: str, tmp_path: Path) -> None:
    _, optimizer = trained()
    path = save_posterior(optimizer, tmp_path / "p")
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
        message = "is truncated or not a safetensors file"
    else:
        change, message = DAMAGED[case]
        with safetensors_torch.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = safetensors_torch.load_file(path)
        change(tensors, metadata)
        safetensors_torch.save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=message) as caught:
        load_posterior(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no posterior at .*: save_posterior\(optimizer, path\) writes one"):
        load_posterior(tmp_path / "nothing")


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = trained()
    path = save_posterior(optimizer, tmp_path / "p")
    before = path.read_bytes()

    def crash(tensors: Any, target: Path, metadata: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors_torch, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_posterior(optimizer, path)
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", lambda source, target: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_posterior(optimizer, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_what_was_loaded_is_taken_back_from_a_model_that_has_lost_it() -> None:
    model, optimizer = trained()
    posterior, p = snapshot_posterior(optimizer), next(model.parameters())
    before = p.detach().clone()
    ones = {name: torch.ones_like(mean) for name, mean in posterior.mean.items()}
    with pytest.raises(KeyError, match="body"), posterior.loaded(model, ones):  # noqa: PT012
        assert (p == 1).all()
        for name in list(model._parameters):
            delattr(model, name)
        raise KeyError("of the body")
    assert torch.equal(p, before)
