"""PEFT's AdaLoRA adds an orthogonality penalty to the loss in its forward pass; keep it out of the evaluation loss."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def orthogonality_in_training_only(model: nn.Module) -> list[RemovableHandle]:
    """Let PEFT's AdaLoRA penalty act in training mode alone; in evaluation mode ``outputs.loss`` is the task's loss.

    PEFT adds ``orth_reg_weight`` times the penalty to ``outputs.loss`` in every forward pass, so its validation loss
    cannot be compared with that of any other method.

    Args:
        model: a model with PEFT AdaLoRA layers; any other model is left alone.

    Returns:
        handles of the hooks; ``handle.remove()`` takes them off. ``IVON.attach(model)`` does this by itself.
    """
    handles = []
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        # AdaLoraModel, by what its forward reads; the PeftModel around it has no `trainable_adapter_name`
        if isinstance(configs, dict) and hasattr(module, "trainable_adapter_name"):
            config = configs.get(module.trainable_adapter_name)
            if hasattr(config, "orth_reg_weight"):
                penalty = _Penalty(config)
                handles.append(module.register_forward_pre_hook(penalty.before))
                handles.append(module.register_forward_hook(penalty.after, always_call=True))
    return handles


class _Penalty:
    """Sets the weight of the penalty to zero during forward passes in evaluation mode."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.weights: list[float] = []  # a stack: forward passes can nest

    def before(self, module: nn.Module, args: Any) -> None:
        self.weights.append(self.config.orth_reg_weight)
        if not module.training:
            self.config.orth_reg_weight = 0.0

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.config.orth_reg_weight = self.weights.pop()
