"""Batches of token ids: which sentences are in batch number `step` is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivon_lora.finetune.corpus import Row

__all__ = ["Encoded", "TrainingOrder", "encode", "evaluation_batches", "pad"]

POOL_BATCHES = 50  # sentences of so many batches are sorted by length together: little padding, order still random


@dataclass(frozen=True)
class Encoded:
    """Token ids of every sentence (unpadded), their labels, and the id that pads."""

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int) -> Encoded:
        """The first ``count`` sentences."""
        return Encoded(self.ids[:count], self.labels[:count], self.pad_id)


def encode(rows: Sequence[Row], tokenizer: Callable[..., Any], max_length: int) -> Encoded:
    """Tokenize, cutting each sentence at ``max_length`` tokens."""
    ids = tokenizer([row.text for row in rows], truncation=True, max_length=max_length)["input_ids"] if rows else []
    pad_id = getattr(tokenizer, "pad_token_id", None)
    return Encoded(tuple(map(tuple, ids)), tuple(row.label for row in rows), int(pad_id or 0))


def pad(data: Encoded, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, shape (len(indices), longest), and ``labels``, shape (len(indices),)."""
    width = max(len(data.ids[i]) for i in indices)
    ids = torch.full((len(indices), width), data.pad_id, dtype=torch.long)
    mask = torch.zeros((len(indices), width), dtype=torch.long)
    for row, i in enumerate(indices):
        length = len(data.ids[i])
        ids[row, :length] = torch.tensor(data.ids[i], dtype=torch.long)
        mask[row, :length] = 1
    labels = torch.tensor([data.labels[i] for i in indices], dtype=torch.long)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


class TrainingOrder:
    """Length-bucketed random batches; ``batch(step)`` needs no history, so a resumed run sees the same ones."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._batches: list[list[int]] = []

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one pass over the data; the last one may be smaller."""
        return -(-len(self._lengths) // self._batch_size)

    def batch(self, step: int) -> list[int]:
        """Indices of batch number ``step`` (from 0)."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._batches = self._shuffle(epoch)
            self._epoch = epoch
        return self._batches[position]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        pool = self._batch_size * POOL_BATCHES
        batches = []
        for start in range(0, len(order), pool):
            chunk = sorted(order[start : start + pool], key=lambda i: self._lengths[i])
            batches += [chunk[at : at + self._batch_size] for at in range(0, len(chunk), self._batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def evaluation_batches(data: Encoded, batch_size: int) -> list[list[int]]:
    """All indices, in batches of like length."""
    order = sorted(range(len(data)), key=lambda i: len(data.ids[i]))
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
