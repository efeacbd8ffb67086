"""An exported adapter computes what the trained model computes, under the scaling rule of every consumer."""

from __future__ import annotations

import copy
import json
import os
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora.export.adapter import export_lora, merge_lora
from ivon_lora.export.model import read_model
from ivon_lora.export.verify import check_update
from ivon_lora.lora.adapters import find_adapters
from ivon_lora.lora.rank_pruner import RankPruner
from ivon_lora.optim.ivon import IVON

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

# peft 0.21 still reads the old name from transformers 5.23 models
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LAYOUTS = ["uniform", "compact"]


class Everything(nn.Module):
    """Every layer kind that PEFT adapts, in one forward pass over tokens, waves, images and volumes."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 5)
        self.transposed = Conv1D(5, 6)
        self.conv1 = nn.Conv1d(3, 4, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(3, 4, (3, 2))
        self.pointwise = nn.Conv2d(3, 4, 1)
        self.conv3 = nn.Conv3d(3, 4, 2)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        hidden = self.embed(x["tokens"])
        y = self.linear(hidden) + self.transposed(hidden)
        images = [self.conv1(x["wave"]), self.conv2(x["image"]), self.pointwise(x["image"]), self.conv3(x["volume"])]
        return torch.cat([self.head(torch.tanh(y)).flatten(1), *(image.flatten(1) for image in images)], 1)


EVERY_LAYER = ["embed", "linear", "conv1", "conv2", "pointwise", "conv3"]


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "tokens": torch.randint(0, 11, (3, 4), generator=generator),
        "wave": torch.randn(3, 3, 8, generator=generator).to(dtype),
        "image": torch.randn(3, 3, 5, 5, generator=generator).to(dtype),
        "volume": torch.randn(3, 3, 3, 3, 3, generator=generator).to(dtype),
    }


def train(model: nn.Module, live: Mapping[str, int], adapter_name: str = "default", seed: int = 3) -> None:
    """Give all adapter tensors random values and leave ``live[name]`` ranks of each layer (by the end of its path)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and adapter_name in name.split("."):
                noise = torch.randn(p.shape, generator=generator).to(p.dtype)
                p.copy_(p * (1 + 0.1 * noise) if "magnitude" in name else 0.6 * noise)
        for adapter in find_adapters(model, adapter_name):
            keep = next((n for name, n in live.items() if adapter.name.endswith(name)), adapter.rank)
            dead = torch.randperm(adapter.rank, generator=generator)[: adapter.rank - keep]
            gate, dim = (adapter.B, 1) if adapter.E is None else (adapter.E, 0)
            gate.index_fill_(dim, dead, 0.0)


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> bool:
    return float((got - wanted).detach().abs().max()) <= tolerance * max(1.0, float(wanted.detach().abs().max()))


def reload_and_compare(base: nn.Module, path: Path, x: Any, wanted: Tensor, tolerance: float = 1e-6) -> Any:
    """Load the files with PEFT into a fresh base model; check forward pass and merged model."""
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), path).eval()
    with torch.no_grad():
        assert close(loaded(x), wanted, tolerance)
        merged = copy.deepcopy(loaded).merge_and_unload()
        assert close(merged(x), wanted, tolerance)
    assert not any("lora" in name for name, _ in merged.named_modules())
    return loaded


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return config


