"""TRL's trainers as they are, with one call: their examples, labels and steps are those of the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ivon_lora import VAdam
from ivon_lora.integrations.trainer import attach_trainer
from ivon_lora.optim.example_counter import Counts
from tests.tiny_language_model import WORDS, counting, lengths, lora_config, make_base, make_tokenizer, texts

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
]

N = 44  # examples: eleven batches of four
QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
QUIET |= {"bf16": False, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "num_train_epochs": 1}


TrainerCallback: Any = transformers.TrainerCallback


class Watcher(TrainerCallback):
    """What every step's gradient was the mean over."""

    def __init__(self, optimizer: VAdam) -> None:
        self.optimizer, self.counts = optimizer, list[Counts]()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        counts = self.optimizer.examples.of_step()
        assert counts is not None
        self.counts.append(counts)

    @property
    def total(self) -> Counts:
        return Counts(*(sum(column) for column in zip(*self.counts, strict=True)))


def trained(trainer: Any, examples: int, **options: Any) -> tuple[VAdam, Watcher]:
    """After training: ranks, steps and examples are those of the run, whatever the trainer."""
    optimizer = attach_trainer(trainer, target_rank=2, pruner_options={"final": 0.3}, **options)
    assert isinstance(optimizer, VAdam)
    watcher = Watcher(optimizer)
    trainer.add_callback(watcher)
    trainer.train()
    assert optimizer.pruner is not None
    assert optimizer.pruner.total_steps == trainer.state.max_steps == len(watcher.counts)
    assert sum(row["live"] for row in optimizer.rank_table()) == 2 * len(optimizer.pruner.adapters)
    assert 2 * watcher.total.examples == optimizer.param_groups[0]["noise_warmup"] == 2 * examples
    assert not optimizer.is_sampled
    return optimizer, watcher


