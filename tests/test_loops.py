"""Loops that people write, and that torch.optim.Adam runs: the weights must be those of the plain loop."""

from __future__ import annotations

import copy
import functools
import gc
import io
import logging
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from ivon_lora import IVON, VAdam
from tests.compiler import BACKENDS
from tests.two_processes import Pool

X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
STEPS = 14  # the noise begins at the eleventh

Loop = Callable[[Any, Any], Any]


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def vadam(model: nn.Module, **options: Any) -> VAdam:
    optimizer = VAdam(model.parameters(), **{"lr": 1e-2, "num_examples": 64, **options})
    optimizer.attach(model)
    return optimizer


def fixed(model: nn.Module) -> IVON:
    """At learning rate 0 the mean must stay where it is, under noise of 0.1."""
    optimizer = IVON(model.parameters(), lr=0.0, ess=100)
    optimizer.attach(model)
    return optimizer


def loss_of(model: Any, rows: slice = slice(None)) -> Tensor:
    return F.cross_entropy(model(X[rows]), Y[rows])


def finish(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain(model: Any, optimizer: Any) -> None:
    loss_of(model).backward()
    finish(optimizer)


def train(step: Loop, steps: int = STEPS, make: Callable[[nn.Module], Any] = vadam) -> Tensor:
    model = net()
    optimizer = make(model)
    for _ in range(steps):
        step(model, optimizer)
    return weights(model)


# ---------------------------------------------------------------- what must change nothing


def between(disturb: Loop) -> Loop:
    """Between a forward and its backward."""

    def step(model: Any, optimizer: Any) -> None:
        loss = loss_of(model)
        disturb(model, optimizer)
        loss.backward()
        finish(optimizer)

    return step


def before_step(disturb: Loop) -> Loop:
    """Between a backward and the step."""

    def step(model: Any, optimizer: Any) -> None:
        loss = loss_of(model)
        loss.backward()
        disturb(model, optimizer)
        finish(optimizer)

    return step


def reference_pass(model: Any, optimizer: Any) -> None:
    with torch.no_grad():
        model(X)


def evaluation(model: Any, optimizer: Any) -> None:
    model.eval()
    with torch.inference_mode():
        model(X)
    model.train()


def both_passes(model: Any, optimizer: Any) -> None:
    evaluation(model, optimizer)
    reference_pass(model, optimizer)


def prediction(model: Any, optimizer: Any) -> None:
    """At a sample of its own, also while a graph is open."""
    with optimizer.sampled_params(), torch.no_grad():
        model(X)


def detached(model: Any, optimizer: Any) -> None:
    optimizer.attach(model).remove()
    ema_swap(model, optimizer)


def moved(model: Any, optimizer: Any) -> None:
    model.eval()
    for p in model.parameters():
        p.data = p.data.clone()
    model.train()


def state_dict(model: Any, optimizer: Any) -> None:
    model.state_dict()


def copied(model: Any, optimizer: Any) -> None:
    copy.deepcopy(model.eval())
    model.train()


def ema_swap(model: Any, optimizer: Any) -> None:
    model.eval()
    stored = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.data.copy_(torch.zeros_like(p))
    with torch.no_grad():
        assert not model(X).any()
    for p, value in zip(model.parameters(), stored, strict=True):
        p.data.copy_(value)
    model.train()


def in_a_backward_hook(read: Loop) -> Loop:
    """Before the last layer's backward, which needs its weights."""

    def step(model: Any, optimizer: Any) -> None:
        handle = model[2].register_full_backward_pre_hook(lambda *_: read(model, optimizer))
        loss_of(model).backward()
        handle.remove()
        finish(optimizer)

    return step


def state_dict_is_the_mean(model: Any, optimizer: Any) -> None:
    saved = model.state_dict()
    assert all(torch.equal(saved[name], optimizer.posterior(p).mean) for name, p in model.named_parameters())


def zero_grad_after_forward(model: Any, optimizer: Any) -> None:
    loss = loss_of(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def retain_graph_twice(model: Any, optimizer: Any) -> None:
    loss = loss_of(model) * 0.5
    loss.backward(retain_graph=True)
    evaluation(model, optimizer)
    loss.backward()
    finish(optimizer)


def out_of_memory(model: Any, optimizer: Any) -> None:
    """Once in the forward, once in the backward; then the batch is tried again."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for register in (model[2].register_forward_pre_hook, model[1].register_full_backward_hook):
        handle = register(fail)
        try:
            loss_of(model).backward()
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
        handle.remove()
    plain(model, optimizer)


def skipped_by_the_scaler(model: Any, optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for spoiled in (True, False):
        scaler.scale(loss_of(model)).backward()
        if spoiled:
            model[0].weight.grad[0, 0] = float("nan")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def checkpointed(reentrant: bool) -> Loop:
    def step(model: Any, optimizer: Any) -> None:
        x = X.clone().requires_grad_()
        F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), Y).backward()
        finish(optimizer)

    return step


def another_default_dtype(model: Any, optimizer: Any) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        plain(model, optimizer)
    finally:
        torch.set_default_dtype(torch.float32)


def another_default_device(model: Any, optimizer: Any) -> None:
    with torch.device("meta"):
        plain(model, optimizer)


def through_functional_call(model: Any, optimizer: Any) -> None:
    F.cross_entropy(functional_call(model, dict(model.named_parameters()), (X,)), Y).backward()
    finish(optimizer)


def attack(model: Any, optimizer: Any) -> None:
    """Adversarial examples: gradients for the inputs only."""
    x = X.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(x), Y), x)
    plain(model, optimizer)


def attack_in_eval_mode(model: Any, optimizer: Any) -> None:
    model.eval()
    attack_x = X.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(attack_x), Y), attack_x)
    model.train()
    plain(model, optimizer)


UNDISTURBED: dict[str, Loop] = {
    "reference pass": between(reference_pass),
    "reference pass after the backward": before_step(reference_pass),
    "evaluation": between(evaluation),
    "evaluation after the backward": before_step(evaluation),
    "evaluation and reference pass": between(both_passes),
    "evaluation and reference pass after the backward": before_step(both_passes),
    "prediction": between(prediction),
    "prediction after the backward": before_step(prediction),
    "attached twice, detached once": between(detached),
    "moved in eval mode": between(moved),
    "state_dict": between(state_dict),
    "state_dict after the backward": before_step(state_dict),
    "deepcopy in eval mode": between(copied),
    "swapped with an average": between(ema_swap),
    "swapped with an average after the backward": before_step(ema_swap),
    "state_dict in a backward hook": in_a_backward_hook(state_dict_is_the_mean),
    "evaluation in a backward hook": in_a_backward_hook(evaluation),
    "zero_grad between forward and backward": zero_grad_after_forward,
    "one graph, two backwards": retain_graph_twice,
    "out of memory": out_of_memory,
    "step skipped by the scaler": skipped_by_the_scaler,
    "reentrant checkpoint": checkpointed(True),
    "checkpoint": checkpointed(False),
    "another default dtype": another_default_dtype,
    "another default device": another_default_device,
    "functional_call": through_functional_call,
    "adversarial examples": attack,
    "adversarial examples in eval mode": attack_in_eval_mode,
}


@pytest.fixture(scope="module")
def undisturbed() -> Tensor:
    return train(plain)


@pytest.mark.parametrize("loop", UNDISTURBED.values(), ids=list(UNDISTURBED))
def test_what_changes_nothing_under_adam_changes_nothing(loop: Loop, undisturbed: Tensor) -> None:
    assert torch.equal(train(loop), undisturbed)


def test_a_skipped_micro_batch_is_as_if_it_had_not_been() -> None:
    def step(micro_batches: list[int]) -> Loop:
        def run(model: Any, optimizer: Any) -> None:
            for n in micro_batches:
                loss = loss_of(model, slice(8 * (n % 2), 8 * (n % 2) + 8)) * (0.5 if n < 2 else float("nan"))
                if loss.isfinite():
                    loss.backward()
            finish(optimizer)

        return run

    assert torch.equal(train(step([0, 2, 1, 3])), train(step([0, 1])))


def test_gradient_caches_with_two_passes_have_the_gradient_of_the_whole_batch() -> None:
    """GradCache: representations of all chunks without gradients, then each chunk again with them."""

    def contrastive(z: Tensor) -> Tensor:
        return F.cross_entropy(z @ z.roll(1, 0).T, torch.arange(len(z)))

    def whole(model: Any, optimizer: Any) -> None:
        contrastive(model(X)).backward()
        finish(optimizer)

    def cached(model: Any, optimizer: Any) -> None:
        with torch.no_grad():
            z = torch.cat([model(x) for x in X.split(4)])
        (gradients,) = torch.autograd.grad(contrastive(z.requires_grad_()), z)
        for x, g in zip(X.split(4), gradients.split(4), strict=True):
            (model(x) * g).sum().backward()
        finish(optimizer)

    torch.testing.assert_close(train(cached), train(whole), rtol=0, atol=1e-4)


def test_a_forward_in_eval_mode_after_the_training_forward_belongs_to_its_loss() -> None:
    """Consistency losses: both see the sample, and the gradient is that of both at the sample."""
    model, other = net(), net()
    fixed(model)
    (loss := loss_of(model)).item()
    other.load_state_dict({name: p.detach().clone() for name, p in model.named_parameters()})
    model.eval()
    (loss + loss_of(model)).backward()
    (loss_of(other) + loss_of(other)).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_forward_in_eval_mode_before_the_training_forward_is_named() -> None:
    model = net()
    optimizer = fixed(model)
    loss = loss_of(model.eval())
    loss = loss + loss_of(model.train())
    assert optimizer.is_sampled
    with pytest.warns(UserWarning, match="saw the posterior mean"), pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_eval_inside_a_backward_is_refused() -> None:
    model = net()
    optimizer = fixed(model)
    model[2].register_full_backward_pre_hook(lambda *_: optimizer.eval())
    with pytest.raises(RuntimeError, match="while a backward is running"):
        loss_of(model).backward()


@pytest.mark.parametrize("sampled", [False, True])
def test_swapped_and_restored_without_a_word(sampled: bool) -> None:
    """Averages exchanged in place, with and without a sample there, leave the mean where it was."""
    model = net()
    optimizer, before = fixed(model), weights(model)
    for _ in range(3):
        loss_of(model).backward()
        if not sampled:
            finish(optimizer)
        stored = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
            for p, value in zip(model.parameters(), stored, strict=True):
                p.copy_(value)
        if sampled:
            finish(optimizer)
    assert torch.equal(weights(model), before)


# ---------------------------------------------------------------- one parameter, one driver


def test_a_cell_run_twice_and_a_model_tried_before() -> None:
    """The first optimizer is still alive, and attached, perhaps with a sample in the weights."""
    model, kept = net(), []

    def cell() -> Tensor:
        model.load_state_dict(net().state_dict())
        optimizer = vadam(model)
        kept.append(optimizer)
        for _ in range(STEPS):
            plain(model, optimizer)
        mean = weights(model)
        loss_of(model)  # interrupted
        return mean

    assert torch.equal(cell(), cell())
    assert not torch.equal(weights(model), cell())
    model.eval()
    assert kept[0].completed_steps == STEPS


def test_an_optimizer_that_is_gone_leaves_the_mean() -> None:
    model, before = net(), weights(net())

    def interrupted() -> None:
        optimizer = fixed(model)
        loss_of(model)
        assert optimizer.is_sampled
        assert not torch.equal(weights(model), before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    gc.collect()
    assert torch.equal(weights(model), before)
    assert not model._forward_hooks
    assert "train" not in vars(model)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_stage_of_sgd_on_the_same_parameters(order: str) -> None:
    """Before and after: it starts at the mean, and from its first step on nobody draws samples."""
    model, other = net(), net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    if order == "after":
        plain(model, sgd)
        other.load_state_dict(model.state_dict())
    optimizer = fixed(model)
    plain(model, optimizer)
    loss_of(model).backward()
    gradients = [p.grad for p in model.parameters()]
    assert not torch.equal(weights(model), weights(other))
    finish(sgd)
    reference = torch.optim.SGD(other.parameters(), 0.1)
    for p, g in zip(other.parameters(), gradients, strict=True):
        p.grad = g
    finish(reference)
    for _ in range(3):
        plain(model, sgd)
        plain(other, reference)
    assert torch.equal(weights(model), weights(other))


def test_optimizers_of_one_model_have_noise_of_their_own() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].load_state_dict(model[0].state_dict())
    for layer in model:
        IVON(layer.parameters(), lr=0.1, ess=100).attach(model)  # gone at once
    optimizers = [IVON(layer.parameters(), lr=0.1, ess=100) for layer in model]
    for optimizer in optimizers:
        optimizer.attach(model)
    model(torch.ones(1, 3))
    assert not torch.isclose(model[0].weight, model[1].weight).any()
    whole, other = net(), net()
    together, alone = IVON(whole.parameters(), lr=0.1, ess=100), [IVON([p], 0.1, 100) for p in other.parameters()]
    for optimizer in (together, *alone):
        optimizer.attach(whole if optimizer is together else other)
    whole(X), other(X)
    assert torch.equal(weights(whole), weights(other))


def test_a_step_for_every_parameter_inside_the_backward() -> None:
    """As one optimizer for all: torch's recipe for less memory."""

    def make(model: nn.Module) -> list[VAdam]:
        optimizers = [VAdam([p], lr=1e-2, num_examples=64) for p in model.parameters()]
        for p, optimizer in zip(model.parameters(), optimizers, strict=True):
            optimizer.attach(model)
            p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: finish(optimizer))
        return optimizers

    def backward(model: nn.Module, _: Any) -> None:
        loss_of(model).backward()

    assert torch.equal(train(backward, make=make), train(plain))


def test_two_players() -> None:
    """A GAN: each optimizer counts the examples of its own gradient."""
    real, loss = X, F.binary_cross_entropy_with_logits
    generator, critic = nn.Linear(2, 4), nn.Linear(4, 1)
    first, second = vadam(generator), vadam(critic)
    ones, zeros = torch.ones(16, 1), torch.zeros(16, 1)
    for _ in range(STEPS):
        first.zero_grad()
        second.zero_grad()
        fake = generator(torch.randn(16, 2)).detach()
        loss(critic(torch.cat([real, fake])), torch.cat([ones, zeros])).backward()
        assert second.counted_examples == 32
        second.step()
        first.zero_grad()
        second.zero_grad()
        loss(critic(generator(torch.randn(16, 2))), ones).backward()
        assert first.counted_examples == 16
        first.step()
    assert first.completed_steps == second.completed_steps == STEPS


# ---------------------------------------------------------------- no sample, no explosion


class WithLoss(nn.Sequential):
    def loss(self) -> Tensor:
        hidden = X
        for layer in self:
            hidden = layer(hidden)
        return F.cross_entropy(hidden, Y)


@pytest.mark.parametrize("how", ["no attach", "eval mode", "another method", "per-sample gradients"])
def test_where_no_sample_is_ever_drawn_it_trains_like_adam(how: str) -> None:
    model, other = (WithLoss(*net()).train(how != "eval mode") for _ in range(2))
    optimizer = VAdam(model.parameters(), lr=1e-2, num_examples=64, prior_std=1e3)
    adam = torch.optim.Adam(other.parameters(), lr=1e-2)
    if how != "no attach":
        optimizer.attach(model)

    def one(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    def step() -> None:
        plain(other, adam)
        if how == "per-sample gradients":
            detached = {name: p.detach() for name, p in model.named_parameters()}
            each = vmap(grad(one), (None, 0, 0))(detached, X, Y)
            for name, p in model.named_parameters():
                p.grad = each[name].mean(0)
        else:
            (model.loss() if how == "another method" else loss_of(model)).backward()
        finish(optimizer)

    with pytest.warns(UserWarning, match="without a posterior sample: the curvature is learned at the mean"):
        step()
    for _ in range(29):  # and says so once: warnings are errors here
        step()
    torch.testing.assert_close(weights(model), weights(other), rtol=0, atol=2e-3)


# ---------------------------------------------------------------- how many examples


class Detector(nn.Conv2d):
    def forward(self, images: Any) -> Tensor:
        return torch.stack([super(Detector, self).forward(image[None]).mean() for image in images]).mean()


class Denoiser(nn.Bilinear):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return super().forward(t.expand(len(x), 1), x).mean()


class Tagger(nn.LSTM):
    def forward(self, sequences: Any) -> Any:  # type: ignore[override]
        return super().forward(sequences)[0].data.mean()


class Language(nn.Embedding):
    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids).mean()


def images() -> tuple[Any, ...]:
    return ([torch.randn(3, 8, 8 + i) for i in range(5)],)


def packed_sequences() -> tuple[Any, ...]:
    return (nn.utils.rnn.pack_sequence([torch.randn(n, 4) for n in (9, 5, 3)]),)


def packed_rows() -> dict[str, Tensor]:
    """What transformers' DataCollatorWithFlattening makes of sequences of 5, 6 and 7 tokens."""
    positions = torch.cat([torch.arange(n) for n in (5, 6, 7)])[None]
    return {"input_ids": positions % 3, "position_ids": positions, "labels": positions}


def padded_rows() -> dict[str, Tensor]:
    """Two sequences, one of them padded on the left."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": positions % 3, "position_ids": positions, "attention_mask": mask, "labels": positions}


def graphs() -> tuple[Any, ...]:
    """Ten nodes and their edges."""
    return X[:10], torch.randint(10, (2, 20))


class Pooled(nn.Linear):
    def forward(self, x: Any, *_: Any) -> Tensor:
        rows = [row["x"] for row in x] if isinstance(x, list) else x
        return super().forward(torch.stack(list(rows))).mean()


FORMS: list[tuple[nn.Module, Any, int, bool]] = [
    (Detector(3, 2, 3), images(), 5, True),
    (Tagger(4, 8), packed_sequences(), 3, False),
    (Denoiser(1, 4, 2), (torch.tensor([0.3]), X), 16, True),
    (Language(3, 4), packed_rows(), 3, False),
    (Language(3, 4), padded_rows(), 2, False),
    (nn.Sequential(nn.GRU(4, 2)), (torch.randn(7, 3, 4),), 3, True),
    (Pooled(4, 2), graphs(), 1, True),
    (Pooled(4, 2), ([{"x": x, "height": 3} for x in X[:5]],), 5, True),
]


@pytest.mark.parametrize(("model", "batch", "right", "doubtful"), FORMS)
def test_examples_in_batches_of_other_forms(model: Any, batch: Any, right: int, doubtful: bool) -> None:
    """The right number, or a word about it."""
    optimizer = vadam(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = model(**batch) if isinstance(batch, dict) else model(*batch)
        (output if isinstance(output, Tensor) else output[0]).sum().backward()
    said = any("batch_size=" in str(w.message) and "count_examples" in str(w.message) for w in caught)
    assert said == doubtful
    assert optimizer.counted_examples == right or said


def accumulated(attacked: bool) -> Loop:
    """Two micro-batches, each after a gradient for its inputs only, or not."""

    def run(model: Any, optimizer: Any) -> None:
        for rows in (slice(8), slice(8, 16)):
            if attacked:
                x = X[rows].clone().requires_grad_()
                torch.autograd.grad(F.cross_entropy(model(x), Y[rows]), x)
            (loss_of(model, rows) / 2).backward()

    return run


def gradient_penalty(model: Any, optimizer: Any) -> None:
    x = X.clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (F.cross_entropy(out, Y) + slope.square().mean()).backward()


def two_views(model: Any, optimizer: Any) -> None:
    (model(X) - model(X + 0.1)).square().mean().backward()


def one_of_two_thrown_away(model: Any, optimizer: Any) -> None:
    loss_of(model).backward()
    model.zero_grad()
    loss_of(model).backward()


def retained(model: Any, optimizer: Any) -> None:
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()


def returned(model: Any, optimizer: Any) -> None:
    """Gradients that autograd returns, and the loop puts into place."""
    params = list(model.parameters())
    for p, g in zip(params, torch.autograd.grad(loss_of(model), params), strict=True):
        p.grad = g


def in_eval_mode(model: Any, optimizer: Any) -> None:
    loss_of(model.eval()).backward()


COUNTED: dict[str, Loop] = {
    "accumulated": accumulated(attacked=False),
    "accumulated adversarial examples": accumulated(attacked=True),
    "gradient penalty": gradient_penalty,
    "two views": two_views,
    "one of two thrown away": one_of_two_thrown_away,
    "one graph, two backwards": retained,
    "autograd.grad": returned,
    "eval mode": in_eval_mode,
    "checkpoint": lambda model, _: checkpoint(model, X, use_reentrant=False).mean().backward(),
    "reentrant": lambda model, _: checkpoint(model, X.clone().requires_grad_(), use_reentrant=True).mean().backward(),
}


@pytest.mark.parametrize("backward", COUNTED.values(), ids=list(COUNTED))
def test_the_examples_of_the_gradient_are_counted_once(backward: Loop) -> None:
    model = net()
    optimizer = vadam(model)
    backward(model, optimizer)
    assert optimizer.counted_examples == 16


def unequal_batches(rank: int) -> Tensor:
    model = net()
    optimizer, n = vadam(model), (8, 5)[rank]
    replica = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    for _ in range(STEPS):
        F.cross_entropy(replica(torch.randn(n, 4)), torch.randint(3, (n,))).backward()
        finish(optimizer)
    return weights(model)


def test_replicas_with_unequal_batches_stay_equal(two_processes: Pool) -> None:
    first, second = two_processes(unequal_batches)
    assert torch.equal(first, second)


# ---------------------------------------------------------------- others who write weights


def test_an_embedding_that_bounds_its_norms_does_not_move_the_mean() -> None:
    ids = torch.arange(6)
    model: Any = nn.Sequential(nn.Embedding(6, 4, max_norm=1.0), nn.Linear(4, 3))
    model(ids)  # from here on the mean satisfies the bound
    optimizer, before = fixed(model), model[0].weight.detach().clone()
    for _ in range(50):
        F.cross_entropy(model(ids), ids % 3).backward()
        finish(optimizer)
    torch.testing.assert_close(model[0].weight.detach(), before)


@pytest.mark.filterwarnings("ignore:parameters were written")
@pytest.mark.parametrize("between_forwards", [False, True])
def test_weights_clipped_over_a_sample(between_forwards: bool) -> None:
    """The mean moves by what the clipping moved."""
    model = net()
    optimizer, before = fixed(model), weights(model)
    loss_of(model).backward()
    sample = weights(model)
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.3, 0.3)
    if between_forwards:
        loss_of(model).backward()
    finish(optimizer)
    torch.testing.assert_close(weights(model), before + sample.clamp(-0.3, 0.3) - sample)


class Sharpness(torch.optim.Optimizer):
    """SAM (arXiv:2010.01412) around another optimizer, as its users' copies of it are written."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer) -> None:
        super().__init__(model.parameters(), {"rho": 0.05})
        self.base, self.param_groups = base, base.param_groups

    def climb(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            self.state[p]["old"] = p.data.clone()
            p.data = p.data + 0.05 * p.grad
        self.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p, state in self.state.items():
            p.data = state["old"]
        self.base.step()


@pytest.mark.filterwarnings("ignore:parameters were written")
def test_sharpness_aware_minimisation_climbs_and_comes_back() -> None:
    model = net()
    optimizer, before = fixed(model), weights(model)
    sharpness = Sharpness(model, optimizer)
    for _ in range(3):
        loss_of(model).backward()
        sample, gradients = weights(model), torch.cat([p.grad.flatten() for p in model.parameters()])
        sharpness.climb()
        loss_of(model).backward()
        torch.testing.assert_close(weights(model), sample + 0.05 * gradients)
        finish(sharpness)
    torch.testing.assert_close(weights(model), before)
    assert optimizer.completed_steps == 3


@pytest.mark.parametrize(
    "how", ["skipped by the scaler", "skipped after a prediction", "unused forward", "interrupted"]
)
def test_readers_see_the_mean(how: str) -> None:
    """Averages, copies and files made after a step that was skipped, or in evaluation mode."""
    model = net()
    optimizer, before = fixed(model), weights(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        if how == "skipped by the scaler":
            skipped_by_the_scaler(model, optimizer)
        elif how == "skipped after a prediction":
            loss_of(model).backward()
            prediction(model, optimizer)
            optimizer.zero_grad()
        else:
            loss = loss_of(model)
            if how == "interrupted":
                loss.backward()
            model.eval()
        average.update_parameters(model)
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        for read in (average.module, copy.deepcopy(model), torch.load(saved, weights_only=False)):
            assert torch.equal(weights(read), before)
        model.train()


# ---------------------------------------------------------------- modes, and arguments


@pytest.mark.parametrize("what", ["model", "step", "training step"])
@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_compiled(what: str, undisturbed: Tensor) -> None:
    compiled = functools.partial(torch.compile, backend="eager")
    model = net()
    optimizer = vadam(model)
    forward: Any = compiled(model) if what == "model" else model

    def backward() -> None:
        loss_of(forward).backward()

    def update() -> None:
        finish(optimizer)

    end = compiled(update) if what == "step" else update

    def training_step() -> None:
        backward()
        end()

    run = compiled(training_step) if what == "training step" else training_step
    for _ in range(STEPS):
        run()
    torch._dynamo.reset()
    torch.testing.assert_close(weights(model), undisturbed, rtol=0, atol=1e-6)


def test_lazy_parameters() -> None:
    """Made before the first forward, which is the one at the mean."""
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
    optimizer = vadam(model)
    for _ in range(STEPS):
        plain(model, optimizer)
    assert all(optimizer.state[p]["step"] == STEPS for p in model.parameters())
    model(X)
    assert optimizer.is_sampled
    assert not torch.equal(
        weights(model), torch.cat([optimizer.posterior(p).mean.flatten() for p in model.parameters()])
    )


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("moment", ["before the first step", "between steps", "before a step"])
def test_cast_in_the_middle_of_a_run(moment: str, to: torch.dtype) -> None:
    """As near to the run in fp32 as the new precision tells."""

    def step(model: Any, optimizer: Any, cast: bool = False) -> None:
        if cast and moment == "between steps":
            model.to(to)
        F.cross_entropy(model(X.to(model[0].weight.dtype)), Y).backward()
        if cast and moment == "before a step":
            model.to(to)
        finish(optimizer)

    model, other = net(), net()
    optimizer, reference = vadam(model), vadam(other)
    if moment == "before the first step":
        model.to(to)
    for n in range(STEPS + 2):
        step(model, optimizer, cast=n == STEPS)
        step(other, reference)
    assert all(p.dtype == to for p in model.parameters())
    assert all(torch.equal(p, optimizer.posterior(p).mean.to(to)) for p in model.parameters())
    tolerance = 1e-2 if to == torch.bfloat16 else 1e-6
    torch.testing.assert_close(weights(model).float(), weights(other), rtol=0, atol=tolerance)


@pytest.mark.parametrize("value", [float, lambda step: torch.tensor([int(step)])], ids=["number", "integers"])
@pytest.mark.parametrize("where", ["in a state dict", "in the state"])
def test_a_step_that_is_a_number(where: str, value: Callable[[Tensor], Any], undisturbed: Tensor) -> None:
    def step(model: Any, optimizer: Any) -> None:
        saved = optimizer.state_dict()
        for entry in saved["state"].values():
            entry["step"] = value(entry["step"])
        if where == "in a state dict":
            optimizer.load_state_dict(saved)
        else:
            for p, entry in zip(model.parameters(), saved["state"].values(), strict=False):
                optimizer.state[p]["step"] = float(entry["step"])
        plain(model, optimizer)

    assert torch.equal(train(step), undisturbed)


def test_a_step_that_is_no_number_is_refused_before_anything_changes() -> None:
    model = net()
    optimizer = vadam(model)
    plain(model, optimizer)
    saved, before = optimizer.state_dict(), weights(model)
    saved["state"][2]["step"] = torch.ones(2)
    with pytest.raises(ValueError, match="step of parameter 2"):
        optimizer.load_state_dict(saved)
    assert torch.equal(weights(model), before)
    plain(model, optimizer)


class Adapter(nn.Module):
    """LoRA on a frozen layer, packed as a quantised base is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Parameter(torch.randint(0, 255, (3, 8), dtype=torch.uint8), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(4, 8) / 8**0.5), nn.Parameter(torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.base.float() / 255 - 0.5).T + 4 * x @ self.A.T @ self.B.T


def test_a_schedule_of_absolute_rates_on_a_quantised_base(caplog: pytest.LogCaptureFixture) -> None:
    """Adam(lr=1.0) and a schedule that returns the rate: the limit is for the rate of a step, not for the 1.0."""
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    y = (x @ torch.randn(8, 3, generator=torch.Generator().manual_seed(1))).argmax(-1)

    def loss_after(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 3e-3 * min((s + 1) / 50, (50 / (s + 1)) ** 0.5))
        for step in range(200):
            rows = torch.arange(32 * step, 32 * step + 32) % 256
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            finish(optimizer)
            rate.step()
        return F.cross_entropy(model.eval()(x), y).item()

    model = Adapter()
    adam = loss_after(model, torch.optim.Adam([model.A, model.B], lr=1.0))
    model = Adapter()
    optimizer = VAdam(model.parameters(), lr=1.0, num_examples=256)
    optimizer.attach(model)
    assert loss_after(model, optimizer) == pytest.approx(adam, abs=0.1)
    assert model.base not in optimizer.state
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_dimensions_of_one_element(backend: str, dtype: torch.dtype) -> None:
    values = [
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) for shape in ((1,), (4, 1), (1, 3))
    ]

    def ends(strided: bool) -> list[Tensor]:
        params = [nn.Parameter(torch.stack([v, v], -1)[..., 0] if strided else v.clone()) for v in values]
        optimizer = IVON(params, 0.1, 100, backend=backend)
        for _ in range(3):
            optimizer.train()
            for p in params:
                p.grad = torch.stack([p.detach(), p.detach()], -1)[..., 0] if strided else p.detach().clone()
            optimizer.step()
        return [p.detach() for p in params]

    assert all(map(torch.equal, ends(True), ends(False)))


def test_objects_with_slots_and_weights_that_are_swapped() -> None:
    """Outputs that autograd's users make up; and what torch does to parameters behind the scenes."""

    class Output:
        __slots__ = ("logits",)

        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(nn.Sequential):
        def forward(self, x: Tensor) -> Output:
            return Output(super().forward(x))

    def step(model: Any, optimizer: Any) -> None:
        output = model(X)
        optimizer.zero_grad()
        F.cross_entropy(output.logits, Y).backward()
        optimizer.step()
        for p in model.parameters():
            torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))

    model = Wrapped(*net())
    optimizer = vadam(model)
    for _ in range(STEPS):
        step(model, optimizer)
    assert torch.equal(weights(model), train(plain))


@pytest.mark.parametrize("training", [True, False])
def test_an_attached_model_can_be_exported(training: bool) -> None:
    """At the mean, and the training goes on."""
    model = net().train(training)
    optimizer, before = fixed(model), weights(model)
    exported = torch.export.export(model, (X,), strict=False).module()
    with torch.no_grad():
        expected = model.eval()(X)
        torch.testing.assert_close(exported(X), expected)
    assert torch.equal(weights(model), before)
    plain(model.train(), optimizer)
    assert optimizer.completed_steps == 1


def test_a_search_for_a_learning_rate_leaves_no_trace(undisturbed: Tensor) -> None:
    """Save both, try, load both, as lr_find does."""
    model = net()
    optimizer = vadam(model)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for n in range(5):
        optimizer.param_groups[0]["lr"] = 10.0 ** (n - 4)
        plain(model, optimizer)
    loss_of(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for _ in range(STEPS):
        plain(model, optimizer)
    assert torch.equal(weights(model), undisturbed)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
@pytest.mark.parametrize("moment", ["sampled", "with gradients"])
def test_a_copy_made_in_the_middle_of_a_step_goes_on(
    moment: str, how: Callable[[Any], Any], undisturbed: Tensor
) -> None:
    model = net()
    optimizer = vadam(model)
    for _ in range(STEPS - 1):
        plain(model, optimizer)
    loss = loss_of(model)
    if moment == "with gradients":
        loss.backward()
    other, copied = how((model, optimizer))
    if moment == "sampled":
        copied.attach(other)
        loss_of(other).backward()
    else:  # torch copies no gradients
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = p.grad
    copied.step()
    assert torch.equal(weights(other), undisturbed)
