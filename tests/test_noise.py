"""The noise: known answers of Philox, the distribution of the normals, independence across the fields of the key."""

import numpy as np
import pytest
import torch

from ivon_lora import IVON
from ivon_lora.functional.noise import MASK, NoiseKey, normal, normals_of_quads, philox_4x32
from tests.compiler import BACKENDS

KEY = NoiseKey(seed=0x123456789ABCDEF0, step=7, sample=3)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known-answer tests that Random123 (Salmon et al.) ships for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK, MASK, MASK, MASK), (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert philox_4x32(*counter, *key) == words
    assert tuple(int(w) for w in philox_4x32(*(torch.tensor(c) for c in counter), *key)) == words
    assert tuple(int(w[0]) for w in philox_4x32(*(np.array([c], np.uint64) for c in counter), *key)) == words


def box_muller_float64(words):
    """The textbook formula in double precision, from the uniform that fp32 holds."""
    out = []
    for radius_word, angle_word in ((words[0], words[1]), (words[2], words[3])):
        u = ((radius_word >> 1) | 1).astype(np.float32).astype(np.float64) / 2.0**31
        radius = np.sqrt(-2 * np.log(u))
        angle = ((angle_word & 0x3FFFFFFF) - 0x20000000) / 2.0**30 * (np.pi / 2)
        x, y = radius * np.cos(angle), radius * np.sin(angle)
        x = np.where((angle_word >> 30) & 1, -x, x)
        out += [np.where(angle_word >> 31, y, x), np.where(angle_word >> 31, x, y)]
    return np.stack(out, axis=-1).reshape(-1)


def test_normals_equal_box_muller_in_float64():
    quads = np.arange(1 << 18, dtype=np.uint64)
    words = philox_4x32(quads, KEY.c1, np.full_like(quads, 5), KEY.step, *KEY.philox_key)
    words = [w.astype(np.int64) for w in words]
    got = normals_of_quads(KEY, quads, np.full_like(quads, 5))
    # |n| <= 6.56: half an ulp there is 2.4e-7; the polynomials and their fp32 evaluation add at most four of those.
    np.testing.assert_allclose(got, box_muller_float64(words), rtol=0, atol=1.2e-6)


BASE = {"seed": 1, "step": 1, "sample": 1, "prediction": False, "parameter": 1}


def draw(n=1 << 16, **fields):
    fields = BASE | fields
    key = NoiseKey(**{k: v for k, v in fields.items() if k != "parameter"})
    return normal(key, fields["parameter"], (n,), "cpu").numpy()


CHANGES = [
    {"seed": 2}, {"seed": 1 + (1 << 32)}, {"seed": (1 << 64) - 1}, {"step": 2}, {"step": (1 << 32) - 1}, {"sample": 2},
    {"sample": (1 << 23) - 1}, {"prediction": True}, {"parameter": 2}, {"parameter": (1 << 32) - 1},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_draws_are_independent_across_every_field(change):
    a, b = draw().astype(np.float64), draw(**change).astype(np.float64)
    assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(len(a))
    assert abs(np.corrcoef(np.abs(a), np.abs(b))[0, 1]) < 4.5 / np.sqrt(len(a))
    assert not set(a[:1000].tolist()) & set(b[:1000].tolist()) - {0.0}, "the same normals somewhere else"


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (1, 2), (3, 9), (4, 8), (5, 5), (123, 4567), ((1 << 35) + 3, (1 << 35) + 77)]
)
def test_any_part_is_a_part_of_the_whole(start, stop):
    quads = np.arange(start >> 2, (stop >> 2) + 1, dtype=np.uint64)
    part = normals_of_quads(KEY, quads, np.full_like(quads, 2))[start & 3 :][: stop - start]
    np.testing.assert_array_equal(normal(KEY, 2, (stop - start,), "cpu", first=start).numpy(), part)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_optimizer_draws_these_normals(backend):
    params = [torch.zeros(s, requires_grad=True) for s in ((70_001,), (3, 5))]
    optimizer = IVON(params, lr=0.0, ess=1.0, beta2=1.0, weight_decay=0.0, seed=7, backend=backend)  # sigma = 1
    for step in range(2):
        with optimizer.sampled_params():
            drawn = [p.detach().clone() for p in params]
        optimizer.train()
        for i, p in enumerate(params):
            expected = [normal(NoiseKey(7, step, 0, prediction), i, p.shape, "cpu") for prediction in (True, False)]
            assert torch.equal(drawn[i], expected[0])
            assert torch.equal(p.detach(), expected[1])
            p.grad = torch.zeros_like(p)
        optimizer.step()


def test_golden_normals():
    """The stream is a promise: a checkpoint resumed with another version must draw the same noise."""
    got = normal(NoiseKey(2026, 11, 2), 22, (8,), "cpu").view(torch.int32)
    assert [hex(int(v) & MASK) for v in got] == [
        *("0x3f0fbcc6", "0x3fd57ac5", "0xbde710ff", "0x3ef4cb4a"),
        *("0xbd58a160", "0x3f02eb5a", "0xbf8fe8de", "0xbeffb185"),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1, "step": 0}, r"seed must be an integer in \[0, 2\*\*64\), got -1"),
        ({"seed": 1 << 64, "step": 0}, "seed"),
        ({"seed": 0, "step": 1 << 32}, r"step must be an integer in \[0, 2\*\*32\)"),
        ({"seed": 0, "step": 0, "sample": 1 << 23}, r"sample must be an integer in \[0, 2\*\*23\)"),
    ],
)
def test_fields_out_of_bounds(fields, message):
    with pytest.raises(ValueError, match=message):
        NoiseKey(**fields)
