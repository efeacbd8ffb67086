"""A merged model is the trained function: every layer kind, tied weights, rounding that takes a part of the update."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import RankPruner, export_lora, find_adapters, merge_lora
from tests.export_models import (
    IDS,
    Around,
    Layers,
    adapted,
    distance,
    llama,
    loaded,
    output,
    peft,
    train,
    transformers,
    with_optimizer,
)
from tests.test_export_consumers import KINDS, configuration


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"grouped convolution"}))
def test_every_kind_of_layer(kind: str) -> None:
    model = adapted(KINDS[kind][0](), configuration(KINDS[kind][1]))
    wanted = output(model)
    merged = merge_lora(model)
    assert distance(merged, wanted) < 1e-5
    assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_modules())


TIED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "tied adapters": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "DoRA": {"target_modules": ["embed_tokens"], "use_dora": True},
    "parameter": {"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved, tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1, 2), (1, 1, 1), (2, 1, 1)])
def test_convolutions_with_flat_kernels(kernel: tuple[int, int, int], use_dora: bool) -> None:
    base = Around(nn.Conv3d(2, 3, kernel), shape=(1, 2, 3, 4, 3))
    model = adapted(base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["conv"], use_dora=use_dora), live={})
    wanted = output(model)
    assert distance(merge_lora(model), wanted) < 1e-6


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.parametrize("case", TIED)
def test_a_tied_base_is_untied_where_the_adapter_needs_it(case: str, tmp_path: Path) -> None:
    model = adapted(llama(tie_word_embeddings=True), peft.LoraConfig(r=2, **TIED[case]), live={})
    wanted = output(model)
    merged: Any = merge_lora(model)
    assert distance(merged, wanted) < 1e-5
    merged.save_pretrained(tmp_path)
    assert distance(transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval(), wanted) < 1e-5
    is_tied = merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert merged.config.tie_word_embeddings == is_tied == (case in ("saved, tied", "tokens"))


def test_an_adapter_that_transformers_loaded(tmp_path: Path) -> None:
    """It gives the model the names of the adapter's file; the merged model must be saved under its own."""
    llama().save_pretrained(tmp_path / "base")
    model = adapted(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=2))
    export_lora(model, None, tmp_path / "adapter")
    merged = merge_lora(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    merged.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(again.eval(), output(model)) < 1e-5


def test_a_model_without_embeddings() -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_channels=2)
    base = Around(transformers.ResNetForImageClassification(config), shape=(1, 2, 8, 8)).eval()
    model = adapted(base, peft.LoraConfig(r=2, target_modules=["convolution"]), live={})
    before = model.base_model.model.conv(torch.ones(1, 2, 8, 8)).logits
    merged: Any = merge_lora(model)
    torch.testing.assert_close(merged.conv(torch.ones(1, 2, 8, 8)).logits, before)


@pytest.mark.filterwarnings("ignore:pruning is not final:UserWarning")
def test_masked_ranks_stay_out_of_attention(tmp_path: Path) -> None:
    """PEFT merges the layer and the projection inside it; the masks of both count while pruning anneals."""
    model = adapted(Layers(), peft.LoraConfig(r=4, target_modules=["attn"]), live={})
    adapters = find_adapters(model)
    optimizer = with_optimizer(model, RankPruner(adapters, 1, total_steps=9, warmup=0, final=2, interval=1))
    train(optimizer, 4, lambda: model(input_ids=IDS).square().mean())
    assert not all(bool(optimizer.state[adapter.B]["rank_mask"].all()) for adapter in adapters)
    with torch.no_grad():
        for adapter in adapters:
            adapter.B.add_(0.3)
    export_lora(model, optimizer, tmp_path)
    assert distance(merge_lora(model, optimizer), output(loaded(Layers(), tmp_path))) < 1e-6


def test_weights_and_modules_that_appear_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(40, 6)
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.again = nn.ModuleDict({"c": self.c})

        def forward(self, input_ids: Tensor) -> Tensor:
            y: Tensor = self.b(torch.tanh(self.a(self.e(input_ids)))) + self.c(self.e(input_ids))
            return y + torch.tanh(self.again["c"](y))

    model = adapted(Twice(), peft.LoraConfig(r=2, target_modules=["a", "c"]), live={})
    wanted = output(model)
    assert distance(merge_lora(model), wanted) < 1e-6


@pytest.mark.parametrize(("size", "lost"), [(0.01, True), (2.0, False)])
def test_rounding_that_takes_more_than_one_percent_is_said(size: float, lost: bool) -> None:
    model = adapted(Layers().bfloat16(), peft.LoraConfig(r=2, target_modules=["embed", "linear"]), live={}, scale=size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merge_lora(model)
    said = [str(warning.message) for warning in caught if "rounding" in str(warning.message)]
    assert [("loses more than 1 % of the update in" in message) for message in said] == ([True] if lost else [])


def test_a_merged_weight_that_overflows_is_an_error() -> None:
    model = adapted(
        Layers().half(), peft.LoraConfig(r=2, lora_alpha=100, target_modules=["linear"]), live={}, scale=100.0
    )
    with pytest.raises(ValueError, match=r"layer 'linear': merged weights are not finite in torch.float16"):
        merge_lora(model)
