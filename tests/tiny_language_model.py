"""A language model of a few thousand weights with LoRA, its tokenizer, and texts: people count from a number."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WORDS = ["<pad>", "<eos>", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PAD, EOS = 0, 1


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def make_base(head: str = "LlamaForCausalLM", seed: int = 0, **overrides: Any) -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": len(WORDS), "initializer_range": 0.3}
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**sizes, "pad_token_id": PAD, "eos_token_id": EOS, **overrides})
    model: nn.Module = getattr(transformers, head)(config)
    return model


def lora_config(**overrides: Any) -> Any:
    from peft import LoraConfig

    modules = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": modules, "task_type": "CAUSAL_LM", **overrides})


def make_model(seed: int = 0) -> nn.Module:
    """With an adapter whose B is not zero."""
    from peft import get_peft_model

    torch.manual_seed(seed + 1)
    return get_peft_model(make_base(seed=seed), lora_config(init_lora_weights=False))


def counting(start: int, length: int) -> str:
    return " ".join(WORDS[2 + (start + i) % 10] for i in range(length))


def texts(n: int) -> list[str]:
    """Of 3 to 7 words."""
    return [counting(i, 3 + i % 5) for i in range(n)]


def lengths(n: int) -> list[int]:
    """Labels of each of `texts`, an end of sequence included: all tokens but the first."""
    return [3 + i % 5 for i in range(n)]
