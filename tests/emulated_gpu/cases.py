"""What only the emulated GPU can tell: the bytes that a step moves.

``pytest -p tests.emulated_gpu.plugin tests/emulated_gpu/cases.py``; `tests/test_triton_emulated.py` does it.
"""

import torch
from triton.runtime import driver

from ivon_lora import IVON
from tests.emulated_gpu.driver import EmulatedDriver


def test_a_step_moves_what_the_equations_must_and_no_more() -> None:
    """Per element 16 bytes for a sample and 28 for a step. Tables add some 64 bytes per tile of 512 elements."""
    gpu = driver.active
    assert isinstance(gpu, EmulatedDriver), "run with -p tests.emulated_gpu.plugin"
    params = [torch.full((256, 16), 0.5, requires_grad=True) for _ in range(2)]
    for p in params:
        p.grad = torch.full_like(p, 0.25)
    optimizer = IVON(params, 0.1, 100, backend="triton")
    for _ in range(2):  # the first creates what there is to create
        optimizer.train()
        optimizer.step()
    assert 28 <= gpu.launches["step_kernel"].bytes_moved() / (2 * 256 * 16) < 28.3
    assert 16 <= gpu.launches["sample_kernel"].bytes_moved() / (2 * 256 * 16) < 16.3
