"""The launches of a step, noted instead of made, to be made later: once, again and again, or inside a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ivon_lora.kernels.tables import Part


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for two launches that do the same with what lies at the same addresses."""
        arguments = [a.data_ptr() if isinstance(a, Tensor) else a for a in self.arguments]
        return self.kernel.__name__, self.grid, *arguments, *sorted(self.constants.items())

    def run(self, device: torch.device) -> None:
        """Launch."""
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](*self.arguments, **self.constants)


@dataclass
class Recording:
    """What a backend was asked to launch while it recorded."""

    launches: list[Launch] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    def use_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Point the recorded launches to other gradients.

        Args:
            gradients: of each parameter, by its index in the optimizer.

        Raises:
            RuntimeError: one is missing, or of another dtype, or not contiguous.
        """
        for part in self.parts:
            if part.kind.grad_dtype is None:
                continue
            mine = [gradients[w.index] for w in part.works]
            for w, grad in zip(part.works, mine, strict=True):
                if grad is None or grad.dtype != part.kind.grad_dtype or not grad.is_contiguous():
                    found = "none" if grad is None else f"one of {grad.dtype}, strides {grad.stride()}"
                    raise RuntimeError(
                        f"parameter {w.index} had a contiguous {part.kind.grad_dtype} gradient when the step was "
                        f"recorded and has {found} now; a recorded step needs the same kind of gradients every time"
                    )
            part.use_gradients(mine)

    def restore_means(self) -> None:
        """Write the mean into the parameters of the recorded step, whose sample somebody else has drawn."""
        for part in self.parts:
            if part.kind.grad_dtype is not None:
                for w in part.works:
                    w.param.detach().copy_(w.mean)
