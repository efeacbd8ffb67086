"""One map of names: from a path in the running model, or a key of a file, to the path in the base model.

A running model is wrapped: by a PeftModel (or two), by DDP, FSDP or a trainer's engine, block by block by torch.compile
or activation checkpointing. None of that is there where an adapter is loaded, so none of it belongs into a file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

#: what PEFT's files put in front of a path in the base model
PREFIX = "base_model.model."
#: children that are the wrapped module itself: torch.compile, activation checkpointing, FSDP, Lightning Fabric
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
TRANSPARENT = (*WRAPPED, "module")
#: classes whose child `module` is the wrapped module
ENGINES = {"DataParallel", "DistributedDataParallel", "DeepSpeedEngine"}
#: all that leads to the base model: PEFT's prefix, or that of a PeftModel around a PeftModel
ONCE, ALL = (re.compile(rf"^(?:.*?\.)??(?:{re.escape(PREFIX)}){times}") for times in ("", "+"))
FACTORS = "lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
FACTOR = re.compile(
    rf"(?P<layer>.+)\.(?P<part>{FACTORS})(?:\.(?P<adapter>(?!weight$|bias$|base_layer\b)[^.]+))?(?P<end>\.weight|\.bias)?"
)
#: what a training state has in the name of a tensor that is no factor: a copy of a module, new values of tokens
COPY = re.compile(r"\.modules_to_save\.([^.]+)(?=\.)|(?<=\.token_adapter\.trainable_tokens_delta)\.([^.]+)$")
#: what it has besides, and nobody loads
UNSAVED = re.compile(
    r".*\.(original_module\..+|modules_to_save\.[^.]+|ranknum(\..+)?|token_adapter\.(token_indices|trainable_tokens_original).*)"
)


class Place(NamedTuple):
    """A module of a running model.

    ``path`` is its path in the base model; ``key`` the one in PEFT's files, which differs inside a layer that PEFT
    wraps (``attn.base_layer.out_proj``). A wrapper and what it wraps have the same ``path``.
    """

    key: str
    path: str
    module: nn.Module


class TensorName(NamedTuple):
    """What the name of a tensor says, in a running model or in a file.

    ``key`` is its path in PEFT's files, of a tensor of a LoRA layer that of the layer; ``part`` says which tensor of
    the layer, and is empty for all others; ``adapter`` is the adapter's name, where the name has it.
    """

    key: str
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
    if hasattr(module, "adapter_state_dict"):  # PEFT's trainable tokens, and copies of modules to save
        return "token_adapter" if "token_adapter" in children else "original_module"
    config = getattr(module, "peft_config", None)
    for name in ("base_model", "model"):  # a PeftModel, and the tuner in it
        if config is not None and name in children and getattr(children[name], "peft_config", None) is config:
            return name
    return None


def innermost(module: nn.Module) -> nn.Module:
    """The module of the base model inside all that PEFT, torch.compile and others have put around it."""
    while (name := wrapped_child(module)) is not None:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without torch.compile, activation checkpointing or an engine around it."""
    while (name := wrapped_child(module)) in TRANSPARENT:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def without_wrappers(name: str) -> str:
    """A path in the running model without what torch.compile, activation checkpointing and FSDP put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def tensor_name(name: str, prefix: re.Pattern[str] = ALL) -> TensorName:
    """Read the name of a parameter, or a key of a file; what follows ``prefix`` is the path in the base model."""
    path = prefix.sub("", without_wrappers(name))
    if copy := COPY.search(path):
        return TensorName(path[: copy.start()] + path[copy.end() :], "", copy[1] or copy[2])
    factor = FACTOR.fullmatch(path)
    if factor is None or (factor["end"] == ".bias" and factor["part"] != "lora_B"):
        return TensorName(path, "", None)
    end = ".bias" if factor["end"] == ".bias" else ""
    return TensorName(factor["layer"].replace(".original_module", ""), factor["part"] + end, factor["adapter"])


def one_adapter(names: Collection[str], prefix: re.Pattern[str] | None = None) -> dict[str, TensorName]:
    """What the names in a file say, those of one adapter alone: of the only one, or of the one called default.
    ValueError if there are several, and none is called so."""
    engine = "module." if all(name.startswith("module.") for name in names) else ""
    if prefix is None:  # a base model may have such a path of its own
        inside = [path for path in map(without_wrappers, names) if PREFIX in path]
        prefix = ALL if all(2 * PREFIX in path for path in inside) else ONCE
    said = {name: tensor_name(name.removeprefix(engine), prefix) for name in names}
    # a bias alone is of a module of the base model that is called lora_B
    layers = {key for key, part, _ in said.values() if part not in ("", "lora_B.bias")}
    factors = {name: one for name, one in said.items() if one.key in layers}
    others = {name: one for name, one in said.items() if one.key not in layers and not UNSAVED.fullmatch(name)}
    adapter = _chosen({one.adapter for one in factors.values()})
    found = {name: one for name, one in factors.items() if one.adapter == adapter}
    trained = adapter or _chosen({one.adapter for one in others.values()} - {None})
    for name, (key, part, owner) in others.items():
        if owner in (None, trained):
            found[name] = TensorName(f"{key}.{part}" if part else key, "", owner)
    return found


def _chosen(adapters: Collection[str | None]) -> str | None:
    if len(adapters) > 1 and "default" not in adapters:
        raise ValueError(
            f"the file holds several adapters, {', '.join(sorted(map(str, adapters)))}, and none is called default: "
            "save each in a directory of its own"
        )
    return "default" if "default" in adapters else next(iter(adapters), None)


def matched(names: Iterable[str], found: Mapping[str, object]) -> dict[str, str]:
    """For every name the one in ``found`` that means the same: the same name, or else the same tensor of the same
    adapter; names in files of PEFT do not say which adapter."""
    same: dict[tuple[str, str], list[tuple[str, str | None]]] = {}
    for name in found:
        key, part, adapter = tensor_name(name)
        same.setdefault((key.removeprefix("module."), part), []).append((name, adapter))
    pairs = {}
    for name in names:
        key, part, adapter = tensor_name(name)
        candidates = same.get((key.removeprefix("module."), part), [])
        fitting = [other for other, owner in candidates if owner == adapter or None in (owner, adapter)]
        if name in found or len(fitting) == 1:
            pairs[name] = name if name in found else fitting[0]
    return pairs
