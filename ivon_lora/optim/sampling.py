"""The states of the weights.

- MEAN: the parameters hold the mean. `draw` leads to
- SAMPLED: they hold a posterior sample, and the state of each holds its mean. `restore`, and `end` after a step, lead
  back; where the mean is wanted while a training forward has left a graph whose backward is still to come, `hide` to
- hidden: the sample stays where the graph needs it, and the parameters are the mean in memory of its own, until `show`:
  the backward begins, or the next training forward, or the step.

All transitions are idempotent and survive exceptions. What somebody writes over a sample reaches the mean as the change
that it was (`settle`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ivon_lora.functional.noise import NoiseKey
from ivon_lora.optim.guards import in_backward, no_autograd, refuse_capture
from ivon_lora.optim.outside_writes import keep_changes, keep_untouched, restore_unless_written
from ivon_lora.optim.parameters import GroupBatch, Item, Parameters, Seal, State, by_backend, refresh_mean
from ivon_lora.optim.sharding import forget_copies, local
from ivon_lora.optim.step_samples import StepSamples
from ivon_lora.optim.tied import exchange_memory

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

WRITTEN = (
    "parameters were written while they held a posterior sample; the change was made to the mean. "
    "Call optimizer.eval() before loading or changing weights."
)

NO_ROOM = (
    "the mean is asked for (by an evaluation, state_dict() or eval()) between a training forward and its backward, and "
    "sharded parameters (FSDP2) cannot keep mean and sample at once: run the backward first"
)


class Sampling(StepSamples):
    """Writes samples and means into the parameters of an optimizer.

    Attributes:
        key: the sample that the parameters hold; None while they hold the mean.
        batches: the parameters that hold it.
        loaded: after a checkpoint of sampled weights was loaded: the sample, and the means.
        open_graphs: marks of training forwards whose backward may be still to come (`model_hooks`).
        forward_was_attached: whether the sample has served a forward of an attached model.
        backward_began: whether a backward of such a forward has begun.
    """

    def __init__(self, optimizer: IVON, parameters: Parameters) -> None:
        super().__init__(optimizer, parameters)
        self.key: NoiseKey | None = None
        self.batches: list[GroupBatch] = []
        self.loaded: tuple[NoiseKey, list[tuple[Tensor, Tensor]]] | None = None
        self.open_graphs: weakref.WeakSet[object] = weakref.WeakSet()
        self.forward_was_attached = False
        self.backward_began = False
        self._held: set[int] = set()
        self._hidden: _Hidden | None = None
        weakref.finalize(optimizer, self.end).atexit = False  # perhaps with the function that an exception left

    # ---------------------------------------------------------------- MEAN <-> SAMPLED

    @no_autograd
    def train(self) -> None:
        """Draw the training sample of this step, unless it is there."""
        self.show()
        self.settle()
        if self.key is None:
            self.draw(self.next_key())
        elif not self.open_graphs and any(p.requires_grad and id(p) not in self._held for p in self._parameters):
            self.draw(self.key)  # for those that were frozen when it was drawn

    def eval(self) -> None:
        """Let the parameters be the mean; a sample that a backward still needs is only hidden."""
        if self.key is not None and not self.key.prediction and (self.open_graphs or in_backward()):
            self.hide()
        else:
            self.leave()

    @no_autograd
    def draw(self, key: NoiseKey) -> None:
        """Write a sample into the parameters that train, and their means into the state; those that hold it keep it.

        A sample for prediction is one of frozen parameters, too, whose posterior was learned.
        """
        refuse_capture()
        self.settle()
        items = self._parameters.trained(ever=key.prediction)
        if self._held:
            items = [item for item in items if not self.holds(item[2])]
        batches = self._parameters.batches(items, self.hyper(key.prediction), draw=True)
        if not key.prediction and self.key is None:
            self.forward_was_attached = self.backward_began = False
        self._hold(key, self.batches + batches)
        if not key.prediction:
            self.pending, self.drawn = key, set().union(*(batch.indices for batch in self.batches))
        try:
            for backend, mine in by_backend(batches):
                backend.sample(mine, key)
            for batch in batches:
                batch.write_back(tell_autograd=self._hidden is None)
        except BaseException:
            self._recover()
            raise
        self._forget_copies()
        self.seal()

    @no_autograd
    def restore(self) -> None:
        """Write the mean back, if the parameters hold a sample."""
        self.show()
        self.leave()

    @no_autograd
    def end(self, updated: Sequence[GroupBatch] = ()) -> None:
        """End SAMPLED: all parameters get their mean back but those of the batches given, which hold it already."""
        others = [batch for batch in self.batches if all(batch is not other for other in updated)]
        have = {id(p) for batch in updated for p in batch.params} if others else set()
        for batch in others:
            back = [i for i, p in enumerate(batch.params) if id(p) not in have and batch.has_its_shape(i)]
            if back:
                hidden = self._hidden is not None  # autograd shall not know of what happens beside its graph
                targets = [batch.params[i].data if hidden else local(batch.params[i]).detach() for i in back]
                torch._foreach_copy_(targets, [batch.mean[i] for i in back])
        for batch in self.batches:
            self._parameters.forget_means(batch)
        self._forget_copies()
        self._hold(None, [])

    @no_autograd
    def leave(self) -> None:
        """End the sample of a context; one that a graph still needs stays hidden behind the mean."""
        self.settle()
        if self.key is not None:
            self.end()

    def _hold(self, key: NoiseKey | None, batches: list[GroupBatch]) -> None:
        self.key, self.batches = key, batches
        self._held = set().union(*(map(id, batch.params) for batch in batches))
        torch.clear_autocast_cache()  # it keeps weights as they were

    @property
    def is_in_use(self) -> bool:
        """Whether a backward or the step still needs the sample: a graph may be open, or gradients were taken at it."""
        return self.has_open_graph or (self.key is not None and self.backward_began)

    @property
    def has_open_graph(self) -> bool:
        """Whether the backward of a training forward may be still to come."""
        return self._hidden is not None or (self.key is not None and bool(self.open_graphs))

    def drop_unused(self) -> None:
        """The gradients were thrown away: the mean again, if all forwards of the sample have had their backward."""
        if self.forward_was_attached and not self.open_graphs:
            self.restore()

    def holds(self, p: Tensor) -> bool:
        """Whether a parameter holds a sample now."""
        return id(p) in self._held

    def holds_exactly(self, items: Sequence[Item]) -> bool:
        """Whether these parameters hold a sample now, and no others."""
        return self._held == {id(p) for _, _, p in items}

    def next_sample(self) -> None:
        """Start a new training sample; the gradients of the one before, if any, are banked and cleared."""
        self.restore()
        self.bank()
        self.draw(self.next_key())

    def close(self) -> None:
        """Bank the pending sample, with gradients of zero if there are none; the parameters are the mean."""
        self.restore()
        super().close()

    def forget_step(self) -> None:
        """The step is over, or given up."""
        super().forget_step()
        self.open_graphs.clear()

    # ---------------------------------------------------------------- the mean beside a graph that is still open

    @no_autograd
    def hide(self) -> None:
        """Show the mean in memory of its own; the sample stays where the graph of a training forward expects it.

        Raises:
            RuntimeError: a parameter is sharded, so its memory cannot be exchanged.
        """
        self.settle()
        assert self.key is not None
        if not all(batch.is_plain for batch in self.batches):
            raise RuntimeError(NO_ROOM)
        self._hidden = _Hidden(self.key, self.batches)
        self._hold(None, [])
        self._parameters.forget_batches()  # who sees the mean there may keep it
        try:
            self._exchange(self._hidden)
        except BaseException:
            self.show()
            raise

    def _exchange(self, hidden: _Hidden) -> None:
        for batch in hidden.batches:
            for p, state, mean in zip(batch.params, batch.states, batch.mean, strict=True):
                shown = mean if p.dtype == mean.dtype else mean.to(p.dtype)
                shown, others = shown.view(p.shape), self._parameters.tied.others(p)
                hidden.places.append(_Place(p, others, state, mean, p.data, (p._version, shown.data_ptr())))
                exchange_memory(p, others, shown)
        for batch in hidden.batches:
            self._parameters.forget_means(batch)

    @no_autograd
    def show(self) -> None:
        """Undo `hide`; if somebody has written the mean meanwhile, that is the mean, and the sample is gone."""
        hidden = self._hidden
        if hidden is None:
            return
        if self.key is not None:  # a sample for prediction, in the memory of the mean
            self.end()
        try:
            hidden.exchange_back()
        except BaseException:
            hidden.exchange_back()
            raise
        finally:
            self._hidden = None
            self._hold(hidden.key, hidden.batches)
        if hidden.written:
            self.end()

    # ---------------------------------------------------------------- what others write

    def seal(self) -> None:
        """What the parameters hold from here on is the sample: right after it was drawn, and after a forward.

        A module may change its own weights in the forward (``nn.Embedding(max_norm=...)``): that happens to the sample
        alone, for the forward at the mean does the same to the mean.
        """
        for batch in self.batches:
            batch.seals = batch.current_seals()

    @no_autograd
    def settle(self) -> None:
        """Let what others wrote over a sample reach the mean, as the change that it was; take in what they replaced."""
        self._settle_loaded()
        if self.key is None:
            return
        moved = False
        for batch in self.batches:
            before, batch.seals = batch.seals, batch.current_seals()
            if before != batch.seals:
                suspects = [i for i, seal in enumerate(batch.seals) if seal != before[i]]
                moved = moved or any(batch.seals[i][1] != before[i][1] for i in suspects)
                suspects = [i for i in suspects if batch.has_its_shape(i)]
                if suspects and keep_changes(batch.select(suspects), self.key):
                    self._optimizer.warn_once("written", WRITTEN)
            moved = moved or not batch.has_its_state()
        if moved:
            held = {id(p) for batch in self.batches for i, p in enumerate(batch.params) if batch.has_its_shape(i)}
            items = [item for item in self._parameters.listed() if id(item[2]) in held]
            self._hold(self.key, self._parameters.batches(items, self.hyper(self.key.prediction)))
            self.seal()

    def _recover(self) -> None:
        """A draw was interrupted."""
        for batch in self.batches:
            assert self.key is not None
            keep_untouched(batch, self.key)
        self.end()

    def _settle_loaded(self) -> None:
        """After a checkpoint of sampled weights was loaded: the model's, loaded after ours, may hold the sample."""
        if self.loaded is None:
            return
        (key, items), self.loaded = self.loaded, None
        places = {id(p): (index, group, p) for index, group, p in self._parameters.listed()}
        for p, mean in items:
            (batch,) = self._parameters.batches([places[id(p)]], self.hyper(key.prediction))
            restore_unless_written(p, batch, mean, key)

    def _forget_copies(self) -> None:
        forget_copies([p for batch in self.batches if not batch.is_plain for p in batch.params])

    # ---------------------------------------------------------------- copies of the optimizer

    def pickled(self) -> dict[str, Any]:
        """What a copy needs to go on; the means are in the state."""
        held = [index for batch in self.batches for index in batch.indices]
        names = ("key", "pending", "of_context", "drawn", "banked", "n_banked", "forward_was_attached")
        return {"held": held, **{name: getattr(self, name) for name in names}}

    def unpickle(self, saved: dict[str, Any]) -> None:
        """Take over what `pickled` returned."""
        for name, value in saved.items():
            if name != "held":
                setattr(self, name, value)
        if self.key is not None:
            items = [item for item in self._parameters.listed() if item[0] in set(saved["held"])]
            self._held = {id(item[2]) for item in items}
            self._hold(self.key, self._parameters.batches(items, self.hyper(self.key.prediction)))
            self.seal()


class _Place(NamedTuple):
    """A parameter whose sample is hidden: those that share its memory, its mean, that memory, and how it was left."""

    p: Tensor
    others: list[Tensor]
    state: State
    mean: Tensor
    memory: Tensor
    seal: Seal


@dataclass
class _Hidden:
    """A sample that waits for its backward; whether somebody has written the mean meanwhile."""

    key: NoiseKey
    batches: list[GroupBatch]
    places: list[_Place] = field(default_factory=list)
    written: bool = False

    def exchange_back(self) -> None:
        """Give all parameters the memory of the sample, also after an interruption."""
        while self.places:
            p, others, state, mean, memory, (version, address) = self.places[-1]
            if p.data_ptr() != memory.data_ptr() or not memory.numel():
                moved = p.data_ptr() != address and not torch.equal(p.detach(), mean.to(p.dtype))
                if p._version != version or moved:
                    refresh_mean(p.detach(), mean)
                    self.written = True
                exchange_memory(p, others, memory)
            state["mean"] = mean
            self.places.pop()
