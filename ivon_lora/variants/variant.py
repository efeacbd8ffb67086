"""What all related methods have in common: the moments of a training step at which they act.

A variant is built before the optimizer (some add parameters to the model), attached to it once, and the loop stays as
it is::

    variant = Sora(model, total_steps=1000)
    optimizer = torch.optim.AdamW(variant.param_groups(), lr=5e-4)      # or VAdam(...), IVON(...)
    variant.attach(optimizer)
    ...                                                                 # a plain loop, Trainer, Accelerate, Lightning
    variant.detach()                                                    # the model is a plain PEFT LoRA model again

The moments are hooks that torch has anyway: of the model's forward, of the optimizer's step and of its state dict. So a
variant's state travels in the optimizer's checkpoint.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
import weakref
import zlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ivon_lora.functional.noise import MAX_SEED, NoiseKey, normal
from ivon_lora.lora.adapters import find_adapters
from ivon_lora.optim.guards import no_autograd
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import local, part_of
from ivon_lora.posterior.posterior import PosteriorFile, snapshot_posterior
from ivon_lora.variants.gates import Gates
from ivon_lora.variants.hook import Hook
from ivon_lora.variants.options import check_needs, check_options, integer, state
from ivon_lora.variants.resting import Ranks, Resting, without_noise

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

#: the key of a checkpoint of the optimizer under which the variants' states are
CHECKPOINT_KEY = "variants"

_attached: weakref.WeakSet[Variant] = weakref.WeakSet()


@dataclass(eq=False, repr=False)
class Variant:
    """Base class: a subclass is a dataclass of its options and state, and overrides the moments it needs.

    Args:
        model: with PEFT LoRA layers; the module whose forward the loop calls, before DDP or compile wrap it, and before
            ``fully_shard`` where the method has gates.
        total_steps: optimizer steps of the run, where the method has a schedule.
        adapter_name: which adapter of the model.
        seed: of the variant's random draws, which are functions of (seed, step).

    Attributes:
        claims: what it changes, of "gates", "gradients", "base", "masks" and "links". Two variants that claim the same
            are not attached to one optimizer; gradients may be, and are changed in the order of attachment.
        step: optimizer steps seen.
        history: rows for reports, one dictionary of plain values for each event.
        adapters: of `find_adapters`, in the order of the model.
        gates: those that a subclass has added to the model, or None.
        forwards: training forwards of the model since the last step.
        optimizer: the one it is attached to, or None.

    Raises:
        ValueError: the model has no such adapter, an option is outside its bounds, or the method takes no such layer.
    """

    claims: ClassVar[frozenset[str]] = frozenset()

    model: nn.Module
    _: KW_ONLY
    adapter_name: str = "default"
    seed: int = integer(0, low=0)
    step: int = state(int)
    history: list[dict[str, Any]] = state(list)

    def __post_init__(self) -> None:
        check_options(self)
        self.adapters = find_adapters(self.model, self.adapter_name)
        self.gates: Gates | None = None
        self.forwards = 0
        self.optimizer: Any = None
        self._handles: list[Any] = []
        self._is_ready = False  # `before_forward` has run since the last step, and `rest` not since then
        self._is_rehearsal = False

    # ---------------------------------------------------------------- the moments, for subclasses

    def prepare(self, optimizer: Optimizer) -> None:
        """Before the hooks are installed; ValueError if this optimizer does not go with the variant."""

    def before_forward(self) -> None:
        """Before the first training forward of a step, and again if `rest` was called since; IVON's sample is drawn."""

    def rest(self) -> None:
        """Before a forward that is no training forward, and before the model's weights are read for saving."""

    def at_rest(self) -> list[Ranks]:
        """Ranks that do not train, or are dropped: they have no noise, and steps leave them as they are."""
        return []

    def held(self) -> list[Ranks]:
        """Ranks that the step which follows `before_step` leaves as they are; they may have noise."""
        return self.at_rest()

    def before_step(self) -> None:
        """The gradients are complete, unscaled and clipped; the weights are those at which they were taken."""

    def after_step(self) -> None:
        """The weights are the new ones (of IVON the mean); `step` counts this step already."""

    def fold(self) -> None:
        """Bring what was added to the model into A and B, and take it out; the model computes what it did."""
        if self.gates is not None:
            self.gates.fold(self.optimizer)

    # ---------------------------------------------------------------- for users

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for any optimizer: what trains in the model; gates have a group of their own, see `Gates.group`."""
        gates = [] if self.gates is None else [self.gates.group()]
        own = {id(gate) for group in gates for gate in group["params"]}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        return [{"params": others}, *gates]

    def attach(self, optimizer: Optimizer) -> Self:
        """Install the hooks, on an optimizer of torch or of this library, also in Accelerate's wrapper.

        Raises:
            ValueError: it does not go with the variant, lacks a tensor of an adapter, or has a variant that claims the
                same; the variant is attached already.
        """
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.adapters = find_adapters(self.model, self.adapter_name)  # fully_shard replaces parameters
        self._check(optimizer)
        check_needs(self, optimizer)
        self.prepare(optimizer)
        self._resting, reading = Resting(optimizer), Hook(self.stop)
        self._handles += [
            self.model.register_forward_pre_hook(Hook(self._before_forward)),
            self.model.register_forward_hook(Hook(self._after_forward), always_call=True),
            *(m.register_state_dict_pre_hook(reading) for m in self.model.modules()),
            optimizer.register_step_pre_hook(self._at_step),
            optimizer.register_step_post_hook(self._at_end_of_step),
            optimizer.register_state_dict_post_hook(self._at_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._at_load),
        ]
        self.optimizer = optimizer
        _attached.add(self)
        return self

    def _check(self, optimizer: Any) -> None:
        name, groups = type(self).__name__, optimizer.param_groups
        if self.optimizer is not None:
            raise ValueError(f"this {name} is attached already; build one for each optimizer")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(f"{name} acts once in a step, and LBFGS evaluates many times; take AdamW, SGD or VAdam")
        if any(group.get("maximize") for group in groups):
            raise ValueError(f"{name} minimises, and the optimizer has maximize=True; negate the objective instead")
        for other in (v for v in _attached if v.optimizer is optimizer):
            common = (self.claims & other.claims) - {"gradients"}
            if common or type(other) is type(self):
                what = ", ".join(sorted(common)) or "the same"
                raise ValueError(f"{name} and {type(other).__name__} both change {what}; attach one of them")
        if "masks" in self.claims and getattr(optimizer, "pruner", None) is not None:
            raise ValueError(f"{name} and the optimizer's RankPruner both decide about ranks; take one of them")
        given = {id(p) for group in groups for p in group["params"]}
        needed = [(f"{key} of adapter {a.name!r}", p) for a in self.adapters for key, p, _ in a.tensors()]
        needed += [("a gate", gate) for group in self.param_groups()[1:] for gate in group["params"]]
        for what, p in needed:
            if id(p) not in given:
                order = "build the variant first, then the optimizer from variant.param_groups()"
                frozen = "it has requires_grad=False, so leave its layer out of target_modules"
                cure = order if p.requires_grad else frozen
                raise ValueError(f"{what} is not among the optimizer's parameters: {cure}")

    @no_autograd
    def detach(self) -> None:
        """Take the hooks off and `fold`: the model is a plain PEFT LoRA model, to be exported, merged or saved."""
        if isinstance(self.optimizer, IVON):
            self.optimizer.eval()
        self.stop()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.fold()
        self.optimizer = None

    def posterior(self) -> PosteriorFile:
        """`snapshot_posterior` of the optimizer, IVON or VAdam; ranks at rest have no spread."""
        found = snapshot_posterior(self.optimizer, model=self.model)
        parameters = self.optimizer.parameters
        mine = (p for _, _, p in parameters.listed() if parameters.has_posterior(p))
        names = {id(p): name for name, p in zip(found.names, mine, strict=True)}
        for p, dim, ranks in self.at_rest():
            found.std[names[id(p)]].index_fill_(dim, ranks.cpu().nonzero().flatten(), 0.0)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain values and tensors."""
        values = {name: getattr(self, name) for name in self._names_of_state()}
        return copy.deepcopy({n: v.state_dict() if isinstance(v, Optimizer) else v for n, v in values.items()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; ValueError if it lacks an entry."""
        if missing := [name for name in self._names_of_state() if name not in state]:
            raise ValueError(f"the state of {type(self).__name__} lacks {', '.join(missing)}: it is another variant's")
        for name in self._names_of_state():
            value = copy.deepcopy(state[name])
            if isinstance(own := getattr(self, name), Optimizer):
                own.load_state_dict(value)
            else:
                setattr(self, name, value)

    def _names_of_state(self) -> list[str]:
        return [field.name for field in fields(self) if "is_state" in field.metadata]

    # ---------------------------------------------------------------- for subclasses

    def normals(self, shape: tuple[int, ...], index: int = 0, draw: int = 0) -> Tensor:
        """Standard normals, fp32 on the CPU: a function of class, seed, step, ``index`` (of a layer) and ``draw``."""
        seed = (self.seed + (zlib.crc32(type(self).__name__.encode()) << 32)) % MAX_SEED
        return normal(NoiseKey(seed, self.step, draw), index, shape, "cpu")

    def forget(self, *params: Tensor) -> None:
        """Let the optimizer forget what it knows of some parameters, as if they were new."""
        for p in params:
            self.optimizer.state.pop(p, None)
            p.grad = None

    def restart(self, a: Tensor, b: Tensor, index: int) -> Tensor:
        """Let a pair begin anew: A as PEFT starts it, kaiming_uniform_(a=sqrt 5), B = 0, no state in the optimizer.

        Returns A, (r, in, ...), whole; ``index`` of the pair is that of its `normals`.
        """
        normals = self.normals(tuple(a.shape), index)
        fresh = (torch.erf(normals / math.sqrt(2)) / math.sqrt(normals[0].numel())).to(a)
        local(a).detach().copy_(part_of(a, fresh))
        local(b).detach().zero_()
        self.forget(a, b)
        return fresh

    # ---------------------------------------------------------------- hooks

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        is_training = model.training and torch.is_grad_enabled()
        self.forwards += is_training
        if not is_training or not self._is_ready:
            self._use(is_training)

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if output is None:  # it raised
            self.stop()

    def stop(self, *_: Any) -> None:
        """Somebody reads the weights."""
        self._use(False)

    @no_autograd
    def _use(self, for_training: bool) -> None:
        (self.before_forward if for_training else self.rest)()
        without_noise(self.optimizer, self.at_rest())
        self._is_ready = for_training

    def _at_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._before_step()
            return None
        return args[:1], {**kwargs, "closure": functools.partial(self._evaluate, closure)}

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """A closure's gradients are complete after its last evaluation."""
        loss, optimizer = closure(), self.optimizer
        wanted = max(group.get("mc_samples", 1) for group in optimizer.param_groups)
        if not isinstance(optimizer, IVON) or optimizer.sampling.n_banked + 1 >= wanted:
            self._before_step()
        return loss

    @no_autograd
    def _before_step(self) -> None:
        # torch.distributed.checkpoint steps a fresh optimizer, with gradients of zero and lr 0, to see its state
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._is_rehearsal = not self.forwards and not any(rates)
        if not self._is_rehearsal:
            self.before_step()
            self._resting.hold(self.held())

    @no_autograd
    def _at_end_of_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_rehearsal:
            self._resting.release()
            self.step += 1
            self._is_ready, self.forwards = False, 0
            self.after_step()

    def _at_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict.setdefault(CHECKPOINT_KEY, {})[type(self).__name__] = self.state_dict()

    @no_autograd
    def _at_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state = state_dict.get(CHECKPOINT_KEY, {}).get(type(self).__name__)
        if state is not None:
            self.load_state_dict(state)
        else:
            warnings.warn(
                f"the optimizer's state dict has nothing of {type(self).__name__}, which goes on from step "
                f"{self.step}; call variant.load_state_dict(...) if its state was saved elsewhere",
                stacklevel=3,
            )
