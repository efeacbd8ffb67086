"""Numbers for loggers and tables for people, read from the optimizer's state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ivon_lora.optim.rank_pruning import mask_of, scores_now
from ivon_lora.optim.sharding import local

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

#: elements per parameter that quantiles look at: an even grid over larger ones
QUANTILE_ELEMENTS = 1 << 14


class Weights(NamedTuple):
    """Some weights, float64 ``(n,)`` on CPU: m, sigma, |m| / sigma, h, and the data's part h / (h + delta) of the
    precision."""

    mean: Tensor
    std: Tensor
    snr: Tensor
    hess: Tensor
    data: Tensor


def noisy_weights(optimizer: IVON) -> Weights:
    """Of all parameters that have state, and values in this process; without ranks pruned for good, which have no noise
    and would pull every quantile to 0."""
    found = [[torch.zeros(0, dtype=torch.float64, device="cpu")] * len(Weights._fields)]
    for group in optimizer.param_groups:
        for p in group["params"]:
            if optimizer.state.get(p) and local(p).numel() and not p.is_meta:
                posterior, hess = optimizer.posterior(p), _thin(optimizer.state[p]["hess"])
                numbers = _thin(posterior.mean), _thin(posterior.stddev), _thin(optimizer.snr(p)), hess
                found.append([*numbers, hess / (hess + float(group["weight_decay"]))])
    weights = Weights(*map(torch.cat, zip(*found, strict=True)))
    return Weights(*(numbers[weights.std > 0] for numbers in weights))


def _thin(x: Tensor) -> Tensor:
    flat = local(x).reshape(-1)
    return flat[:: max(1, flat.numel() // QUANTILE_ELEMENTS)].double().cpu()


def metrics(optimizer: IVON) -> dict[str, float]:
    """Flat dictionary of floats.

    Of sharded parameters it reads the part in this process; no process waits for another.

    Keys: ``step``, ``grad/nonfinite`` (elements skipped so far); ``snr/p10 snr/p50 snr/p90`` (of |m|/sigma),
    ``sigma/mean``, ``hess/min``, ``hess/mean`` of the weights with noise; for VAdam ``data/share``, the data's part of
    the precision of the median one; under a pruner also ``rank/live``, ``rank/total``, ``rank/budget``, ``rank/mean``
    (live ranks per adapter), ``rank/snr_p50`` (score over live ranks).
    """
    skipped = optimizer.parameters.nonfinite_elements()
    out = {"step": float(optimizer.completed_steps), "grad/nonfinite": float(skipped)}
    weights = noisy_weights(optimizer)
    if len(weights.std):
        for q in (10, 50, 90):  # torch.quantile stops at 16 million elements
            out[f"snr/p{q}"] = float(np.quantile(weights.snr.numpy(), q / 100))
        out["sigma/mean"] = float(weights.std.mean())
        out |= {"hess/min": float(weights.hess.min()), "hess/mean": float(weights.hess.mean())}
        if optimizer.param_groups[0]["algorithm"] == "vadam":
            out["data/share"] = float(weights.data.median())
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
