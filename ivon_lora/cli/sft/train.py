"""A run from data to report: data, model, TRL's SFTTrainer, our optimizer in it, and what is done with the result."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ivon_lora import PosteriorFile, export_lora, save_posterior, snapshot_posterior, token_nll
from ivon_lora.cli.env import choose_device, has_fast_bf16
from ivon_lora.cli.errors import input_errors
from ivon_lora.cli.finetune.model import quiet
from ivon_lora.cli.finetune.train import EXIT_INTERRUPTED, train
from ivon_lora.cli.plot import draw_pictures, require_matplotlib
from ivon_lora.cli.sft.data import Examples, load_examples
from ivon_lora.cli.sft.model import load_model
from ivon_lora.cli.sft.options import Settings
from ivon_lora.cli.training.folder import check_out, make_out
from ivon_lora.cli.training.report import build_report, print_report, write_report
from ivon_lora.integrations.trainer import attach_trainer


def sft(settings: Settings, overwrite: bool = False) -> int:
    """Run `ivon-lora sft`; returns the exit status: 0, or 130 after Ctrl-C.

    Raises:
        InputError: input that cannot be used. Nothing has been written then.
        TrainingError: the loss is not finite any more.
    """
    out, shared = Path(settings.out), asdict(settings) | {"optimizer": "ivon", "method": "lora"}
    check_out(out, overwrite)
    require_matplotlib()
    device = choose_device(settings.device)
    quiet(settings.threads)
    examples = load_examples(settings.data)
    model, tokenizer = load_model(settings.model, settings.quantize)
    make_out(out, settings, examples.fingerprint())  # type: ignore[arg-type]
    with input_errors(f"--data {settings.data} does not suit --model {settings.model}"):
        trainer = make_trainer(settings, examples, model, tokenizer, device)
        most = settings.max_rank or max(1, min(settings.rank, round(2 * settings.target_rank)))
        noise: dict[str, Any] = {
            "temperature": settings.temperature,
            "prior_std": settings.prior_std,
            "seed": settings.seed,
        }
        optimizer = attach_trainer(trainer, settings.target_rank, pruner_options={"max_rank": most}, **noise)
    print_start(settings, examples, trainer)
    try:
        train(trainer, None)
        if trainer.state.global_step < trainer.state.max_steps:
            raise KeyboardInterrupt
        posterior = snapshot_posterior(optimizer)
        results = evaluate(trainer, posterior, settings.samples)
    except KeyboardInterrupt:
        print(f"interrupted after step {trainer.state.global_step} of {trainer.state.max_steps}", file=sys.stderr)
        return EXIT_INTERRUPTED
    exported = export_lora(trainer.model, optimizer, out / "adapter", settings.layout)
    save_posterior(optimizer, out / "posterior.safetensors")
    report = build_report(settings, examples, trainer, exported, {"results": results})  # type: ignore[arg-type]
    report["settings"] = shared
    draw_pictures(report, posterior, out)
    write_report(report, out)  # its presence means that the run is complete
    print_report(report, out)
    return 0


def make_trainer(settings: Settings, examples: Examples, model: Any, tokenizer: Any, device: str) -> Any:
    """TRL's trainer, with LoRA on all linear layers."""
    splits = {name: rows if name == "train" else rows[: settings.eval_limit] for name, rows in examples.splits.items()}
    disable_progress_bars()
    sets = {name: Dataset.from_list(rows) for name, rows in splits.items()}
    args = SFTConfig(
        output_dir=settings.out,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        max_length=settings.max_length,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        seed=settings.seed,
        use_cpu=device == "cpu",
        bf16=device != "cpu" and has_fast_bf16(device),  # autocast is slower than fp32 on CPUs
        gradient_checkpointing=device != "cpu",  # there memory is scarce
        dataloader_pin_memory=device != "cpu",
        save_strategy="no",
        logging_steps=5,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    return SFTTrainer(
        model,
        args,
        train_dataset=sets.pop("train"),
        eval_dataset=sets,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear"),
    )


def evaluate(trainer: Any, posterior: PosteriorFile, samples: int) -> list[dict[str, Any]]:
    """Scores of the labels of each test set, at the mean of the weights and averaged over samples.

    Returns:
        a row for each set and kind of weights: ``set``, ``weights`` ("mean" or e.g. "8 samples"), ``n`` labels,
        ``accuracy``, ``nll`` and ``entropy`` (nats), ``perplexity``, ``ece`` and ``reliability``, its bins.
    """
    rows = []
    model = trainer.model.eval()
    for name in trainer.eval_dataset:
        for weights, temperature in (("mean", math.inf), (f"{samples} samples", 1.0)):
            scores = token_nll(model, posterior, trainer.get_eval_dataloader(name), samples, temperature)
            bins = scores.reliability()
            row = {"set": name, "weights": weights, "n": len(scores.nll), "accuracy": float(scores.right.mean())}
            row |= {"nll": float(scores.nll.mean()), "perplexity": scores.perplexity, "ece": bins.gap}
            row["entropy"] = float(scores.entropy.mean())
            row["reliability"] = {k: [None if x != x else x for x in column] for k, column in asdict(bins).items()}
            rows.append(row)
    return rows


def print_start(settings: Settings, examples: Examples, trainer: Any) -> None:
    """Print what is going to happen."""
    counts = ", ".join(f"{count} {name}" for name, count in examples.counts().items())
    size = f"LoRA of rank {settings.rank}, {trainer.get_num_trainable_parameters():,} trained numbers"
    base = f"{settings.model}, {settings.quantize}" if settings.quantize != "none" else settings.model
    precision = "bf16 autocast" if trainer.args.bf16 else "fp32"
    print(f"data       {examples.source}: {counts} examples")
    print(f"model      {base}: {size}, ranks pruned to {settings.target_rank:g} on average")
    print(f"training   lr {settings.lr:g}, {settings.epochs:g} epochs in batches of {settings.batch_size}")
    print(f"computing  on {trainer.args.device.type} in {precision}, {torch.get_num_threads()} threads", flush=True)
