"""A small LoRA model on a regression problem, and what the processes of `two_processes` do with it."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor

from ivon_lora import IVON, LoraAdapter, RankPruner, VAdam
from ivon_lora.optim.lr_limit import lr_limit
from tests.optimizer_problem import differing, photo

WORLD = 2
ROWS = 8  # of a batch of one process
#: every option that changes numbers has a value that matters
HYPER: dict[str, Any] = {
    "lr": 0.1, "ess": 50.0, "hess_init": 0.5, "beta2": 0.9, "weight_decay": 1e-3, "clip_radius": 0.5, "seed": 3,
}  # fmt: skip
SCHEDULE: dict[str, Any] = {"total_steps": 12, "warmup": 2, "final": 5, "interval": 2}


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter; sizes are chosen so that no shard begins at a multiple of four."""

    def __init__(self, n_in: int, n_out: int, rank: int, triplet: bool) -> None:
        super().__init__()
        self.base = nn.Linear(n_in, n_out).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, n_in) * 0.5)
        self.B = nn.Parameter(torch.randn(n_out, rank) * 0.5)
        self.E = nn.Parameter(torch.randn(rank, 1)) if triplet else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.A.T
        if self.E is not None:
            hidden = hidden * self.E.T
        return self.base(x) + hidden @ self.B.T


class Model(nn.Module):
    """Two adapters and a head whose bias has one element: one of two shards of it is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LoraLinear(7, 9, 5, triplet=False)
        self.second = LoraLinear(9, 6, 3, triplet=True)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model().to(dtype)


def adapters_of(model: nn.Module) -> list[LoraAdapter]:
    return [LoraAdapter(n, m.A, m.B, m.E) for n, m in model.named_modules() if isinstance(m, LoraLinear)]


def make_optimizer(model: nn.Module, criterion: str | None = "snr_abs", **changes: Any) -> IVON:
    """Of the trainable parameters by name; with a pruner unless ``criterion`` is None."""
    pruner = None if criterion is None else RankPruner(adapters_of(model), 1.5, criterion, **SCHEDULE)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if "num_examples" in changes:
        own = {name: changes.pop(name) for name in ("sync", "mc_samples") if name in changes}
        return VAdam([{"params": named, **own}], pruner=pruner, **{"lr": 0.01, **changes})
    return IVON(named, pruner=pruner, **{**HYPER, **changes})


def batch(step: int, process: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one process in one step, each from a problem of its own."""
    generator = torch.Generator().manual_seed(100 * step + process)
    x = torch.randn(ROWS, 7, generator=generator)
    return x, torch.sin(3 * x[:, :1]) + 0.3 * process


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x.to(next(model.parameters()).dtype)).float(), y)


def train(model: nn.Module, optimizer: IVON, steps: Iterable[int], processes: Iterable[int], samples: int = 0) -> None:
    """Steps on the batches of ``processes``, from so many contexts of `sampled_params`; 0: `train()` draws."""
    processes = list(processes)
    for step in steps:
        optimizer.zero_grad()
        for _ in range(max(samples, 1)):
            with optimizer.sampled_params(train=True) if samples else contextlib.nullcontext():
                for process in processes:
                    if not samples:
                        optimizer.train()
                    (loss_of(model, *batch(step, process)) / len(processes)).backward()
        optimizer.step()


def shard(model: Model, mesh: tuple[int, ...] = (WORLD,), **options: Any) -> Model:
    """FSDP2 as people apply it, block by block; a mesh of two dimensions copies along the first one."""
    device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("copies", "shards")[-len(mesh) :])
    for part in (model.first, model.second, model):
        fully_shard(part, mesh=device_mesh, **options)
    return model


def build(kind: str, seed: int = 0, mesh: tuple[int, ...] = (WORLD,), **options: Any) -> tuple[nn.Module, IVON]:
    """A fresh model in ``kind``, "ddp" or "fsdp", and its optimizer; other weights where it is to be loaded."""
    model = make_model(seed)
    if kind == "fsdp":
        shard(model, mesh)
    optimizer = make_optimizer(model, **options)
    optimizer.attach(model)
    return (nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model), optimizer


