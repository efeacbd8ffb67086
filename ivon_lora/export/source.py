"""The base model and the PEFT configuration behind what the user holds, and its tensors that are not LoRA factors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ivon_lora.export.means import Means


@dataclass(frozen=True, eq=False)
class Source:
    """``root`` is the outermost module with a PEFT configuration, ``base`` the model its layers were put into."""

    root: nn.Module
    base: nn.Module
    config: Any | None

    def config_value(self, name: str, default: Any = None) -> Any:
        """A field of the PEFT configuration, or the default where there is none."""
        return getattr(self.config, name, default)


def find_source(model: nn.Module, adapter_name: str) -> Source:
    """Look through torch.compile, DDP, PeftModel, tuner and user-written wrappers."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and adapter_name in configs:
            return Source(module, _base_model(module), configs[adapter_name])
    return Source(model, model, None)


def _base_model(root: nn.Module) -> nn.Module:
    # a PeftModel holds the model in `.base_model.model`, a tuner in `.model`; an injected model is its own base
    for tuner in (getattr(root, "base_model", None), root):
        inner = getattr(tuner, "model", None)
        if isinstance(inner, nn.Module) and getattr(inner, "peft_config", None) is getattr(tuner, "peft_config", tuner):
            return inner
    return root


def extra_tensors(source: Source, means: Means, adapter_name: str, left_out: Iterable[str]) -> dict[str, Tensor]:
    """Trained tensors that are not LoRA factors, by path in the base: `modules_to_save`, trainable tokens, biases.

    Args:
        left_out: adapted modules that the export drops; their biases are found under their plain name again.
    """
    extras: dict[str, Tensor] = {}
    for path, module in source.base.named_modules():
        if hasattr(module, "adapter_state_dict"):  # PEFT's wrappers around modules that are trained in full
            state = _mean_state(module, means)
            extras.update({f"{path}.{key}": t for key, t in module.adapter_state_dict(adapter_name, state).items()})
    extras.update(_trained_biases(source, means, left_out))
    return extras


def _mean_state(module: nn.Module, means: Means) -> dict[str, Tensor]:
    state = {name: means.mean(p) for name, p in module.named_parameters(remove_duplicate=False)}
    state.update({name: b.detach() for name, b in module.named_buffers(remove_duplicate=False)})
    return state


def _trained_biases(source: Source, means: Means, left_out: Iterable[str]) -> dict[str, Tensor]:
    which = source.config_value("bias", "none")
    plain_names = {f"{name}.base_layer.": f"{name}." for name in left_out}
    biases: dict[str, Tensor] = {}
    if which == "none":
        return biases
    for name, parameter in source.base.named_parameters():
        is_adapted = name.endswith(".base_layer.bias")
        wrapped = ".lora_" in name or "modules_to_save" in name or "original_module" in name
        if wrapped or "bias" not in name.rpartition(".")[2] or not (which == "all" or is_adapted):
            continue
        for old, new in plain_names.items():
            name = name.replace(old, new)
        biases[name] = means.mean(parameter)
    return biases
