"""What the Trainer calls while it trains: progress, Ctrl-C, a loss that is not finite, AdaLoRA and DiffoRA."""

from __future__ import annotations

import math
import signal
import sys
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from ivon_lora.cli.errors import TrainingError


def progress() -> TrainerCallback:
    """The Trainer's bar with our numbers behind it on a terminal, lines on stderr elsewhere."""
    return LiveLine() if sys.stderr.isatty() else PlainLines()


def summary(entry: dict[str, float]) -> str:
    """Loss, learning rate and live ranks of an entry of the log."""
    ranks = "".join(f"  ranks {value:.0f}" for name, value in entry.items() if name.endswith("rank/live"))
    return f"loss {entry['loss']:.4f}  lr {entry['learning_rate']:.2e}{ranks}"


class LiveLine(ProgressCallback):
    """The Trainer's bar."""

    training_bar: Any
    prediction_bar: Any

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.training_bar.set_postfix_str(summary(state.log_history[-1]))

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if self.prediction_bar is None:
            self.prediction_bar = tqdm(desc="evaluating", total=len(eval_dataloader), leave=False, dynamic_ncols=True)
        self.prediction_bar.update()


class PlainLines(PrinterCallback):
    """A line on stderr for every entry of the log."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            line = f"training {state.global_step}/{state.max_steps}  {summary(state.log_history[-1])}"
            print(line, file=sys.stderr, flush=True)


class StopIfDiverged(TrainerCallback):
    """TrainingError when the logged loss is not finite; the last step is always logged."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            raise TrainingError(f"the loss is {logs['loss']} at step {state.global_step}: lower --lr")


class Interrupt(TrainerCallback):
    """A context in which Ctrl-C ends training after the present step, with a checkpoint; a second one does at once."""

    def __init__(self) -> None:
        self.asked = self.has_begun = False

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._handle)

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.has_begun = True

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        if self.asked:
            control.should_training_stop, control.should_save = True, args.save_strategy != "no"


class AllocateRanks(TrainerCallback):
    """What PEFT's AdaLoRA asks of a training loop: a call after each optimizer step, while gradients are there."""

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)

    def on_log(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        allocator, pattern = model.base_model.rankallocator, model.peft_config["default"].rank_pattern
        live = sum(map(sum, pattern.values())) if pattern else allocator.init_bgt
        budget, _mask = allocator.budget_schedule(state.global_step)
        state.log_history[-1].update({"adalora/rank/live": live, "adalora/rank/budget": budget})


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
