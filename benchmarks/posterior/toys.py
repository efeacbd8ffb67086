"""Two small beds whose true Fisher information is cheap and exact: logistic regression, and an MLP on digits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from benchmarks.posterior.curvature import Agreement, agreement
from benchmarks.posterior.ledger import Ledger
from benchmarks.posterior.methods import make_optimizer
from benchmarks.posterior.options import parse_options
from ivon_lora import IVON
from ivon_lora.finetune.schedule import learning_rate
from ivon_lora.finetune.settings import make_settings
from ivon_lora.posterior.metrics import score_probabilities

BATCH = 32
FEATURES, EXAMPLES, HELD_OUT = 40, 2000, 4000  # of the logistic regression
SAMPLES = 8


@dataclass(frozen=True)
class Bed:
    """Data and model. ``x`` is (examples, features), ``y`` the class; ``model(seed)`` returns logits (n, classes)."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    model: Callable[[int], nn.Module]


@dataclass(frozen=True)
class Run:
    """One training run; the fields are the key of its row.

    Args:
        bed: of `BEDS`.
        method: of `methods.METHODS`.
        lr: peak learning rate.
        seed: of initialisation, batches and posterior noise (the data are always the same).
        options: further arguments of the optimizer; "" for the defaults.
        steps: optimizer steps of 32 examples.
    """

    bed: str
    method: str
    lr: float
    seed: int
    options: str = ""
    steps: int = 1000


#: held-out at the mean; held-out averaged over samples of the posterior; the same on training examples; and with their
#: own labels instead of the label's expectation, which is what the optimizer sees
TRUTHS = ("mean", "posterior", "training", "observed")
CURVATURE = tuple(Agreement.__dataclass_fields__)
RESULTS = (
    *("accuracy", "nll", "ece", "brier", "sampled_nll", "step_rms"),
    *(f"{truth}_{name}" for truth in TRUTHS for name in CURVATURE),
)


def ledger(folder: Path) -> Ledger:
    """The file of the runs on these beds."""
    return Ledger(folder / "posterior_toys.csv", tuple(Run.__dataclass_fields__), RESULTS)


