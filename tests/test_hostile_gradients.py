"""Random training loops with everything that goes wrong with gradients: what must hold whatever happened."""

import warnings
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ivon_lora import IVON, LoraAdapter, RankPruner

SHAPES = [(3, 4), (4, 3), (5,), (), (0, 3), (2, 1, 3)]  # A and B of an adapter of rank 3, then others
FAULTS = [
    "nan", "inf", "huge", "none", "absent", "freeze", "thaw", "reassign", "unwritten", "zero_grad", "skip", "eval",
]  # fmt: skip
VALUES = {"nan": float("nan"), "inf": -float("inf"), "huge": 1e30}
STEPS = 8


def make_optimizer(params: list[nn.Parameter], options: dict[str, Any], pruned: bool) -> IVON:
    pruner = None
    if pruned:
        adapter = LoraAdapter("layer", params[0], params[1])
        pruner = RankPruner([adapter], 1, total_steps=STEPS, warmup=1, final=3, interval=2)
    return IVON(params, lr=0.3, ess=20.0, beta2=0.5, seed=1, pruner=pruner, **options)


def backward(params: list[nn.Parameter], step: int) -> None:
    """Gradients of a quadratic loss, added as autograd adds them."""
    for i, p in enumerate(params):
        if p.requires_grad:
            gradient = p.detach() - (0.1 * i + 0.01 * step)
            p.grad = gradient if p.grad is None else p.grad + gradient


def spoil(optimizer: IVON, params: list[nn.Parameter], fault: str, i: int) -> bool:
    """Do what the fault says, between backward and step; whether the step is to be made."""
    p = params[i]
    if fault in VALUES and p.grad is not None and p.numel():
        p.grad.view(-1)[0] = VALUES[fault] if p.dtype != torch.float16 or fault != "huge" else 6e4
    elif fault == "none":
        p.grad = None
    elif fault == "absent":
        for q in params:
            q.grad = None
    elif fault in ("freeze", "thaw"):
        p.requires_grad_(fault == "thaw")
    elif fault == "reassign":
        p.data = p.data.clone()  # other memory, same values
    elif fault == "unwritten":
        p.grad = None if p.grad is None else p.grad.t().contiguous().t() if p.dim() == 2 else p.grad
    elif fault == "zero_grad":
        optimizer.zero_grad(set_to_none=i % 2 == 0)
    elif fault == "eval":
        optimizer.eval()
    return fault != "skip"


def check(optimizer: IVON, params: list[nn.Parameter]) -> None:
    """h + delta > 0, everything finite, masks as the budget wants them, pruned ranks exactly zero when they are."""
    delta = optimizer.param_groups[0]["weight_decay"]
    for p in params:
        assert torch.isfinite(p).all()
        for name, value in optimizer.state[p].items():
            assert torch.isfinite(value).all(), name
        if "hess" in optimizer.state[p]:
            assert (optimizer.state[p]["hess"] + delta > 0).all()
            assert optimizer.state[p]["hess"].dtype == (torch.float64 if p.dtype == torch.float64 else torch.float32)
    if optimizer.pruner is not None and "rank_mask" in optimizer.state[params[0]]:
        masks = [optimizer.state[p]["rank_mask"] for p in params[:2]]
        assert torch.equal(*masks)
        step = optimizer.completed_steps
        if optimizer.pruner.is_hard(step):
            assert int(masks[0].sum()) == optimizer.pruner.target_budget
            assert not params[0][~masks[0]].any()
            assert not params[1][:, ~masks[0]].any()


@settings(max_examples=60)
@given(
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), min_size=6, max_size=6
    ),
    options=st.fixed_dictionaries(
        {
            "hess_approx": st.sampled_from(["price", "gradsq"]),
            "weight_decay": st.sampled_from([0.0, 1e-2]),
            "clip_radius": st.sampled_from([0.1, float("inf")]),
            "debias": st.booleans(),
            "rescale_lr": st.booleans(),
        }
    ),
    pruned=st.booleans(),
    faults=st.lists(st.tuples(st.sampled_from(FAULTS), st.integers(0, 5)), min_size=STEPS, max_size=STEPS),
)
def test_no_fault_corrupts_weights_state_or_masks(
    dtypes: list[torch.dtype], options: dict[str, Any], pruned: bool, faults: list[tuple[str, int]]
) -> None:
    params = [nn.Parameter(torch.full(s, 0.5, dtype=d)) for s, d in zip(SHAPES, dtypes, strict=True)]
    optimizer = make_optimizer(params, options, pruned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "step() without a sample", which eval() here asks for
        for step, (fault, i) in enumerate(faults):
            optimizer.zero_grad()
            optimizer.train()
            before = [p.detach().clone() for p in params]
            backward(params, step)
            if spoil(optimizer, params, fault, i):
                optimizer.step()
                check(optimizer, params)
            else:  # as a GradScaler skips: the sample stays
                assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
        optimizer.eval()
    check(optimizer, params)
