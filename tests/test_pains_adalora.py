"""What hurts users of PEFT's AdaLoRA, one test each: the peer fails here and now, IVON with a RankPruner does not.

Tests are numbered like the pains, ``test_01_...``; what else covers them is in brackets:

== =====================================================================================================
01 ranks stay unless the loop calls `update_and_allocate`, which nobody does [test_pruning]
02 injected adapters have no allocator                                      [test_adapters]
03 the allocator must run between backward and zero_grad                    [test_trainer]
04 an adapter without a gradient is an error                                [test_hostile_gradients]
05 the number of steps must be given, and be right                          [test_trainer]
06 a target equal to the initial rank is an error                           [test_pruning]
07 the orthogonality penalty is in the evaluation loss, or nowhere          [test_predict]
08 memory never shrinks                                                     [test_export]
09 patterns of ranks are lists of booleans; rank 0 fails to load            [test_export]
10 no DoRA, one adapter                                                     [test_adapters]
11 what is saved is no plain LoRA                                           [test_export_saved]
12 gradients must be fetched from DeepSpeed                                 [test_deepspeed]
== =====================================================================================================
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ivon_lora import IVON, RankPruner, export_lora, find_adapters
from ivon_lora.integrations.trainer import IVONFactory
from tests.tiny_trainer import arguments, make_data

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

STEPS, RANK, TARGET = 12, 4, 1
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = X @ torch.randn(6, 2, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Two layers, and a head that only some losses reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.aside = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adalora_config(**overrides: Any) -> Any:
    schedule = {"init_r": RANK, "target_r": TARGET, "total_step": STEPS, "tinit": 1, "tfinal": 4, "deltaT": 1}
    return peft.AdaLoraConfig(**{"target_modules": ["first", "second"], **schedule, **overrides})


def lora_config(**overrides: Any) -> Any:
    return peft.LoraConfig(**{"target_modules": ["first", "second"], "r": RANK, "lora_alpha": 8, **overrides})


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def make_ivon(model: nn.Module, target: float = TARGET, **options: Any) -> IVON:
    options = {"total_steps": STEPS, "interval": 1, "criterion": "magnitude", **options}
    pruner = RankPruner(find_adapters(model), target, **options)
    optimizer = IVON(trainable(model), lr=0.05, ess=1e5, beta2=0.99, pruner=pruner)
    optimizer.attach(model)
    return optimizer


def train(model: nn.Module, optimizer: Any, steps: int = STEPS, between: Any = lambda step: None) -> None:
    """A loop that knows of no ranks; ``between`` runs after the step and before the gradients are cleared."""
    for step in range(steps):
        nn.functional.mse_loss(model(X), Y).backward()
        optimizer.step()
        between(step)
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=0.05)


def live_adalora(model: nn.Module) -> int:
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)


def live(optimizer: IVON) -> int:
    """Ranks whose column of B is not zero, as the mask says."""
    assert optimizer.pruner is not None
    for adapter in optimizer.pruner.adapters:
        assert torch.equal(optimizer.state[adapter.A]["rank_mask"], adapter.B.detach().abs().sum(0) != 0)
    return sum(row["live"] for row in optimizer.rank_table())


def test_01_nothing_has_to_be_called():
    """AdaLoRA without `update_and_allocate` trains all ranks to the end, silently."""
    peer = peft.get_peft_model(Net(), adalora_config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(peer, adamw(peer))
    assert live_adalora(peer) == 2 * RANK
    model = peft.get_peft_model(Net(), lora_config())
    optimizer = make_ivon(model)
    train(model, optimizer)
    assert live(optimizer) == 2 * TARGET


def test_02_injected_adapters_are_pruned():
    """`inject_adapter_in_model` (and `model.add_adapter`) leaves no AdaLoraModel, hence no allocator."""
    peer = peft.inject_adapter_in_model(adalora_config(), Net())
    assert not any(hasattr(module, "update_and_allocate") for module in peer.modules())
    for config in (lora_config(), adalora_config()):  # its layers are pruned by us all the same
        model = peft.inject_adapter_in_model(config, Net())
        optimizer = make_ivon(model)
        train(model, optimizer)
        assert sum(row["live"] for row in optimizer.rank_table()) == 2 * TARGET


def test_03_the_place_of_zero_grad_does_not_matter():
    """The Trainer clears gradients before `on_step_end`, where one would call the allocator."""
    peer = peft.get_peft_model(Net(), adalora_config())
    optimizer = adamw(peer)
    nn.functional.mse_loss(peer(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(TypeError, match="NoneType"):
        peer.base_model.update_and_allocate(1)
    model = peft.get_peft_model(Net(), lora_config())
    ours = make_ivon(model)
    for _ in range(STEPS):
        ours.zero_grad()
        nn.functional.mse_loss(model(X), Y).backward()
        ours.step()
        model.zero_grad()
    assert live(ours) == 2 * TARGET


def test_04_unused_adapters_need_no_gradient():
    modules = ["first", "second", "aside"]
    peer = peft.get_peft_model(Net(), adalora_config(target_modules=modules))
    with pytest.raises(TypeError, match="NoneType"):
        train(peer, adamw(peer), between=peer.base_model.update_and_allocate)
    model = peft.get_peft_model(Net(), lora_config(target_modules=modules))
    optimizer = make_ivon(model)
    train(model, optimizer)
    assert sum(row["live"] for row in optimizer.rank_table()) == 3 * TARGET


def test_05_the_schedule_follows_the_run(tmp_path):
    """AdaLoRA wants absolute steps, and with a wrong total never ends. Ours are fractions of the Trainer's total."""
    from transformers import Trainer

    from tests.tiny_trainer import make_model

    with pytest.raises(ValueError, match="total_step"):
        adalora_config(total_step=None)
    with pytest.raises(ValueError, match="budgeting phase"):
        adalora_config(total_step=4)
    peer = peft.get_peft_model(Net(), adalora_config(total_step=100 * STEPS))
    train(peer, adamw(peer), between=peer.base_model.update_and_allocate)
    assert live_adalora(peer) > 2 * TARGET

    args = arguments(tmp_path, max_steps=-1, num_train_epochs=3)
    data = make_data(20)
    factory = {"args": args, "num_examples": len(data), "target_rank": TARGET}
    trainer = Trainer(
        model=make_model(), args=args, train_dataset=data, optimizer_cls_and_kwargs=(IVONFactory, factory)
    )
    trainer.create_optimizer()
    optimizer = trainer.optimizer
    trainer.train()
    assert optimizer.pruner.total_steps == trainer.state.max_steps == 15
    assert sum(row["live"] for row in optimizer.rank_table()) == 4 * TARGET


