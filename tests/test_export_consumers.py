"""Each cell of the table in docs/export.md: a consumer loads an export, and computes what was trained."""

import contextlib
import functools
import inspect
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from ivon_lora import export_lora, export_saved
from tests.export_models import (
    Layers,
    adapted,
    clip_text,
    config_of,
    distance,
    flux,
    gpt2,
    llama,
    loaded,
    moe,
    output,
    peft,
    tensors_of,
    transformers,
    unet,
    vision,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "export.md"
PREFIX = "base_model.model."
LINEAR = ["v_proj", "o_proj", "down_proj"]


def configuration(options: dict[str, Any], **others: Any) -> Any:
    """The configuration of a row of the table."""
    options = {"lora_alpha": 6, "target_modules": LINEAR, **options, **others}
    return peft.AdaLoraConfig(**options) if "init_r" in options else peft.LoraConfig(r=4, **options)


def resized() -> Any:
    """A base whose vocabulary has grown since it was saved; new rows differ from call to call."""
    folder = Path(tempfile.gettempdir()) / "ivon-lora-tests-base"
    if not (folder / "config.json").is_file():
        llama().save_pretrained(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    resized.calls += 1  # type: ignore[attr-defined]
    torch.manual_seed(resized.calls)  # type: ignore[attr-defined]
    model.resize_token_embeddings(44, mean_resizing=False)
    return model.eval()


resized.calls = 0  # type: ignore[attr-defined]

biased = functools.partial(llama, attention_bias=True)
FUSED = ["experts.gate_up_proj", "experts.down_proj"]
#: row of the table -> base model of PEFT and transformers, options of the configuration
KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "linear layers, LoRA": (llama, {}),
    "linear layers, rsLoRA": (llama, {"use_rslora": True}),
    "linear layers, AdaLoRA": (llama, {"init_r": 4, "total_step": 9}),
    "linear layers, DoRA": (llama, {"use_dora": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "transposed linear (GPT-2's Conv1D)": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "convolution": (vision, {"target_modules": ["patch_embedding", "v_proj"]}),
    "grouped convolution": (Layers, {"target_modules": ["grouped", "linear"]}),
    "nn.MultiheadAttention": (Layers, {"target_modules": ["attn", "linear"]}),
    "fused experts (`target_parameters`)": (moe, {"target_modules": ["v_proj"], "target_parameters": FUSED}),
    "experts in a list": (Layers, {"target_modules": ["w1", "w2", "linear"]}),
    "one parameter (a router, `target_parameters`)": (
        moe,
        {"target_modules": ["v_proj"], "target_parameters": ["gate.weight"]},
    ),
    "head (`modules_to_save`)": (llama, {"modules_to_save": ["lm_head"]}),
    'biases (`bias="all"`)': (biased, {"bias": "all"}),
    "LoRA's own bias (`lora_bias`)": (biased, {"target_modules": ["v_proj", "o_proj"], "lora_bias": True}),
    "tokens (`trainable_token_indices`)": (llama, {"trainable_token_indices": [3, 4]}),
    "rows added to the vocabulary": (resized, {}),
}
#: of the adapter of a UNet
UNET = {
    "convolution": {"target_modules": ["conv1", "to_v"]},
    "LoRA's own bias (`lora_bias`)": {"target_modules": ["to_out.0", "conv1"]},
    "head (`modules_to_save`)": {"modules_to_save": ["conv_out"]},
}


def table() -> Iterator[tuple[str, str, str]]:
    """(row, consumer, cell) of the first table of the document."""
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if "---" not in line]
    for row in rows:
        if len(row) == len(head):
            yield from ((row[0], consumer, cell) for consumer, cell in zip(head[1:], row[1:], strict=True))


CELLS = [
    pytest.param(kind, consumer, layout, cell == "exact" or cell == layout, id=f"{kind}-{consumer}-{layout}")
    for kind, consumer, cell in table()
    if cell != "-"
    for layout in ("uniform", "compact")
]


@functools.cache
def exported(kind: str, layout: str, for_unet: bool = False) -> tuple[Path, Any, Tensor, Callable[[], Any]]:
    """The folder, the trained model, what it computes, and a maker of its base."""
    make = unet if for_unet else KINDS[kind][0]
    others = {"target_modules": ["to_q", "to_v"], **UNET.get(kind, {})} if for_unet else {}
    model = adapted(make(), configuration(KINDS[kind][1], **others))
    folder = Path(tempfile.mkdtemp()) / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_lora(model, None, folder, layout)
    return folder, model, output(model), make


def by_peft(kind: str, layout: str) -> bool:
    folder, _, wanted, make = exported(kind, layout)
    model = loaded(make(), folder)
    exact = distance(model, wanted) < 1e-5
    if kind == "grouped convolution":  # PEFT cannot merge these
        return exact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return exact and distance(model.merge_and_unload(), wanted) < 1e-5


def by_transformers(kind: str, layout: str) -> bool:
    folder, _, wanted, make = exported(kind, layout)
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_adapter(str(folder))
    return distance(model.eval(), wanted) < 1e-5


def by_diffusers(kind: str, layout: str) -> bool:
    pytest.importorskip("diffusers")
    folder, _, wanted, make = exported(kind, layout, for_unet=True)
    model = make()
    model.load_lora_adapter(str(folder), weight_name="adapter_model.safetensors", prefix="unet")
    return distance(loaded(make(), folder), wanted) < 1e-5 and distance(model.eval(), wanted) < 1e-5


def factors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Key of every layer -> its two tensors, as consumers without PEFT read them; raises for every other tensor."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors_of(folder).items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_(?:(?:embedding_([AB]))|(?:([AB])\.weight))", key)
        if match is None:
            raise ValueError(f"{key} is neither A nor B of a layer")
        layers.setdefault(match[1], {})[match[2] or match[3]] = tensor
    return layers


def updates_agree(model: Any, found: dict[str, Tensor]) -> bool:
    """Whether the updates, (out, in) by path, are those of the trained model, and none is missing."""
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight") and "default" in {*layer.lora_A, *layer.lora_embedding_A}:
            wanted = layer.get_delta_weight("default").detach()
            got = found.get(name, torch.zeros(()))
            got = got if got.dim() == 0 or got.shape == wanted.shape else got.transpose(-2, -1)
            if float((got - wanted).abs().max()) > 1e-6 * max(1.0, float(wanted.abs().max())):
                return False
    return True


def write_gguf(
    folder: Path, out: Path, n_blocks: int, heads: Mapping[str, int] = MappingProxyType({})
) -> dict[str, str]:
    """As llama.cpp's convert_lora_to_gguf.py, for Llama: names, metadata, order of rows. Returns path by name."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config_of(folder)["lora_alpha"]))
    names, paths = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n_blocks), {}
    for path, pair in factors(folder).items():
        name, a, b = names.get_name(f"{path}.weight", try_suffixes=(".weight",)), pair["A"], pair["B"]
        if name is None or "lora_magnitude" in path:
            raise ValueError(f"llama.cpp has no tensor for {path}")
        if n := heads.get(path.split(".")[-1]):  # rotary halves are interleaved there
            b = b.view(n, 2, len(b) // n // 2, -1).swapaxes(1, 2).reshape(b.shape)
        writer.add_tensor(f"{name}.lora_a", (a.T if "token_embd.weight" in name else a).contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", b.contiguous().numpy())
        paths[name] = path
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return paths


def by_gguf(kind: str, layout: str) -> bool:
    """The scale is that of llama-adapter.h: alpha / rank of the tensor."""
    gguf = pytest.importorskip("gguf")
    folder, model, _, _ = exported(kind, layout)
    paths = write_gguf(folder, folder.parent / "adapter.gguf", 2)
    reader = gguf.GGUFReader(folder.parent / "adapter.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    found = {}
    for name, path in paths.items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        a = a.T if "token_embd" in name else a
        found[path] = (alpha / b.shape[1] if alpha else 1.0) * b @ a
    return updates_agree(model, found)


def by_vllm(kind: str, layout: str) -> bool:
    folder, model, _, _ = exported(kind, layout)
    config = config_of(folder)
    is_served = not (config["modules_to_save"] or config["use_dora"]) and config["r"] <= 512
    if not is_served or not isinstance(config["target_modules"], list):
        raise ValueError("refused")
    found, experts = {}, {}
    for path, pair in factors(folder).items():
        module = model.base_model.model.get_submodule(path)
        if pair["A"].dim() > 2 or path.endswith("gate") or "attn" in path.split("."):
            raise ValueError(f"{path} is no module that vLLM adapts")
        if pair["A"].shape[0] > config["r"] * getattr(module, "num_experts", 1):
            raise ValueError(f"{path} has more ranks than r")
        scale = config["lora_alpha"] / config["r"]
        if ".experts." in f".{path}" and path.split("experts.")[1][0].isdigit():
            experts[path] = pair["A"].shape[0]
        if hasattr(module, "parameter_name"):  # the fused layout: (experts, rank, in) and (out, rank, experts)
            a = pair["A"].view(module.num_experts, -1, pair["A"].shape[1])
            b = pair["B"].view(len(pair["B"]), -1, module.num_experts).permute(2, 0, 1)
            found[path] = scale * b @ a
        else:
            found[path] = scale * pair["B"] @ pair["A"]
    if len(set(experts.values())) > 1 or len(experts) not in (0, 6):
        raise ValueError("experts cannot be stacked")
    return updates_agree(model, found)


CONSUMERS = {
    "PEFT": by_peft,
    "transformers": by_transformers,
    "diffusers": by_diffusers,
    "llama.cpp": by_gguf,
    "vLLM": by_vllm,
}


@pytest.mark.parametrize(("kind", "consumer", "layout", "exact"), CELLS)
def test_a_cell_of_the_table(kind: str, consumer: str, layout: str, exact: bool) -> None:
    if exact:
        assert CONSUMERS[consumer](kind, layout)
        return
    with contextlib.suppress(ValueError, KeyError):  # a consumer may refuse, or compute something else
        assert not CONSUMERS[consumer](kind, layout)


@pytest.mark.parametrize(
    "kind", [kind for kind, consumer, cell in table() if (consumer, cell) == ("llama.cpp", "uniform")]
)
def test_the_compact_layout_for_llama_cpp(kind: str) -> None:
    """Right wherever uniform is, for PEFT and transformers too; and it says for whom it is not."""
    assert by_gguf(kind, "gguf")
    assert by_peft(kind, "gguf")
    assert by_transformers(kind, "gguf")
    folder, model, wanted, make = exported(kind, "gguf")
    again = export_saved(folder, folder.parent / "again", "compact")
    assert distance(loaded(make(), folder.parent / "again"), wanted) < 1e-5
    if "target_parameters" not in kind:  # else a note says already that neither takes it
        assert again.notes[-1].startswith("llama.cpp gives layers of this layout wrong scales")
        assert export_lora(model, None, folder, "gguf").notes[-1].startswith("vLLM gives layers")


def test_the_table_has_every_kind_and_consumer() -> None:
    assert {kind for kind, _, _ in table()} == set(KINDS)
    assert {consumer for _, consumer, _ in table()} == set(CONSUMERS)


#: pipeline, component, its base model, and layers to adapt
PIPELINES: dict[str, tuple[str, Callable[[], Any], list[str]]] = {
    "unet": ("StableDiffusionPipeline", unet, ["to_q", "conv1"]),
    "text_encoder": ("StableDiffusionPipeline", clip_text, ["q_proj", "fc1"]),
    "transformer": ("FluxPipeline", flux, ["to_q", "to_out.0"]),
}


@pytest.mark.parametrize("component", PIPELINES)
def test_a_pipeline_of_diffusers_loads_the_folder_and_it_can_be_exported_again(component: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline, make, targets = PIPELINES[component]
    kind = getattr(diffusers, pipeline)
    model = adapted(make(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, bias="all"))
    with torch.no_grad():  # diffusers reads no biases
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.copy_(make().get_parameter(name.removeprefix(PREFIX).replace("base_layer.", "")))
    report = export_lora(model, None, tmp_path / "first", "compact")
    assert report.notes[-1].startswith("diffusers ignores tensors that are no LoRA factors")
    export_saved(tmp_path / "first", tmp_path / "again", "uniform")
    parts = {"text_encoder": clip_text, "transformer": flux, "unet": unet}
    for path in (tmp_path / "first", tmp_path / "again"):
        others = {name: parts[name]() if name in parts else None for name in inspect.signature(kind).parameters}
        pipe = kind(**{name: part for name, part in others.items() if name != "requires_safety_checker"})
        pipe.load_lora_weights(str(path))
        assert distance(getattr(pipe, component).eval(), output(model)) < 1e-5
