"""Same noise, same options, same data: the trajectories of ivon-opt 0.1.3.

ivon-opt (GPL-3.0) is used as a black box; its ``torch.randn`` is replaced by our normals.
"""

import math
import random

import numpy as np
import pytest
import torch

from ivon_lora import IVON, VAdam
from ivon_lora.functional.noise import NoiseKey, normal

ivon = pytest.importorskip("ivon")

SHAPES = [(5, 7), (1,), (33, 2), (129,)]
STEPS = 200


def random_options(seed):
    rng = random.Random(seed)
    return {
        "lr": rng.choice([1e-3, 0.1]),
        "ess": rng.choice([50.0, 1e4]),
        "hess_init": rng.choice([0.01, 1.0]),
        "beta1": rng.choice([0.0, 0.9]),
        "beta2": rng.choice([0.9, 0.99, 0.99999]),
        "weight_decay": rng.choice([0.0, 1e-2]),
        "mc_samples": rng.choice([1, 3]),
        "hess_approx": rng.choice(["price", "gradsq"]),
        "clip_radius": rng.choice([math.inf, 0.1]),
        "debias": rng.choice([True, False]),
        "rescale_lr": rng.choice([True, False]),
    }


class Problem:
    """Quartic bowls with known minima; two groups with their own weight decay."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.start = [torch.randn(s, generator=generator) for s in SHAPES]
        self.data = [torch.randn(s, generator=generator) for s in SHAPES]

    def backward(self, params):
        terms = (
            ((p - d) ** 2 * (1 + d * d)).sum() * 0.5 + (p**4).sum() * 0.01
            for p, d in zip(params, self.data, strict=True)
        )
        (sum(terms) / 10).backward()


def groups(params):
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.05}]


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def normals(key, i):
    return normal(key, i, (math.prod(SHAPES[i]),), "cpu").numpy()


def backward(optimizer, problem, params):
    with optimizer.sampled_params(train=True):
        optimizer.zero_grad()
        problem.backward(params)


def peer_backward(peer, problem, params, key, monkeypatch):
    """One sample and one gradient of ivon-opt, with our normals of ``key`` for its two groups."""
    noise = iter([torch.from_numpy(np.concatenate([normals(key, i) for i in group])) for group in ((0, 1), (2, 3))])
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn", lambda *_, **__: next(noise))
        backward(peer, problem, params)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("seed", [0, 2, 3, 11])  # between them, nearly all values of all options
def test_200_steps_follow_ivon_opt(seed, monkeypatch):
    options = random_options(seed)
    problem = Problem(seed)
    ours, theirs = ([p.clone().requires_grad_() for p in problem.start] for _ in range(2))
    mine, peer = IVON(groups(ours), seed=seed, **options), ivon.IVON(groups(theirs), **options)
    for step in range(STEPS):
        for sample in range(options["mc_samples"]):
            backward(mine, problem, ours)
            peer_backward(peer, problem, theirs, NoiseKey(seed, step, sample), monkeypatch)
        mine.step()
        peer.step()
        # fp32 rounds each of ~25 operations of a step by 6e-8; the maps contract, so 200 steps stay within 1e-5.
        assert relative(flat(ours), flat(theirs)) < 1e-5, (step, options)
        for name in ("momentum", "hess"):
            state = flat([mine.state[p][name] for p in ours])
            assert relative(state, flat([group[name] for group in peer.param_groups])) < 1e-5, (step, name, options)


@pytest.mark.parametrize("debias", [True, False])
def test_a_checkpoint_of_ivon_opt_is_taken_over(debias, monkeypatch, tmp_path):
    """200 steps of ivon-opt, then both go on from there with the same noise."""
    problem = Problem(0)
    theirs = [p.clone().requires_grad_() for p in problem.start]
    options = {"lr": 0.05, "ess": 100.0, "hess_init": 0.3, "beta2": 0.99, "debias": debias}
    peer = ivon.IVON(groups(theirs), **options)
    for _ in range(200):
        backward(peer, problem, theirs)
        peer.step()
    torch.save(peer.state_dict(), tmp_path / "ivon.pt")
    ours = [p.detach().clone().requires_grad_() for p in theirs]
    mine = IVON(groups(ours), lr=9.0, ess=1.0, debias=debias, seed=5)
    mine.load_state_dict(torch.load(tmp_path / "ivon.pt", weights_only=True))
    assert [g["weight_decay"] for g in mine.param_groups] == [1e-4, 0.05]
    assert mine.param_groups[0]["lr"] == 0.05
    for step in range(20):
        backward(mine, problem, ours)
        peer_backward(peer, problem, theirs, NoiseKey(5, step), monkeypatch)
        mine.step()
        peer.step()
        # with debias the unknown step costs 0.9^158 = 6e-8 of the momentum, the rounding of fp32
        assert relative(flat(ours), flat(theirs)) < 1e-5


def test_a_checkpoint_of_ivon_opt_that_does_not_fit_changes_nothing():
    peer = ivon.IVON([torch.ones(5, requires_grad=True)], lr=0.1, ess=10)
    p = torch.ones(4, requires_grad=True)
    mine = IVON([p], lr=0.1, ess=10)
    with pytest.raises(ValueError, match="has 5 elements, the optimizer's 4"):
        mine.load_state_dict(peer.state_dict())
    two = IVON([{"params": [p]}, {"params": [torch.ones(1, requires_grad=True)]}], lr=0.1, ess=10)
    with pytest.raises(ValueError, match="has 1 parameter groups, the optimizer 2"):
        two.load_state_dict(peer.state_dict())
    assert not mine.state
    with pytest.raises(ValueError, match="was saved by IVON: load it into an optimizer of that class"):
        VAdam([torch.ones(5, requires_grad=True)], num_examples=10).load_state_dict(peer.state_dict())
