"""Every option of `sft`: its default and its bounds."""

from __future__ import annotations

from dataclasses import dataclass

from ivon_lora.cli.arguments import RunSettings, at_least, positive, setting

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Settings(RunSettings):
    """A run."""

    model: str = setting(DEFAULT_MODEL, "folder or hub name of a causal language model", group="input")
    data: str | None = setting(None, ".jsonl or .txt (default: signatures and docstrings)", metavar="FILE")
    validation: str | None = setting(None, "for the softmax temperature (default: a tenth of --data)", metavar="FILE")
    max_length: int = setting(256, "tokens an example is cut at", at_least(8), "N")
    quantize: str = setting("none", "nf4: the base model in 4 bits (QLoRA), with bitsandbytes", ("none", "nf4"))

    epochs: float = setting(1.0, "passes over the data", positive, "N", "training")
    batch_size: int = setting(8, "examples a step", at_least(1), "N")
    lr: float = setting(1e-3, "peak learning rate", positive)
    temperature: float | None = setting(None, "1 is Bayes' rule, less is less noise (default: 0.006)", positive)
    prior_std: float | None = setting(None, "largest noise of a weight (default: by the width)", positive)
    rank: int = setting(12, "initial rank of every linear layer", at_least(1), "R", "pruning")
    target_rank: float = setting(4.0, "mean rank at the end", positive, "R")
    max_rank: int | None = setting(None, "largest rank at the end (default: twice --target-rank)", at_least(1), "R")

    out: str = setting("runs/sft", "folder of the run", metavar="DIR", group="run")
    eval_limit: int = setting(64, "examples of each test set", at_least(1), "N")
    layout: str = setting("uniform", "of the adapter; gguf: for llama.cpp", ("uniform", "compact", "gguf"))