def test_06_the_target_may_be_the_initial_rank():
    peer = peft.get_peft_model(Net(), adalora_config(target_r=RANK))
    with pytest.raises((RuntimeError, IndexError), match="kthvalue"):
        train(peer, adamw(peer), between=peer.base_model.update_and_allocate)
    model = peft.get_peft_model(Net(), lora_config())
    optimizer = make_ivon(model, target=RANK)
    train(model, optimizer)
    assert live(optimizer) == 2 * RANK


def test_07_the_evaluation_loss_is_the_tasks():
    """AdaLoRA adds its penalty in evaluation too; without a task type it adds none even in training."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    base = BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}
    expected = base(**batch).loss.item()
    layers = {"target_modules": ["query"], "inference_mode": False}
    peer = peft.get_peft_model(copy.deepcopy(base), adalora_config(task_type="SEQ_CLS", **layers)).eval()
    with torch.no_grad():
        assert peer(**batch).loss.item() > expected + 0.5, "E is 0, so the adapter changes nothing but the loss"
        untyped = Net()
        untyped_peer = peft.get_peft_model(untyped, adalora_config())
        assert torch.equal(nn.functional.mse_loss(untyped_peer(X), Y), nn.functional.mse_loss(Net()(X), Y))
        optimizer = IVON(trainable(peer), lr=0.1, ess=10.0)
        optimizer.attach(peer)
        assert peer(**batch).loss.item() == pytest.approx(expected, rel=1e-6)
        model = peft.get_peft_model(copy.deepcopy(base), lora_config(task_type="SEQ_CLS", **layers)).eval()
        assert model(**batch).loss.item() == pytest.approx(expected, rel=1e-6)


def test_08_pruned_ranks_stay_pruned_and_the_export_is_small(tmp_path):
    """AdaLoRA's pruned values are refilled by every optimizer step, unless it is called after each; so is memory."""
    peer = peft.get_peft_model(Net(), adalora_config(tfinal=4))
    optimizer = adamw(peer)
    train(peer, optimizer, STEPS - 3, between=peer.base_model.update_and_allocate)  # the mask is final
    assert live_adalora(peer) <= 2 * TARGET
    nn.functional.mse_loss(peer(X), Y).backward()
    optimizer.step()
    assert live_adalora(peer) == 2 * RANK
    model = peft.get_peft_model(Net(), lora_config())
    ours = make_ivon(model)
    train(model, ours, STEPS + 3)
    assert live(ours) == 2 * TARGET
    assert all(p.shape[0] == RANK for name, p in model.named_parameters() if "lora_A" in name)  # in training, as there
    export_lora(model, ours, tmp_path / "adapter", layout="compact")
    saved = safetensors_torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.shape[0] for name, tensor in saved.items() if "lora_A" in name) == 2 * TARGET


