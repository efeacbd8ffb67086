"""Tiny base models for the tests of exports, and adapters on them with ranks that differ from layer to layer."""

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, ExportReport, RankPruner, export_lora, find_adapters
from ivon_lora.posterior.tensor_file import read_tensors

peft = pytest.importorskip("peft", reason="needs peft: pip install 'ivon-lora[peft]'")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(3, 13).view(2, 5)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=1, **SIZES, **options)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).eval()


def mixtral() -> Any:
    """PEFT adapts its fused experts where a configuration names those of a list: w1, w2, w3."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_local_experts": 3, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(vocab_size=40, num_key_value_heads=1, **SIZES, **options)
    return transformers.MixtralForCausalLM(config).eval()


def moe() -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    config = transformers.Qwen3MoeConfig(vocab_size=40, num_key_value_heads=1, **SIZES, **options)
    return transformers.Qwen3MoeForCausalLM(config).eval()


def vision() -> Any:
    torch.manual_seed(0)
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(image_size=8, patch_size=4, **SIZES)).eval()


def unet() -> Any:
    import diffusers

    torch.manual_seed(0)
    model: Any = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return model.eval()


def flux() -> Any:
    import diffusers

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict.fromkeys(("num_layers", "num_single_layers", "num_attention_heads"), 1)
    sizes |= dict.fromkeys(("attention_head_dim", "joint_attention_dim", "pooled_projection_dim"), 16)
    sizes |= {"axes_dims_rope": (4, 4, 8)}
    model: Any = diffusers.FluxTransformer2DModel(patch_size=1, in_channels=4, **sizes)
    return model.eval()


def clip_text() -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(vocab_size=40, max_position_embeddings=8, **SIZES)
    return transformers.CLIPTextModel(config).eval()


class Layers(nn.Module):
    """Layer kinds that no tiny model of a library has, in one pass over tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config: dict[str, Any] = {}
        self.embed = nn.Embedding(40, 16)
        self.linear = nn.Linear(16, 16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.grouped = nn.Conv1d(16, 8, 3, padding=1, groups=2)
        self.conv3 = nn.Conv3d(2, 3, (1, 1, 2))
        experts = [nn.ModuleDict({"w1": nn.Linear(16, 8), "w2": nn.Linear(8, 16)}) for _ in range(3)]
        self.experts = nn.ModuleList(experts)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(self.embed(input_ids)))
        hidden = hidden + self.attn(hidden, hidden, hidden, need_weights=False)[0]
        for expert in self.experts:
            hidden = hidden + expert["w2"](torch.relu(expert["w1"](hidden)))  # type: ignore[index]
        waves = self.grouped(hidden.transpose(1, 2))
        return torch.cat(
            [self.head(hidden).flatten(1), waves.flatten(1), self.conv3(hidden.view(2, 2, 1, 1, -1)).flatten(1)], 1
        )


