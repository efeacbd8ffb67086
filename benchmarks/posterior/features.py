"""What the frozen lower layers of the encoder make of the sentences: computed once, so that a run costs a third."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ivon_lora.finetune.batches import Encoded, TrainingOrder, encode, evaluation_batches, pad
from ivon_lora.finetune.model import MeanPoolClassifier, load_base, load_tokenizer
from ivon_lora.finetune.reviews import cache_folder, load_reviews
from ivon_lora.finetune.settings import DEFAULT_MODEL

MAX_LENGTH = 32
UPPER_LAYERS = 2  # they get the adapters
SPLITS = ("train", "validation", "test", "shifted")


@dataclass(frozen=True)
class Split:
    """Sentences as hidden states that enter the upper layers: a (tokens, hidden) fp16 tensor each, and labels."""

    hidden: tuple[Tensor, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.hidden)

    def first(self, count: int) -> Split:
        """The first ``count`` sentences."""
        return Split(self.hidden[:count], self.labels[:count])

    def order(self, batch_size: int, seed: int) -> TrainingOrder:
        """Random batches of sentences of like length."""
        return TrainingOrder([len(h) for h in self.hidden], batch_size, seed)

    def batches(self, batch_size: int) -> list[list[int]]:
        """All sentences, in batches of like length."""
        lengths = Encoded(tuple(tuple(range(len(h))) for h in self.hidden), self.labels, 0)
        return evaluation_batches(lengths, batch_size)

    def pad(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids``, here hidden states (batch, tokens, hidden), and ``attention_mask`` (batch, tokens)."""
        mask = torch.zeros(len(indices), max(len(self.hidden[i]) for i in indices), dtype=torch.long)
        for row, i in enumerate(indices):
            mask[row, : len(self.hidden[i])] = 1
        hidden = nn.utils.rnn.pad_sequence([self.hidden[i].float() for i in indices], batch_first=True)
        return {"input_ids": hidden, "attention_mask": mask}

    def targets(self, indices: Sequence[int]) -> Tensor:
        """Labels (batch,)."""
        return torch.tensor([self.labels[i] for i in indices])


class UpperLayers(nn.Module):
    """The last layers of a BERT or MPNet encoder, from the hidden states that enter them."""

    def __init__(self, encoder: Any, count: int) -> None:
        super().__init__()
        self.config = encoder.config
        self.layer = nn.ModuleList(list(encoder.encoder.layer)[-count:])
        #: MPNet's attention adds a term that depends on the distance of tokens; of BERT, nothing
        self.position_bias = getattr(encoder.encoder, "compute_position_bias", None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Hidden states (batch, tokens, hidden) to ``last_hidden_state`` of the same shape."""
        hidden = input_ids
        bias = (1 - attention_mask[:, None, None, :].to(hidden)) * torch.finfo(hidden.dtype).min
        more = () if self.position_bias is None else (self.position_bias(hidden),)
        for layer in self.layer:
            found = layer(hidden, bias, *more)
            hidden = found[0] if more else found
        return SimpleNamespace(last_hidden_state=hidden)


def load_classifier(model: str, seed: int) -> Any:
    """The encoder with mean pooling and a new linear head.

    Args:
        model: the default of `ivon-lora finetune`, or a folder or a name on the hub, of a BERT or MPNet encoder.
        seed: of the head.
    """
    if model == DEFAULT_MODEL:
        return load_base(seed=seed)
    transformers.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = transformers.AutoModel.from_pretrained(model, add_pooling_layer=False, dtype=torch.float32)
        return MeanPoolClassifier(encoder, 2)


def load_upper(seed: int, model: str = DEFAULT_MODEL) -> Any:
    """The classifier on the upper layers alone, with a new head."""
    base: Any = load_classifier(model, seed)
    base.encoder = UpperLayers(base.encoder, UPPER_LAYERS)
    return base


def load_splits(counts: dict[str, int], model: str = DEFAULT_MODEL) -> dict[str, Split]:
    """Hidden states of the first ``counts[split]`` sentences of every split, from the cache or computed (minutes)."""
    of_model = "" if model == DEFAULT_MODEL else f"-{Path(model).name}"
    path = cache_folder() / f"posterior-upper{UPPER_LAYERS}-tokens{MAX_LENGTH}{of_model}.pt"
    cached = torch.load(path, weights_only=True) if path.exists() else {}
    if any(len(cached.get(name, {}).get("labels", ())) < count for name, count in counts.items()):
        cached = {name: _compute(name, count, model) for name, count in counts.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(cached, path)
    return {
        name: Split(tuple(cached[name]["hidden"]), tuple(cached[name]["labels"])).first(count)
        for name, count in counts.items()
    }


@torch.no_grad()
def _compute(name: str, count: int, model: str) -> dict[str, Any]:
    corpus = load_reviews()
    rows = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test, "shifted": corpus.shifted}
    data = encode((rows[name] or ())[:count], load_tokenizer(model), MAX_LENGTH)
    base: Any = load_classifier(model, 0)
    base.eval()
    found: list[Tensor] = [torch.empty(0)] * len(data)
    for indices in evaluation_batches(data, 64):
        batch = pad(data, indices, torch.device("cpu"))
        states = base.encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states[-1 - UPPER_LAYERS]
        for row, i in enumerate(indices):
            found[i] = states[row, : len(data.ids[i])].half()
    return {"hidden": found, "labels": list(data.labels)}
