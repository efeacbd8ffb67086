"""One training loop for all studies, timed step by step, and the scores of what it trained."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.data import Sentences
from ivon_lora import IVON, VAdam, score_probabilities

METRICS = ("accuracy", "nll", "ece", "brier")


class Data(Protocol):
    """What `train` asks of its data: batches of indices, and the model's arguments for one of them."""

    def training_batches(self, size: int, seed: int) -> Iterator[list[int]]:
        """Endless random batches."""

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of these examples, with ``labels``."""


@dataclass(frozen=True)
class Step:
    """Loss of a batch, and seconds of processor time of the two halves of its step."""

    loss: float
    passes: float
    optimizer: float


def make_optimizer(method: str, model: Any, lr: float, groups: Any = None, **options: Any) -> torch.optim.Optimizer:
    """An optimizer of all that ``model`` trains, or of ``groups``.

    Args:
        method: "vadam" with its defaults and ``options``; "ivon-opt" as its authors have it for LoRA; any other name is
            AdamW's, without weight decay.
    """
    params = groups or [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if method == "vadam":
        return VAdam(params, lr=lr, **options)
    if method == "ivon-opt":
        import ivon

        clip = 1e-3  # nearly every element of a step is clipped, so its size is lr * clip
        known = {"hess_init": 1e-3, "beta2": 0.99999, "weight_decay": 0.0, "clip_radius": clip, "rescale_lr": False}
        made: torch.optim.Optimizer = ivon.IVON([p for _, p in params], lr=lr / clip, ess=1e7, **known)
        return made
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    data: Data,
    *,
    steps: int,
    batch_size: int = 32,
    seed: int = 0,
    after_step: Callable[[int], object] = lambda step: None,
    own_loss: bool = False,
    second_half: str = "decay",
) -> Iterator[Step]:
    """Train with a learning rate that warms up over 6 % of the steps and then decays to 0.

    An optimizer other than `IVON` that has ``sampled_params`` (ivon-opt's) is used as that asks for.

    Args:
        model: called with ``input_ids`` and ``attention_mask``, gives ``logits``.
        seed: of batches and dropout.
        after_step: called with the number of steps made, before the gradients are cleared; counts as the optimizer's.
        own_loss: minimise what the model makes of the labels (PEFT's AdaLoRA adds its penalty), not the cross-entropy.
        second_half: "decay", or "constant" at half of the learning rate, for averages of the weights (SWA).
    """
    warmup = max(1, round(0.06 * steps))
    lowest = 0.5 if second_half == "constant" else 0.0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: max(lowest * (i >= warmup), min((i + 1) / warmup, (steps - i) / (steps + 1 - warmup)))
    )
    batches = data.training_batches(batch_size, seed)
    model.train()
    for number in range(1, steps + 1):
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:6], "big"))
        batch = data.batch(next(batches))
        clock = [time.process_time()]
        if isinstance(optimizer, IVON):
            optimizer.train()
        clock.append(time.process_time())
        labels = batch["labels"] if own_loss else batch.pop("labels")
        peer: Any = None if isinstance(optimizer, IVON) else getattr(optimizer, "sampled_params", None)
        with peer(train=True) if peer else nullcontext():
            output = model(**batch)
            loss = output.loss if own_loss else cross_entropy(output.logits.float(), labels)
            loss.backward()
        clock.append(time.process_time())
        optimizer.step()
        after_step(number)
        clock.append(time.process_time())
        optimizer.zero_grad()
        schedule.step()
        yield Step(float(loss.detach()), clock[2] - clock[1], clock[1] - clock[0] + clock[3] - clock[2])
    if isinstance(optimizer, IVON):
        optimizer.eval()


def averaged(call: Callable[[], Tensor], optimizer: Any, n_samples: int) -> Tensor:
    """The mean of what ``call`` gives at samples of the weights, which IVON and ivon-opt draw alike."""
    total = torch.zeros(())
    for _ in range(n_samples):
        with optimizer.sampled_params():
            total = total + call() / n_samples
    return total


@torch.no_grad()
def predict(model: Any, data: Sentences) -> Tensor:
    """Logits (sentences, classes) in double precision, with dropout off."""
    model.eval()
    order = data.batches(64)
    logits = torch.cat([model(**data.inputs(indices)).logits.double() for indices in order])
    return logits[torch.tensor([*itertools.chain(*order)]).argsort()]


def scores(probabilities: Tensor, data: Sentences) -> dict[str, float]:
    """`METRICS` of class probabilities (sentences, classes) for ``data``."""
    found = asdict(score_probabilities(probabilities, torch.tensor(data.labels)))
    return {name: found[name] for name in METRICS}