def tensors_of(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = safetensors_torch.load_file(path / "adapter_model.safetensors")
    return tensors


RANKS = {"embed": 2, "linear": 3, "conv1": 1, "conv2": 4, "pointwise": 0, "conv3": 2, "transposed": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "rsdora"])
def test_every_layer_kind_survives_a_reload(variant: str, layout: str, tmp_path: Path) -> None:
    base = Everything().eval()
    config = peft.LoraConfig(
        r=6,
        lora_alpha=7,
        target_modules=EVERY_LAYER,
        use_rslora=variant.startswith("rs"),
        use_dora=variant.endswith("dora"),
        lora_dropout=0.1,
    )
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    train(model, RANKS)
    wanted = model(batch()).detach()
    report = export_lora(model, None, tmp_path / "adapter", layout)
    assert close(model(batch()), wanted, 0)  # the trained model is as it was
    loaded = reload_and_compare(base, tmp_path / "adapter", batch(), wanted)
    assert report.max_abs_error <= 1e-6
    assert report.ranks == {name: RANKS[name] for name in EVERY_LAYER}
    assert (report.max_rank, report.suggestion) == (4, "--max-lora-rank 8")
    written = config_of(tmp_path / "adapter")
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (4, 4, False)
    # a DoRA magnitude acts without ranks, so its layer stays, with one rank of zeros
    least = 1 if variant.endswith("dora") else 0
    file_ranks = {a.name.rpartition(".")[2]: a.rank for a in find_adapters(loaded)}
    own_ranks = {name: max(least, RANKS[name]) for name in EVERY_LAYER if max(least, RANKS[name])}
    assert file_ranks == (own_ranks if layout == "compact" else dict.fromkeys(own_ranks, 4))
    assert all(adapter.scaling == 1 for adapter in find_adapters(loaded))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adalora_becomes_plain_lora(layout: str, tmp_path: Path) -> None:
    base = Everything().eval()
    names = ["linear", "conv2", "pointwise"]
    config = peft.AdaLoraConfig(init_r=6, target_r=2, lora_alpha=9, total_step=10, target_modules=names)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    train(model, RANKS)
    wanted = model(batch()).detach()
    report = export_lora(model, None, tmp_path / "adapter", layout)
    reload_and_compare(base, tmp_path / "adapter", batch(), wanted)
    assert report.ranks == {name: RANKS[name] for name in names}
    assert config_of(tmp_path / "adapter")["peft_type"] == "LORA"
    assert close(merge_lora(model, None)(batch()), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_transposed_weights(kind: str, layout: str, tmp_path: Path) -> None:
    base = Everything().eval()
    config = (
        peft.LoraConfig(r=3, target_modules=["transposed"], fan_in_fan_out=True)
        if kind == "lora"
        else peft.AdaLoraConfig(init_r=3, total_step=10, target_modules=["transposed"], fan_in_fan_out=True)
    )
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    train(model, RANKS)
    wanted = model(batch()).detach()
    export_lora(model, None, tmp_path / "adapter", layout)
    reload_and_compare(base, tmp_path / "adapter", batch(), wanted)
    assert close(merge_lora(model, None)(batch()), wanted)


# What each consumer multiplies B A by, from its source: the configuration `c`, the module name, and the ranks of the
# tensors in the file, by name. None of them reads what the others read.
def peft_scale(c: Mapping[str, Any], name: str, ranks: Mapping[str, int]) -> float:
    def find(patterns: Mapping[str, float], default: float) -> float:
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), default)

    return find(c["alpha_pattern"], c["lora_alpha"]) / find(c["rank_pattern"], c["r"])


def vllm_scale(c: Mapping[str, Any], name: str, ranks: Mapping[str, int]) -> float:
    return float(c["lora_alpha"] / c["r"])


def llama_cpp_scale(c: Mapping[str, Any], name: str, ranks: Mapping[str, int]) -> float:
    return float(c["lora_alpha"] / ranks[name])


def diffusers_scale(c: Mapping[str, Any], name: str, ranks: Mapping[str, int]) -> float:
    """Without alphas in the file, alpha is each module's own rank."""
    alphas = dict(ranks)
    return alphas[name] / ranks[name]


def older_diffusers_scale(c: Mapping[str, Any], name: str, ranks: Mapping[str, int]) -> float:
    """Before that it was the most frequent rank for all."""
    return statistics.mode(ranks.values()) / ranks[name]


