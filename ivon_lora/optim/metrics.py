"""Numbers for loggers and tables for people, read from the optimizer's state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ivon_lora.optim.param_groups import Group
from ivon_lora.optim.rank_pruning import mask_of, scores_now
from ivon_lora.optim.sharding import local

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

#: elements per parameter that quantiles look at: an even grid over larger ones
QUANTILE_ELEMENTS = 1 << 14


def _thin(x: Tensor) -> Tensor:
    flat = local(x).reshape(-1)
    return flat[:: max(1, flat.numel() // QUANTILE_ELEMENTS)].double()


class NoiseParts(NamedTuple):
    """Where the noise of a posterior comes from.

    Attributes:
        data: the data's part of the precision, h / (h + delta), of the median weight.
        std: standard deviation of the median weight.
        rms: root mean square of the weights' means.
    """

    data: float
    std: float
    rms: float


def _readable(optimizer: IVON, group: Group) -> list[Tensor]:
    """The parameters of a group that have state, and values in this process."""
    return [p for p in group["params"] if optimizer.state.get(p) and local(p).numel() and not p.is_meta]


def noise_in_parts(optimizer: IVON) -> NoiseParts | None:
    """Over the weights of VAdam that have state and noise; None without any."""
    shares, stds, means = [], [], []
    for group in optimizer.param_groups:
        for p in _readable(optimizer, group) if group["algorithm"] == "vadam" else ():
            posterior, state = optimizer.posterior(p), optimizer.state[p]
            std, hess = _thin(posterior.stddev).cpu(), _thin(state["hess"]).cpu()
            delta = float(group["weight_decay"])
            alive = std > 0
            shares.append((hess / (hess + delta))[alive])
            stds.append(std[alive])
            means.append(_thin(posterior.mean).cpu()[alive])
    if not sum(map(len, stds)):
        return None
    return NoiseParts(
        float(torch.cat(shares).median()),
        float(torch.cat(stds).median()),
        float(torch.cat(means).square().mean().sqrt()),
    )


def metrics(optimizer: IVON) -> dict[str, float]:
    """Flat dictionary of floats.

    Of sharded parameters it reads the part in this process; no process waits for another.

    Keys: ``snr/p10 snr/p50 snr/p90`` (of |m|/sigma) and ``sigma/mean`` over all parameters with state, without ranks
    pruned for good; ``hess/min``, ``hess/mean``, ``grad/nonfinite`` (elements skipped so far), ``step``; for VAdam
    ``data/share``, the data's part of the precision, h / (h + delta), of the median weight; under a pruner also
    ``rank/live``, ``rank/total``, ``rank/budget``, ``rank/mean`` (live ranks per adapter), ``rank/snr_p50`` (score over
    live ranks).
    """
    skipped = optimizer.parameters.nonfinite_elements()
    out = {"step": float(optimizer.completed_steps), "grad/nonfinite": float(skipped)}
    params = [p for group in optimizer.param_groups for p in _readable(optimizer, group)]
    if params:
        sigma = torch.cat([_thin(optimizer.posterior(p).stddev).cpu() for p in params])
        alive = sigma > 0  # ranks pruned for good have no noise, and would pull every quantile to 0
        snr = torch.cat([_thin(optimizer.snr(p)).cpu() for p in params])[alive]
        hess = torch.cat([_thin(optimizer.state[p]["hess"]).cpu() for p in params])
        if len(snr):
            for q in (10, 50, 90):  # torch.quantile stops at 16 million elements
                out[f"snr/p{q}"] = float(np.quantile(snr.numpy(), q / 100))
            out["sigma/mean"] = float(sigma[alive].mean())
        out |= {"hess/min": float(hess.min()), "hess/mean": float(hess.mean())}
    if (share := noise_in_parts(optimizer)) is not None:
        out["data/share"] = share.data
    if optimizer.pruner is not None:
        masks = [mask_of(optimizer, adapter) for adapter in optimizer.pruner.adapters]
        live = sum(int(m.sum()) for m in masks)
        out |= {
            "rank/live": float(live),
            "rank/total": float(sum(m.numel() for m in masks)),
            "rank/budget": float(optimizer.pruner.budget(optimizer.completed_steps)),
            "rank/mean": live / len(masks),
        }
        scores = [
            s[mask]
            for a, mask in zip(optimizer.pruner.adapters, masks, strict=True)
            if (s := optimizer.state.get(a.A, {}).get("rank_snr")) is not None
        ]
        if sum(map(len, scores)):
            out["rank/snr_p50"] = float(torch.cat(scores).double().median())
    return out


def rank_table(optimizer: IVON) -> list[dict[str, Any]]:
    """See `IVON.rank_table`."""
    pruner = optimizer.pruner
    if pruner is None:
        raise ValueError("rank_table() needs ranks: give the optimizer one, pruner=RankPruner(adapters, ...)")
    rows = []
    all_scores = scores_now(optimizer, pruner, optimizer.masks_are_hard).split([a.rank for a in pruner.adapters])
    for adapter, scores in zip(pruner.adapters, all_scores, strict=True):
        mask = mask_of(optimizer, adapter)
        rows.append(
            {
                "name": adapter.name,
                "rank": adapter.rank,
                "live": int(mask.sum()),
                "snr_min": float(scores.min()),
                "snr_mean": float(scores.mean()),
                "snr_max": float(scores.max()),
                "scores": scores.tolist(),
                "mask": mask.tolist(),
            }
        )
    return rows
