"""Every option of `sft`: its default and its bounds."""

from __future__ import annotations

from dataclasses import dataclass

from ivon_lora.cli.arguments import at_least, option, positive

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Settings:
    """A run."""

    model: str = option(DEFAULT_MODEL, "folder or hub name of a causal language model", group="input")
    data: str | None = option(None, ".jsonl or .txt (default: signatures and docstrings)", metavar="FILE")
    max_length: int = option(256, "tokens an example is cut at", at_least(8), "N")
    quantize: str = option("none", "nf4: the base model in 4 bits (QLoRA), with bitsandbytes", ("none", "nf4"))

    epochs: float = option(1.0, "passes over the data", positive, "N", "training")
    batch_size: int = option(8, "examples a step", at_least(1), "N")
    lr: float = option(1e-3, "peak learning rate", positive)
    temperature: float | None = option(None, "1 is Bayes' rule, less is less noise (default: by --lr)", positive)
    prior_std: float | None = option(None, "largest noise of a weight (default: found by the data)", positive)
    rank: int = option(12, "initial rank of every linear layer", at_least(1), "R", "pruning")
    target_rank: float = option(4.0, "mean rank at the end", positive, "R")
    max_rank: int | None = option(None, "largest rank at the end (default: twice --target-rank)", at_least(1), "R")

    out: str = option("runs/sft", "folder of the run", metavar="DIR", group="run")
    seed: int = option(0, "of everything random", at_least(0))
    samples: int = option(8, "posterior samples to average", at_least(1), "N")
    eval_limit: int = option(64, "examples of each test set", at_least(1), "N")
    layout: str = option("uniform", "of the adapter; gguf: for llama.cpp", ("uniform", "compact", "gguf"))
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))
    threads: int | None = option(None, "of torch on the CPU (default: torch's choice)", at_least(1), "N")
