"""A run from data to report: data, model, PEFT, the Trainer, our optimizer in it, and what is done with the result."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainerState, TrainingArguments

import ivon_lora.cli.training as training
from ivon_lora import snapshot_posterior
from ivon_lora.cli.arguments import as_steps
from ivon_lora.cli.env import has_fast_bf16
from ivon_lora.cli.errors import InputError
from ivon_lora.cli.finetune.data import in_order, load_texts, tokenized
from ivon_lora.cli.finetune.evaluate import evaluate, mixture
from ivon_lora.cli.finetune.methods import GELORA_TEXTS, adapt, make_optimizer
from ivon_lora.cli.finetune.model import load_base, load_tokenizer
from ivon_lora.cli.finetune.options import Settings, make_settings, read_settings
from ivon_lora.cli.report import result_table
from ivon_lora.cli.training import COLUMNS, PREFIX, write_report
from ivon_lora.integrations.trainer import watch
from ivon_lora.optim.wrappers import unwrap
from ivon_lora.variants import Diffora


def finetune_runs(
    chosen: dict[str, Any], count: int, resume: bool = False, overwrite: bool = False
) -> tuple[dict[str, Any], str]:
    """`finetune`; or into ``seed0``, ``seed1``, ... of the folder, and the mean of all probabilities beside the first.

    ``resume`` goes on with the run that was interrupted, and wants the same options again.
    """
    if count == 1:
        return finetune(chosen, resume, overwrite)
    out, seed = Path(chosen.get("out", Settings.out)), chosen.get("seed", Settings.seed)
    folders = [out / f"seed{seed + k}" for k in range(count)]
    for k, folder in enumerate(folders):
        if resume and (folder / "report.json").exists():
            continue
        again = resume and (folder / "settings.json").exists()
        given = {"out": str(folder)} if again else {**chosen, "seed": seed + k, "out": str(folder)}
        print(finetune(given, again, overwrite)[1])
    first = json.loads((folders[0] / "report.json").read_text(encoding="utf-8"))
    single = [{**row, "weights": f"{row['weights']}, 1 run"} for row in first["results"]]
    results = single + mixture([folder / "predictions.safetensors" for folder in folders])
    report = {"runs": list(map(str, folders)), "results": results}
    write_report(report, out)
    return report, f"\n{result_table(results)}\n\n{count} runs; everything is in {out}"


def finetune(chosen: dict[str, Any], resume: bool = False, overwrite: bool = False) -> tuple[dict[str, Any], str]:
    """Run `ivon-lora finetune` with the chosen settings; returns the report, and its tables.

    Nothing has been written where an `InputError` is raised. A KeyboardInterrupt says how to go on.
    """
    out = Path(chosen.get("out", Settings.out))
    settings, fingerprint = read_settings(out, chosen) if resume else (make_settings(chosen), None)
    training.check_out(out, overwrite or resume)
    device = training.prepare(settings)
    texts = load_texts(settings.data, settings.text, settings.label)
    if fingerprint not in (None, texts.fingerprint()):
        raise InputError("--resume: the data is not what the run was started with; restore it, or use --overwrite")
    base = load_base(settings.model, len(texts.labels), settings.seed)
    tokenizer = load_tokenizer(settings.model, base)
    data = {name: tokenized(table, tokenizer, settings.max_length) for name, table in texts.splits.items()}
    collate = DataCollatorWithPadding(tokenizer)
    measured: Any = data["train"][:GELORA_TEXTS]
    model = adapt(base, settings, DataLoader(measured, 32, collate_fn=collate)).to(device)
    args = training_arguments(settings, device)
    optimizer, variant = make_optimizer(model, args, settings, len(data["train"]))
    checkpoint = last_checkpoint(out, settings.steps) if resume else None
    if not resume:
        training.make_out(out, settings, texts)

    order = settings.batch_size, settings.steps, settings.seed
    texts_in_order: Any = in_order(data["train"], *order)
    trainer = Trainer(model, args, collate, texts_in_order, optimizers=(optimizer, None))
    if settings.optimizer == "ivon":
        watch(trainer, PREFIX)
    elif settings.method == "adalora":
        trainer.add_callback(AllocateRanks())
    if isinstance(variant, Diffora) and variant.gates is not None:
        trainer.add_callback(SearchLayers(trainer, variant, in_order(data["validation"], *order)))
    rank = "ranks by GeLoRA" if settings.method == "gelora" else f"rank {settings.rank}"
    pruning = f", ranks pruned to {settings.target_rank} on average" if settings.prunes else ""
    training.print_start(
        texts,
        trainer,
        model=f"{settings.model}: LoRA of {rank}{pruning}",
        method=", ".join((settings.method, *settings.option)),
        optimizer=f"{settings.optimizer}, lr {settings.lr:g}, {settings.steps} steps of {settings.batch_size} texts",
    )
    again = f"go on from the last checkpoint with `ivon-lora finetune --resume --out {shlex.quote(str(out))}`"
    with training.interruptible(trainer, again if settings.resumable else "PEFT's AdaLoRA cannot be resumed"):
        training.train(trainer, checkpoint)
        ivon, posterior = unwrap(optimizer), None
        if ivon is not None:
            posterior = snapshot_posterior(ivon) if variant is None else variant.posterior()
        results, temperature = evaluate(trainer, data, posterior, settings, out / "predictions.safetensors")
    if variant is not None:
        variant.detach()
    events = [] if variant is None else variant.history
    found = {"results": results, "softmax_temperature": temperature, "events": events}
    return training.finish(settings, texts, trainer, posterior, found)


def training_arguments(settings: Settings, device: str) -> TrainingArguments:
    """The settings in the Trainer's words."""
    return TrainingArguments(
        **training.trainer_arguments(settings, device),
        max_steps=settings.steps,
        per_device_eval_batch_size=64,
        train_sampling_strategy="sequential",
        warmup_steps=as_steps(settings.lr_warmup, settings.steps),
        weight_decay=0.0 if settings.optimizer == "ivon" else settings.weight_decay or 0.0,
        max_grad_norm=0.0,
        optim="adamw_torch",
        bf16=settings.precision == "bf16" or (settings.precision == "auto" and has_fast_bf16(device)),
        save_strategy="steps" if settings.resumable else "no",
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=settings.log_every,
    )


