"""Show versions of the libraries and what this machine can do, for bug reports.

examples:
  ivon-lora env --json
"""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ivon_lora import __version__
from ivon_lora.cli.errors import InputError

PACKAGES = ("numpy", "peft", "transformers", "tokenizers", "safetensors", "matplotlib", "triton")


def run(arguments: argparse.Namespace) -> tuple[Any, str]:
    """Do what the module's docstring says."""
    device = choose_device("auto")
    precision = "bf16 autocast" if has_fast_bf16(device) else "fp32"
    facts = {**read_versions(), "device": device, "precision": precision, "threads": torch.get_num_threads()}
    lines = [f"{name:<14}{'not installed' if value is None else value}" for name, value in facts.items()]
    return facts, "\n".join(lines)


def choose_device(wanted: str) -> str:
    """What "auto", "cpu" or "cuda" is here. InputError if cuda is asked for and absent, or if there are several."""
    count = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cuda" and not count:
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")
    if count > 1:
        raise InputError(f"--device {wanted}: the Trainer would take all {count} devices; set CUDA_VISIBLE_DEVICES=0")
    return "cuda" if count else "cpu"


def has_fast_bf16(device: str) -> bool:
    """Whether bf16 matrix products are fast; on a CPU without the instructions they are ten times slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


def read_versions() -> dict[str, str | None]:
    """Versions of Python, the system and the packages a run depends on; None for what is not installed."""
    found: dict[str, str | None] = {"ivon-lora": __version__, "python": platform.python_version()}
    found |= {"system": platform.system(), "torch": torch.__version__}  # the latter says what it was built for
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
