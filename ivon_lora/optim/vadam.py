"""VAdam: AdamW's learning rate and steps, with a posterior of the right size at the end."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ivon_lora.optim.ivon import IVON, Params
from ivon_lora.optim.lr_limit import lr_limit as find_lr_limit
from ivon_lora.optim.param_groups import check_group, integer, number, weight_decay_of, without_names

if TYPE_CHECKING:
    from ivon_lora.lora.rank_pruner import RankPruner

logger = logging.getLogger(__name__)

#: chosen on LoRA adapters: temperature, the learning rate that it was chosen at, and the prior's standard deviation
#: over the learning rate that an adapter bears
TEMPERATURE, LR, PRIOR = 6e-3, 3e-3, 27.0
#: epochs over which noise grows: an example seen for the first time cannot be overfitted, nor much the second
EPOCHS = 2
#: of the prior's standard deviation: wider noise drowns the small models on which people try things
WIDEST = 0.09

#: entries of AdamW's groups that have no counterpart here
ADAMW_ENTRIES = {"eps", "weight_decay", "amsgrad", "foreach", "capturable", "differentiable", "fused"}
ADAMW_ENTRIES |= {"decoupled_weight_decay", "initial_lr"}


class VAdam(IVON):
    r"""The optimizer for a loop that trains with AdamW: same learning rate, same steps, and a posterior at the end.

    Where you have ``AdamW(params, lr=1e-3)``, write ``VAdam(params, lr=1e-3, num_examples=len(dataset))`` and, once,
    ``optimizer.attach(model)``. Schedulers, clipping and accumulation stay as they are. The steps are those of Adam;
    each is taken at weights with a little noise, whose size follows how sharply the loss reacts to each weight.

    Follows Vadam (Khan et al., "Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam",
    arXiv:1806.04854), with the square of the batch's gradient times the number of its examples as the curvature::

        sample      theta = m + sigma eps,  sigma^2 = 1 / (ess (h + weight_decay)),  ess = num_examples / temperature
        momentum    g <- beta1 g + (1 - beta1) ghat
        curvature   h <- beta2 h + (1 - beta2) batch_size ghat^2, without the bias of its start
        mean        m <- m - lr (g / (1 - beta1^t) + min(weight_decay, d) m) / d,  d = sqrt(h / batch_size) + 1e-8

    ghat is the gradient of an example's loss, the sum over its labels, averaged over the examples of the batch. Where a
    loss is a mean over labels, as that of tokens is, the hooks count these, and ghat is the gradient times the labels
    of an example (their running mean is in the group, ``labels_per_example``).

    The first ten updates are made at the mean. Noise, prior and posterior grow over the first two epochs, in which
    ``ess`` is divided by the square of the share of them that is over: an example seen for the first time cannot be
    overfitted. Towards temperature 0 it is ``torch.optim.Adam``. Where no sample is ever drawn (``attach`` forgotten),
    it trains like Adam, learns its curvature at the mean, and says so once.

    Args:
        params: tensors, groups (a group may have its own ``lr``, ``betas``, ``prior_std``, ``lr_limit`` and
            ``maximize``; AdamW's other entries are dropped, with a notice in the log), or ``model.named_parameters()``.
        lr, betas: AdamW's. The second of ``betas`` is the curvature's memory too.
        num_examples: number of training examples, e.g. ``len(train_dataset)``. For language models: sequences.
        batch_size: examples per optimizer step: micro-batch x accumulated micro-batches x processes. "auto" counts
            them where the backward passes the model given to :meth:`attach`. The loss must be the *mean* over these
            examples: under accumulation, divide each micro-batch's loss by their number.
        temperature: how much the posterior is sharpened. 1 is Bayes' rule; smaller means less noise in training and
            predictions that are more certain. None: 0.006, which suits fine-tuning of LoRA adapters; for learning rates
            below 3e-3 less, in proportion to their square.
        prior_std: standard deviation of a weight of which the data say nothing. None: where a group starts as LoRA
            does, 1.73 divided by the square root of A's number of inputs (0.088 at 384, 0.027 at 4096), three times
            what A is drawn with, 0.09 at most; else 27 learning rates, 0.081 at most.
        noise_warmup: examples over which the noise, the prior's pull and the posterior's standard deviations grow to
            their full size. None: 2 ``num_examples``, two epochs.
        lr_limit: bound of the learning rate that a step takes. "auto" finds one where a group starts as LoRA does, with
            zeros in B beside what is drawn for A, for beyond it fresh adapters tend to collapse: 0.064 divided by the
            square root of A's number of inputs (0.0033 at 384, 0.001 at 4096). That is low enough for ``lora_alpha /
            sqrt(rank)`` up to some 7. None: no bound.
        seed, backend, pruner, maximize: as for :class:`IVON`.

    Raises:
        ValueError: an argument outside its bounds, duplicate, complex or integer parameters.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        num_examples: int,
        batch_size: int | str = "auto",
        temperature: float | None = None,
        prior_std: float | None = None,
        noise_warmup: int | None = None,
        lr_limit: float | str | None = "auto",
        seed: int = 0,
        backend: str = "auto",
        pruner: RankPruner | None = None,
        maximize: bool = False,
    ) -> None:
        num_examples = integer("num_examples", num_examples, meaning="the number of training examples")
        if temperature is not None:
            temperature = number("temperature", temperature)
        self._recipe: dict[str, Any] = {
            "num_examples": num_examples,
            "temperature": temperature,
            "prior_std": prior_std,
            "lr_limit": lr_limit,
        }
        rate = number("lr", lr)
        ess = num_examples / (temperature or _temperature_for(rate))
        beta1, beta2 = betas
        defaults = {
            "lr": lr,
            "ess": ess,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay_of(_prior_std_for(rate), ess),  # of groups, see _own_entries
            "hess_approx": "gradsq",
            "algorithm": "vadam",
            "rescale_lr": False,
            "maximize": maximize,
            "batch_size": batch_size,
            "noise_warmup": EPOCHS * num_examples if noise_warmup is None else noise_warmup,
        }
        self._start(params, defaults, seed, backend, pruner)

    def _own_entries(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """By our names, with the limit of its learning rate, and the noise and prior that belong to it."""
        recipe, group = self._recipe, _with_our_names(param_group)
        found = find_lr_limit(p for p in without_names(group["params"]) if isinstance(p, Tensor))
        group["lr_limit"] = _limit(group.get("lr_limit", recipe["lr_limit"]), found)
        lr = min(number("lr", group.get("lr", self.defaults["lr"])), group["lr_limit"])
        if recipe["temperature"] is None and "ess" not in group:
            group["ess"] = recipe["num_examples"] / _temperature_for(lr)
        prior_std = group.pop("prior_std", recipe["prior_std"])
        if prior_std is None:
            prior_std = min(PRIOR * found, WIDEST) if math.isfinite(found) else _prior_std_for(lr)
        group["weight_decay"] = weight_decay_of(prior_std, group.get("ess", self.defaults["ess"]))
        return group

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_recipe": self._recipe}


def _limit(lr_limit: float | str | None, found: float) -> float:
    """The bound of a group's learning rate; ``found``: what "auto" means for it."""
    if lr_limit is None:
        return math.inf
    if lr_limit == "auto":
        return found
    if isinstance(lr_limit, str):
        raise ValueError(f"lr_limit must be 'auto', a number or None, got {lr_limit!r}")
    return number("lr_limit", lr_limit)


def _temperature_for(lr: float) -> float:
    """Below `LR` in proportion to the square of the learning rate, so that the noise is proportional to it.

    Adam moves a weight by about the learning rate in a step, and noise that is many times larger drowns what the steps
    can learn. Learning rates of whole models are a hundredth of those of adapters, and their noise has to be.
    """
    share = min(1.0, lr / LR) if lr > 0 else 1.0
    return TEMPERATURE * share**2


def _prior_std_for(lr: float) -> float:
    """Of weights that do not start as LoRA does, for the same reason."""
    return PRIOR * (min(lr, LR) if lr > 0 else LR)


def _with_our_names(group: dict[str, Any]) -> dict[str, Any]:
    """A group with AdamW's ``betas`` by our names; entries that are dropped are logged."""
    dropped = sorted(group.keys() & ADAMW_ENTRIES)
    level = logging.WARNING if group.get("weight_decay") else logging.INFO
    kept = {name: value for name, value in group.items() if name not in ADAMW_ENTRIES}
    if "betas" in kept:
        kept["beta1"], kept["beta2"] = kept.pop("betas")
    if dropped:
        logger.log(level, "VAdam dropped %s of a group: the prior takes weight decay's place, see prior_std=", dropped)
    return kept


def _from_adamw(params: Params, lr: float | Tensor = 1e-3, *args: Any, **options: Any) -> VAdam:
    """`VAdam` by the arguments of 0.1.0's ``IVON.from_adamw``."""
    prior, weight_decay, _ = (options.pop(name, None) for name in ("prior", "weight_decay", "total_steps"))
    given: list[Any] = list(params)
    optimizer = VAdam(given, lr, *args, **options)
    stated = [options.get("prior_std") is not None or (isinstance(g, dict) and "prior_std" in g) for g in given]
    for group, has_std in zip(optimizer.param_groups, stated, strict=False):  # tensors are one group, of the first
        if weight_decay is not None and not has_std:
            group["weight_decay"] = weight_decay
        kind = group.pop("prior", prior)
        if kind not in (None, "fixed"):
            raise ValueError(f"prior={kind!r} is gone, and priors are fixed: state the width of another by prior_std")
        check_group(group)
    return optimizer


IVON.from_adamw = staticmethod(_from_adamw)
