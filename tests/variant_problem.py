"""A planted low-rank regression that every method of `ivon_lora.variants` is trained on."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora import IVON, VAdam
from ivon_lora.variants import METHODS, Variant

WIDTH, ROWS, RANK = 8, 64, 4
OPTIMIZERS = ("sgd", "adamw", "vadam", "ivon")


RATES = {"sgd": 0.5, "adamw": 0.02, "vadam": 0.02, "ivon": 0.5}

#: steps of the regression, and options of the methods, ``total_steps`` apart
STEPS: dict[str, int] = {**dict.fromkeys(METHODS, 150), "xgblora": 300}
OPTIONS: dict[str, dict[str, Any]] = {
    "beamlora": {"temperature": 0.5},
    "cola": {"links": 3},
    "diffora": {},
    "flat-lora": {"replicas": "same"},
    "lora-pro": {},
    "rm-lora": {"orthogonality": 0.01},
    "sora": {"init": "ones"},
    "xgblora": {"booster_steps": 25, "layers": 0.5},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def base() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def make_model(rank: int = RANK) -> Any:
    from peft import LoraConfig, get_peft_model

    net = base()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(net, LoraConfig(r=rank, lora_alpha=rank, target_modules=["layers.0", "layers.1"]))


@functools.cache
def make_data() -> tuple[Tensor, Tensor]:
    """Inputs and the outputs of the base with a rank-2 change in both layers."""
    generator = torch.Generator().manual_seed(2)
    net = base()
    with torch.no_grad():
        for layer in net.layers:
            assert isinstance(layer, nn.Linear)
            left, right = torch.randn(WIDTH, 2, generator=generator), torch.randn(2, WIDTH, generator=generator)
            layer.weight += left @ right / WIDTH
    x = torch.randn(ROWS, WIDTH, generator=generator)
    with torch.no_grad():
        return x, net(x)


def loss_of(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    device = next(model.parameters()).device
    x, y = (tensor[rows].to(device) for tensor in make_data())
    return nn.functional.mse_loss(model(x), y)


class Side(nn.Module):
    """Eight layers side by side, each with inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x[:, i]) for i, layer in enumerate(self.layers)]).sum(0)


def make_planted(changed: tuple[int, ...], rank: int = 2) -> tuple[Any, Callable[[], Tensor]]:
    """A model, and its loss on a new batch of a base in which some layers differ by rank 1, with noise."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain, truth = Side(), Side()
    truth.load_state_dict(plain.state_dict())
    for i in changed:
        truth.get_parameter(f"layers.{i}.weight").data.add_(0.6 * torch.outer(torch.randn(6), torch.randn(6)))
    targets = [f"layers.{i}" for i in range(8)]
    model: Any = get_peft_model(plain, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))

    def loss() -> Tensor:
        x = torch.randn(32, 8, 6)
        with torch.no_grad():
            y = truth(x) + 0.5 * torch.randn(32, 6)
        return nn.functional.mse_loss(model(x), y)

    return model, loss


def make_optimizer(name: str, groups: list[dict[str, Any]], lr: float, model: nn.Module | None = None) -> Any:
    """An optimizer by name; those with a posterior are attached to the model."""
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if name == "vadam":
        optimizer: IVON = VAdam(groups, lr, num_examples=10 * ROWS, batch_size=ROWS, lr_limit=None)
    else:
        groups = [{k: v for k, v in group.items() if k in ("params", "lr")} for group in groups]
        optimizer = IVON(groups, lr, ess=1e6, hess_init=0.2, beta2=0.9999)
    if model is not None:
        optimizer.attach(model)
    return optimizer


@dataclass
class Run:
    model: Any
    variant: Any
    optimizer: Any

    def train(self, steps: int, micro_batches: int = 1) -> None:
        self.model.train()
        size = ROWS // micro_batches
        for _ in range(steps):
            self.optimizer.zero_grad()
            for n in range(micro_batches):
                (loss_of(self.model, slice(n * size, (n + 1) * size)) / micro_batches).backward()
            self.optimizer.step()

    def logits(self) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            value: Tensor = self.model(make_data()[0].to(next(self.model.parameters()).device))
        self.model.train()
        return value

    def loss(self) -> float:
        return float(nn.functional.mse_loss(self.logits().cpu(), make_data()[1]))

    def trained(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def frozen(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if not p.requires_grad}

    def save(self, path: Path) -> None:
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])


def make_variant(method: str, model: nn.Module, steps: int | None = None, **options: Any) -> Variant:
    """With its `OPTIONS`, and those given."""
    if "total_steps" in inspect.signature(METHODS[method]).parameters:
        options.setdefault("total_steps", STEPS[method] if steps is None else steps)
    return METHODS[method](model, **{**OPTIONS[method], **options})


def start(
    method: str,
    optimizer: str,
    *,
    rank: int = RANK,
    steps: int | None = None,
    fast: float = 1.0,
    prepare: Callable[[Any], object] = lambda model: None,
    **options: Any,
) -> Run:
    """A run, always the same; ``fast`` multiplies its learning rate; ``prepare(model)`` precedes the optimizer."""
    model = make_model(rank)
    variant = make_variant(method, model, steps, **options)
    prepare(model)
    made = make_optimizer(optimizer, variant.param_groups(), fast * RATES[optimizer], model)
    return Run(model, variant.attach(made), made)


def start_lora(optimizer: str, rank: int = RANK) -> Run:
    """A run without a method."""
    model = make_model(rank)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    return Run(model, None, make_optimizer(optimizer, groups, RATES[optimizer], model))


def resume(rank: int, method: str, optimizer: str, path: str, steps: int) -> dict[str, Tensor]:
    """In another process: load, go on, and return what trains."""
    run = start(method, optimizer)
    run.load(Path(path))
    run.train(steps)
    return run.trained()


def train_in_ddp(rank: int, method: str, optimizer: str, steps: int) -> dict[str, Tensor]:
    """In a process of a group, each on half of the rows."""
    run = start(method, optimizer)
    ddp = nn.parallel.DistributedDataParallel(run.model, find_unused_parameters=True)
    half = ROWS // 2
    for _ in range(steps):
        run.optimizer.zero_grad()
        loss_of(ddp, slice(rank * half, (rank + 1) * half)).backward()
        run.optimizer.step()
    return run.trained()