TEXTS = [{"text": text} for text in texts(N)]
PREFERENCES = [
    {"prompt": counting(i, 2), "chosen": " " + counting(i + 2, 3), "rejected": " " + counting(i + 5, 2 + i % 2)}
    for i in range(N)
]
RATINGS = [{"prompt": counting(i, 2), "completion": " " + counting(i, 3), "label": i % 2 == 0} for i in range(N)]
PROMPTS = [{"prompt": counting(i, 2)} for i in range(N // 4)]  # four completions each


def make_trainer(kind: str, folder: Any, rows: list[dict[str, Any]], **options: Any) -> Any:
    """TRL's trainer of this kind; ``options`` are those of its configuration, and some of the trainer."""
    more = {name: options.pop(name) for name in ("optimizers", "reward_funcs") if name in options}
    model, lora = options.pop("model", None) or make_base(), options.pop("peft_config", lora_config())
    return getattr(trl, f"{kind}Trainer")(
        model,
        args=getattr(trl, f"{kind}Config")(str(folder), **{**QUIET, **options}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        peft_config=lora,
        **more,
    )


SITUATIONS: dict[str, dict[str, Any]] = {
    "unpacked": {},
    "without checkpointing": {"gradient_checkpointing": False},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "padding-free": {"padding_free": True, "max_length": None},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "packed": {"packing": True, "per_device_train_batch_size": 1},
    "packed, rows of several": {"packing": True, "per_device_train_batch_size": 2, "num_train_epochs": 2},
}


@pytest.mark.filterwarnings("ignore:.*(Padding-free|padding-free|attention implementation)")
@pytest.mark.parametrize("options", SITUATIONS.values(), ids=list(SITUATIONS))
def test_sft_counts_documents_and_labels(tmp_path: Any, options: dict[str, Any]) -> None:
    trainer = make_trainer("SFT", tmp_path, TEXTS, **{"max_length": 16, **options})
    epochs = options.get("num_train_epochs", 1)
    optimizer, watcher = trained(trainer, N * epochs, num_examples=N * epochs if epochs > 1 else None)
    assert watcher.total.labels == sum(lengths(N)) * epochs
    assert optimizer.param_groups[0]["labels_per_example"] == pytest.approx(sum(lengths(N)) / N, rel=1e-6)


def test_accumulated_micro_batches_are_the_batch(tmp_path: Any) -> None:
    states = []
    for options in ({}, SITUATIONS["accumulated"]):
        trainer = make_trainer("SFT", tmp_path, TEXTS, max_length=16, max_grad_norm=0.05, **options)
        trained(trainer, N)
        states.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    for whole, parts in zip(*states, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)


def test_rows_of_text_without_borders_are_examples(tmp_path: Any) -> None:
    """packing_strategy="wrapped" cuts a stream of tokens into rows, whose labels are all but the first."""
    trainer = make_trainer("SFT", tmp_path, TEXTS, max_length=16, packing=True, packing_strategy="wrapped")
    rows = len(trainer.train_dataset)
    _, watcher = trained(trainer, rows)
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    assert watcher.total.labels == tokens - rows


def log_probabilities(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of the completions, (rows,)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    tokens = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (tokens * batch["completion_mask"][:, 1:]).sum(-1)


def test_dpo_has_the_gradient_of_a_reference_of_its_own(tmp_path: Any) -> None:
    """The reference is the same model without its adapter, run between the policy's forward and its backward."""
    trainer = make_trainer("DPO", tmp_path, PREFERENCES, num_train_epochs=2, max_grad_norm=0.0)
    seen, compute_loss = list[dict[str, Any]](), trainer.compute_loss

    def recording(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(dict(inputs))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    policy, reference = peft.get_peft_model(make_base(), lora_config()), make_base()
    policy.load_state_dict(trainer.model.state_dict())
    optimizer = attach_trainer(trainer, noise_warmup=N)
    trainer.train()

    params = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    manual = VAdam(params, lr=1e-2, num_examples=N, batch_size=4, noise_warmup=N)
    steps = trainer.state.max_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(manual, lambda step: 1 - step / steps)
    policy.train()
    for batch in seen:
        with torch.no_grad():
            expected = log_probabilities(reference, batch)
        manual.train()
        chosen, rejected = (log_probabilities(policy, batch) - expected).chunk(2)
        F.softplus(-trainer.args.beta * (chosen - rejected)).mean().backward()
        manual.step()
        manual.zero_grad()
        schedule.step()
    assert optimizer.param_groups[0]["examples_seen"] == 2 * N
    assert optimizer.metrics()["sigma/mean"] > 0.01
    for p, (_, q) in zip((p for p in trainer.model.parameters() if p.requires_grad), params, strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(optimizer.state[p]["hess"], manual.state[q]["hess"], rtol=1e-3, atol=1e-9)


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(completion.count("two")) for completion in completions]


ONE_LABEL: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "DPO": (PREFERENCES, {}),
    "KTO": (RATINGS, {}),
    "Reward": (PREFERENCES, {"peft_config": lora_config(task_type="SEQ_CLS", modules_to_save=["score"])}),
    "GRPO": (PROMPTS, {"num_generations": 4, "max_completion_length": 4, "beta": 0.1, "reward_funcs": rewards}),
}


@pytest.mark.parametrize("kind", ONE_LABEL)
def test_one_label_an_example(tmp_path: Any, kind: str) -> None:
    """Pairs of preferences, ratings, and completions that a reward rates."""
    rows, options = ONE_LABEL[kind]
    scores = make_base("LlamaForSequenceClassification", num_labels=1) if kind == "Reward" else None
    assert trained(make_trainer(kind, tmp_path, rows, model=scores, **options), N)[1].total == (N, N)


def test_sequence_to_sequence(tmp_path: Any) -> None:
    """Every label of a decoder is a prediction, the first one too."""
    from peft import get_peft_model

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS)}
    torch.manual_seed(0)
    base = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    model = get_peft_model(base, lora_config(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]))
    tokenizer = make_tokenizer()
    rows = [{"input_ids": tokenizer(text)["input_ids"], "labels": tokenizer(text)["input_ids"]} for text in texts(N)]
    trainer = transformers.Seq2SeqTrainer(
        model,
        transformers.Seq2SeqTrainingArguments(str(tmp_path), **QUIET),
        train_dataset=rows,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model),
    )
    _, watcher = trained(trainer, N)
    assert watcher.total.labels == sum(len(row["labels"]) for row in rows)


def test_an_optimizer_made_before_the_adapter_says_so(tmp_path: Any) -> None:
    model = make_base()
    optimizer = VAdam(model.parameters(), num_examples=N, batch_size=4)
    trainer = make_trainer("SFT", tmp_path, TEXTS, model=model, optimizers=(optimizer, None))
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient"):
        trainer.train()
