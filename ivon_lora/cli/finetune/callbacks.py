"""What the Trainer calls for two methods while it trains: PEFT's AdaLoRA and DiffoRA."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerState


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
