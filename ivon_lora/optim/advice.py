"""What a step tells its user, once, of a loop that does not do what it seems to."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ivon_lora.optim.metrics import noisy_weights
from ivon_lora.optim.parameters import Item

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

logger = logging.getLogger(__name__)

#: noise so many times larger than the weights is worth a word; VAdam's defaults on LoRA make some 3 times of it
DROWNED = 5

UNSAMPLED = (
    "step() without a posterior sample: {happens}. Call optimizer.attach(model) once, for the model whose forward the "
    "loop calls in training mode, or optimizer.train() before the forward pass, or use sampled_params(train=True)."
)

NO_GRADIENT = (
    "no parameter of this optimizer has a gradient, so that it trains nothing: was it made before the model got its "
    "adapter, or left the device 'meta'? Make it afterwards, e.g. with attach_trainer(trainer)"
)

SUPERSEDED = (
    "another optimizer was made for the parameters of this one, or has stepped them, and drives them now: this one "
    "leaves them alone. optimizer.attach(model) takes them back."
)


def report_idle(optimizer: IVON, items: list[Item]) -> None:
    """Nothing is updated.

    Args:
        items: the parameters that have gradients.
    """
    if optimizer.superseded and not items:
        optimizer.warn_once("superseded", SUPERSEDED)
    elif not items and not optimizer.state:
        optimizer.warn_once("no gradient", NO_GRADIENT)


def report_unsampled(optimizer: IVON) -> None:
    """The gradients were taken at the mean."""
    if optimizer.param_groups[0]["algorithm"] == "vadam":
        happens = "the curvature is learned at the mean, and nothing is averaged over the posterior"
        if optimizer.param_groups[0]["batch_size"] == "auto" and optimizer.counted_examples is None:
            happens += (
                "; a step counts as one example, so that its variance is as many times too large as it has examples"
            )
    else:
        happens = "mean and momentum move, the Hessian does not"
    optimizer.warn_once("unsampled", UNSAMPLED.format(happens=happens))


def report_lr(optimizer: IVON) -> None:
    """A learning rate is beyond its limit, which is lowered in every step that it is."""
    beyond = next((group for group in optimizer.param_groups if float(group["lr"]) > group["lr_limit"]), None)
    if beyond is not None and optimizer.once("lr_limit"):
        logger.warning(
            "lr=%g is lowered to %g, for beyond it fresh LoRA adapters of this width tend to collapse "
            "(lr_limit=None keeps it)",
            float(beyond["lr"]),
            beyond["lr_limit"],
        )


def report_noise(optimizer: IVON) -> None:
    """The data have little say in the size of the noise, or it drowns the weights."""
    weights = noisy_weights(optimizer)
    if not len(weights.std) or not optimizer.once("noise"):
        return
    data, std, rms = weights.data.median(), weights.std.median(), weights.mean.square().mean().sqrt()
    if data < 0.01:
        logger.warning(
            "the data have %.2g %% of the precision of the median weight: its spread, %.2g, is the prior's, "
            "and its signal-to-noise ratio follows its size. If that matters, pass a larger prior_std=, or a smaller "
            "temperature= with a prior_std=",
            100 * data,
            std,
        )
    if std > DROWNED * rms:
        logger.warning(
            "the noise of the median weight, %.2g, is more than %d times the weights, %.2g in root mean square: "
            "averages over samples may predict worse than the mean. Pass a smaller temperature= or prior_std=",
            std,
            DROWNED,
            rms,
        )