def advance(model: nn.Module, optimizer: IVON, steps: Iterable[int], rank: int) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, *batch(step, rank)).backward()
        optimizer.step()


def train_in_two(
    rank: int, steps: int, mesh: tuple[int, ...] | None, options: dict[str, Any], samples: int
) -> dict[str, Tensor]:
    """A process of two under FSDP2, or under DDP where there is no mesh; a look at the evaluation loss between steps.

    Its global random state is its own, and so are, at first, its weights, which DDP replaces by those of rank 0.
    """
    torch.manual_seed(1000 + rank)
    model, optimizer = build("ddp", rank, **options) if mesh is None else build("fsdp", mesh=mesh, **options)
    for step in range(steps):
        torch.rand(rank + 1)  # the global random states drift apart
        with torch.no_grad():
            loss_of(model, *batch(step, rank))  # a forward pass after which FSDP2 keeps what it has gathered
        if samples:
            train(model, optimizer, [step], [rank], samples)
        else:
            advance(model, optimizer, [step], rank)
    return photo(optimizer)


def make_lora_start() -> Model:
    """B at zero, as where the training of an adapter begins."""
    model = make_model()
    for adapter in adapters_of(model):
        nn.init.zeros_(adapter.B)
    return model


def limit_in_fsdp(rank: int) -> float:
    return lr_limit(shard(make_lora_start(), (WORLD,)).parameters())


# ---------------------------------------------------------------- replicas that draw their own noise


def train_with_own_noise(rank: int, steps: int, how: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """``how``: by which means the gradients of a replica stay its own; "same batch" gives all of them rank 0's."""
    torch.manual_seed(1000 + rank)
    model = make_model(seed=rank if "ddp" in how else 0)
    optimizer = make_optimizer(model, sync=True, **options)
    if how in ("without", "same batch", "attached before ddp"):
        optimizer.attach(model)
    wrapped = nn.parallel.DistributedDataParallel(model) if "ddp" in how else model
    if how == "attached after ddp":
        optimizer.attach(wrapped)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(2):
            own = 0 if how == "same batch" else rank
            with wrapped.no_sync() if how == "no_sync of ddp" else contextlib.nullcontext():  # type: ignore[operator]
                optimizer.train()
                (loss_of(wrapped, *batch(2 * step + micro, own)) / 2).backward()
        optimizer.step()
    return photo(optimizer)


def curvature_of_one_step(rank: int, sync: bool) -> Tensor:
    """What one step adds to the Hessian of 20,000 parameters with the loss 0.5 c_r theta^2, c_r = 1 + rank."""
    p = nn.Parameter(torch.full((20_000,), 0.1, dtype=torch.float64))
    optimizer = IVON([p], lr=0.0, ess=10.0, hess_init=1.0, weight_decay=0.0, beta2=1 - 1e-6, sync=sync)
    optimizer.train()
    (0.5 * (1 + rank) * p.square().sum()).backward()
    if not sync:  # as DDP does
        assert p.grad is not None
        dist.all_reduce(p.grad)
        p.grad.div_(WORLD)
    optimizer.step()
    return (optimizer.state[p]["hess"] - 1.0) / 1e-6 + 1.0  # f, but for terms of the order of rho


def refusal(rank: int, fault: str) -> str:
    """The message of the error that a misuse of ``sync=True`` gives, and whether anything changed."""
    model = make_model(seed=rank if fault == "weights" else 0)
    optimizer = make_optimizer(model, sync=True, seed=rank if fault == "seed" else 0, criterion=None)
    wrapped = nn.parallel.DistributedDataParallel(model) if fault == "averaged" else model
    for _ in range(1 + rank if fault == "samples" else 1):
        with optimizer.sampled_params(train=True):
            loss_of(wrapped, *batch(0, rank)).backward()
    before = photo(optimizer)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error) if not differing(before, photo(optimizer)) else f"changed, and {error}"
    return "nothing was raised"


