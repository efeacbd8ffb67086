"""What the Trainer calls while it trains: progress, Ctrl-C, and PEFT's AdaLoRA."""

from __future__ import annotations

import math
import signal
import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from ivon_lora.cli.errors import TrainingError

__all__ = ["AllocateRanks", "Interrupt", "Progress"]


class Progress(TrainerCallback):
    """One live line on a terminal, elsewhere a line for every entry of the log; both on stderr."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.bar: Any = None
        self.has_begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start to count."""
        self.has_begun = True
        self.first, self.started = state.global_step, time.monotonic()
        self._open("training", state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step more; the last one is always in the log."""
        self.bar.update()
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show loss, learning rate and live ranks; stop if the loss is not finite any more."""
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise TrainingError(f"the loss is {logs['loss']} at step {state.global_step}: lower --lr")
        note = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}"
        note += "".join(f"  ranks {value:.0f}" for name, value in logs.items() if name.endswith("rank/live"))
        self.bar.set_postfix_str(note)
        if not self.live:
            step, total = state.global_step, state.max_steps
            left = (time.monotonic() - self.started) / (step - self.first) * (total - step)
            print(f"training {step}/{total}  {note}  {tqdm.format_interval(left)} left", file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the line as it is."""
        self.close()

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        """One batch of an evaluation more."""
        if self.bar is None:
            self._open("evaluating", len(eval_dataloader), 0, leave=False)
        self.bar.update()

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        """An evaluation is over."""
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _open(self, what: str, total: int, done: int, leave: bool = True) -> None:
        self.bar = tqdm(
            desc=what,
            total=total,
            initial=done,
            leave=leave,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not self.live,
        )


class Interrupt(TrainerCallback):
    """A context in which Ctrl-C ends training after the present step, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Between two steps."""
        if self.asked:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"


class AllocateRanks(TrainerCallback):
    """What PEFT's AdaLoRA asks of a training loop: a call after each optimizer step, while gradients are there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Score the ranks and mask them to the budget."""
        model.base_model.update_and_allocate(state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **_: Any) -> None:
        """Add the live ranks and the budget to the log."""
        allocator, pattern = model.base_model.rankallocator, model.peft_config["default"].rank_pattern
        numbers = {
            "adalora/rank/live": float(sum(map(sum, pattern.values())) if pattern else allocator.init_bgt),
            "adalora/rank/budget": float(allocator.budget_schedule(state.global_step)[0]),
        }
        logs.update(numbers)
        state.log_history[-1].update(numbers)
