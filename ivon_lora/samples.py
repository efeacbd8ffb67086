"""The training samples of one step: the gradients at all but the last are banked, that at the last is in ``p.grad``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ivon_lora.backends import Work
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.layout import Seen, addresses, grad_of, is_sparse, plain_addresses, same
from ivon_lora.members import Members
from ivon_lora.notices import Notices
from ivon_lora.optim.param_groups import AUTO, hyper_of, needs_batch_size
from ivon_lora.optim.sharding import local, local_grad
from ivon_lora.plan import Group, Part, Roster
from ivon_lora.untracked import untracked
from ivon_lora.works import Works


@dataclass(frozen=True)
class Found:
    """Parameters to update, as their gradients stand.

    Attributes:
        params, grads: the parameters and their gradients; None where only banked ones are there.
        places: addresses of the gradients, if all are contiguous and of one dtype; else None.
        dtype: of the gradients then.
        seen: how the parameters lie, if that was seen on the way.
    """

    params: list[Tensor]
    grads: Sequence[Tensor | None]
    places: np.ndarray | None = None
    dtype: torch.dtype | None = None
    seen: Seen | None = None


class Samples:
    """What the coming step knows of its samples.

    Attributes:
        pending: the sample at which the gradients in ``p.grad`` are taken; None without one.
        of_context: whether a context of `sampled_params` drew it.
        drawn: the parameters that took part in the last draw.
        banked: sums of gradients and curvatures over the earlier samples.
        n_banked: how many those are.
    """

    def __init__(self, members: Members, works: Works, notices: Notices) -> None:
        self._members, self._works, self._notices = members, works, notices
        self.pending: NoiseKey | None = None
        self.of_context = False
        self.drawn: list[Tensor] = []
        self.banked: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self.n_banked = 0

    def begin(self, key: NoiseKey, params: list[Tensor]) -> None:
        """A training sample is about to be written into ``params``."""
        self.pending, self.drawn = key, params

    def forget(self) -> None:
        """The step is over, or given up."""
        self.pending, self.of_context, self.drawn = None, False, []
        self.banked, self.n_banked = {}, 0
        self._members.forget_noise()
        self._works.examples.next_step()

    @property
    def taken(self) -> int:
        """Samples of the coming step so far."""
        return self.n_banked + (self.pending is not None)

    def next_key(self) -> NoiseKey:
        """The sample that follows those banked."""
        replicas = self._members.replicas()
        sample = self.n_banked if replicas is None else replicas.sample_number(self.n_banked)
        return self.key_of(self._members.completed_steps, sample)

    def key_of(self, step: int, sample: int) -> NoiseKey:
        """Of a training sample; an antithetic one with an odd number mirrors the one before it."""
        seed = self._members.seed
        if self._members.groups[0]["antithetic"]:
            return NoiseKey(seed, step, sample // 2, mirrored=bool(sample % 2))
        return NoiseKey(seed, step, sample)

    def with_gradient(self, roster: Roster) -> Found:
        """Parameters to update, and their gradients.

        Raises:
            RuntimeError: a gradient is sparse. Nothing has been changed then.
        """
        quick = roster.tensors.gradients()
        if quick is not None:
            return Found(roster.params, quick.tensors, quick.places, quick.dtype, quick.params)
        params = roster.trainable()
        grads = list(map(grad_of, params))
        present = [grad for grad in grads if grad is not None]
        dtype = present[0].dtype if present else None
        places = None if dtype is None else plain_addresses(present, dtype)
        if places is None and any(map(is_sparse, present)):
            raise RuntimeError("IVON does not take sparse gradients; build the embedding with sparse=False")
        if len(present) == len(params):
            return Found(params, present, places, dtype)
        pairs = [(p, grad) for p, grad in zip(params, grads, strict=True) if grad is not None or p in self.banked]
        return Found([p for p, _ in pairs], [grad for _, grad in pairs])

    def by_part_taken(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Those that took part in a sample of this step, and the others."""
        if self.n_banked:
            drawn = set(self.drawn)
            self.open([p for p in params if p in drawn])
        elif same(params, self.drawn):
            return params, []
        took_part = {*self.drawn, *self.banked}
        return [p for p in params if p in took_part], [p for p in params if p not in took_part]

    # ---------------------------------------------------------------- the bank

    @untracked
    def bank(self) -> None:
        """Add gradient and curvature of the pending sample to the sums of this step."""
        roster = self._members.census()
        took_part = set(self.drawn)
        found = self.with_gradient(roster)
        params = [p for p in found.params if p in took_part]
        if self.pending is None or not params:
            return
        self.require_examples()
        replicas, examples = self._members.replicas(), self._works.examples
        parts = 1 if replicas is None else replicas.size
        self.open(params)
        for part in self._works.plan("bank", params, roster).parts:
            with self.gradients(part, found):
                hyper = hyper_of(part.group, part.updates + 1, examples.batch, parts=parts)
                part.backend.bank(part.works, hyper, observed_at(self.pending, part.group))
        for p in params:
            if p.grad is not None:
                p.grad.zero_()  # the next sample's gradient must not contain this one's
        self._count_banked()

    def close(self) -> None:
        """Bank the pending sample, with gradients of zero if there are none."""
        self.bank()
        if self.pending is not None:
            self._count_banked()

    def _count_banked(self) -> None:
        self.n_banked += 1
        self._works.examples.next_sample()
        self.pending, self.of_context = None, False

    def open(self, params: list[Tensor]) -> None:
        """Sums of zero for those that have none: an earlier sample without a gradient counts as a gradient of zero."""
        for p in params:
            if p not in self.banked:
                hess = local(self._works.state_of(p)["hess"])
                self.banked[p] = torch.zeros_like(hess), torch.zeros_like(hess)

    @contextmanager
    def gradients(self, part: Part, found: Found | None) -> Iterator[None]:
        """Lend the works gradients and banked sums, and take them back: they are not the optimizer's to keep.

        Args:
            found: None: all gradients are zero, because those of all samples are banked already.
        """
        works = part.works
        if found is not None and found.places is not None and part.is_plain and same(part.params, found.params):
            works.lend(found.grads, found.places, found.dtype == works[0].param.dtype)
        else:
            read = grad_of if part.is_plain else local_grad
            works.lend(*_plain([None] * len(works) if found is None else list(map(read, part.params)), works))
        if not part.backend.reads_table:
            works.hand_out()
        if self.banked:
            sums = [self.banked.get(p, (None, None)) for p in part.params]
            for work, (grad, curvature) in zip(part.works, sums, strict=True):
                work.banked_grad, work.banked_curvature = grad, curvature
            part.works.read("banked_grad")
            part.works.read("banked_curvature")
        try:
            yield
        finally:
            works.take_back()
            if self.banked:
                part.works.forget("banked_grad")
                part.works.forget("banked_curvature")

    # ---------------------------------------------------------------- the examples of a step

    def require_examples(self) -> None:
        """Before a curvature is computed.

        Raises:
            RuntimeError: a group counts its examples, and none were seen.
        """
        if self._works.examples.batch is None and any(
            group["batch_size"] == AUTO and needs_batch_size(group) for group in self._members.groups
        ):
            raise RuntimeError(
                "batch_size='auto' counts the examples of training forwards, and there was none since the last step: "
                "call optimizer.attach(model) once, for the model whose forward the loop calls, or pass batch_size=, "
                "the number of examples that one step's gradient averages over"
            )

    @property
    def examples(self) -> int:
        """Examples that the gradient of the step is the mean of: as stated, or as counted (0 if none were)."""
        stated = self._members.groups[0]["batch_size"]
        if isinstance(stated, int):
            return stated
        counter = self._works.examples
        return (counter.batch if self.pending is not None else counter.batch_of_step) or 0

    def check_batch_size(self) -> None:
        """Warn if the examples counted contradict a ``batch_size`` that was stated."""
        for group in self._members.groups:
            if isinstance(group["batch_size"], int) and needs_batch_size(group):
                complaint = self._works.examples.complaint(group["batch_size"], self.taken)
                if complaint is not None:
                    self._notices.warn("batch_size", complaint)
                return


def observed_at(key: NoiseKey, group: Group) -> NoiseKey:
    """The sample at which the gradients of a group are taken, as its curvature is to see it.

    Maximising negates the gradient. Squares of it stay; ``(-ghat) eps / sigma`` is ``ghat (-eps) / sigma``, with the
    same bits, and the noise can be had mirrored. The momentum takes the sign from `Hyper.beta1_complement`.
    """
    return replace(key, mirrored=not key.mirrored) if group["maximize"] else key


def _plain(grads: list[Tensor | None], works: Sequence[Work]) -> tuple[list[Tensor], np.ndarray, bool]:
    """Contiguous gradients, zeros where there are none; their addresses; whether they have their parameters' dtype."""
    plain = [torch.zeros_like(w.hess) if g is None else g.contiguous() for g, w in zip(grads, works, strict=True)]
    return plain, addresses(plain), all(g.dtype == w.param.dtype for g, w in zip(plain, works, strict=True))
