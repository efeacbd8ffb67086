"""Lightning's Trainer: automatic and manual optimization, accumulation, closures, clipping, checkpoints, resuming."""

import csv
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ivon_lora import IVON, VAdam
from ivon_lora.integrations.lightning import ivon_callback
from tests.optimizer_problem import differing, equal, photo

lightning = pytest.importorskip("lightning")
LightningModule: Any = lightning.LightningModule
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
Y = X @ torch.randn(6, 2, generator=torch.Generator().manual_seed(2))


class Module(LightningModule):
    """A module whose forward Lightning never calls: everything happens in `training_step`."""

    def __init__(self, automatic: bool = True, attach: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.automatic_optimization = automatic
        self.attach = attach
        self.seen: list[list[Tensor]] = []

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]

    def training_step(self, batch, index):
        x, y = batch
        optimizer = self.optimizers()
        if not self.automatic_optimization:
            optimizer.train()  # LightningOptimizer hands it on
        loss = F.mse_loss(self.net(x), y)
        self.seen.append(self.weights())
        if not self.automatic_optimization:
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()
        return loss

    def validation_step(self, batch, index):
        F.mse_loss(self.net(batch[0]), batch[1])

    def make_optimizer(self) -> IVON:
        return IVON(self.net.parameters(), lr=0.1, ess=500.0, beta2=0.99)

    def configure_optimizers(self):
        self.optimizer = self.make_optimizer()
        if self.attach:
            self.optimizer.attach(self.net)
        return self.optimizer


class VAdamModule(Module):
    lr = 0.01

    def make_optimizer(self) -> IVON:
        return VAdam(self.net.parameters(), self.lr, num_examples=32)


def data() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=4)


def make_trainer(folder: Any, callbacks: Any = (), **options: Any) -> Any:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"max_epochs": 1, "enable_checkpointing": False, "default_root_dir": folder, "num_sanity_val_steps": 0}
    return lightning.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(module: Module, folder: Any, callbacks: Any = (), checkpoint: Any = None, **options: Any) -> Any:
    trainer = make_trainer(folder, callbacks, **options)
    trainer.fit(module, data(), data(), ckpt_path=checkpoint)
    return trainer


