"""A Trainer run of a second: a random two-layer BERT with LoRA, its data, and the loop that the Trainer stands for."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora import IVON

LENGTH, VOCABULARY = 6, 40


def make_base() -> Any:
    """Its dropout is 0, so that a loop around it can be repeated exactly."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "initializer_range": 0.3}
    sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes))


def make_model(rank: int = 4, **overrides: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = {"task_type": "SEQ_CLS", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["query", "value"]}
    return get_peft_model(make_base(), LoraConfig(**{**lora, **overrides}))


def make_data(count: int = 24) -> list[dict[str, Tensor]]:
    """The label says whether the first word comes from the upper half of the vocabulary."""
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": (row[0] >= VOCABULARY // 2).long()} for row in ids]


def arguments(folder: Path, **overrides: Any) -> Any:
    """TrainingArguments of 6 steps without anything that reports or writes."""
    from transformers import TrainingArguments

    quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    quiet |= {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 0.1, "logging_steps": 3}
    return TrainingArguments(output_dir=str(folder), dataloader_pin_memory=False, **{**quiet, **overrides})


def make_trainer(folder: Path, model: nn.Module, optimizer: Any = None, data: Any = None, **overrides: Any) -> Any:
    """The Trainer is told to divide micro-batch losses: BERT's head ignores num_items_in_batch."""
    from transformers import Trainer

    data = make_data() if data is None else data
    evaluation = make_data(8)
    args = arguments(folder, **overrides)
    trainer: Any = Trainer(model, args, train_dataset=data, eval_dataset=evaluation, optimizers=(optimizer, None))
    trainer.model_accepts_loss_kwargs = False
    return trainer


def make_optimizer(model: nn.Module, **overrides: Any) -> IVON:
    options: dict[str, Any] = {"lr": 0.1, "ess": 1e4, "hess_init": 0.1, "beta2": 0.9, "weight_decay": 1e-3}
    return IVON([(n, p) for n, p in model.named_parameters() if p.requires_grad], **{**options, **overrides})


def record_batches(model: nn.Module) -> list[dict[str, Tensor]]:
    """The batches on which the model is trained from now on, in their order."""
    seen: list[dict[str, Tensor]] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            seen.append({name: kwargs[name].clone() for name in ("input_ids", "labels")})

    model.register_forward_pre_hook(before, with_kwargs=True)
    return seen


def manual_loop(
    model: nn.Module, optimizer: IVON, batches: list[dict[str, Tensor]], accumulate: int, clip: float, steps: int
) -> None:
    """What the Trainer does for a linear schedule, without the Trainer; also around DistributedDataParallel."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (steps - t) / steps)
    micro_batches = iter(batches)
    for _ in range(steps):
        model.train()
        for last in (False,) * (accumulate - 1) + (True,):
            optimizer.train()
            with nullcontext() if last else getattr(model, "no_sync", nullcontext)():
                (model(**next(micro_batches)).loss / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert next(micro_batches, None) is None
