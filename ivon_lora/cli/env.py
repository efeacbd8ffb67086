"""The verb `env`: versions, and what the machine can do."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ivon_lora import __version__
from ivon_lora.cli.arguments import add_json, add_verb, print_json
from ivon_lora.cli.errors import InputError

__all__ = ["choose_device", "has_fast_bf16", "read_versions", "register_env"]

PACKAGES = ("torch", "numpy", "peft", "transformers", "tokenizers", "safetensors", "matplotlib", "triton")


def register_env(verbs: Any) -> None:
    """Add the verb `env`."""
    parser = add_verb(
        verbs,
        "env",
        _run,
        summary="show versions and what this machine can do",
        description="Versions of the libraries, and device, precision and threads that the other verbs would choose "
        "here. For bug reports.",
        examples="ivon-lora env --json",
    )
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    device = choose_device("auto")
    facts: dict[str, Any] = dict(read_versions())
    facts |= {"device": device, "precision": "bf16 autocast" if has_fast_bf16(device) else "fp32"}
    facts["threads"] = torch.get_num_threads()
    if arguments.json:
        print_json(facts)
        return 0
    for name, value in facts.items():
        print(f"{name:<14}{'not installed' if value is None else value}")
    return 0


def choose_device(wanted: str) -> str:
    """ "cuda" or "cpu", for "auto" as well.

    Raises:
        InputError: cuda is asked for and absent, or there are several, of which the Trainer would use all.
    """
    count = 0 if wanted == "cpu" else torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not count:
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")
    if count > 1:
        raise InputError(
            f"--device {wanted}: the Trainer would split batches over {count} devices; set CUDA_VISIBLE_DEVICES=0"
        )
    return "cuda" if count else "cpu"


def has_fast_bf16(device: str) -> bool:
    """Whether bf16 matrix products are fast; on a CPU without the instructions they are ten times slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


def read_versions() -> dict[str, str | None]:
    """Versions of Python, the system and the packages a run depends on; None for what is not installed."""
    found: dict[str, str | None] = {
        "ivon-lora": __version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # says what it was built for, which the package's metadata may leave out
    return found
