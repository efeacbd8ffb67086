"""The training loop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ivon_lora.finetune.batches import Encoded, TrainingOrder, pad
from ivon_lora.finetune.checkpoint import write_checkpoint
from ivon_lora.finetune.errors import TrainingError
from ivon_lora.finetune.history import QUANTILES, History
from ivon_lora.finetune.interrupt import Interrupt
from ivon_lora.finetune.methods import Method
from ivon_lora.finetune.progress import Progress
from ivon_lora.finetune.runtime import Runtime, step_seed
from ivon_lora.finetune.schedule import learning_rate
from ivon_lora.finetune.settings import Settings

__all__ = ["Trained", "train"]

SNR_POINTS = 40  # how often in a run the quantiles of the signal-to-noise ratio are taken


@dataclass(frozen=True)
class Trained:
    """``step`` steps are done, which took ``seconds``; fewer than asked for if the run was interrupted."""

    step: int
    seconds: float


def train(
    method: Method,
    data: Encoded,
    settings: Settings,
    runtime: Runtime,
    out: Path,
    fingerprint: str,
    interrupt: Interrupt,
    history: History,
    done: int = 0,
    seconds: float = 0.0,
) -> Trained:
    """Train from step ``done`` to the end, or to the step at which Ctrl-C was pressed; checkpoint into ``out``.

    Everything random in step t is a function of (seed, t), so a run that was stopped and resumed gives the same
    numbers as one that was not. ``history`` is extended in place. ``seconds`` were spent before.

    Raises:
        TrainingError: the loss is not finite any more.
    """
    order = TrainingOrder([len(ids) for ids in data.ids], settings.batch_size, settings.seed)
    progress = Progress("training", settings.steps, settings.log_every, done)
    snr_interval = max(1, settings.steps // SNR_POINTS)
    started = time.monotonic() - seconds
    step = done
    try:
        while step < settings.steps and not interrupt.asked:
            lr = learning_rate(settings, step + 1, method.peak_lr)
            loss = one_step(method, data, order.batch(step), step + 1, lr, settings.seed, runtime)
            step += 1
            if not math.isfinite(loss):
                raise TrainingError(f"the loss is {loss} in step {step}: lower --lr (now {settings.lr:g})")
            live = sum(method.kept_ranks().values())
            history.add(loss, lr, method.budget(step), live)
            if step % snr_interval == 0 or step == settings.steps:
                quantiles = method.snr_quantiles(QUANTILES)
                if quantiles is not None:
                    history.add_snr(step, quantiles)
            progress.update(step, f"loss {_recent(history.loss):.4f}  lr {lr:.2e}  ranks {live}")
            if step % settings.save_every == 0 and step < settings.steps:
                write_checkpoint(out, settings, method, history, step, fingerprint, time.monotonic() - started)
    finally:
        progress.close()
    spent = time.monotonic() - started
    write_checkpoint(out, settings, method, history, step, fingerprint, spent)
    return Trained(step, spent)


def one_step(
    method: Method, data: Encoded, indices: list[int], step: int, lr: float, seed: int, runtime: Runtime
) -> float:
    """Step number ``step`` (from 1) on one batch; returns its mean cross-entropy in nats."""
    torch.manual_seed(step_seed(seed, step))
    for group in method.optimizer.param_groups:
        group["lr"] = lr
    method.model.train()
    method.begin_step()
    with runtime.autocast():
        loss, data_loss = method.loss(pad(data, indices, runtime.device))
    loss.backward()
    method.finish_step(step)
    method.optimizer.zero_grad()
    return float(data_loss.detach())


def _recent(losses: list[float], window: int = 20) -> float:
    return sum(losses[-window:]) / len(losses[-window:])