@pytest.mark.parametrize(
    ("layout", "consumer"),
    [
        ("uniform", peft_scale),
        ("uniform", vllm_scale),
        ("uniform", llama_cpp_scale),
        ("uniform", diffusers_scale),
        ("uniform", older_diffusers_scale),
        ("compact", peft_scale),
        ("compact", vllm_scale),
        ("compact", diffusers_scale),
    ],
)
@pytest.mark.parametrize("kind", ["lora", "rslora", "adalora", "transposed"])
def test_the_update_under_each_consumers_rule(
    layout: str, consumer: Callable[[Mapping[str, Any], str, Mapping[str, int]], float], kind: str, tmp_path: Path
) -> None:
    """Every kind of layer, after a reload and merge by PEFT, and by hand from the file under the consumer's rule."""
    names = {"adalora": ["linear", "conv2", "pointwise", "head"], "transposed": ["transposed"]}.get(kind, EVERY_LAYER)
    config = (
        peft.AdaLoraConfig(init_r=6, lora_alpha=9, total_step=10, target_modules=names)
        if kind == "adalora"
        else peft.LoraConfig(
            r=6, lora_alpha=7, target_modules=names, use_rslora=kind == "rslora", fan_in_fan_out=kind == "transposed"
        )
    )
    base = Everything().eval()
    model: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    train(model, RANKS)
    export_lora(model, None, tmp_path / "adapter", layout)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload()
    written, tensors = config_of(tmp_path / "adapter"), tensors_of(tmp_path / "adapter")
    factors: dict[str, list[Tensor]] = {}
    for key in sorted(tensors):  # A before B
        factors.setdefault(key.removeprefix("base_model.model.").split(".lora_")[0], []).append(tensors[key])
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    assert sorted(ranks) == sorted(set(names) - {"pointwise"}), "a layer without ranks is left out"
    for name, (a, b) in factors.items():
        wanted = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach().flatten(1)
        assert float(wanted.abs().max()) > 0.1
        got = consumer(written, name, ranks) * b.flatten(1) @ a.flatten(1)
        assert close(got.T if name in ("embed", "transposed") else got, wanted)
        change = merged.get_submodule(name).weight - base.get_submodule(name).weight
        assert close(change.detach().flatten(1), wanted)


def test_rules_that_know_one_rank_for_all_scale_the_compact_layout_wrongly(tmp_path: Path) -> None:
    """As documented; and so the rules above can tell a wrong scale."""
    model = peft.get_peft_model(Everything(), peft.LoraConfig(r=6, target_modules=["linear", "conv1", "conv3"]))
    train(model, {"linear": 3, "conv1": 1, "conv3": 3})
    export_lora(model, None, tmp_path / "adapter", "compact")
    ranks = {"linear": 3, "conv1": 1, "conv3": 3}
    for rule in (llama_cpp_scale, older_diffusers_scale):
        assert rule(config_of(tmp_path / "adapter"), "conv1", ranks) == 3


class Named(nn.Module):
    """Linear layers under any names, one after the other; a name with dots makes a path."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            parent: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = x + torch.tanh(self.get_submodule(name)(x))
        return x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "ranks",
    [
        {"a+b.q[0]": 3, "a+b.q(1)|x": 1, "a+b.^k$": 2, "a+b.v*": 0},  # characters with a meaning in a regex
        {"q": 3, "block.q": 1, "outer.block.q": 2},  # paths that end like other paths
        {"q": 1, "block.q": 0, "other.q": 2},  # a module without ranks that ends like one that is kept
        {"layer1": 1, "layer11": 2, "1": 3, "11.1": 1},
    ],
)
def test_names_reach_their_own_module_only(ranks: dict[str, int], layout: str, tmp_path: Path) -> None:
    base = Named([*ranks, "free.q", "free.x"]).eval()
    targets = "|".join(re.escape(name) for name in ranks)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    with torch.no_grad():
        for adapter in find_adapters(model):
            adapter.B.normal_()[:, ranks[adapter.name.removeprefix("base_model.model.")] :] = 0
    x = torch.randn(5, 4)
    wanted = model(x).detach()
    export_lora(model, None, tmp_path / "adapter", layout)
    loaded = reload_and_compare(base, tmp_path / "adapter", x, wanted)
    got = {a.name.removeprefix("base_model.model."): a.rank for a in find_adapters(loaded)}
    kept = {name: rank for name, rank in ranks.items() if rank}
    assert got == (kept if layout == "compact" else dict.fromkeys(kept, max(kept.values())))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_targets(layout: str, tmp_path: Path) -> None:
    """From 20 targets on, PEFT shortens the list of names when it loads."""
    ranks = {f"layers.{i}.{kind}": (i * 3 + len(kind)) % 4 for i in range(12) for kind in ("q", "qv", "free.q")}
    base = Named([*ranks, "q"]).eval()
    targets = rf"layers\.\d+\.({'|'.join(('q', 'qv', 'free.q'))})"
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=targets))
    with torch.no_grad():
        for adapter in find_adapters(model):
            adapter.B.normal_()[:, ranks[adapter.name.removeprefix("base_model.model.")] :] = 0
    x = torch.randn(5, 4)
    wanted = model(x).detach()
    export_lora(model, None, tmp_path / "adapter", layout)
    loaded = reload_and_compare(base, tmp_path / "adapter", x, wanted)
    got = {a.name.removeprefix("base_model.model."): a.rank for a in find_adapters(loaded)}
    kept = {name: rank for name, rank in ranks.items() if rank}
    assert got == (kept if layout == "compact" else dict.fromkeys(kept, max(kept.values())))


def test_a_model_without_ranks_is_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(Named(["q"]), peft.LoraConfig(r=3, target_modules=["q"]))  # B starts as zero
    with pytest.raises(ValueError, match="adapter 'default' has no rank left in any of its 1 modules"):
        export_lora(model, None, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_adapters_are_exported_and_merged_one_by_one(layout: str, tmp_path: Path) -> None:
    base = Everything().eval()
    model: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["linear"]))
    wide = peft.LoraConfig(r=5, lora_alpha=3, target_modules=["linear", "conv1"], modules_to_save=["head"])
    model.add_adapter("wide", wide)
    train(model, {}, "default")
    train(model, {"conv1": 2}, "wide")
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["wide"].weight.mul_(3)
    for name, rank in (("default", 2), ("wide", 5)):
        model.set_adapter(name)
        wanted = model.eval()(batch()).detach()
        model.set_adapter("wide" if name == "default" else "default")  # the exported one need not be the active one
        report = export_lora(model, None, tmp_path / name, layout, adapter_name=name)
        assert report.max_rank == rank
        reload_and_compare(base, tmp_path / name, batch(), wanted)
        assert close(merge_lora(copy.deepcopy(model), None, name)(batch()), wanted)
    with pytest.raises(ValueError, match="adapter_name='narrow' is not in the model; it has: default, wide"):
        export_lora(model, None, tmp_path / "narrow", adapter_name="narrow")


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=32, num_labels=3
    )
    torch.manual_seed(1)
    model: nn.Module = transformers.BertForSequenceClassification(config).eval()
    return model


class Logits(nn.Module):
    """A module of the user's own around a PeftModel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits


