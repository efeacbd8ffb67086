"""What is measured: sets of adapter tensors as real models have them, computed from the dimensions of the models.

A new case is one more entry in `CASES`; a model with other layers is one more function that lists its linear maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ivon_lora import LoraAdapter


@dataclass(frozen=True)
class Linear:
    """A linear map of the model: what LoRA adapts with A (rank, n_in) and B (n_out, rank)."""

    name: str
    n_in: int
    n_out: int


def bert_linears(hidden: int, intermediate: int, layers: int) -> tuple[Linear, ...]:
    """Every linear map inside the blocks of a BERT encoder: query, key, value, and the three dense ones."""
    square = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    block = [Linear(name, hidden, hidden) for name in square]
    block += [Linear("intermediate.dense", hidden, intermediate), Linear("output.dense", intermediate, hidden)]
    return _repeat("encoder.layer", block, layers)


def llama_linears(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[Linear, ...]:
    """Every linear map inside the blocks of a Llama decoder (PEFT's "all-linear": without the language-model head)."""
    block = [
        Linear("self_attn.q_proj", hidden, heads * head_dim),
        Linear("self_attn.k_proj", hidden, kv_heads * head_dim),
        Linear("self_attn.v_proj", hidden, kv_heads * head_dim),
        Linear("self_attn.o_proj", heads * head_dim, hidden),
        Linear("mlp.gate_proj", hidden, intermediate),
        Linear("mlp.up_proj", hidden, intermediate),
        Linear("mlp.down_proj", intermediate, hidden),
    ]
    return _repeat("model.layers", block, layers)


def many_linears(count: int, features: int) -> tuple[Linear, ...]:
    """``count`` equal square maps: what a step costs per tensor rather than per element."""
    return tuple(Linear(f"layers.{i}", features, features) for i in range(count))


def _repeat(prefix: str, block: list[Linear], layers: int) -> tuple[Linear, ...]:
    return tuple(Linear(f"{prefix}.{i}.{m.name}", m.n_in, m.n_out) for i in range(layers) for m in block)


@dataclass(frozen=True)
class Case:
    """A set of trainable tensors.

    Args:
        name: key in the results; never reuse one for other shapes.
        rounds: how often every peer is timed, unless the caller says otherwise.
        linears: the adapted maps; empty for a flat tensor.
        rank: LoRA rank.
        triplets: with AdaLoRA's E (rank, 1) beside A and B.
        flat: elements of the one tensor of a case without adapters.
    """

    name: str
    rounds: int
    linears: tuple[Linear, ...] = ()
    rank: int = 0
    triplets: bool = False
    flat: int = 0

    @property
    def target_rank(self) -> int:
        """Mean rank per adapter to which the pruning peers go: a third."""
        return max(1, self.rank // 3)

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all tensors, adapter by adapter in the order A, B, E."""
        if self.flat:
            return [(self.flat,)]
        shapes: list[tuple[int, ...]] = []
        for m in self.linears:
            shapes += [(self.rank, m.n_in), (m.n_out, self.rank)]
            if self.triplets:
                shapes.append((self.rank, 1))
        return shapes


@dataclass(frozen=True)
class Trainable:
    """The tensors of a case, with gradients in place, and the adapters they form (none for a flat tensor)."""

    tensors: list[Tensor]
    adapters: list[LoraAdapter]


def build(case: Case, triplets: bool | None = None, seed: int = 0) -> Trainable:
    """Fresh fp32 tensors for one peer.

    Args:
        triplets: overrides ``case.triplets``; PEFT's AdaLoRA always has an E.
    """
    generator = torch.Generator().manual_seed(seed)

    def parameter(*shape: int) -> Tensor:
        p = torch.randn(shape, generator=generator).mul_(0.02).requires_grad_()
        p.grad = torch.randn(shape, generator=generator).mul_(0.01)
        return p

    if case.flat:
        return Trainable([parameter(case.flat)], [])
    with_e = case.triplets if triplets is None else triplets
    adapters = [
        LoraAdapter(
            m.name,
            parameter(case.rank, m.n_in),
            parameter(m.n_out, case.rank),
            parameter(case.rank, 1) if with_e else None,
        )
        for m in case.linears
    ]
    return Trainable([tensor for adapter in adapters for _, tensor, _ in adapter.tensors()], adapters)


_MINILM = bert_linears(hidden=384, intermediate=1536, layers=6)  # all-MiniLM-L6-v2
_LLAMA_3B = llama_linears(hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8, head_dim=128)  # Llama-3.2-3B

CASES = (
    Case("minilm-lora-r8", 30, _MINILM, rank=8),
    Case("minilm-adalora-r12", 30, _MINILM, rank=12, triplets=True),
    Case("llama-3.2-3b-lora-r16", 5, _LLAMA_3B, rank=16),
    Case("one-tensor-5m", 15, flat=5_000_000),
    Case("one-tensor-50m", 3, flat=50_000_000),
    Case("4000-tensors-5m", 7, many_linears(2000, features=625), rank=2),  # as many elements, to be compared with it
)

QUICK_CASES = (
    Case("quick-minilm-lora-r8", 5, bert_linears(hidden=24, intermediate=96, layers=2), rank=8),
    Case("quick-minilm-adalora-r12", 5, bert_linears(hidden=24, intermediate=96, layers=2), rank=12, triplets=True),
    Case(
        "quick-llama-lora-r16",
        5,
        llama_linears(hidden=48, intermediate=128, layers=2, heads=3, kv_heads=1, head_dim=16),
        rank=16,
    ),
    Case("quick-one-tensor", 5, flat=20_000),
    Case("quick-many-tensors", 5, many_linears(50, features=100), rank=2),
)
