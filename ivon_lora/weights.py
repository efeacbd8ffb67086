"""The two states of the weights: MEAN, and SAMPLED, in which they hold a posterior sample.

All transitions are idempotent and in place, and survive exceptions. What the user writes over a sample becomes the
mean.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ivon_lora.functional.noise import NoiseKey
from ivon_lora.layout import Seen, equal, same
from ivon_lora.members import Members
from ivon_lora.notices import Notices
from ivon_lora.optim.sharding import forget_copies, local
from ivon_lora.plan import Part
from ivon_lora.samples import Samples
from ivon_lora.untracked import refuse_capture, untracked
from ivon_lora.works import Live, Works


class Weights:
    """Writes samples and means into the parameters.

    Attributes:
        unsettled: after a checkpoint of sampled weights was loaded: the sample, and the means.
    """

    def __init__(self, members: Members, works: Works, samples: Samples, notices: Notices) -> None:
        self._members, self._works, self._samples, self._notices = members, works, samples, notices
        self.unsettled: tuple[NoiseKey, dict[Tensor, Tensor]] | None = None

    def train(self) -> None:
        """Draw a training sample, unless one is live."""
        if self._works.live is None:
            self.draw(self._samples.next_key())

    def next_sample(self) -> None:
        """Start a new training sample; the gradients of the one before, if any, are banked and cleared."""
        self.restore()
        self._samples.bank()
        self.draw(self._samples.next_key())

    def eval(self) -> None:
        """Restore the mean, if a sample is live, and forget its noise."""
        self.restore()
        self._members.forget_noise()

    def restore(self) -> None:
        """Restore the mean, if a sample is live; the step that follows may find its noise."""
        self.settle()
        if self._works.live is not None:
            self.drop(self._works.live.params)

    @untracked
    def draw(self, key: NoiseKey, written: bool = False) -> None:
        """Write a sample into the parameters, and its means into their memory.

        Args:
            written: both are there already.
        """
        refuse_capture()
        works = self._works
        self.settle()
        self.unsettled = None
        roster = self._members.census()
        params, seen = roster.look()
        plan = works.plan("draw", params, roster, seen)
        # refuses here what is out of bounds
        hypers = [works.hyper(part.group, part.updates, key.prediction) for part in plan.parts]
        live = works.live = Live(key, plan.params, plan.parts)
        if not key.prediction:
            self._samples.begin(key, plan.params)
        try:
            for part, hyper in zip(plan.parts, hypers, strict=True):
                if not written:
                    part.backend.sample(part.works, hyper, key)
        except BaseException:
            for part in plan.parts:
                for p, work in zip(part.params, part.works, strict=True):
                    if (mean := work.mean_copy) is not None:  # where p is no sample of the copy, it still is the mean
                        mean.copy_(torch.where(self._written(p, mean, key), local(p), mean))
            self.drop(plan.params)
            raise
        plan.were_written()
        if not plan.is_plain:
            forget_copies(plan.params)
        live.seals = [part.backend.seal(part.works) for part in plan.parts]
        live.complete = True

    @untracked
    def drop(self, params: list[Tensor]) -> None:
        """End SAMPLED; ``params`` get their mean back, all others already hold it."""
        entries = self._members.entries
        if params:
            self._works.show_means()
            torch._foreach_copy_([local(p) for p in params], [local(entries[p]["mean"]) for p in params])
            forget_copies(params)
        live, self._works.live = self._works.live, None
        if live is None or not live.means_are_shown:
            return
        ours = [part.hide_means() for part in live.parts or ()]
        if not all(ours):
            self._works.forget_plans()  # they have that memory for the mean
        if live.parts is None:
            for p in live.params:
                if p.dtype == entries[p]["hess"].dtype:
                    del entries[p]["mean"]

    # ---------------------------------------------------------------- what the user writes over a sample

    @untracked
    def settle(self, seen: Seen | None = None) -> None:
        """Find what the user wrote over a sample, and keep it as the mean of the elements written.

        Args:
            seen: how the parameters lie now, if that is known.
        """
        entries = self._members.entries
        if self.unsettled is not None:
            # A checkpoint of sampled weights was loaded: the model's, loaded after ours, may still hold the sample.
            key, means = self.unsettled
            for p, mean in means.items():
                part, written = local(p), self._written(p, mean, key)
                part.copy_(torch.where(written, part, mean.to(p.dtype)))
                if p.dtype != mean.dtype:
                    local(entries[p]["mean"]).copy_(torch.where(written, part.to(mean.dtype), mean))
        live = self._works.live
        if live is None or not live.complete:
            return
        if self.keep_written(_suspects(live, seen)):
            self.warn_of_written()

    def seals(self, parts: list[Part], seen: Seen | None) -> list[np.ndarray] | None:
        """Seals for the parts of a step that looks itself for what was written over the sample.

        None: it cannot, and :meth:`settle` must.
        """
        live = self._works.live
        if live is None or live.parts is None or not live.complete or len(parts) != len(live.parts):
            return None
        fit = all(
            same(part.params, drawn.params) and part.backend.checks_seals and drawn.is_in_place(seen)
            for part, drawn in zip(parts, live.parts, strict=True)
        )
        return live.seals if fit else None

    @untracked
    def keep_written(self, suspects: list[Tensor]) -> bool:
        """Make what the user wrote over the live sample the mean of these parameters; whether there was something."""
        entries, live, found = self._members.entries, self._works.live, False
        assert live is not None
        for p in suspects:
            self._works.show_means()
            mean = local(entries[p]["mean"])
            written = self._written(p, mean, live.key)
            if bool(written.any()):
                mean.copy_(torch.where(written, local(p).to(mean.dtype), mean))
                found = True
        return found

    def warn_of_written(self) -> None:
        """Say that it became the mean."""
        self._notices.warn(
            "written",
            "parameters were written while they held a posterior sample; the values written become the mean. "
            "Call optimizer.eval() before loading or changing weights.",
        )

    def _written(self, p: Tensor, mean: Tensor, key: NoiseKey) -> Tensor:
        """True where the local part of ``p`` is neither ``mean`` nor its sample ``key``."""
        work = self._works.work(p)
        part = work.param
        work.param, work.mean, work.mean_state, work.reread = torch.empty_like(part), mean, None, False
        _, group = self._members.place(p)
        hyper = self._works.hyper(group, int(self._members.entries[p]["step"].item()), key.prediction)
        self._members.backend(p.device).sample([work], hyper, key)
        return (work.param != part) & (mean.to(p.dtype) != part)


def _suspects(live: Live, seen: Seen | None) -> list[Tensor]:
    """Parameters that may have been written since the sample was."""
    if live.seals is None or live.parts is None:
        return live.params
    suspects = []
    for part, marks in zip(live.parts, live.seals, strict=True):
        if not (part.is_in_place(seen) and equal(part.backend.marks(part.works), marks)):
            suspects += part.params
    return suspects
