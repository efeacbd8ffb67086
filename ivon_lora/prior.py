"""A prior whose width the data choose, one for each parameter tensor: empirical Bayes.

Of the prior N(0, 1 / (lambda delta)) of a tensor, the variational objective lambda E_q[L] + KL(q | prior) sees

    -n/2 log(lambda delta) + lambda delta / 2 sum_j (m_j^2 + sigma_j^2),

which is smallest at ``delta = 1 / (lambda mean_j(m_j^2 + sigma_j^2))`` (Graves 2011, eq. 15; per matrix of LoRA in
arXiv:2506.14280). sigma depends on delta, so this is repeated: expectation maximisation for the evidence. At its fixed
point delta is where the evidence, or what the Gaussian family makes of it, is largest. Each repetition moves delta the
less the less the data say, so it is safe long before mean and curvature have settled.

The prior only narrows. Where the data say little of a tensor, the fixed point is far out, at m^2 divided by the share
that the data have in the precision; and its m are initial values (A of LoRA), which are no news at all. The width
that it starts with stays what a user can rely on: the largest noise of a weight.

The mean keeps its pull delta m (arXiv:2506.14280 switches it off). It is the gradient of the same objective, also with
delta at its optimum: the derivative of ``n/2 log mean_j(m_j^2 + sigma_j^2)`` by m_j is ``lambda delta m_j``. Without it
the prior would be fitted to means that know nothing of it, and where the data say little, as in small training sets,
they would grow, and the prior with them.

The mean over a tensor is the true mean of its fp32 numbers, rounded once to fp32, which no order of summation can
change; so backends that add as it suits them agree in every bit. It is taken of the posterior that the update leaves,
before an allocation sets ranks to zero: that is no news from the data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ivon_lora.backends import Work
from ivon_lora.functional._arrays import Array, clamp, ones_like, where
from ivon_lora.functional.importance import exact_sum, settled_means, spread
from ivon_lora.layout import Look
from ivon_lora.optim.sharding import Addends, mask_part, means_over_shards

#: Updates of a parameter between two of its prior's. A sum over all elements adds a tenth to a compiled step on CPU,
#: and more to small ones; and a mean that moves by a learning rate takes several updates to say anything new.
INTERVAL = 10

#: How far the standard deviation of a prior may fall below where it starts, as a factor. Tensors of which the data say
#: almost nothing and whose mean is zero (B of LoRA, before it moves) have no other bound.
RANGE = 10.0

#: elements at once
_CHUNK = 1 << 15


def is_due(updates: int) -> bool:
    """Whether the prior of a parameter changes after its ``updates``-th update.

    For ``hess_init="auto"`` the curvature is known after as many updates as are between two of these.
    """
    return updates % INTERVAL == 0


def second_moment(mean: Array, hess: Array, ess: float, weight_decay: Array) -> Array:
    """m^2 + sigma^2 of each element under the posterior, sigma^2 = 1 / (lambda (h + delta)).

    Where h = 0 the data have said nothing of the element, whose own optimum is m = 0 and sigma = the prior's: it counts
    as if it were there. That does not move the fixed point, and keeps initial values (A of LoRA, while B is zero) out
    of it.
    """
    precision = (hess + weight_decay) * ess
    return where(hess > 0.0, mean * mean, 0.0) + ones_like(precision) / precision


def bounds(initial: float) -> tuple[float, float]:
    """The smallest and the largest delta: its first value, and what narrows the prior by `RANGE`."""
    return initial, initial * RANGE**2


def next_weight_decay(moment: Array, ess: float, initial: float) -> Array:
    """delta = 1 / (lambda moment), for the mean of :func:`second_moment`, within its :func:`bounds`."""
    precision = moment * ess
    return clamp(ones_like(precision) / precision, *bounds(initial))


def initial_state(weight_decay: float, device: torch.device) -> Tensor:
    """delta of a tensor before its first update: one fp32 element."""
    return torch.tensor(weight_decay, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Posterior:
    """One parameter, as much as its prior needs of it.

    Attributes:
        param: the parameter.
        work: its work, after an update.
        ess: lambda.
        initial: delta at the start.
    """

    param: Tensor
    work: Work
    ess: float
    initial: float


@dataclass(frozen=True)
class Sums:
    """Whole parameters on CPU whose moments a backend has added up.

    Attributes:
        works: their works, after an update; fp32 state.
        places: addresses of their ``own_decay``, int64 (n,).
        counts: elements of each, int64 (n,).
        ess, initial: as in `Posterior`, of all.
        totals: `Backend.moment_sums`, float64 (n,).
    """

    works: Sequence[Work]
    places: np.ndarray
    counts: np.ndarray
    ess: float
    initial: float
    totals: np.ndarray


#: they write deltas into the memory that holds them
Decays = list[Callable[[], object]]


@torch.no_grad()
def next_decays(posteriors: Sequence[Posterior | Sums]) -> Decays:
    """What `set_decays` takes to set the works' ``own_decay`` by the posteriors as they are; nothing waits for a GPU.

    Of sharded parameters all processes must take part, and get the same bits as from whole ones.
    """
    single = [x for x in posteriors if isinstance(x, Posterior) and x.param.numel()]
    alike: dict[tuple[torch.device, float, float], list[tuple[Tensor, Tensor]]] = {}
    for x, mean in zip(single, means_over_shards([_addends(x) for x in single]), strict=True):
        alike.setdefault((mean.device, x.ess, x.initial), []).append((_decay(x.work), mean))
    found: Decays = [_of_sums(x) for x in posteriors if isinstance(x, Sums)]
    for (_, ess, initial), pairs in alike.items():
        decays = next_weight_decay(torch.cat([mean for _, mean in pairs]), ess, initial)
        found.append(functools.partial(torch._foreach_copy_, [decay for decay, _ in pairs], list(decays.unbind())))
    return found


@torch.no_grad()
def set_decays(decays: Decays) -> None:
    """Write what `next_decays` has found."""
    for write in decays:
        write()


def _of_sums(x: Sums) -> Callable[[], object]:
    """`next_decays` of many parameters at once; those without elements keep their delta."""
    means = settled_means(
        x.totals, x.counts, lambda i: _exact(Posterior(x.works[i].param, x.works[i], x.ess, x.initial), 0)
    )
    with np.errstate(all="ignore"):  # a mean may be infinite, or of no numbers
        decays = next_weight_decay(means, x.ess, x.initial)
    filled = x.counts > 0
    return functools.partial(Look.put, decays[filled], x.places[filled])


def _addends(x: Posterior) -> Addends:
    if x.work.hess.device.type != "cpu":
        sums = second_moment(*_values(x), x.ess, _decay(x.work)).sum(dtype=torch.float64).view(1)
        return Addends(x.param, sums, x.param.numel(), None)
    exact = functools.partial(_exact, x) if x.work.hess.dtype == torch.float32 else None
    total = sum(float(np.sum(moments, dtype=np.float64)) for moments in _chunks(x))
    return Addends(x.param, torch.tensor([total], dtype=torch.float64), x.param.numel(), exact)


def _exact(x: Posterior, _: int) -> int:
    return sum(map(exact_sum, _chunks(x)))


def _chunks(x: Posterior) -> Iterator[np.ndarray]:
    """Second moments, part by part: temporaries stay small."""
    mean, hess = (values.numpy() for values in _values(x))
    decay = _decay(x.work).numpy()
    with np.errstate(over="ignore"):  # the square of a huge mean is infinite: the widest prior
        for start in range(0, len(hess), _CHUNK):
            yield second_moment(mean[start : start + _CHUNK], hess[start : start + _CHUNK], x.ess, decay)


def _values(x: Posterior) -> tuple[Tensor, Tensor]:
    """Mean and Hessian of the local elements, flat; ranks pruned for good have no Hessian, so they say nothing."""
    work = x.work
    mean = work.param.detach() if work.mean_state is None else work.mean_state
    hess = work.hess
    if work.rank_mask is not None:
        alive = spread(mask_part(x.param, work.rank_mask, work.rank_dim), work.rank_dim, tuple(hess.shape))
        hess = torch.where(alive, hess, 0.0)
    return mean.contiguous().view(-1), hess.view(-1)


def _decay(work: Work) -> Tensor:
    assert work.own_decay is not None
    return work.own_decay
