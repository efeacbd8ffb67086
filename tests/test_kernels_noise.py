"""The Triton noise gives the bits of `functional.noise` wherever it runs."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from ivon_lora.functional import noise
from ivon_lora.kernels import noise as kernels


@triton.jit
def normal_kernel(out_ptr, key_ptr, n, N_QUADS: tl.constexpr):
    """Normals of some quads, from the first on: out is fp32 [n]."""
    parameter, first_quad = tl.load(key_ptr + 4), tl.load(key_ptr + 5)  # behind the key
    quad = tl.program_id(0) * N_QUADS + tl.arange(0, N_QUADS)
    eps = kernels.normals(first_quad + quad.to(tl.int64), key_ptr, parameter)
    element = tl.program_id(0) * (4 * N_QUADS) + tl.arange(0, 4 * N_QUADS)
    tl.store(out_ptr + element, eps, mask=element < n)


def launch_normals(
    key: noise.NoiseKey, parameter: int, first_quad: int, n: int, n_quads: int, device: str
) -> np.ndarray:
    """`normal_kernel` on fp32 [n + 4]; the four extra elements must stay as they were."""
    numbers = np.array([key.seed, key.c1, key.step, 0, parameter, first_quad], np.uint64).view(np.int64)
    table = torch.from_numpy(numbers).to(device)
    out = torch.full((n + 4,), 7.0, device=device)
    grid = (triton.cdiv(n, 4 * n_quads),)
    normal_kernel[grid](out, table, n, N_QUADS=n_quads, enable_fp_fusion=False)
    result = out.cpu().numpy()
    assert (result[n:] == 7.0).all()
    return result[:n]


@pytest.mark.parametrize(
    ("key", "parameter", "first_quad", "n", "n_quads"),
    [
        (noise.NoiseKey(seed=0, step=0), 0, 0, 1, 1024),
        (noise.NoiseKey(seed=1, step=1, sample=1), 1, 0, 200_001, 32768),
        (noise.NoiseKey(seed=2**64 - 1, step=2**32 - 1, sample=2**23 - 1, prediction=True), 2**32 - 1, 5, 4097, 256),
        (noise.NoiseKey(seed=2**63, step=77, sample=3), 391, 2**32 - 3, 30, 4),  # crosses from c0 into c1
        (noise.NoiseKey(seed=123456789012345, step=10**9), 12, 2**40 - 16, 64, 16),  # the last elements there are
    ],
)
def test_normals_equal_those_of_the_package_bit_for_bit(
    key: noise.NoiseKey, parameter: int, first_quad: int, n: int, n_quads: int, triton_device: str
) -> None:
    found = launch_normals(key, parameter, first_quad, n, n_quads, triton_device)
    expected = noise.normal(key, parameter, (n,), "cpu", 4 * first_quad).numpy()
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


@triton.jit
def box_muller_kernel(out_ptr, radius_ptr, angle_ptr, n, BLOCK: tl.constexpr):
    """Two normals per pair of words: out is fp32 [2, n]."""
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    radius, angle = tl.load(radius_ptr + offsets, mask=mask, other=0), tl.load(angle_ptr + offsets, mask=mask, other=0)
    first, second = kernels.box_muller(radius, angle)
    tl.store(out_ptr + offsets, first, mask=mask)
    tl.store(out_ptr + n + offsets, second, mask=mask)


def test_box_muller_has_the_same_bits_at_the_edges_of_its_words(triton_device: str) -> None:
    """Every power of two and its neighbours: where the mantissa range is split, signs change and axes are exchanged."""
    edges = sorted({(2**k + d) % 2**32 for k in range(33) for d in (-2, -1, 0, 1, 2)})
    split = [int(2**k * 2**0.5) + d for k in range(31) for d in (-2, -1, 0, 1, 2)]
    words = np.array([*edges, *(word % 2**32 for word in split)], dtype=np.int64).astype(np.int32)
    radius, angle = (grid.ravel() for grid in np.meshgrid(words, words))
    out = torch.empty(2, radius.size, device=triton_device)
    arguments = [torch.from_numpy(np.ascontiguousarray(x)).to(triton_device) for x in (radius, angle)]
    size = radius.size
    box_muller_kernel[(1,)](out, *arguments, size, BLOCK=triton.next_power_of_2(size), enable_fp_fusion=False)
    expected = np.stack(noise.box_muller(radius, angle))
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(out.cpu().numpy().view(np.int32), expected.view(np.int32))