def exported(folder: Path, target: float, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = peft.get_peft_model(Net(), lora_config())
    optimizer = make_ivon(model, target, **options)
    train(model, optimizer)
    export_lora(model, optimizer, folder)
    return model, json.loads((folder / "adapter_config.json").read_text())


def test_09_ranks_are_numbers_and_empty_layers_disappear(tmp_path):
    """AdaLoRA's rank_pattern is lists of booleans per lora_E; its factor stays alpha / init_r, which is not saved."""
    peer = peft.get_peft_model(Net(), adalora_config(target_r=3))
    train(peer, adamw(peer), between=peer.base_model.update_and_allocate)
    peer.save_pretrained(tmp_path / "peer")
    saved = json.loads((tmp_path / "peer" / "adapter_config.json").read_text())
    assert all(isinstance(keep, list) and keep[0] in (True, False) for keep in saved["rank_pattern"].values())
    weights = safetensors_torch.load_file(tmp_path / "peer" / "adapter_model.safetensors")
    assert not any("ranknum" in name for name in weights)

    model, config = exported(tmp_path / "ours", target=0.5)  # one rank for two layers: one of them is left with none
    assert not any(isinstance(rank, list) for rank in (config["rank_pattern"] or {}).values())
    assert config["r"] == config["lora_alpha"] == 1
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    assert len(find_adapters(again)) == 1
    torch.testing.assert_close(again(X), model.eval()(X), rtol=1e-5, atol=1e-6)


def test_10_dora_and_second_adapters():
    with pytest.raises(ValueError, match="does not support DoRA"):
        adalora_config(use_dora=True)
    peer = peft.get_peft_model(Net(), adalora_config())
    with pytest.raises(ValueError, match="only 1 trainable adapter"):
        peer.add_adapter("second", adalora_config())
    model = peft.get_peft_model(Net(), lora_config(use_dora=True))
    model.add_adapter("second", lora_config())
    optimizer = make_ivon(model)
    train(model, optimizer)
    assert live(optimizer) == 2 * TARGET
    model.set_adapter("second")
    pruner = RankPruner(find_adapters(model, "second"), TARGET, total_steps=STEPS, criterion="magnitude")
    second = IVON(trainable(model), lr=0.05, ess=1e5, pruner=pruner)
    second.attach(model)
    train(model, second)
    assert live(second) == 2 * TARGET


def test_11_what_comes_out_is_plain_lora(tmp_path):
    """vLLM, llama.cpp and diffusers read LORA configurations and lora_A, lora_B, nothing else."""
    peer = peft.get_peft_model(Net(), adalora_config())
    peer.save_pretrained(tmp_path / "peer")
    assert json.loads((tmp_path / "peer" / "adapter_config.json").read_text())["peft_type"] == "ADALORA"
    peer_weights = safetensors_torch.load_file(tmp_path / "peer" / "adapter_model.safetensors")
    assert any("lora_E" in name for name in peer_weights)
    for number, make in enumerate((lora_config, adalora_config)):
        model = peft.get_peft_model(Net(), make())
        optimizer = make_ivon(model)
        train(model, optimizer)
        folder = tmp_path / str(number)
        export_lora(model, optimizer, folder)
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
        weights = safetensors_torch.load_file(folder / "adapter_model.safetensors")
        assert {name.split(".")[-2] for name in weights} == {"lora_A", "lora_B"}
        again = peft.PeftModel.from_pretrained(Net(), folder)
        torch.testing.assert_close(again(X), model.eval()(X), rtol=1e-5, atol=1e-6)


def test_12_no_gradient_is_fetched_from_deepspeed():
    """AdaLoRA's allocator needs `safe_get_full_grad` under DeepSpeed: test_deepspeed shows it where that is installed.

    Here, where each reads gradients: the peer's source names DeepSpeed, our step needs `p.grad` and nothing else.
    """
    before = "deepspeed" in sys.modules
    from peft.tuners.adalora import layer

    source = Path(layer.__file__).read_text()
    assert "deepspeed.utils.safe_get_full_grad" in source
    model = peft.get_peft_model(Net(), lora_config())
    optimizer = make_ivon(model)
    train(model, optimizer)
    assert live(optimizer) == 2 * TARGET
    assert ("deepspeed" in sys.modules) == before
