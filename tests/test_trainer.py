"""The Hugging Face Trainer, unchanged: IVON through `optimizers=` or `attach_trainer`, watched by a callback."""

import contextlib
from typing import Any

import pytest
import torch

from ivon_lora import IVON, RankPruner, VAdam, find_adapters
from ivon_lora.integrations.loss_scale import LossScaleCheck
from ivon_lora.integrations.trainer import attach_trainer, optimizer_for, watch
from ivon_lora.optim.wrappers import unwrap
from tests import tiny_trainer
from tests.optimizer_problem import differing, equal, photo
from tests.tiny_language_model import make_base, make_tokenizer, texts
from tests.tiny_trainer import arguments, make_data, make_model, make_optimizer, make_trainer

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

FIELDS = transformers.TrainingArguments.__dataclass_fields__
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in FIELDS)
QUIET = {"eval_strategy": "steps", "eval_steps": 2}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_evaluations_and_checkpoints_are_of_the_mean(tmp_path):
    from peft.utils import load_peft_weights

    model = make_model()
    optimizer = make_optimizer(model, ess=10.0)
    means = {}

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            means[state.global_step] = [optimizer.posterior(p).mean for p in trainable(model)]

        def on_evaluate(self, args, state, control, **kwargs):
            assert equal(trainable(model), means[state.global_step])

    trainer = make_trainer(tmp_path, model, optimizer, save_strategy="steps", save_steps=3, **QUIET)
    trainer.add_callback(Look())
    trainer.train()
    assert equal(trainable(model), means[6])
    saved = load_peft_weights(str(tmp_path / "checkpoint-3"), device="cpu")
    names = [
        n.replace(".default", "").replace("modules_to_save.", "")
        for n, p in model.named_parameters()
        if p.requires_grad
    ]
    assert sorted(saved) == sorted(names)
    assert all(torch.equal(saved[name], mean) for name, mean in zip(names, means[3], strict=True))


# ---------------------------------------------------------------- one call


def test_attach_trainer_trains_prunes_and_logs(tmp_path):
    """Learning rate, betas, steps (two epochs of three steps) and number of examples are the Trainer's.

    It is the plain loop, bit for bit; activations are checkpointed.
    """
    reported = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    options = {"learning_rate": 0.02, "adam_beta2": 0.99, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    options |= {CHECKPOINTING: True}
    model, twin = make_model(), make_model()
    trainer = make_trainer(tmp_path, model, max_steps=-1, num_train_epochs=2, **options, **QUIET)
    start = trainer.evaluate()["eval_loss"]
    optimizer = attach_trainer(trainer, target_rank=1, pruner_options={"interval": 1})
    trainer.add_callback(Reporter())
    assert trainer.optimizer is optimizer
    seen = tiny_trainer.record_batches(model)
    trainer.train()
    pruner = RankPruner(find_adapters(twin), 1, total_steps=6, interval=1)
    params = [(n, p) for n, p in twin.named_parameters() if p.requires_grad]
    manual = VAdam(params, lr=0.02, betas=(0.9, 0.99), num_examples=24, batch_size=8, pruner=pruner)
    tiny_trainer.manual_loop(twin, manual, seen, 2, 0.05, steps=6)
    assert differing(photo(optimizer), photo(manual)) == []
    assert trainer.evaluate()["eval_loss"] < start
    assert sum(row["live"] for row in optimizer.rank_table()) == 4  # four adapters
    for logs in (reported, trainer.state.log_history):  # every reporter has ranks and SNR
        training = [entry for entry in logs if "loss" in entry]
        assert [entry["ivon/rank/live"] for entry in training] == [4, 4]
        assert all(entry["ivon/snr/p50"] > 0 for entry in training)
        assert not any(key.startswith("ivon/") for entry in logs if "eval_loss" in entry for key in entry)
        assert training[-1]["ivon/snr/p90"] == optimizer.metrics()["snr/p90"]


def test_attach_trainer_refuses_what_it_cannot_know(tmp_path):
    trainer = make_trainer(tmp_path, make_model())
    attach_trainer(trainer)
    with pytest.raises(ValueError, match="the trainer has an optimizer already"):
        attach_trainer(trainer)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_data())

    with pytest.raises(ValueError, match=r"train_dataset \(Stream\) has no length: pass num_examples="):
        attach_trainer(make_trainer(tmp_path, make_model(), data=Stream()))
    trainer = make_trainer(tmp_path, make_model(), data=Stream())
    attach_trainer(trainer, num_examples=24)
    trainer.train()


