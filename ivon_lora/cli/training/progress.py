"""What a user sees while the Trainer trains, and a loss that is not finite."""

from __future__ import annotations

import math
import shutil
import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from ivon_lora.cli.errors import TrainingError


class Progress(TrainerCallback):
    """How training goes, on stderr: one live line in a terminal, elsewhere a line for every entry of the log.

    Both have the numbers of the last entry; the last step gets one too. TrainingError if its loss is not finite.
    """

    bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        columns, rows = shutil.get_terminal_size()  # tqdm itself draws nothing where a terminal tells no size
        size = {"ncols": min(columns - 1, 100), "nrows": rows}
        line = "training {n}/{total} |{bar}| {desc}  {remaining} left"
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, bar_format=line, disable=None, **size)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update()
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise TrainingError(f"the loss is {logs['loss']} at step {state.global_step}: lower --lr")
        entry = state.log_history[-1]
        ranks = "".join(f"  ranks {value:.0f}" for name, value in entry.items() if name.endswith("rank/live"))
        numbers = f"loss {entry['loss']:.4f}  lr {entry['learning_rate']:.2e}{ranks}"
        self.bar.set_description_str(numbers)
        if self.bar.disable:
            print(f"training {state.global_step}/{state.max_steps}  {numbers}", file=sys.stderr, flush=True)
