"""Adapters are found by their tensors, in every layer kind of PEFT, with the factor PEFT applies."""

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from ivon_lora.lora.adapters import LoraAdapter, find_adapters
from tests.export_models import Layers, Named, adapted, peft

EVERY_KIND = ["embed", "linear", "conv1", "conv2", "conv3"]


def adapted_layers(config: Any) -> Any:
    """Numbers everywhere: PEFT starts with B = 0 or E = 0, which would hide a wrong factor."""
    base = Layers()
    base.conv1, base.conv2, base.conv3 = nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, (3, 2)), nn.Conv3d(3, 4, 2)
    return adapted(base, config, live={})


def check_delta(model: Any, adapter: LoraAdapter) -> None:
    """The update of an adapter is the one that PEFT computes."""
    e = torch.ones(adapter.rank) if adapter.E is None else adapter.E.flatten()
    found = adapter.scaling * (adapter.B.flatten(1) * e) @ adapter.A.flatten(1)
    wanted = model.get_submodule(adapter.name).get_delta_weight("default")
    wanted = wanted.T if adapter.name.endswith("embed") else wanted
    torch.testing.assert_close(found, wanted.flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_every_layer_kind_gives_the_delta_of_peft(use_rslora: bool, use_dora: bool) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=EVERY_KIND, use_rslora=use_rslora, use_dora=use_dora)
    model = adapted_layers(config)
    adapters = find_adapters(model)
    assert {a.name for a in adapters} == {f"base_model.model.{name}" for name in EVERY_KIND}
    parameters = {id(p) for p in model.parameters()}
    for adapter in adapters:
        assert adapter.rank == 4
        assert adapter.scaling == (6 / math.sqrt(4) if use_rslora else 6 / 4)
        assert all(tensor.shape[dim] == 4 for _, tensor, dim in adapter.tensors())
        assert all(id(tensor) in parameters for _, tensor, _ in adapter.tensors())  # the tensors, not copies
        check_delta(model, adapter)


def test_adalora_has_e_and_its_own_scaling() -> None:
    config = peft.AdaLoraConfig(init_r=6, target_r=2, lora_alpha=9, total_step=10, target_modules=["linear", "conv2"])
    model = adapted_layers(config)
    adapters = find_adapters(model)
    assert [a.name.rpartition(".")[2] for a in adapters] == ["linear", "conv2"]
    for adapter in adapters:
        assert [key for key, _, _ in adapter.tensors()] == ["A", "B", "E"]
        assert adapter.scaling == pytest.approx(9 / (6 + 1e-5), rel=1e-7)
        check_delta(model, adapter)


def test_modules_to_save_are_never_listed() -> None:
    model = peft.get_peft_model(Layers(), peft.LoraConfig(r=2, target_modules=["linear"]))
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["conv3"], modules_to_save=["head"]))
    assert [a.name for a in find_adapters(model)] == ["base_model.model.linear"]
    assert [a.name for a in find_adapters(model, "second")] == ["base_model.model.conv3"]

    # the second adapter trains a full copy of a module that holds LoRA layers of the first
    outer = nn.Sequential(Layers(), nn.Linear(2, 2))
    outer = peft.get_peft_model(outer, peft.LoraConfig(r=2, target_modules=["0.linear"]))
    outer.add_adapter("second", peft.LoraConfig(r=3, target_modules=["1"], modules_to_save=["0"]))
    assert any("modules_to_save" in name and "lora_A" in name for name, _ in outer.named_parameters())
    assert [a.name for a in find_adapters(outer)] == ["base_model.model.0.original_module.linear"]


def test_grouped_convolutions_are_skipped_and_a_model_of_only_such_layers_says_why() -> None:
    grouped, config = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), peft.LoraConfig(r=2, target_modules=["0"])
    with pytest.warns(UserWarning, match="groups > 1"):
        model = peft.get_peft_model(grouped, config)
    with pytest.raises(ValueError, match=r"base_model\.model\.0: its rank axis is split over 2 convolution groups"):
        find_adapters(model)


def test_tied_tensors_are_listed_once(caplog: pytest.LogCaptureFixture) -> None:
    config = peft.LoraConfig(r=2, target_modules=["p", "q", "r"])
    model: Any = peft.inject_adapter_in_model(config, Named(["p", "q", "r"]))
    model.q.lora_A["default"].weight = model.p.lora_A["default"].weight
    model.q.lora_B["default"].weight = model.p.lora_B["default"].weight
    # PEFT ties an output embedding by a transposed view: another Parameter over the same memory
    model.r.lora_A["default"].weight = nn.Parameter(model.p.lora_B["default"].weight.t())
    model.r.lora_B["default"].weight = nn.Parameter(model.p.lora_A["default"].weight.t())
    with caplog.at_level(logging.INFO, logger="ivon_lora.lora.adapters"):
        assert [a.name for a in find_adapters(model)] == ["p"]
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "WARNING"]  # one Parameter, and two over its memory


def test_rank_zero_layers_are_left_out() -> None:
    config = peft.AdaLoraConfig(init_r=3, target_r=1, total_step=10, target_modules=["linear", "head"])
    model: Any = peft.get_peft_model(Layers(), config)
    model.base_model.model.head.update_layer("default", 0, 1, config=config)
    assert [a.name for a in find_adapters(model)] == ["base_model.model.linear"]


@pytest.mark.parametrize(
    ("a", "b", "e"), [((3, 4), (5, 2), None), ((3, 4), (5, 3), (2, 1)), ((3, 4), (5, 3), (1, 3)), ((3,), (5, 3), None)]
)
def test_shapes_are_checked(a: tuple[int, ...], b: tuple[int, ...], e: tuple[int, ...] | None) -> None:
    with pytest.raises(ValueError, match=r"adapter 'q' has no common rank axis: A .*give A as \(rank, in") as caught:
        LoraAdapter("q", torch.zeros(a), torch.zeros(b), None if e is None else torch.zeros(e))
    assert str(b) in str(caught.value)
