"""However a model is wrapped while it trains, adapter, posterior and merged weights have names of the base model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from ivon_lora import export_lora, export_saved, find_adapters, load_posterior, merge_lora, save_posterior
from tests.export_models import Around, Layers, Named, adapted, distance, llama, loaded, output, peft, with_optimizer


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


def inside(wrap: Callable[[nn.Module], nn.Module], *paths: str) -> Callable[[Any], nn.Module]:
    """Wraps some modules of a PeftModel, by their paths."""

    def change(model: Any) -> nn.Module:
        for path in paths:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, wrap(model.get_submodule(path)))
        return model

    return change


P = "base_model.model"
BLOCKS = (f"{P}.model.layers.0", f"{P}.model.layers.1", f"{P}.lm_head")  # the head is one of PEFT's modules_to_save
LAYER = (f"{P}.model.layers.0.self_attn.q_proj", f"{P}.model.layers.0.self_attn.v_proj.base_layer")


def checkpointed(model: Any) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")
    return model


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "blocks compiled": inside(compiled, *BLOCKS),
    "blocks checkpointed": inside(checkpoint_wrapper, *BLOCKS),
    "checkpointed by torch": checkpointed,
    "one layer compiled": inside(compiled, *LAYER),
    "one layer checkpointed": inside(checkpoint_wrapper, *LAYER),
    "base compiled": inside(compiled, P),
    "all compiled": compiled,
    "DataParallel": nn.DataParallel,
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
    "user": lambda model: Around(model, "net"),
    "user's module": lambda model: Around(model, "module"),
    "compiled user": lambda model: compiled(Around(model, "net")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(wrapper: str, tmp_path: Path) -> None:
    def config() -> Any:
        return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])

    model = adapted(llama(), config(), live={})
    wanted = output(model)
    names = [adapter.name for adapter in find_adapters(model)]
    model = WRAPPERS[wrapper](model)
    assert [name.partition("base_model.")[1:] for name in names] == [
        adapter.name.partition("base_model.")[1:] for adapter in find_adapters(model)
    ]
    export_lora(model, None, tmp_path / "adapter")
    assert distance(loaded(llama(), tmp_path / "adapter"), wanted) < 1e-6
    posterior = load_posterior(save_posterior(with_optimizer(model), tmp_path / "posterior"))
    fresh = adapted(llama(), config(), live={}, scale=0.1)
    fresh.save_pretrained(tmp_path / "other")
    export_saved(tmp_path / "other", tmp_path / "again", posterior=posterior)  # its means, head included
    assert distance(loaded(llama(), tmp_path / "again"), wanted) < 1e-6
    posterior.load_into(fresh)
    assert distance(fresh, wanted) < 1e-6
    merged = merge_lora(model)
    assert distance(merged, wanted) < 1e-6
    assert merged.state_dict().keys() == llama().state_dict().keys()


@pytest.mark.parametrize(
    "name", ["base_model.model.q", "top.base_model.model.q", "token_adapter.q", "original_module.q"]
)
def test_a_base_model_with_names_like_those_of_wrappers(name: str, tmp_path: Path) -> None:
    def base() -> nn.Module:
        return Named([name, "k"])

    model = adapted(base(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=[name, "k"]), live={})
    wanted = output(model)
    model.save_pretrained(tmp_path / "saved")
    export_lora(model, None, tmp_path / "model")
    export_saved(tmp_path / "saved", tmp_path / "files")
    for folder in ("model", "files"):
        assert distance(loaded(base(), tmp_path / folder), wanted) < 1e-6
    assert distance(merge_lora(model), wanted) < 1e-6


def test_adapters_that_were_injected_leave_nothing_behind(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn_like(p), alpha=0.3)
    wanted = output(model.eval())
    export_lora(model, None, tmp_path / "adapter")
    assert distance(loaded(llama(), tmp_path / "adapter"), wanted) < 1e-6
    merged = merge_lora(model)
    assert merged is model
    assert set(merged.state_dict()) == set(llama().state_dict())
    again = peft.get_peft_model(merged, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert distance(again.eval(), wanted) < 1e-6


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_a_peft_model_and_another_one(inside: bool, tmp_path: Path) -> None:
    first, second = peft.LoraConfig(r=2, target_modules=["linear"]), peft.LoraConfig(r=3, target_modules=["w1"])
    model: Any = Around(peft.get_peft_model(Layers(), first) if inside else Layers(), "net")
    with pytest.warns(UserWarning, match="modify a model with PEFT|multiple adapters"):
        model = peft.get_peft_model(model if inside else peft.get_peft_model(model, first), second)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
    wanted = output(model.eval())
    report = export_lora(model, None, tmp_path / "adapter")
    assert {name: rank for name, rank in report.ranks.items() if "linear" in name} == {"net.linear": 2}
    assert distance(loaded(Around(Layers(), "net"), tmp_path / "adapter"), wanted) < 1e-5
    assert distance(merge_lora(model), wanted) < 1e-5