def test_a_model_that_the_trainer_makes_anew_gets_a_new_optimizer(tmp_path):
    """As in a hyperparameter search, which also changes the learning rate."""
    trainer = transformers.Trainer(model_init=lambda: make_model(), args=arguments(tmp_path), train_dataset=make_data())
    trainer.model_accepts_loss_kwargs = False
    optimizer, rates = attach_trainer(trainer, target_rank=1, pruner_options={"interval": 1}), []
    for rate in (0.01, 0.02):
        trainer.args.learning_rate = rate
        trainer.train()
        made = unwrap(trainer.optimizer)
        assert made is not optimizer
        assert {*made.parameters} == {*trainable(trainer.model)}
        assert sum(row["live"] for row in made.rank_table()) == 4
        rates.append(made.param_groups[0]["initial_lr"])
    assert rates == [0.01, 0.02]


def test_an_interrupted_step_leaves_nothing_behind(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), gradient_accumulation_steps=2, max_steps=2)
    optimizer, compute_loss, calls = attach_trainer(trainer), trainer.compute_loss, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert optimizer.param_groups[0]["examples_seen"] == 2 * 8


@pytest.mark.parametrize("model_only", [False, True])
def test_the_best_model_has_the_posterior_and_the_ranks_of_its_step(tmp_path, model_only):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": model_only}
    trainer = make_trainer(tmp_path, make_model(), **QUIET, **best, **saving)
    optimizer = attach_trainer(trainer, target_rank=1, pruner_options={"interval": 1, "final": 1})
    expected = r"which has no optimizer\.pt" if model_only else r"is that of step 2, .* at the target from step 5"
    with pytest.warns(UserWarning, match=expected):
        trainer.train()
    if not model_only:
        saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
        for index, p in enumerate(trainable(trainer.model)):
            assert equal([optimizer.state[p][k] for k in saved[index]], [*saved[index].values()])


# ---------------------------------------------------------------- its arguments


def test_weight_decay_is_that_of_the_optimizer_and_its_loss_is_said(tmp_path):
    """The Trainer's own groups carry weight_decay=0, which wins over the argument of any optimizer class."""
    kept = attach_trainer(make_trainer(tmp_path, make_model()), ess=24.0, weight_decay=1e-3)
    assert [g["weight_decay"] for g in kept.param_groups] == [1e-3]
    lost = transformers.Trainer(
        model=make_model(),
        args=arguments(tmp_path),
        optimizer_cls_and_kwargs=(IVON, {"lr": 0.1, "ess": 24, "weight_decay": 1e-3}),
    )
    with pytest.warns(UserWarning, match="every group sets weight_decay=0"):
        lost.create_optimizer()
    assert {g["weight_decay"] for g in lost.optimizer.param_groups} == {0.0}

    with pytest.warns(UserWarning, match=r"TrainingArguments.weight_decay=0.01 is AdamW's"):
        attach_trainer(make_trainer(tmp_path, make_model(), weight_decay=0.01))
    attach_trainer(make_trainer(tmp_path, make_model(), weight_decay=0.01), prior_std=0.1)  # no warning


