"""An adapter exported from its files alone is the one exported from the model, and computes the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ivon_lora import (
    IVON,
    RankPruner,
    export_lora,
    export_saved,
    find_adapters,
    load_posterior,
    save_posterior,
    snapshot_posterior,
)
from ivon_lora.export.saved import read_adapter
from tests.test_export import EVERY_LAYER, RANKS, Everything, batch, config_of, reload_and_compare, tensors_of, train

peft = pytest.importorskip("peft")

# peft 0.21 still reads the old name from transformers 5.23 models
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def same_files(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    numbers = (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
        "peft_type",
    )
    assert {k: config_of(one)[k] for k in numbers} == {k: config_of(other)[k] for k in numbers}


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")  # of lora_bias
@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("variant", ["lora", "rsdora", "bias"])
def test_every_layer_kind_and_a_trained_head(variant: str, layout: str, tmp_path: Path) -> None:
    base = Everything().eval()
    config = peft.LoraConfig(
        r=6,
        lora_alpha=7,
        target_modules=EVERY_LAYER if variant != "bias" else ["linear"],
        rank_pattern={"linear": 3},
        alpha_pattern={"linear": 5},
        use_rslora=variant == "rsdora",
        use_dora=variant == "rsdora",
        lora_bias=variant == "bias",
        modules_to_save=["head"],
    )
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    train(model, {**RANKS, "linear": 2})
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.mul_(1.5)
    wanted = model(batch()).detach()
    model.save_pretrained(tmp_path / "saved")
    export_lora(model, None, tmp_path / "model", layout)
    report = export_saved(tmp_path / "saved", tmp_path / "files", layout)
    assert report.ranks["linear"] == 2
    assert report.max_abs_error <= 1e-6
    same_files(tmp_path / "model", tmp_path / "files")
    reload_and_compare(base, tmp_path / "files", batch(), wanted)
    # an export can be exported again, into the other layout and back
    export_saved(tmp_path / "files", tmp_path / "other", "compact" if layout == "uniform" else "uniform")
    export_saved(tmp_path / "other", tmp_path / "back", layout)
    same_files(tmp_path / "files", tmp_path / "back")


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(5))


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")  # of layers without ranks, as PEFT saves them
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_an_adalora_adapter_that_peft_pruned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Tokens()
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=1,
        lora_alpha=3,
        total_step=12,
        tinit=1,
        tfinal=1,
        deltaT=1,
        target_modules=["one", "two", "three"],
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.base_model.peft_config["default"].orth_reg_weight = 0.1
    for step in range(1, 13):
        model.base_model.model(X)[:, 0].sub(X.sum(1)).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.eval()
    wanted = model.base_model.model(X).detach()
    model.save_pretrained(tmp_path / "adalora")
    ranks = read_adapter(tmp_path / "adalora").ranks()
    assert sum(ranks.values()) == 3
    report = export_saved(tmp_path / "adalora", tmp_path / "lora")
    assert {name: rank for name, rank in ranks.items() if rank} == report.ranks
    assert config_of(tmp_path / "lora")["peft_type"] == "LORA"
    reload_and_compare(base, tmp_path / "lora", X, wanted)


def trained(steps: int) -> tuple[Any, IVON]:
    """Ranks pruned softly: with 8 of 20 steps done, masked ranks go on learning."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Tokens(), peft.LoraConfig(r=4, lora_alpha=3, target_modules=["one", "two", "three"]))
    pruner = RankPruner(find_adapters(model), 2, total_steps=20, warmup=1, final=6, interval=3)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = IVON(named, lr=0.2, ess=500, hess_init=0.1, pruner=pruner)
    for _ in range(steps):
        optimizer.train()
        model.base_model.model(X)[:, 0].sub(X.sum(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.filterwarnings("ignore:pruning is not final:UserWarning")
@pytest.mark.parametrize("steps", [8, 20], ids=["annealing", "final"])
def test_a_posterior_brings_masks_and_means_to_files_that_hold_a_sample(steps: int, tmp_path: Path) -> None:
    model, optimizer = trained(steps)
    export_lora(model, optimizer, tmp_path / "model")
    save_posterior(optimizer, tmp_path / "posterior.safetensors")
    optimizer.train()
    model.save_pretrained(tmp_path / "saved")  # of weights that are a sample: the files alone are not the mean
    posterior = load_posterior(tmp_path / "posterior.safetensors")
    report = export_saved(tmp_path / "saved", tmp_path / "files", posterior=posterior)
    same_files(tmp_path / "model", tmp_path / "files")
    assert optimizer.pruner is not None
    budget = optimizer.pruner.budget(6 if steps == 8 else 20)
    assert sum(report.ranks.values()) == budget < 12
    without = export_saved(tmp_path / "saved", tmp_path / "without")
    assert sum(without.ranks.values()) == (12 if steps == 8 else budget)


def test_a_posterior_of_something_else_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained(20)
    model.save_pretrained(tmp_path / "saved")
    export_lora(model, optimizer, tmp_path / "exported")
    posterior = snapshot_posterior(optimizer)
    with pytest.raises(ValueError, match="has lost its pruned ranks already"):
        export_saved(tmp_path / "exported", tmp_path / "out", posterior=posterior)
    other = IVON(nn.Linear(2, 2).named_parameters(), lr=0.1, ess=1)
    with pytest.raises(ValueError, match="no tensor in common"):
        export_saved(tmp_path / "saved", tmp_path / "out", posterior=snapshot_posterior(other))
    assert not (tmp_path / "out").exists()


def edited(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "adapter of type IA3: LORA and ADALORA are supported"),
        ({"r": 9}, "layer 'one' has rank 4, its configuration says 9"),
        ({"use_qalora": True}, "use_qalora cannot be exported from its files alone"),
        ({"bias": "all"}, "bias='all' cannot be exported"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    trained(1)[0].save_pretrained(tmp_path / "saved")
    edited(tmp_path / "saved", **changes)
    with pytest.raises(ValueError, match=message):
        export_saved(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_and_torn_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config.json cannot be read"):
        read_adapter(tmp_path)
    trained(1)[0].save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_adapter(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_adapter(tmp_path)


def test_weights_that_torch_saved(tmp_path: Path) -> None:
    model, _ = trained(2)
    model.save_pretrained(tmp_path / "new")
    export_saved(tmp_path / "new", tmp_path / "from-new")
    torch.save(tensors_of(tmp_path / "new"), tmp_path / "new" / "adapter_model.bin")
    (tmp_path / "new" / "adapter_model.safetensors").unlink()
    export_saved(tmp_path / "new", tmp_path / "from-old")
    same_files(tmp_path / "from-new", tmp_path / "from-old")