class Logistic(nn.Module):
    """Logits (0, w x + b)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        return torch.cat([torch.zeros_like(z), z], -1)


@lru_cache(maxsize=2)
def load_bed(name: str) -> Bed:
    """ "logreg": 40 independent features of scales .1 to 3; "digits": an MLP 64-32-10 on scikit-learn's 8x8 digits.

    Raises:
        ValueError: unknown name.
    """
    if name == "logreg":
        return _logreg()
    if name == "digits":
        return _digits()
    raise ValueError(f"bed must be logreg or digits, got {name!r}")


def _logreg() -> Bed:
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1, 0.5, FEATURES)
    weight = torch.randn(FEATURES, generator=generator) / scale / 3
    x = torch.randn(EXAMPLES + HELD_OUT, FEATURES, generator=generator) * scale
    y = (torch.rand(len(x), generator=generator) < (x @ weight).sigmoid()).long()
    return Bed(x[:EXAMPLES], y[:EXAMPLES], x[EXAMPLES:], y[EXAMPLES:], lambda seed: Logistic(FEATURES))


def _digits() -> Bed:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order].long()
    train = 1297

    def model(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    return Bed(x[:train], y[:train], x[train:], y[train:], model)


def fisher(model: nn.Module, params: Mapping[str, Tensor], x: Tensor, labels: Tensor | None = None) -> list[Tensor]:
    """Diagonal of the Fisher information on ``x`` (n, features), the label's expectation taken exactly.

    With ``labels`` (n,), the empirical one: the mean of the squared gradients at these labels.

    grad log p(y) = J_y - sum_k p_k J_k with J the Jacobian of the logits.
    """

    def logits(values: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, values, (one.unsqueeze(0),))[0]

    values = {name: p.detach() for name, p in params.items()}
    jacobians = vmap(jacrev(logits), in_dims=(None, 0))(values, x)
    p = vmap(logits, in_dims=(None, 0))(values, x).softmax(-1)
    weights = p if labels is None else nn.functional.one_hot(labels, p.shape[-1]).to(p)
    diagonals = []
    for name in values:
        jacobian = jacobians[name].flatten(2)
        score_ = jacobian - torch.einsum("nk,nkp->np", p, jacobian).unsqueeze(1)
        diagonals.append(torch.einsum("nk,nkp->p", weights, score_.square()).view_as(values[name]) / len(x))
    return diagonals


def execute(run: Run, folder: Path, curvature: bool) -> bool:
    """Make a run and write its row, unless the row is there; says whether it was made."""
    book = ledger(folder)
    if book.has(asdict(run)):
        return False
    started = time.monotonic()
    torch.set_num_threads(1)
    bed = load_bed(run.bed)
    model, optimizer, step_rms = train(run, bed)
    found = {"step_rms": step_rms}
    with torch.no_grad():
        scores = asdict(score_probabilities(model(bed.test_x).double().softmax(-1), bed.test_y))
    found |= {name: scores[name] for name in ("accuracy", "nll", "ece", "brier")}
    if isinstance(optimizer, IVON):
        found["sampled_nll"] = _sampled_nll(model, optimizer, bed)
        if curvature:
            found |= curvature_facts(model, optimizer, bed)
    book.append(asdict(run), found, time.monotonic() - started)
    return True


def train(run: Run, bed: Bed) -> tuple[nn.Module, torch.optim.Optimizer, float]:
    """The trained model (at the mean), its optimizer, and the RMS of a step halfway through, in units of its lr."""
    model = bed.model(run.seed)
    params = list(model.parameters())
    count = {"num_examples": len(bed.x), "batch_size": BATCH}
    optimizer = make_optimizer(run.method, params, run.lr, seed=run.seed, **count, **parse_options(run.options))
    settings = make_settings({"optimizer": "adamw", "lr": run.lr, "steps": run.steps})
    generator = torch.Generator().manual_seed(run.seed)
    step_rms = 0.0
    for step in range(1, run.steps + 1):
        lr = learning_rate(settings, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        chosen = torch.randint(len(bed.x), (BATCH,), generator=generator)
        halfway = step == run.steps // 2
        before = [p.detach().clone() for p in params] if halfway else []
        if isinstance(optimizer, IVON):
            optimizer.train()
        nn.functional.cross_entropy(model(bed.x[chosen]), bed.y[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if halfway:
            moves = torch.cat([(p.detach() - old).flatten() for p, old in zip(params, before, strict=True)])
            step_rms = float(moves.square().mean().sqrt()) / lr
    if isinstance(optimizer, IVON):
        optimizer.eval()
    return model, optimizer, step_rms


def curvature_facts(model: nn.Module, optimizer: IVON, bed: Bed) -> dict[str, float]:
    """Agreement with each of `TRUTHS`; the mean-field optimum has h = E_q[H], hence the averages over samples."""
    params = dict(model.named_parameters())
    held_out = bed.test_x, None
    training = bed.x[: len(bed.test_x)], None
    observed = bed.x[: len(bed.test_x)], bed.y[: len(bed.test_x)]
    found: dict[str, float] = {}
    for name, (x, labels), samples in (
        ("mean", held_out, 0),
        ("posterior", held_out, SAMPLES),
        ("training", training, SAMPLES),
        ("observed", observed, SAMPLES),
    ):
        halves = _fisher_halves(model, optimizer, params, x, labels, samples)
        facts = asdict(agreement(optimizer, list(params.values()), halves))
        found |= {f"{name}_{key}": value for key, value in facts.items()}
    return found


def _fisher_halves(
    model: nn.Module, optimizer: IVON, params: Mapping[str, Tensor], x: Tensor, labels: Tensor | None, samples: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Of every other example and of the rest, averaged over ``samples`` of the posterior (0: at the mean)."""
    sums = [torch.zeros_like(p) for p in params.values()], [torch.zeros_like(p) for p in params.values()]
    for _ in range(max(samples, 1)):
        with optimizer.sampled_params() if samples else nullcontext():
            for start, total in enumerate(sums):
                part = fisher(model, params, x[start::2], None if labels is None else labels[start::2])
                for t, f in zip(total, part, strict=True):
                    t.add_(f, alpha=1 / max(samples, 1))
    return sums


def _sampled_nll(model: nn.Module, optimizer: IVON, bed: Bed) -> float:
    from ivon_lora import posterior_predict

    p = posterior_predict(model, optimizer, lambda m: m(bed.test_x).double(), n_samples=SAMPLES)
    return score_probabilities(p, bed.test_y).nll
