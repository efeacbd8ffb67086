"""A run from data to report: data, model, PEFT, the Trainer, our optimizer in it, and what is done with the result."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from ivon_lora import export_lora, save_posterior, snapshot_posterior
from ivon_lora.cli.arguments import as_steps
from ivon_lora.cli.env import choose_device, has_fast_bf16
from ivon_lora.cli.errors import InputError, one_line
from ivon_lora.cli.finetune.callbacks import AllocateRanks, Progress, SearchLayers
from ivon_lora.cli.finetune.data import Texts, in_order, load_texts, tokenized
from ivon_lora.cli.finetune.evaluate import evaluate, softmax_temperature
from ivon_lora.cli.finetune.folder import check_out, last_checkpoint, make_out, read_settings
from ivon_lora.cli.finetune.methods import GELORA_TEXTS, add_adapter, make_config, make_optimizer, make_variant
from ivon_lora.cli.finetune.model import load_base, load_tokenizer, quiet
from ivon_lora.cli.finetune.options import Settings, make_settings
from ivon_lora.cli.finetune.report import build_report, print_report, write_report
from ivon_lora.cli.plot import draw_pictures, require_matplotlib
from ivon_lora.integrations.trainer import watch
from ivon_lora.optim.wrappers import unwrap
from ivon_lora.variants import Diffora

EXIT_INTERRUPTED = 130


def finetune(chosen: dict[str, Any], resume: bool = False, overwrite: bool = False) -> int:
    """Run `ivon-lora finetune` with the chosen settings; returns the exit status: 0, or 130 after Ctrl-C.

    Raises:
        InputError: input that cannot be used. Nothing has been written then.
        TrainingError: the loss is not finite any more.
    """
    out = Path(chosen.get("out", Settings.out))
    settings, fingerprint = read_settings(out, chosen) if resume else (make_settings(chosen), None)
    if not resume:
        check_out(out, overwrite)
    require_matplotlib()
    device = choose_device(settings.device)
    quiet(settings.threads)
    texts = load_texts(settings.data, settings.text, settings.label)
    if fingerprint not in (None, texts.fingerprint()):
        raise InputError("--resume: the data is not what the run was started with; restore it, or use --overwrite")
    base = load_base(settings.model, len(texts.labels), settings.seed)
    tokenizer = load_tokenizer(settings.model, base)
    data = {name: tokenized(table, tokenizer, settings.max_length) for name, table in texts.splits.items()}
    collate = DataCollatorWithPadding(tokenizer)
    config = make_config(base, settings, DataLoader(data["train"][:GELORA_TEXTS], 32, collate_fn=collate))  # type: ignore[arg-type]
    model = add_adapter(base, config, settings.seed).to(device)
    variant = make_variant(model, settings)
    args = training_arguments(settings, device)
    optimizer = make_optimizer(model, args, settings, len(data["train"]), variant)
    checkpoint = last_checkpoint(out, settings.steps) if resume else None
    if not resume:
        make_out(out, settings, texts.fingerprint())

    order = settings.batch_size, settings.steps, settings.seed
    texts_in_order: Any = in_order(data["train"], *order)
    trainer = Trainer(model, args, collate, texts_in_order, optimizers=(optimizer, None))
    if settings.optimizer == "ivon":
        watch(trainer)
    elif settings.method == "adalora":
        trainer.add_callback(AllocateRanks())
    if isinstance(variant, Diffora) and variant.gates is not None:
        trainer.add_callback(SearchLayers(trainer, variant, in_order(data["validation"], *order)))
    print_start(settings, texts, trainer)
    try:
        train(trainer, checkpoint)
        ivon = unwrap(optimizer)  # None for AdamW
        posterior = None if ivon is None else snapshot_posterior(ivon) if variant is None else variant.posterior()
        tests = {name: examples for name, examples in data.items() if name in ("test", "shifted")}
        temperature = softmax_temperature(trainer, data["validation"])
        kept = out / "predictions.safetensors"
        results = evaluate(trainer, tests, posterior, settings.samples, settings.eval_limit, temperature, kept)
    except KeyboardInterrupt:
        again = f"go on from the last checkpoint with `ivon-lora finetune --resume --out {shlex.quote(str(out))}`"
        advice = again if settings.resumable else "PEFT's AdaLoRA cannot be resumed"
        print(f"interrupted after step {trainer.state.global_step} of {settings.steps}: {advice}", file=sys.stderr)
        return EXIT_INTERRUPTED

    if posterior is not None:
        save_posterior(posterior, out / "posterior.safetensors", softmax_temperature=temperature or 1.0)
    if variant is not None:
        variant.detach()
    exported = export_lora(model, ivon, out / "adapter")
    found = {
        "results": results,
        "softmax_temperature": temperature,
        "events": [] if variant is None else variant.history,
    }
    report = build_report(settings, texts, trainer, exported, found)
    draw_pictures(report, posterior, out)
    write_report(report, out)  # its presence means that the run is complete
    print_report(report, out)
    return 0


def training_arguments(settings: Settings, device: str) -> TrainingArguments:
    """The settings in the Trainer's words."""
    return TrainingArguments(
        output_dir=settings.out,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64,
        train_sampling_strategy="sequential",
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=as_steps(settings.lr_warmup, settings.steps),
        weight_decay=0.0 if settings.optimizer == "ivon" else settings.weight_decay or 0.0,
        max_grad_norm=0.0,
        optim="adamw_torch",
        seed=settings.seed,
        use_cpu=device == "cpu",
        bf16=settings.precision == "bf16" or (settings.precision == "auto" and has_fast_bf16(device)),
        dataloader_pin_memory=device != "cpu",
        save_strategy="steps" if settings.resumable else "no",
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


def train(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train to the end.

    Raises:
        InputError: the checkpoint cannot be loaded.
        TrainingError: the loss is not finite any more.
    """
    progress = Progress()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Exception as error:
        if checkpoint is None or progress.has_begun:
            raise
        advice = "remove it to go on from an earlier one, or start again with --overwrite"
        raise InputError(f"--resume: {checkpoint} cannot be loaded ({one_line(error, 120)}); {advice}") from error


def print_start(settings: Settings, texts: Texts, trainer: Trainer) -> None:
    """Print what is going to happen."""
    counts = ", ".join(f"{count} {name}" for name, count in texts.counts().items())
    rank = "ranks by GeLoRA" if settings.method == "gelora" else f"rank {settings.rank}"
    pruning = f", ranks pruned to {settings.target_rank} on average" if settings.prunes else ""
    precision, trained = "bf16 autocast" if trainer.args.bf16 else "fp32", trainer.get_num_trainable_parameters()
    print(f"data       {texts.source}: {counts} texts")
    print(f"model      {settings.model}: LoRA of {rank}, {trained:,} trained numbers")
    print(f"method     {', '.join((settings.method, *settings.option))}{pruning}")
    print(f"optimizer  {settings.optimizer}, lr {settings.lr:g}, {settings.steps} steps of {settings.batch_size} texts")
    print(f"computing  on {trainer.args.device.type} in {precision}, {torch.get_num_threads()} threads", flush=True)