@pytest.mark.parametrize(
    "overrides",
    [
        {"max_steps": 7},
        {"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 5},
        {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 5, "dataloader_drop_last": True},
        {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 50},
    ],
)
def test_the_pruners_steps_are_those_of_the_trainer(tmp_path, overrides):
    trainer = make_trainer(tmp_path, make_model(), data=make_data(22), **overrides)
    *_, max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    pruner = attach_trainer(trainer, 1, pruner_options={"warmup": 0, "final": 0, "interval": 1}).pruner
    assert pruner.total_steps == max_steps


def test_a_run_resumes_exactly_ranks_included(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}

    def run(checkpoint):
        trainer = make_trainer(tmp_path, make_model(), **saving)
        optimizer = attach_trainer(trainer, target_rank=1, pruner_options={"interval": 1})
        trainer.train(resume_from_checkpoint=checkpoint)
        return optimizer

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-3"))
    assert differing(photo(whole), photo(resumed)) == []
    assert whole.rank_table() == resumed.rank_table()
    assert sum(row["live"] for row in resumed.rank_table()) == 4


# ---------------------------------------------------------------- the callback


def test_a_mistake_in_the_optimizer_or_the_trainer_is_said(tmp_path):
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        optimizer_for(make_model().requires_grad_(False), arguments(tmp_path), num_examples=24)
    model = make_model()
    misfits = {
        "optimizer is AdamW, not IVON": lambda: torch.optim.AdamW(trainable(model)),
        "is 4, but .* mean of 8 examples": lambda: VAdam(trainable(model), num_examples=24, batch_size=4),
        "schedule ends at step 50, the Trainer's run at 1: pass RankPruner": lambda: make_optimizer(
            model, pruner=RankPruner(find_adapters(model), target_rank=2, total_steps=50)
        ),
    }
    for message, make in misfits.items():
        trainer = make_trainer(tmp_path, model, make(), max_steps=1, gradient_accumulation_steps=2)
        watch(trainer)
        with pytest.raises((ValueError, UserWarning), match=message):  # warnings are errors here
            trainer.train()


def test_watch_restores_the_mean_after_a_skipped_step(tmp_path):
    """What a GradScaler does to an overflow: `step` is never called, and a checkpoint may be written right then."""
    model = make_model()
    optimizer = make_optimizer(model)
    trainer = make_trainer(tmp_path, model, optimizer)
    callback = watch(trainer)
    mean = [p.detach().clone() for p in trainable(model)]
    optimizer.train()
    assert not equal(trainable(model), mean)
    callback.on_optimizer_step(trainer.args, trainer.state, trainer.control, optimizer=optimizer)
    assert equal(trainable(model), mean)


def test_the_trap_is_found_once_and_is_real(tmp_path):
    """With 4 micro-batches per step BERT's gradients are 4 times too large, unless the Trainer is told to divide."""
    norms = {}
    for divide in (True, False):
        options = {"gradient_accumulation_steps": 4, "max_steps": 1, "logging_steps": 1}
        trainer = make_trainer(tmp_path, make_model(), **options)
        # at a rate of 0 all micro-batches are seen by the same weights, and AdamW does not care for the scale
        attach_trainer(trainer, ess=1e4, lr=0.0)
        trainer.model_accepts_loss_kwargs = not divide
        expected = pytest.warns(UserWarning, match=r"gradients 4 times too large.*model_accepts_loss_kwargs = False")
        with contextlib.nullcontext([]) if divide else expected as caught:
            trainer.train()
        assert divide or len([w for w in caught if "times too large" in str(w.message)]) == 1
        norms[divide] = trainer.state.log_history[0]["grad_norm"]
    assert norms[False] == pytest.approx(4 * norms[True], rel=1e-5)


def test_a_head_that_divides_is_left_alone():
    """Llama's loss uses num_items_in_batch: no warning, and the same loss and gradient as without the check."""
    batch = {"input_ids": torch.randint(40, (2, 5)), "num_items_in_batch": torch.tensor(8)}
    batch["labels"] = batch["input_ids"]
    ends = []
    for check in (False, True):
        torch.manual_seed(0)
        model = make_base(vocab_size=40)
        if check:
            LossScaleCheck(model, accumulation=2)
        loss = model(**batch).loss
        loss.backward()
        ends.append([loss, *(p.grad for p in model.parameters())])
        assert type(loss) is torch.Tensor
    assert equal(*ends)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


# ---------------------------------------------------------------- a trainer built on it: of sentence-transformers


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_cached_contrastive_losses_are_the_plain_ones(tmp_path):
    """sentence-transformers' GradCache: representations without gradients, then each piece again in the backward."""
    library = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Pooling

    n = 32
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=12, **sizes, **options)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    pairs = datasets.Dataset.from_dict({"anchor": texts(n), "positive": texts(n)[3:] + texts(3)})

    def train(loss: str, **options: Any) -> VAdam:
        encoder = Transformer(str(tmp_path))
        model = library.SentenceTransformer(modules=[encoder, Pooling(16)], device="cpu")
        for name, p in model.named_parameters():
            p.requires_grad_(not name.endswith("key.bias"))  # its gradient is rounding, which Adam makes large
        args = library.SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=8,
            num_train_epochs=5,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
        )
        made = getattr(losses, loss)(model, **options)
        trainer = library.SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=made)
        optimizer = attach_trainer(trainer, noise_warmup=n)
        trainer.train()
        assert isinstance(optimizer, VAdam)
        assert optimizer.param_groups[0]["examples_seen"] == 5 * n
        return optimizer

    plain = train("MultipleNegativesRankingLoss")
    cached = train("CachedMultipleNegativesRankingLoss", mini_batch_size=4)
    for p, q in zip(cached.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(cached.posterior(p).mean, plain.posterior(q).mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(cached.posterior(p).stddev, plain.posterior(q).stddev, rtol=1e-3, atol=1e-6)
