"""``batch_size="auto"``: how many examples are in the gradient, whatever a batch looks like."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.loop_problem import STEPS, Loop, X, Y, finish, loss_of, net, vadam, weights
from tests.two_processes import Pool


class Anything(nn.Linear):
    """Takes any batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.weight.sum()


class Tagger(nn.LSTM):
    def forward(self, sequences: Any) -> Any:  # type: ignore[override]
        return super().forward(sequences)[0].data.mean()


IMAGES = [torch.randn(3, 8, 8 + i) for i in range(5)]


def packed_rows() -> dict[str, Tensor]:
    """What transformers' DataCollatorWithFlattening makes of sequences of 5, 6 and 7 tokens."""
    positions = torch.cat([torch.arange(n) for n in (5, 6, 7)])[None]
    return {"input_ids": positions % 3, "position_ids": positions, "labels": positions}


def padded_rows() -> dict[str, Tensor]:
    """Two sequences, one of them padded on the left."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": positions % 3, "position_ids": positions, "attention_mask": mask, "labels": positions}


def ragged() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        return torch.nested.nested_tensor([X[:2], X[:3]])


FORMS: list[tuple[nn.Module, Any, int, bool]] = [
    (Tagger(4, 8), (nn.utils.rnn.pack_sequence([torch.randn(n, 4) for n in (9, 5, 3)]),), 3, False),
    (nn.Sequential(nn.GRU(4, 2)), (torch.randn(7, 3, 4),), 3, True),
    (Anything(2, 1), (IMAGES,), 5, True),
    (Anything(2, 1), (torch.tensor([0.3]), X), 16, True),  # the time of a denoiser
    (Anything(2, 1), packed_rows(), 3, False),
    (Anything(2, 1), padded_rows(), 2, False),
    (Anything(2, 1), (X[:10], torch.randint(10, (2, 20))), 1, True),  # the nodes of a graph, and its edges
    (Anything(2, 1), ([{"x": x, "height": 3} for x in X[:5]],), 5, True),
    (Anything(2, 1), (X[:5],), 5, False),
    (Anything(2, 1), {"labels": X[0], "input_ids": X[:5]}, 5, False),
    (Anything(2, 1), (None, {"mask": torch.tensor(1.0), "pixel_values": X[:5]}), 5, False),
    (Anything(2, 1), ((X[0, :3], X[:5]),), 3, True),
    (Anything(2, 1), ([(X[0], Y[0]), (X[1], Y[1])],), 2, True),
    (Anything(2, 1), (tuple(IMAGES),), 3, True),
    (Anything(2, 1), {"input_ids": torch.zeros(1, 9), "cu_seq_lens_q": torch.tensor([0, 4, 7, 9])}, 3, False),
    (Anything(2, 1), {"input_ids": torch.zeros(9), "cu_seqlens": torch.tensor([0, 4, 7, 9, 9, 9])}, 3, False),
    (
        Anything(2, 1),
        {"input_ids": torch.zeros(1, 8), "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])},
        3,
        False,
    ),
    (Anything(2, 1), {"inputs_embeds": torch.zeros(5, 9, 2), "position_ids": torch.arange(9)[None]}, 5, False),
    (Anything(2, 1), (ragged(),), 2, False),
    (nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8)), (torch.randn(7, 3, 4),), 3, True),
    (Anything(2, 1), ("text",), 0, True),
    (Anything(2, 1), ([X[0], X[0]],), 2, True),
]


@pytest.mark.parametrize(("model", "batch", "right", "doubtful"), FORMS)
def test_examples_in_batches_of_other_forms(model: Any, batch: Any, right: int, doubtful: bool) -> None:
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


def one_of_two_thrown_away(set_to_none: bool) -> Loop:
    def run(model: Any, optimizer: Any) -> None:
        loss_of(model).backward()
        model.zero_grad(set_to_none=set_to_none)
        loss_of(model).backward()

    return run


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
    "one of two thrown away": one_of_two_thrown_away(set_to_none=True),
    "one of two set to zero": one_of_two_thrown_away(set_to_none=False),
    "autograd.grad": returned,
    "eval mode": in_eval_mode,
}


@pytest.mark.parametrize("backward", COUNTED.values(), ids=list(COUNTED))
def test_the_examples_of_the_gradient_are_counted_once(backward: Loop) -> None:
    model = net()
    optimizer = vadam(model)
    backward(model, optimizer)
    assert optimizer.counted_examples == 16


def test_chunks_of_a_batch_or_time_steps_in_one_backward_are_in_doubt() -> None:
    model = net()
    optimizer = vadam(model)
    with pytest.warns(UserWarning, match=r"pieces of one tensor.*batch_size=.*count_examples"):
        (loss_of(model, slice(8)) + loss_of(model, slice(8, 16))).backward()
    assert optimizer.counted_examples == 8


def unequal_batches(rank: int) -> Tensor:
    model = net()
    optimizer, n = vadam(model), (8, 5)[rank]
    replica = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    for _ in range(STEPS):
        F.cross_entropy(replica(torch.randn(n, 4)), torch.randint(3, (n,))).backward()
        finish(optimizer)
    return weights(model)


def joined(rank: int) -> str:
    model = net()
    optimizer = vadam(model, batch_size=16)
    replica = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(RuntimeError) as caught, replica.join():
        loss_of(replica)
    assert not optimizer.is_sampled
    return str(caught.value)


def test_unequal_numbers_of_batches_are_refused(two_processes: Pool) -> None:
    """One process would wait for the sum of a step that the other one does not make."""
    assert all("the same number of batches" in message for message in two_processes(joined))


def test_replicas_with_unequal_batches_stay_equal(two_processes: Pool) -> None:
    first, second = two_processes(unequal_batches)
    assert torch.equal(first, second)
