"""What a copy or a pickle of an optimizer takes along, so that it can go on where the original stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ivon_lora.optim.drivers import take_over
from ivon_lora.optim.parameters import Parameters
from ivon_lora.optim.sampling import Sampling
from ivon_lora.optim.tied import TiedParameters

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON


def pickled(optimizer: IVON) -> dict[str, Any]:
    """All but what torch keeps itself: defaults, state and groups."""
    return {
        "backend": optimizer.parameters.backend_name,
        "sampling": optimizer.sampling.pickled(),
        "examples": optimizer.examples,
        "warned": optimizer.warned,
        "nonfinite": optimizer.nonfinite_before + optimizer.parameters.nonfinite_elements(),
        "replicas_agree": optimizer.replicas_agree,
        "pruner": optimizer.pruner,
    }


def unpickle(optimizer: IVON, saved: dict[str, Any]) -> None:
    """Take over what `pickled` returned; the copy is attached to no model, and drives its parameters."""
    optimizer.in_context = optimizer.is_attached = False
    optimizer.superseded = set()
    optimizer.pruner, optimizer.examples, optimizer.warned = saved["pruner"], saved["examples"], saved["warned"]
    optimizer.nonfinite_before, optimizer.replicas_agree = saved["nonfinite"], saved["replicas_agree"]
    optimizer.parameters = Parameters(optimizer, saved["backend"])
    optimizer.parameters.tied = TiedParameters(optimizer.parameters)
    optimizer.sampling = Sampling(optimizer, optimizer.parameters)
    optimizer.sampling.unpickle(saved["sampling"])
    take_over(optimizer, optimizer.parameters)
