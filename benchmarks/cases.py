"""What is measured: sets of adapter tensors as real models have them, computed from the dimensions of the models.

A new case is one more entry in `CASES`; a model with other layers is one more function that lists its linear maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ivon_lora import LoraAdapter


class Linear(NamedTuple):
    """A linear map of the model: what LoRA adapts with A (rank, n_in) and B (n_out, rank)."""

    name: str
    n_in: int
    n_out: int


def bert_linears(hidden: int, intermediate: int, layers: int) -> tuple[Linear, ...]:
    """Every linear map inside the blocks of a BERT encoder: query, key, value, and the three dense ones."""
    square = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    block = [(name, hidden, hidden) for name in square]
    block += [("intermediate.dense", hidden, intermediate), ("output.dense", intermediate, hidden)]
    return _repeat("encoder.layer", block, layers)


def llama_linears(hidden: int, intermediate: int, layers: int, queries: int, keys: int) -> tuple[Linear, ...]:
    """Every linear map inside the blocks of a Llama decoder (PEFT's "all-linear": without the language-model head).

    Args:
        queries: features of all query heads together.
        keys: features of all key heads together, and of all value heads.
    """
    block = [("self_attn.q_proj", hidden, queries), ("self_attn.k_proj", hidden, keys)]
    block += [("self_attn.v_proj", hidden, keys), ("self_attn.o_proj", queries, hidden)]
    block += [("mlp.gate_proj", hidden, intermediate), ("mlp.up_proj", hidden, intermediate)]
    block += [("mlp.down_proj", intermediate, hidden)]
    return _repeat("model.layers", block, layers)


def many_linears(count: int, features: int) -> tuple[Linear, ...]:
    """``count`` equal square maps: what a step costs per tensor rather than per element."""
    return tuple(Linear(f"layers.{i}", features, features) for i in range(count))


def _repeat(prefix: str, block: list[tuple[str, int, int]], layers: int) -> tuple[Linear, ...]:
    return tuple(Linear(f"{prefix}.{i}.{name}", a, b) for i in range(layers) for name, a, b in block)


@dataclass(frozen=True)
class Case:
    """A set of trainable tensors.

    Args:
        name: key in the results; never reuse one for other shapes.
        rounds: how often every peer is timed, unless the caller says otherwise.
        linears: the adapted maps; empty for a flat tensor.
        rank: LoRA rank.
        flat: elements of the one tensor of a case without adapters.
    """

    name: str
    rounds: int
    linears: tuple[Linear, ...] = ()
    rank: int = 0
    flat: int = 0

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all tensors, adapter by adapter in the order A, B."""
        if self.flat:
            return [(self.flat,)]
        return [shape for m in self.linears for shape in ((self.rank, m.n_in), (m.n_out, self.rank))]

    def build(
        self, gates: bool = False, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> tuple[list[Tensor], list[LoraAdapter]]:
        """Fresh tensors with gradients in place, and the adapters they form (none for a flat tensor).

        Args:
            gates: with AdaLoRA's E (rank, 1) in every adapter.
        """
        generator = torch.Generator(device).manual_seed(0)

        def parameter(*shape: int) -> Tensor:
            p, grad = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
            p = p.mul_(0.02).to(dtype).requires_grad_()
            p.grad = grad.mul_(0.01).to(dtype)
            return p

        if self.flat:
            return [parameter(self.flat)], []
        adapters = [
            LoraAdapter(
                m.name,
                parameter(self.rank, m.n_in),
                parameter(m.n_out, self.rank),
                parameter(self.rank, 1) if gates else None,
            )
            for m in self.linears
        ]
        return [tensor for adapter in adapters for _, tensor, _ in adapter.tensors()], adapters


MINILM, LLAMA, FLAT, MANY = "minilm-lora-r8", "llama-3.2-3b-lora-r16", "one-tensor-5m", "4000-tensors-5m"

CASES = (
    Case(MINILM, 20, bert_linears(hidden=384, intermediate=1536, layers=6), rank=8),
    Case(LLAMA, 5, llama_linears(hidden=3072, intermediate=8192, layers=28, queries=3072, keys=1024), rank=16),
    Case(FLAT, 10, flat=5_000_000),
    Case(MANY, 5, many_linears(2000, features=625), rank=2),  # as many elements, to be compared with it
)

#: the same, so small that a run takes seconds; the numbers mean nothing
QUICK_CASES = (
    Case(MINILM, 2, bert_linears(hidden=24, intermediate=96, layers=2), rank=8),
    Case(LLAMA, 2, llama_linears(hidden=48, intermediate=128, layers=2, queries=48, keys=16), rank=16),
    Case(FLAT, 2, flat=20_000),
    Case(MANY, 2, many_linears(50, features=100), rank=2),
)