def train_with_missing_gradients(rank: int) -> dict[str, Tensor]:
    """The second adapter is used by replica 0 only, and in step 1 by nobody."""
    model = make_model()
    optimizer = make_optimizer(model, sync=True, criterion="sensitivity")
    optimizer.attach(model)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.train()
        x, y = batch(step, rank)
        hidden = model.first(x)
        if rank == 0 and step != 1:
            hidden = model.second(hidden)
        (hidden.mean(dim=1, keepdim=True) - y).square().mean().backward()
        optimizer.step()
    return photo(optimizer)


# ---------------------------------------------------------------- torch.distributed.checkpoint


def resume_from_checkpoint(
    rank: int, folder: str, kinds: tuple[str, str], how: str, stop: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train, save after ``stop`` steps with a sample live, go on; and load into something fresh, and go on there."""
    full = how in ("full", "broadcast")
    options = StateDictOptions(full_state_dict=full, cpu_offload=full, flatten_optimizer_state_dict=how == "flat")
    model, optimizer = build(kinds[0])
    advance(model, optimizer, range(stop), rank)
    loss_of(model, *batch(stop, rank))  # draws a sample, which the guard of attach ends
    saved = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    if full:
        if rank == 0:
            torch.save(saved, f"{folder}/whole.pt")
        dist.barrier()
    else:
        save(saved, checkpoint_id=folder)
    advance(model, optimizer, range(stop, 12), rank)

    fresh, new = build(kinds[1], seed=7)
    if full:
        options.broadcast_from_rank0 = how == "broadcast"
        has_file = rank == 0 or not options.broadcast_from_rank0
        loaded = torch.load(f"{folder}/whole.pt", weights_only=True) if has_file else {"model": {}, "optimizer": {}}
    else:
        loaded = {
            "model": get_model_state_dict(fresh, options=options),
            "optimizer": get_optimizer_state_dict(fresh, new, options=options),
        }
        load(loaded, checkpoint_id=folder)
    set_model_state_dict(fresh, loaded["model"], options=options)
    set_optimizer_state_dict(fresh, new, loaded["optimizer"], options=options)
    advance(fresh, new, range(stop, 12), rank)
    return photo(optimizer), photo(new)


def resume_sharded(rank: int, file: str, stop: int) -> dict[str, Tensor]:
    """Go on, sharded, with what one process has saved by ``torch.save`` after ``stop`` steps."""
    saved = torch.load(file, weights_only=True)
    model, optimizer = build("fsdp", seed=7)
    set_model_state_dict(model, saved["model"], options=StateDictOptions(full_state_dict=True))
    optimizer.load_state_dict(saved["optimizer"])
    advance(model, optimizer, range(stop, 12), rank)
    return photo(optimizer)


# ---------------------------------------------------------------- what is refused


def refused(rank: int, how: str) -> str:
    """The message of the error for parameters that IVON cannot take."""
    model = make_model()
    if how.startswith("fsdp1"):
        for p in model.parameters():
            p.requires_grad_(True)  # FSDP1's flat parameters are all trained, or none
        cpu = torch.device("cpu")
        flat = FullyShardedDataParallel(model, use_orig_params=how == "fsdp1 views", device_id=cpu)
        params = list(flat.named_parameters())
    elif how == "columns":
        mesh = init_device_mesh("cpu", (WORLD,))
        params = [("A", nn.Parameter(distribute_tensor(model.first.A.detach(), mesh, [Shard(1)])))]
    elif how == "zero redundancy":
        params = list(model.named_parameters())
    else:
        params = list(shard(model).named_parameters())
    try:
        if how == "zero redundancy":
            ZeroRedundancyOptimizer([p for _, p in params], IVON, lr=0.1, ess=10.0).step()
        IVON(params, lr=0.1, ess=10.0, sync=how == "own noise")
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was raised"
