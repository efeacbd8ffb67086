"""A run from data to report: data, model, TRL's SFTTrainer, our optimizer in it, and what is done with the result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import ivon_lora.cli.training as training
from ivon_lora import PosteriorFile, fit_token_temperature, snapshot_posterior, token_nll
from ivon_lora.cli.dataset import Examples
from ivon_lora.cli.env import has_fast_bf16
from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.cli.report import plain_bins
from ivon_lora.cli.sft.data import load_examples
from ivon_lora.cli.sft.model import load_model
from ivon_lora.cli.sft.options import Settings
from ivon_lora.integrations.trainer import attach_trainer
from ivon_lora.optim.example_counter import labels_in, shifts_labels
from ivon_lora.posterior.softmax_temperature import FEW


def sft(settings: Settings, overwrite: bool = False) -> tuple[dict[str, Any], str]:
    """Run `ivon-lora sft`; returns the report, and its tables."""
    target, out = settings.target_rank, Path(settings.out)
    for option, bound in (("--rank", settings.rank), ("--max-rank", settings.max_rank or settings.rank)):
        if target > bound:
            raise InputError(f"--target-rank {target:g} is above {option} {bound}: lower it or raise {option}")
    training.check_out(out, overwrite)
    device = training.prepare(settings)
    disable_progress_bars()
    examples = load_examples(settings.data, settings.validation)
    model, tokenizer = load_model(settings.model, settings.quantize)
    with input_errors(f"--data {settings.data} does not suit --model {settings.model}"):
        trainer = make_trainer(settings, examples, model, tokenizer, device)
        if not len(trainer.train_dataset) or not len(trainer.eval_dataset["test"]):  # TRL leaves out what has no label
            length = f"--max-length {settings.max_length}"
            raise InputError(f"{examples.source}: no completion begins within {length}, to train or to test: raise it")
        most = settings.max_rank or max(1, min(settings.rank, round(2 * target)))
        options: dict[str, Any] = {name: getattr(settings, name) for name in ("temperature", "prior_std", "seed")}
        options |= {"pruner_options": {"max_rank": most}, "prefix": training.PREFIX}
        optimizer = attach_trainer(trainer, target, **options)
    training.make_out(out, settings, examples)
    base = settings.model if settings.quantize == "none" else f"{settings.model}, {settings.quantize}"
    training.print_start(
        examples,
        trainer,
        model=f"{base}: LoRA of rank {settings.rank}, ranks pruned to {target:g} on average",
        training=f"lr {settings.lr:g}, {settings.epochs:g} epochs in batches of {settings.batch_size}",
    )
    with training.interruptible(trainer, "an unfinished run of sft starts again"):
        training.train(trainer)
        posterior = snapshot_posterior(optimizer)
        results, temperature = evaluate(trainer, posterior, settings.samples)
    found = {"results": results, "softmax_temperature": temperature}
    return training.finish(settings, examples, trainer, posterior, found, settings.layout)


def make_trainer(settings: Settings, examples: Examples, model: Any, tokenizer: Any, device: str) -> Any:
    """TRL's trainer, with LoRA on all linear layers."""
    limits = {name: None if name == "train" else settings.eval_limit for name in examples.splits}
    sets = {n: Dataset.from_list(table[: limits[n]].to_dict("records")) for n, table in examples.splits.items()}
    args = SFTConfig(
        **training.trainer_arguments(settings, device),
        num_train_epochs=settings.epochs,
        per_device_eval_batch_size=settings.batch_size,
        max_length=settings.max_length,
        warmup_steps=0.06,
        bf16=device != "cpu" and has_fast_bf16(device),  # autocast is slower than fp32 on CPUs
        gradient_checkpointing=device != "cpu",  # there memory is scarce
        save_strategy="no",
        logging_steps=5,
    )
    return SFTTrainer(
        model,
        args,
        train_dataset=sets.pop("train"),
        eval_dataset=sets,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear"),
    )


def evaluate(trainer: Any, posterior: PosteriorFile, samples: int) -> tuple[list[dict[str, Any]], float | None]:
    """A row for each test set and kind of weights, whose n counts labels, and the softmax temperature of the mean.

    The mean, the mean with the temperature that the validation labels choose, if they are enough ("mean + TS"), and the
    average over samples.
    """
    rows: list[dict[str, Any]] = []
    kinds, temperature = [("mean", math.inf, 1.0)], None
    model, loader = trainer.model.eval(), trainer.get_eval_dataloader
    if "validation" in trainer.eval_dataset:
        labels = sum(labels_in(batch, shifts_labels(model)) or 0 for batch in loader("validation"))
        if labels >= FEW:
            temperature = fit_token_temperature(model, posterior, loader("validation"))
            kinds.append(("mean + TS", math.inf, temperature))
    kinds.append((f"{samples} samples", 1.0, 1.0))
    for name in [name for name in trainer.eval_dataset if name != "validation"]:
        for weights, *temperatures in kinds:
            scores = token_nll(model, posterior, loader(name), samples, *temperatures)
            bins = scores.reliability()
            row = {"set": name, "weights": weights, "n": len(scores.nll), "accuracy": float(scores.right.mean())}
            row |= {"nll": float(scores.nll.mean()), "perplexity": scores.perplexity, "ece": bins.gap}
            rows.append({**row, "entropy": float(scores.entropy.mean()), "reliability": plain_bins(bins)})
    return rows, temperature
