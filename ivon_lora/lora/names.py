"""One map of names: from a path in the running model, or a key of a file, to the path in the base model.

A running model is wrapped: by a PeftModel (or two), by DDP, FSDP or a trainer's engine, block by block by torch.compile
or activation checkpointing. None of that is there where an adapter is loaded, so none of it belongs into a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

#: what PEFT's files put in front of a path in the base model
PREFIX = "base_model.model."
#: children that are the wrapped module itself: torch.compile, activation checkpointing, FSDP, Lightning Fabric
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
TRANSPARENT = (*WRAPPED, "module")
#: classes whose child `module` is the wrapped module
ENGINES = {"DataParallel", "DistributedDataParallel", "DeepSpeedEngine"}
INSIDE = re.compile(rf"^(?:.*\.)?{re.escape(PREFIX)}")
FACTORS = "lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
KEY = re.compile(
    rf"(?P<layer>.+)\.(?P<part>{FACTORS})(?:\.(?P<adapter>(?!weight$|bias$|base_layer\b)[^.]+))?(?P<end>\.weight|\.bias)?"
)


class Place(NamedTuple):
    """A module of a running model.

    ``path`` is its path in the base model; ``key`` the one in PEFT's files, which differs inside a layer that PEFT
    wraps (``attn.base_layer.out_proj``). A wrapper and what it wraps have the same ``path``.
    """

    key: str
    path: str
    module: nn.Module


class Factor(NamedTuple):
    """A tensor of a LoRA layer by its name: the layer's key, which tensor, and the adapter if the name has one."""

    layer: str
    part: str
    adapter: str | None


def walk(model: nn.Module) -> Iterator[Place]:
    """All modules of the base model and what PEFT wrapped around them, from the outside in; no tensors of adapters."""
    return _walk("", "", model, set())


def _walk(key: str, path: str, module: nn.Module, seen: set[int]) -> Iterator[Place]:
    if id(module) in seen:
        return
    seen.add(id(module))
    wrapped = wrapped_child(module)
    if wrapped not in TRANSPARENT:
        yield Place(key, path, module)
    if wrapped is not None:
        below = f"{key}.{wrapped}" if wrapped in ("base_layer", "token_adapter") else key
        yield from _walk(below, path, module._modules[wrapped], seen)  # type: ignore[arg-type]
        return
    for name, child in module.named_children():
        yield from _walk(f"{key}.{name}".lstrip("."), f"{path}.{name}".lstrip("."), child, seen)


def wrapped_child(module: nn.Module) -> str | None:
    """The name of the child that ``module`` wraps and stands for, if there is one."""
    children = module._modules
    for name in WRAPPED:
        if name in children:
            return name
    if "base_layer" in children and hasattr(module, "get_base_layer"):  # a layer of PEFT
        return "base_layer"
    if any(base.__name__ in ENGINES for base in type(module).__mro__) and "module" in children:
        return "module"
    if "modules_to_save" in children and "original_module" in children:
        return "original_module"
    if "token_adapter" in children:  # PEFT's trainable tokens
        return "token_adapter"
    config = getattr(module, "peft_config", None)
    for name in ("base_model", "model"):  # a PeftModel, and the tuner in it
        if config is not None and name in children and getattr(children[name], "peft_config", None) is config:
            return name
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without torch.compile, activation checkpointing or an engine around it."""
    while (name := wrapped_child(module)) in TRANSPARENT:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def without_wrappers(name: str) -> str:
    """A path in the running model without what torch.compile, activation checkpointing and FSDP put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def base_path(name: str) -> str:
    """The path in the base model of a module, parameter or key, from its name alone: what follows PEFT's prefix."""
    return INSIDE.sub("", without_wrappers(name))


def factor(name: str) -> Factor | None:
    """Which tensor of which LoRA layer a name means; None for every other tensor."""
    match = KEY.fullmatch(base_path(name))
    if match is None or (match["end"] == ".bias" and match["part"] != "lora_B"):
        return None
    return Factor(match["layer"], match["part"] + (".bias" if match["end"] == ".bias" else ""), match["adapter"])


def matched(names: Iterable[str], found: Mapping[str, object]) -> dict[str, str]:
    """For every name the one in ``found`` that means the same: the same name, or the same path in the base model."""
    by_path: dict[str, list[str]] = {}
    for name in found:
        by_path.setdefault(base_path(name).removeprefix("module."), []).append(name)
    pairs = {}
    for name in names:
        same = [name] if name in found else by_path.get(base_path(name).removeprefix("module."), [])
        if len(same) == 1:
            pairs[name] = same[0]
    return pairs
