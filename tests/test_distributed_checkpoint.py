"""torch.distributed.checkpoint in two real processes: full and sharded, DDP and FSDP2, into something fresh."""

from pathlib import Path

import pytest
import torch

from tests import replicated
from tests.optimizer_problem import differing, photo
from tests.replicated import make_model, make_optimizer, train
from tests.two_processes import Pool

SAME = [(kind, kind) for kind in ("ddp", "fsdp")]
CROSS = [("fsdp", "ddp"), ("ddp", "fsdp")]


@pytest.mark.parametrize(
    ("kinds", "how"),
    # torch cannot load what is full and flat at once
    [(kinds, how) for kinds in SAME for how in ("sharded", "flat", "full", "broadcast")]
    + [(kinds, how) for kinds in CROSS for how in ("sharded", "full")],
    ids=lambda value: value if isinstance(value, str) else "-to-".join(value),
)
def test_a_resumed_run_equals_the_whole_one(
    kinds: tuple[str, str], how: str, tmp_path: Path, two_processes: Pool
) -> None:
    for went_on, resumed in two_processes(replicated.resume_from_checkpoint, str(tmp_path), kinds, how, 6):
        assert differing(went_on, resumed) == []


def test_state_dict_of_whole_parameters_goes_into_sharded_ones(tmp_path: Path, two_processes: Pool) -> None:
    """``IVON.load_state_dict`` itself, of a run on one process: every process keeps its part."""
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(6), range(2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "whole.pt")
    train(model, optimizer, range(6, 12), range(2))
    for resumed in two_processes(replicated.resume_sharded, str(tmp_path / "whole.pt"), 6):
        assert differing(resumed, photo(optimizer)) == []
