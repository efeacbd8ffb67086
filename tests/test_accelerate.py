"""Accelerate: `prepare`, `accumulate`, clipping, `save_state` and `load_state`."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ivon_lora import IVON
from ivon_lora.optim.wrappers import unwrap
from tests.loop_problem import X, Y, net
from tests.optimizer_problem import photo, same_photo

accelerate = pytest.importorskip("accelerate")


def forget() -> None:
    """What an `Accelerator` leaves behind in its process, a Trainer's among them."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture
def accelerator(tmp_path):
    forget()
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    forget()


def make_optimizer(model: nn.Module) -> IVON:
    return IVON(model.parameters(), lr=0.1, ess=500.0, beta2=0.999)


def batches() -> Any:
    return zip(X.split(2), Y.split(2), strict=True)


def plain_loop(model: nn.Module, optimizer: IVON, clip: float, steps: int = 4) -> None:
    data = batches()
    for _ in range(steps):
        for _ in range(2):
            x, y = next(data)
            optimizer.train()
            (F.cross_entropy(model(x), y) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def accelerate_loop(accelerator: Any, model: nn.Module, optimizer: Any, clip: float, data: Any) -> None:
    """As in Accelerate's documentation, for any optimizer."""
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("first", ["attach", "prepare"])
def test_an_adamw_loop_equals_the_plain_one(accelerator, first):
    model, twin = net(), net()
    optimizer, plain = make_optimizer(model), make_optimizer(twin)
    if first == "attach":
        optimizer.attach(model)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    if first == "prepare":
        optimizer.attach(prepared)
    accelerate_loop(accelerator, prepared, wrapped, 0.05, batches())
    plain_loop(twin, plain, 0.05)
    assert same_photo(photo(optimizer), photo(plain))
    assert unwrap(wrapped) is optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_state_and_load_state_resume_exactly(accelerator, tmp_path, dtype):
    def make() -> tuple[Any, Any, IVON]:
        model = net().to(dtype)
        optimizer = make_optimizer(model)
        optimizer.attach(model)
        prepared, wrapped = accelerator.prepare(model, optimizer)
        return prepared, wrapped, optimizer

    data = [(x.to(dtype), y) for x, y in batches()]
    model, wrapped, optimizer = make()
    accelerate_loop(accelerator, model, wrapped, 0.05, data[:4])
    model(data[0][0])  # and it is saved while a sample is live
    accelerator.save_state(str(tmp_path / "state"))
    accelerate_loop(accelerator, model, wrapped, 0.05, data[4:])
    accelerator.free_memory()
    again, wrapped, resumed = make()
    accelerator.load_state(str(tmp_path / "state"))
    accelerate_loop(accelerator, again, wrapped, 0.05, data[4:])
    assert same_photo(photo(resumed), photo(optimizer))
