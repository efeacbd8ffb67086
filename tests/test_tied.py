"""Parameters over one memory are one parameter: the trajectory is that of the model in which they are one tensor."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from ivon_lora import IVON, VAdam

X = torch.linspace(-1.0, 1.0, 15).reshape(3, 5)


class Tied(nn.Module):
    """x -> (x W) W^T, with two parameters over the memory of W, or with W itself."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.linspace(-0.4, 0.5, 20).reshape(5, 4))
        self.up = nn.Parameter(self.down.data.t()) if tied else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down @ (self.down.t() if self.up is None else self.up)


def make(kind: type[IVON], model: nn.Module) -> IVON:
    if kind is VAdam:
        return VAdam(model.parameters(), lr=1e-2, num_examples=30, batch_size=3)
    return IVON(model.parameters(), lr=0.1, ess=30.0, weight_decay=1e-2)


def plain(model: nn.Module, optimizer: IVON) -> None:
    with optimizer.sampled_params(train=True):
        model(X).square().sum().backward()


def several_samples(model: nn.Module, optimizer: IVON) -> None:
    for _ in range(3):
        plain(model, optimizer)


def evaluation_before_backward(model: nn.Module, optimizer: IVON) -> None:
    loss = model(X).square().sum()
    model.eval()
    with torch.no_grad():
        model(X)
    model.train()
    loss.backward()


@pytest.mark.parametrize("loop", [plain, several_samples, evaluation_before_backward])
@pytest.mark.parametrize("kind", [IVON, VAdam])
def test_two_parameters_over_one_memory_are_one(kind: type[IVON], loop: Callable[[nn.Module, IVON], None]) -> None:
    found = []
    for tied in (True, False):
        model = Tied(tied)
        optimizer = make(kind, model)
        if loop is evaluation_before_backward:
            optimizer.attach(model)
        for _ in range(14):  # VAdam's first ten draw no noise
            loop(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.eval()
        found.append((model.down.detach().clone(), optimizer.state[model.down]["hess"].clone()))
        if model.up is not None:
            assert model.up.data_ptr() == model.down.data_ptr()
            assert model.up not in optimizer.state
            torch.testing.assert_close(model.up.detach(), model.down.detach().t(), rtol=0, atol=0)
    for mine, single in zip(*found, strict=True):  # the sum of two gradients is rounded once in both
        torch.testing.assert_close(mine, single, rtol=0, atol=0)


def test_a_tied_adapter_of_peft_is_updated_once() -> None:
    sizes: dict[str, Any] = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    )
    optimizer = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=100.0)
    optimizer.attach(model)
    model.train()
    tokens = torch.arange(12).reshape(2, 6)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert sum("hess" in state for state in optimizer.state.values()) == 2  # A and B, not four


def test_a_piece_of_another_parameter_is_refused() -> None:
    whole = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"shapes \(4, 3\) and \(2, 3\) share memory"):
        IVON([whole, nn.Parameter(whole.data[:2])], lr=0.1, ess=10.0)