TOKENS = torch.arange(24).reshape(3, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_classifier_keeps_its_head(layout: str, tmp_path: Path) -> None:
    base = bert()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "dense"], task_type="SEQ_CLS")
    model: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    train(model, {"0.attention.self.query": 0, "1.attention.self.query": 1})
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    wrapped = Logits(model)
    wanted = wrapped(TOKENS).detach()
    report = export_lora(wrapped, None, tmp_path / "adapter", layout)  # found inside the user's module
    assert report.ranks["bert.encoder.layer.0.attention.self.query"] == 0
    assert any("merged model" in note for note in report.notes)
    written = config_of(tmp_path / "adapter")
    assert written["task_type"] == "SEQ_CLS"
    assert "classifier" in written["modules_to_save"]
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert close(Logits(loaded)(TOKENS), wanted)
    assert close(Logits(loaded.merge_and_unload())(TOKENS), wanted)
    assert close(Logits(merge_lora(wrapped, None))(TOKENS), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_injected_adapters(layout: str, tmp_path: Path) -> None:
    base = bert()
    model: Any = copy.deepcopy(base)
    model.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], modules_to_save=["classifier"])
    )
    train(model, {"0.attention.self.query": 0})
    with torch.no_grad():
        model.classifier.modules_to_save["default"].weight.normal_()
    wanted = Logits(model.eval())(TOKENS).detach()
    export_lora(model, None, tmp_path / "adapter", layout)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert close(Logits(loaded)(TOKENS), wanted)
    merged = merge_lora(model, None)
    assert merged is model
    assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_modules())
    assert set(merged.state_dict()) == set(base.state_dict())
    assert close(Logits(merged)(TOKENS), wanted)
    again = peft.get_peft_model(merged, peft.LoraConfig(r=2, target_modules=["query"]))  # nothing of PEFT is left
    assert close(Logits(again.eval())(TOKENS), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_reach_modules_without_ranks(bias: str, layout: str, tmp_path: Path) -> None:
    base = Everything().eval()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["linear", "conv1"], bias=bias)
    model: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    train(model, {"linear": 0})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and name.endswith("bias"):
                p.add_(torch.randn_like(p))
    wanted = model(batch()).detach()
    export_lora(model, None, tmp_path / "adapter", layout)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert close(loaded(batch()), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_bias_is_scaled_and_kept_without_ranks(layout: str, tmp_path: Path) -> None:
    base = Everything().eval()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["linear", "conv1"], lora_bias=True)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    train(model, {"linear": 0, "conv1": 3})
    wanted = model(batch()).detach()
    report = export_lora(model, None, tmp_path / "adapter", layout)
    reload_and_compare(base, tmp_path / "adapter", batch(), wanted)
    assert report.ranks == {"linear": 0, "conv1": 3}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_layers_hold_two_adapters(layout: str, tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.attn(x, x, x)[0])
            return y

    base = Attention().eval()
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["attn", "out"])
    ).eval()
    train(model, {"attn": 1, "attn.base_layer.out_proj": 3, "model.out": 2})
    x = torch.randn(2, 5, 8)
    wanted = model(x).detach()
    report = export_lora(model, None, tmp_path / "adapter", layout)
    assert report.ranks == {"attn": 1, "attn.base_layer.out_proj": 3, "out": 2}
    reload_and_compare(base, tmp_path / "adapter", x, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, layout: str, tmp_path: Path) -> None:
    base = Everything().eval().to(dtype)
    config = peft.LoraConfig(r=6, lora_alpha=7, target_modules=["linear", "conv2", "embed"])
    model = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
    train(model, RANKS)
    report = export_lora(model, None, tmp_path / "adapter", layout)
    assert {t.dtype for t in tensors_of(tmp_path / "adapter").values()} == {dtype}
    wanted = model(batch(dtype)).detach()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    # two roundings of numbers of this size, through sums of at most 18 terms
    assert close(loaded(batch(dtype)), wanted, 1e-6 if dtype == torch.float64 else 20 * torch.finfo(dtype).eps)
    assert (report.max_abs_error < 1e-15) == (dtype == torch.float64)


