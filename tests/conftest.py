"""What every test shares: how Triton runs here, one thread, fixed seeds, and poisoned uninitialised memory."""

import os
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.two_processes import Pool

HAS_GPU = torch.cuda.is_available()  # importing torch does not import triton
EMULATED_GPU = "IVON_LORA_EMULATED_GPU" in os.environ  # see tests/emulated_gpu/plugin.py

# Triton reads the variable when it is first imported, and peft, transformers and torch._dynamo all import triton.
if not HAS_GPU and not EMULATED_GPU and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before tests/conftest.py could choose its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The tensors here are small: threads cost more than they give, and the number of threads changes the order of
# reductions, i.e. the last bits, from machine to machine.
torch.set_num_threads(1)

# Same examples on every run; no deadline, because a first call may compile or load something.
settings.register_profile("ivon-lora", deadline=None, derandomize=True)
settings.load_profile("ivon-lora")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none; long files first where several processes share the work."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is the one that libraries use
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    """In deterministic mode torch fills what `torch.empty` returns with NaN, so nobody can read it unnoticed."""
    if HAS_GPU:  # there the mode also refuses operations that have no deterministic version
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def triton_device() -> Iterator[str]:
    """Where Triton kernels run in this session: on the GPU, or on CPU tensors in Triton's interpreter."""
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns where a GPU is silent
        yield "cuda" if HAS_GPU else "cpu"


@pytest.fixture(scope="session")
def two_processes() -> Iterator[Pool]:
    """Runs functions in two processes that form a gloo group."""
    pool = Pool()
    yield pool
    pool.close()