class Named(nn.Module):
    """Layers under any names, one after the other; a name with dots makes a path."""

    def __init__(self, names: Iterable[str], make: Callable[[], nn.Module] = lambda: nn.Linear(4, 4)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names, self.config = list(names), {}  # type: ignore[var-annotated]
        for name in self.names:
            parent: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent._modules[last] = make()  # perhaps where another path goes through

    def forward(self, input_ids: Tensor) -> Tensor:
        x = input_ids.to(next(self.parameters()).dtype)[:, :4] / 10
        for name in self.names:
            x = x + torch.tanh(self.get_submodule(name)(x))
        return x


class Around(nn.Module):
    """One module under a name, called with the tokens in any shape."""

    def __init__(self, module: nn.Module, name: str = "conv", shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module(name, module)
        self.name, self.shape, self.config = name, shape, {}  # type: ignore[var-annotated]

    def forward(self, input_ids: Tensor) -> Any:
        inside = self.get_submodule(self.name)
        if not self.shape:
            return inside(input_ids=input_ids)
        size = torch.Size(self.shape).numel()
        return inside((input_ids.float() / 10).flatten().repeat(size)[:size].view(self.shape))


def output(model: Any) -> Tensor:
    """What a model computes from fixed inputs."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        if name == "UNet2DConditionModel":
            generator = torch.Generator().manual_seed(1)
            x, h = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 16, generator=generator)
            found = model(x, torch.tensor([3]), h).sample
        elif name == "FluxTransformer2DModel":
            text, place = torch.linspace(-1, 1, 32).view(1, 2, 16), torch.arange(12.0).view(4, 3)
            image = torch.linspace(-1, 1, 16).view(1, 4, 4)
            found = model(image, text, text[:, 0], torch.tensor([0.5]), place, place[:2], return_dict=False)[0]
        elif name == "CLIPVisionModel":
            found = model(pixel_values=torch.linspace(-1, 1, 192).view(1, 3, 8, 8)).last_hidden_state
        else:
            found = model(input_ids=IDS)
            found = found if isinstance(found, Tensor) else found[0]
    result: Tensor = found
    return result


def adapted(base: nn.Module, config: Any, live: Mapping[str, int] | None = None, scale: float = 0.3) -> Any:
    """``base`` with a trained adapter: random numbers everywhere, ranks cut to ``live`` (by end of path)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=scale)
        for number, adapter in enumerate(prunable(model)):
            kept = {end: rank for end, rank in (live or {}).items() if adapter.name.endswith(end)}
            rank = next(iter(kept.values()), (3, 2, 1, 0, 3)[number % 5] if live is None else adapter.rank)
            rank = min(rank, adapter.rank)
            gate, dim = (adapter.B, 1) if adapter.E is None else (adapter.E, 0)
            gate.index_fill_(dim, torch.arange(rank, adapter.rank), 0.0)
    return model


def pruned(steps: int, kind: str = "lora") -> tuple[Any, IVON]:
    """Two layers pruned by the optimizer, a third one trained whole: masks are frozen from step 12 of 20 on."""
    common: dict[str, Any] = {"target_modules": ["q", "k"], "modules_to_save": ["last"]}
    if kind == "lora":
        config: Any = peft.LoraConfig(r=4, lora_alpha=6, **common)
    else:
        config = peft.AdaLoraConfig(init_r=4, total_step=20, **common)
    model = adapted(Named(["q", "k", "last"]), config, live={})
    pruner = RankPruner(find_adapters(model), 1.5, total_steps=20, warmup=2, final=8, interval=3)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = IVON(named, lr=0.05, ess=100, hess_init=0.5, weight_decay=0.01, pruner=pruner)
    x = torch.randint(0, 10, (16, 5), generator=torch.Generator().manual_seed(0))
    train(optimizer, steps, lambda: (model(input_ids=x) - x.flip(1)[:, :4] / 10).float().square().mean())
    return model, optimizer


def train(optimizer: IVON, steps: int, loss: Callable[[], Tensor]) -> None:
    for _ in range(steps):
        optimizer.train()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def with_optimizer(model: Any, pruner: RankPruner | None = None) -> IVON:
    """An optimizer of what the model trains, before its first step."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return IVON(named, lr=0.1, ess=100, hess_init=0.1, pruner=pruner)


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return config


def tensors_of(path: Path) -> dict[str, Tensor]:
    return read_tensors(path / "adapter_model.safetensors")[0]


def prunable(model: nn.Module) -> list[Any]:
    try:
        return list(find_adapters(model))
    except ValueError:
        return []


def loaded(base: nn.Module, path: Path) -> Any:
    """A fresh base model with the files loaded by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, path).eval()


def distance(model: Any, wanted: Tensor) -> float:
    """Largest difference of the outputs, relative to the largest of them if that is above 1."""
    return float((output(model) - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))


def exported(model: Any, base: nn.Module, folder: Path, optimizer: Any = None, **options: Any) -> list[ExportReport]:
    """The reports of an export in both layouts; either, loaded on the base, computes what the model does."""
    wanted, reports = output(model), []
    for layout in ("uniform", "compact"):
        reports.append(export_lora(model, optimizer, folder / layout, layout, **options))
        assert distance(loaded(copy.deepcopy(base), folder / layout), wanted) < 1e-5
    return reports
