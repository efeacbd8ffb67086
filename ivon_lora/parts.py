"""The parts an optimizer is made of: how they fit together, are loaded, and are copied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ivon_lora.functional.noise import NoiseKey
from ivon_lora.members import Members, Owner
from ivon_lora.notices import Notices
from ivon_lora.optim.batch_size import ExampleCounter
from ivon_lora.optim.replicas import Exchange
from ivon_lora.optim.state_dict import NO_SAMPLE, PREDICTION_SAMPLE, restore
from ivon_lora.rank_work import RankWork
from ivon_lora.samples import Samples
from ivon_lora.untracked import untracked
from ivon_lora.update import Update
from ivon_lora.weights import Weights
from ivon_lora.works import Works

#: name in a pickle: part, and its attribute
PICKLED = {
    "_backend_name": ("members", "backend_name"),
    "_examples": ("works", "examples"),
    "_live": ("works", "live"),
    "_unsettled": ("weights", "unsettled"),
    "_pending": ("samples", "pending"),
    "_pending_of_context": ("samples", "of_context"),
    "_sampled": ("samples", "drawn"),
    "_banked": ("samples", "banked"),
    "_n_banked": ("samples", "n_banked"),
    "_replicas_agree": ("exchange", "agreed"),
    "_warned": ("notices", "given"),
}


class Parts:
    """What is behind `IVON`; each part knows only those before it.

    Args:
        owner: the optimizer.
        backend: its argument.
    """

    def __init__(self, owner: Owner, backend: str) -> None:
        self.notices = Notices()
        self.exchange = Exchange()
        self.members = Members(owner, backend)
        self.works = Works(self.members, ExampleCounter())
        self.samples = Samples(self.members, self.works, self.notices)
        self.weights = Weights(self.members, self.works, self.samples, self.notices)
        self.ranks = RankWork(self.members, self.works, self.samples)
        self.update = Update(
            self.members, self.works, self.samples, self.weights, self.ranks, self.exchange, self.notices
        )

    def pickled(self) -> dict[str, Any]:
        """What a copy or a pickle of the optimizer needs to go on, by the names of `PICKLED`."""
        self.weights.settle()
        self.works.show_means()
        saved = {name: getattr(getattr(self, part), attribute) for name, (part, attribute) in PICKLED.items()}
        live = self.works.live
        return {**saved, "_live": None if live is None else replace(live, parts=None, seals=None)}

    def unpickle(self, state: dict[str, Any]) -> None:
        """Take over what `pickled` returned, once the owner has its groups."""
        for name, (part, attribute) in PICKLED.items():
            setattr(getattr(self, part), attribute, state[name])
        self.members.given.update(self.members)

    @untracked
    def load(self, state_dict: dict[str, Any]) -> None:
        """Load a checked state dict; the weights are the mean afterwards."""
        self.samples.forget()
        self.works.forget()
        self.weights.unsettled = None
        members = self.members
        live_sample, means = restore(state_dict, members.groups, members.entries)
        if means and live_sample == PREDICTION_SAMPLE:
            key = NoiseKey(members.seed, members.groups[0]["prediction_draws"] - 1, prediction=True)
            self.weights.unsettled = key, means
        elif means and live_sample != NO_SAMPLE:
            self.weights.unsettled = self.samples.key_of(members.completed_steps, live_sample), means