def manual_loop(accumulate: int = 1) -> dict[str, Any]:
    module = Module()
    optimizer = module.make_optimizer()
    for i, (x, y) in enumerate(data()):
        optimizer.train()
        (F.mse_loss(module.net(x), y) / accumulate).backward()
        if (i + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(module.net.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    return photo(optimizer)


@pytest.mark.parametrize(
    ("how", "accumulate"), [("nothing", 1), ("callback", 1), ("attach", 1), ("callback", 2), ("attach", 2)]
)
def test_automatic_optimization_equals_the_manual_loop(tmp_path, how, accumulate):
    """Lightning passes a closure to `step`, which samples around it: without accumulation nothing more is needed.

    One sample serves all micro-batches of a step, and validation, also between them, is at the mean.
    """
    module, at_mean = Module(attach=how == "attach"), []

    def look(net: nn.Module, *_: Any) -> None:
        if not net.training:
            means = [module.optimizer.posterior(p).mean for p in net.parameters()]
            at_mean.append(equal(module.weights(), means))

    module.net.register_forward_hook(look)
    callbacks = [ivon_callback()] if how == "callback" else []
    options = {"accumulate_grad_batches": accumulate, "val_check_interval": 4 if accumulate == 1 else 3}
    fit(module, tmp_path, callbacks, gradient_clip_val=0.05, **options)
    assert at_mean == [True] * 16
    assert differing(photo(module.optimizer), manual_loop(accumulate)) == []
    assert all(equal(module.seen[i], module.seen[i + accumulate - 1]) for i in range(0, 8, accumulate))
    assert not equal(module.seen[0], module.seen[accumulate])


@pytest.mark.parametrize("how", ["callback", "attach"])
def test_mixed_precision_with_a_scaler_equals_the_manual_loop(tmp_path, how):
    """Here Lightning runs the closure before `scaler.step(optimizer)`, which gets none; the first step overflows."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    scale = 2.0**20
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100))
    module = Module(attach=how == "attach")
    callbacks = [ivon_callback()] if how == "callback" else []
    fit(module, tmp_path, callbacks, plugins=[precision], gradient_clip_val=0.05)
    twin = Module()
    optimizer = twin.make_optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    for x, y in data():
        optimizer.train()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.mse_loss(twin.net(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(twin.net.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
    assert 0 < optimizer.completed_steps < 8, "some steps overflow"
    assert differing(photo(module.optimizer), photo(optimizer)) == []


def test_a_context_on_lightnings_wrapper_reaches_the_optimizer_inside(tmp_path):
    """The wrapper has the optimizer's class but not its attributes: what a method writes must arrive inside."""

    class WithContext(Module):
        def training_step(self, batch, index):
            wrapper = self.optimizers()
            assert isinstance(wrapper, IVON)
            assert wrapper is not self.optimizer
            for _ in range(2):
                with wrapper.sampled_params(train=True):
                    assert self.optimizer.in_context
                    wrapper.zero_grad()
                    self.manual_backward(F.mse_loss(self.net(batch[0]), batch[1]))
            wrapper.step()

    module, twin = WithContext(automatic=False), Module()
    fit(module, tmp_path)
    optimizer = twin.make_optimizer()
    for x, y in data():
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                F.mse_loss(twin.net(x), y).backward()
        optimizer.step()
    assert differing(photo(module.optimizer), photo(optimizer)) == []


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("attach", [True, False])
def test_callback_counts_examples_where_nobody_else_does(tmp_path, automatic, attach):
    counted = []

    class Counted(VAdamModule):
        def on_before_optimizer_step(self, optimizer):  # called after the callbacks'
            counted.append(self.optimizer.counted_examples)

    accumulate = 2 if automatic else 1
    fit(Counted(automatic, attach), tmp_path, [ivon_callback()], accumulate_grad_batches=accumulate)
    assert counted == [4 * accumulate] * (8 // accumulate)


def test_a_search_for_a_learning_rate_leaves_no_trace(tmp_path):
    from lightning.pytorch.tuner.tuning import Tuner

    means = []
    for search in (False, True):
        module, trainer = VAdamModule(attach=True), make_trainer(tmp_path, max_epochs=3)
        if search:
            Tuner(trainer).lr_find(module, data(), data(), num_training=12, update_attr=False)
        trainer.fit(module, data(), data())
        assert module.optimizer.completed_steps == 3 * 8
        means.append([module.optimizer.posterior(p).mean for p in module.net.parameters()])
    torch.testing.assert_close(*means)


def test_checkpoint_of_an_interrupted_step_is_the_mean_and_resumes_exactly(tmp_path):
    path = tmp_path / "interrupted.ckpt"

    class Saver(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if index == 4 and trainer.current_epoch == 0:  # the first of the two micro-batches of step 3
                assert not equal(module.weights(), [module.optimizer.posterior(p).mean for p in module.parameters()])
                trainer.save_checkpoint(path)

    module = Module()
    fit(module, tmp_path, [ivon_callback(), Saver()], accumulate_grad_batches=2)
    state = torch.load(path, weights_only=True)
    saved = list(state["state_dict"].values())
    other = Module()
    optimizer = other.configure_optimizers()
    optimizer.load_state_dict(state["optimizer_states"][0])
    other.load_state_dict(state["state_dict"])
    assert equal(other.weights(), saved)
    assert optimizer.completed_steps == 2

    ends = tmp_path / "epoch.ckpt"
    first = Module()
    fit(first, tmp_path, [ivon_callback()]).save_checkpoint(ends)
    second, whole = Module(), Module()
    fit(second, tmp_path, [ivon_callback()], checkpoint=ends, max_epochs=2)
    fit(whole, tmp_path, [ivon_callback()], max_epochs=2)
    assert differing(photo(second.optimizer), photo(whole.optimizer)) == []


def test_metrics_reach_the_logger(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    module = Module()
    trainer = fit(module, tmp_path, [ivon_callback()], logger=logger, log_every_n_steps=4)
    with open(logger.experiment.metrics_file_path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["ivon/snr/p50"]]
    assert [int(row["step"]) for row in rows] == [4, 8]
    assert float(rows[-1]["ivon/snr/p50"]) == module.optimizer.metrics()["snr/p50"]
    assert not module._forward_pre_hooks, "the callback takes its hooks off at the end"
    assert trainer.global_step == 8
