"""The Hugging Face Trainer in two processes: replicas stay equal, and equal the loop around DistributedDataParallel."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ivon_lora import IVON, RankPruner, find_adapters
from ivon_lora.integrations.trainer import attach_trainer
from ivon_lora.optim.wrappers import unwrap
from tests import tiny_trainer
from tests.optimizer_problem import differing, photo
from tests.two_processes import WORLD, Pool

pytest.importorskip("transformers", reason="needs transformers: pip install 'ivon-lora[hf]'")
pytest.importorskip("peft", reason="needs peft: pip install 'ivon-lora[peft]'")

STEPS, ACCUMULATE, CLIP, EXAMPLES = 6, 2, 0.05, 96


@contextmanager
def launched(rank: int) -> Iterator[None]:
    """What torchrun and ``accelerate launch`` tell a process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    os.environ |= {name: str(value) for name, value in told.items()}
    try:
        yield
    finally:
        for name in told:
            del os.environ[name]
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def run_trainer(folder: str, own_noise: bool) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """State of the optimizer afterwards, and the batches that this process was given."""
    options: dict[str, Any] = {"learning_rate": 0.02, "max_steps": STEPS, "ddp_backend": "gloo"}
    options |= {"gradient_accumulation_steps": ACCUMULATE, "max_grad_norm": CLIP}
    model = tiny_trainer.make_model()
    seen = tiny_trainer.record_batches(model)
    trainer = tiny_trainer.make_trainer(Path(folder), model, data=tiny_trainer.make_data(EXAMPLES), **options)
    chosen: dict[str, Any] = {"ess": 1e4, "sync": True} if own_noise else {"target_rank": 2}
    attach_trainer(trainer, **chosen)
    assert trainer.args.world_size == WORLD
    trainer.train()
    optimizer: Any = unwrap(trainer.optimizer)
    return photo(optimizer), seen


def run_loop(batches: list[dict[str, Tensor]], own_noise: bool) -> dict[str, Any]:
    model = tiny_trainer.make_model()
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if own_noise:
        optimizer = IVON(params, lr=0.02, ess=1e4, sync=True)
    else:
        pruner = RankPruner(find_adapters(model), 2, total_steps=STEPS)
        optimizer = IVON.from_adamw(params, lr=0.02, num_examples=EXAMPLES, batch_size=16, pruner=pruner)
    optimizer.attach(model)
    tiny_trainer.manual_loop(DistributedDataParallel(model), optimizer, batches, ACCUMULATE, CLIP, STEPS)
    return photo(optimizer)


def both(rank: int, folder: str, own_noise: bool) -> list[Any]:
    torch.manual_seed(1000 + rank)
    with launched(rank):
        trained, seen = run_trainer(folder, own_noise)
    return [trained, run_loop(seen, own_noise), [batch["input_ids"] for batch in seen]]


@pytest.mark.parametrize("own_noise", [False, True], ids=["shared noise", "own noise"])
def test_two_processes_equal_the_loop_around_ddp(own_noise: bool, tmp_path: Path, two_processes: Pool) -> None:
    (first, looped, seen), (second, _, others) = two_processes(both, str(tmp_path), own_noise)
    assert len(seen) == len(others) == STEPS * ACCUMULATE
    assert not any(torch.equal(a, b) for a, b in zip(seen, others, strict=True))
    assert differing(first, second) == []
    assert differing(first, looped) == []
    if not own_noise:
        masks = [mask for name, mask in first.items() if name.endswith("/rank_mask")]
        assert sum(int(mask.sum()) for mask in masks) == 2 * len(masks)
