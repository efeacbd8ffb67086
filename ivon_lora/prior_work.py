"""Which priors a step changes: within the launches of the update where the backend can, or after it."""

from __future__ import annotations

import torch

from ivon_lora.plan import Part, Plan
from ivon_lora.prior import Posterior, Sums, bounds, is_due

#: elements of a tensor up to which a launch can add up moments
MOST_ELEMENTS = 2**31 - 1


def bounds_within(part: Part) -> tuple[float, float] | None:
    """Bounds of the deltas that the update of a part is to set itself; None: it sets none."""
    return bounds(float(part.group["weight_decay"])) if _is_due(part) and can_be_within(part) else None


def can_be_within(part: Part) -> bool:
    """Whether the launches of an update can change the priors of its works."""
    return (
        part.backend.fits_priors
        and part.is_plain
        and all(w.hess.dtype == torch.float32 and w.hess.numel() <= MOST_ELEMENTS for w in part.works)
    )


def is_any_due(plan: Plan) -> bool:
    """Whether the coming update changes the prior of one of its parameters."""
    return any(map(_is_due, plan.parts))


def due_after(plan: Plan, within: bool) -> list[Posterior | Sums]:
    """The posteriors after an update whose priors it changes, and has not changed yet.

    Args:
        within: launches change those that they can.
    """
    return [
        posterior
        for part in plan.parts
        if _is_due(part) and not (within and can_be_within(part))
        for posterior in _posteriors(part)
    ]


def _posteriors(part: Part) -> list[Posterior | Sums]:
    ess, initial = float(part.group["ess"]), float(part.group["weight_decay"])
    totals = part.backend.moment_sums(part.works, ess) if part.is_plain else None
    if totals is not None:
        places, counts = part.works.row("own_decay"), part.works.row("numel")
        return [Sums(part.works, places, counts, ess, initial, totals)]
    return [Posterior(p, w, ess, initial) for p, w in zip(part.params, part.works, strict=True)]


def _is_due(part: Part) -> bool:
    return part.group["prior"] == "empirical" and is_due(part.updates + 1)