def last_checkpoint(out: Path, steps: int) -> Path | None:
    """The last complete checkpoint-N before the end; None to start from the beginning.

    The Trainer writes trainer_state.json last, so a checkpoint whose writer was killed lacks it. One at the end is
    not taken, because the Trainer would go one step too far from it; the steps since the one before are repeated.
    """
    complete = [path.parent for path in out.glob("checkpoint-*/trainer_state.json")]
    by_step = {int(folder.name.partition("-")[2]): folder for folder in complete}
    return by_step.get(max((step for step in by_step if step < steps), default=0))


class AllocateRanks(TrainerCallback):
    """What PEFT's AdaLoRA asks of a training loop: a call after each optimizer step, while gradients are there."""

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)

    def on_log(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        allocator, pattern = model.base_model.rankallocator, model.peft_config["default"].rank_pattern
        live = sum(map(sum, pattern.values())) if pattern else allocator.init_bgt
        budget, _mask = allocator.budget_schedule(state.global_step)
        state.log_history[-1].update({COLUMNS["live"]: live, COLUMNS["budget"]: budget})


class SearchLayers(TrainerCallback):
    """DiffoRA's second level: before each step of its search the gates take one, on a batch that is not trained on."""

    def __init__(self, trainer: Any, variant: Any, held_out: Any) -> None:
        self.trainer, self.variant, self.held_out = trainer, variant, held_out

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step < self.variant.search:
            trainer, start = self.trainer, state.global_step * args.train_batch_size
            batch = trainer.data_collator(self.held_out[start : start + args.train_batch_size]).to(args.device)
            model.train()
            with self.variant.architecture(), trainer.compute_loss_context_manager():
                trainer.accelerator.backward(trainer.compute_loss(model, batch))