def test_the_check_refuses_what_rounding_does_not_explain(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = peft.get_peft_model(
            Named(["q"]).to(dtype),
            peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q"]),
            autocast_adapter_dtype=False,
        )
        train(model, {})
        (layer,) = read_model(model, None, "default").layers
        a, b = layer.folded()
        exact = check_update(layer, a, b, 1.0)
        assert exact < (1e-6 if dtype == torch.float32 else 0.05)
        with pytest.raises(ValueError, match="layer 'q': the exported update differs from the trained one by"):
            check_update(layer, a, b, 1.02)
        with pytest.raises(ValueError, match="differs"):
            check_update(layer, a, b.flip(1), 1.0)
        with pytest.raises(ValueError, match="differs"):
            check_update(layer, a[:0], b[:, :0], 1.0)
    with torch.no_grad():
        find_adapters(model)[0].A[0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer 'q' cannot be exported: its update is not finite"):
        export_lora(model, None, tmp_path / "adapter")


def test_an_overflow_in_fp16_is_an_error(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        Named(["q"]).half(), peft.LoraConfig(r=1, lora_alpha=1000, target_modules=["q"]), autocast_adapter_dtype=False
    )
    with torch.no_grad():
        find_adapters(model)[0].B.fill_(100)
    with pytest.raises(ValueError, match=r"its update is not finite \(in torch.float16\)"):
        export_lora(model, None, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def small() -> Any:
    model = peft.get_peft_model(Named(["q"]), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q"]))
    train(model, {})
    return model


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("moment", ["writing", "verifying", "renaming"])
def test_a_crash_leaves_the_old_directory_intact(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_lora(small(), None, tmp_path / "adapter")
    before = files(tmp_path)

    def crash_while_writing(tensors: Any, path: Path, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError("disk full")

    rename, calls = os.rename, []

    def crash_while_renaming(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError("disk full")
        rename(source, target)

    if moment == "writing":
        monkeypatch.setattr(safetensors_torch, "save_file", crash_while_writing)
    elif moment == "verifying":
        monkeypatch.setattr(safetensors_torch, "load_file", lambda path: 1 / 0)
    else:
        monkeypatch.setattr(os, "rename", crash_while_renaming)
    model = small()
    with torch.no_grad():
        find_adapters(model)[0].A.mul_(2)
    with pytest.raises((OSError, ZeroDivisionError)):
        export_lora(model, None, tmp_path / "adapter")
    assert files(tmp_path) == before
    monkeypatch.undo()
    export_lora(model, None, tmp_path / "adapter")
    assert files(tmp_path) != before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_other_files_of_the_directory_stay(tmp_path: Path) -> None:
    path = tmp_path / "new" / "adapter"
    (path / "tokenizer").mkdir(parents=True)
    (path / "tokenizer" / "vocab.txt").write_text("a b c")
    (path / "adapter_config.json").write_text("{}")
    report = export_lora(small(), None, path)
    assert (path / "tokenizer" / "vocab.txt").read_text() == "a b c"
    assert config_of(path)["r"] == 3
    assert report.bytes == sum(
        (path / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert [p.name for p in path.parent.iterdir()] == ["adapter"]


def test_paths_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"path='.*file' is a file: name a directory"):
        export_lora(small(), None, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="holds the current working directory"):
        export_lora(small(), None, ".")
    with pytest.raises(ValueError, match="path is empty"):
        export_lora(small(), None, "")
    with pytest.raises(ValueError, match="layout='squeezed' is unknown: use 'uniform' or 'compact'"):
        export_lora(small(), None, "adapter", layout="squeezed")


def test_the_same_model_gives_the_same_files(tmp_path: Path) -> None:
    model = peft.get_peft_model(Everything(), peft.LoraConfig(r=3, target_modules=EVERY_LAYER))
    train(model, RANKS)
    for name in ("one", "two"):
        export_lora(model, None, tmp_path / name, "compact")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert config_of(tmp_path / "one")["target_modules"] == sorted(name for name in EVERY_LAYER if RANKS[name])


@pytest.mark.parametrize(("rank", "flag"), [(8, "8"), (9, "16"), (257, "320"), (321, "512"), (513, "513")])
def test_the_server_flag(rank: int, flag: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(Named(["q"]), peft.LoraConfig(r=rank, target_modules=["q"]))
    train(model, {})
    report = export_lora(model, None, tmp_path / "adapter")
    assert report.suggestion == f"--max-lora-rank {flag}"
    assert any("vLLM serves ranks up to 512" in note for note in report.notes) == (rank > 512)
    assert f"{rank} ranks in 1 of 1 modules" in str(report)


def test_an_initialisation_that_changed_the_base_is_said(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights="pissa")
    model = peft.get_peft_model(Named(["q"]), config)
    with pytest.warns(UserWarning, match="'pissa' changed the frozen weights"):
        report = export_lora(model, None, tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["init_lora_weights"] is True  # loading must not change weights again
    assert len(report.notes) == 1


def test_layers_that_plain_lora_cannot_express_are_refused(tmp_path: Path) -> None:
    class Dilated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 2, dilation=2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return y

    config = peft.AdaLoraConfig(init_r=3, total_step=10, target_modules=["conv"])
    model = peft.get_peft_model(Dilated().eval(), config).eval()
    train(model, {})
    with pytest.raises(ValueError, match=r"layer 'conv' cannot be exported: .* has \(2, 2\); merge_lora"):
        export_lora(model, None, tmp_path / "adapter")
    wanted = model(batch()["image"]).detach()
    assert close(merge_lora(model, None)(batch()["image"]), wanted)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4, 4))

    model = peft.get_peft_model(
        nn.ModuleDict({"block": Experts()}), peft.LoraConfig(r=2, target_modules=[], target_parameters=["block.w"])
    )
    with pytest.raises(ValueError, match=r"cannot be exported: its rank axis is fused with 3 experts"):
        export_lora(model, None, tmp_path / "adapter")

    kasa = peft.LoraConfig(r=2, target_modules=["q"], kasa_config=peft.tuners.lora.config.KasaConfig())
    model = peft.get_peft_model(Named(["q"]), kasa)
    with pytest.raises(ValueError, match="a plain LoRA adapter does not express KasaLinearVariant"):
        export_lora(model, None, tmp_path / "adapter")


def test_compiled_and_wrapped_models(tmp_path: Path) -> None:
    model = small()
    x = torch.randn(2, 4)
    wanted = model(x).detach()
    base = copy.deepcopy(model).unload()
    for number, wrapped in enumerate([torch.compile(model), nn.DataParallel(model), model.base_model]):
        export_lora(wrapped, None, tmp_path / str(number))
        reload_and_compare(base, tmp_path / str(number), x, wanted)


def pruned(steps: int, kind: str = "lora", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any, IVON, Tensor]:
    """A model pruned by the optimizer: masks are frozen from step 12 of 20 on."""
    base = Named(["q", "k", "last"]).to(dtype)
    config = (
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "k"], modules_to_save=["last"])
        if kind == "lora"
        else peft.AdaLoraConfig(init_r=4, total_step=20, target_modules=["q", "k"], modules_to_save=["last"])
    )
    model: Any = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    train(model, {})
    pruner = RankPruner(find_adapters(model), 1.5, total_steps=20, warmup=2, final=8, interval=3)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = IVON(named, lr=0.05, ess=100, hess_init=0.5, weight_decay=0.01, pruner=pruner)
    x = torch.randn(16, 4).to(dtype)
    for _ in range(steps):
        optimizer.train()
        (model(x) - x.flip(1)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return base, model, optimizer, x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_the_means_of_the_ranks_that_live_are_exported_never_a_sample(kind: str, layout: str, tmp_path: Path) -> None:
    base, model, optimizer, x = pruned(20, kind)
    wanted = model(x).detach()
    report = export_lora(model, optimizer, tmp_path / "adapter", layout)
    reload_and_compare(base, tmp_path / "adapter", x, wanted)
    assert sum(report.ranks.values()) == 3  # 1.5 per adapter
    assert list(report.ranks.values()) == [row["live"] for row in optimizer.rank_table()]
    assert not any("final" in note for note in report.notes)

    optimizer.train()
    sample = [p.detach().clone() for p in model.parameters()]
    assert not close(model(x), wanted)
    export_lora(model, optimizer, tmp_path / "again", layout)
    assert files(tmp_path / "again") == files(tmp_path / "adapter")
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), sample, strict=True))  # the sample is still live
    assert close(merge_lora(model, optimizer)(x), wanted)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_export_while_pruning_anneals_drops_what_is_masked_and_says_so(kind: str, tmp_path: Path) -> None:
    base, model, optimizer, x = pruned(11, kind)
    with pytest.warns(UserWarning, match="pruning is not final: masked ranks still made an update of up to"):
        report = export_lora(model, optimizer, tmp_path / "adapter")
    assert list(report.ranks.values()) == [row["live"] for row in optimizer.rank_table()]
    assert 0 < sum(report.ranks.values()) < 8
    wanted = merge_lora(model, optimizer)(x)  # merging drops the same ranks
    reload_and_compare(base, tmp_path / "adapter", x, wanted.detach())


def test_a_16_bit_adapter_exports_the_rounded_mean(tmp_path: Path) -> None:
    base, model, optimizer, x = pruned(20, "lora", torch.bfloat16)
    wanted = model(x).detach()
    optimizer.train()
    export_lora(model, optimizer, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert close(loaded(x), wanted, 20 * torch.finfo(torch.bfloat16).eps)
    kept = optimizer.state[find_adapters(model)[0].A]["rank_mask"]
    optimizer.eval()
    a = tensors_of(tmp_path / "adapter")["base_model.model.q.lora_A.weight"]
    assert torch.equal(a[: int(kept.sum())], find_adapters(model)[0].A[kept])


def test_wrapped_and_foreign_optimizers(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    base, model, optimizer, x = pruned(20)
    wanted = model(x).detach()
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
    optimizer.train()  # preparing it goes through load_state_dict
    export_lora(model, wrapped, tmp_path / "one")
    reload_and_compare(base, tmp_path / "one", x, wanted)
    optimizer.eval()
    export_lora(model, torch.optim.AdamW(model.parameters()), tmp_path / "two")
    reload_and_compare(base, tmp_path / "two", x, wanted)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv3d(3, 4, (1, 1, 2)), (2, 3, 3, 3, 3)),
        (nn.Conv3d(3, 4, 1), (2, 3, 3, 3, 3)),
        (nn.Conv2d(3, 4, (1, 2)), (2, 3, 3, 3)),
        (nn.Conv1d(3, 4, 1), (2, 3, 3)),
    ],
    ids=str,
)
def test_convolutions_with_flat_kernels_merge(layer: nn.Module, shape: tuple[int, ...], use_dora: bool) -> None:
    model = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(layer)), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=use_dora)
    ).eval()
    train(model, {})
    x = torch.randn(shape)
    wanted = model(x).detach()
    assert close(merge_lora(model)(x), wanted)
