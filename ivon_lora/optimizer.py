"""IVON as a torch optimizer: parameter groups, state, and the two states of the weights, MEAN and SAMPLED.

No formula lives here (see `reference`), no kernel (see `backends`) and no decision about ranks (see `pruning`).
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from ivon_lora import posterior as _posterior
from ivon_lora.attach import Attachment
from ivon_lora.backends import Backend, Resampling, Work, choose_backend, make_backend
from ivon_lora.batch import same
from ivon_lora.batch_size import ExampleCounter
from ivon_lora.checkpoint import check_state_dict, entries, from_ivon_opt, is_ivon_opt
from ivon_lora.hyperparameters import (
    ADDED_ENTRIES,
    AUTO,
    COUNTERS,
    beta2_notice,
    check_group,
    hyper_of,
    initial_hess,
    needs_batch_size,
    plain_numbers,
    resolve_ess,
    state_dtype,
    weight_decay_of,
    without_adamw_entries,
)
from ivon_lora.integrations.wrappers import act_inside, evaluates_nothing
from ivon_lora.noise import MASK, NoiseKey
from ivon_lora.plan import Part, Plan, Roster, is_sparse, trainable
from ivon_lora.reference import Hyper
from ivon_lora.replicas import Replicas, checksum, find_replicas
from ivon_lora.shards import (
    check_layout,
    check_replaced,
    first_element,
    forget_copies,
    is_sharded,
    like,
    local,
    local_grad,
    mask_part,
    part_of,
)

if TYPE_CHECKING:
    from ivon_lora.pruning import RankPruner

logger = logging.getLogger(__name__)

#: state of a parameter's shape, kept in the state's dtype whatever the parameter's
STATE_TENSORS = ("momentum", "hess", "mean", "sensitivity", "uncertainty")

#: those of them that are the criterion "sensitivity"
RUNNING_MEANS = ("sensitivity", "uncertainty")

#: values of "live_sample" in a saved group that are no index of a training sample
NO_SAMPLE, PREDICTION_SAMPLE = -1, -2

P = ParamSpec("P")
R = TypeVar("R")


def _untracked(method: Callable[P, R]) -> Callable[P, R]:
    """No gradients, and ordinary tensors even inside ``torch.inference_mode()``: training goes on with them."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


@dataclass
class _Live:
    """The sample that the parameters hold now.

    Attributes:
        key: which one.
        params: the parameters that hold it.
        complete: False while it is being written.
        seals: for each of the calls that wrote it the addresses and `Backend.marks` of its parameters, to see later
            whether somebody else has written; None when nothing is known of them (in a copy of the optimizer).
    """

    key: NoiseKey
    params: list[Tensor]
    complete: bool = False
    seals: list[tuple[Part, np.ndarray, np.ndarray]] | None = None

    @functools.cached_property
    def members(self) -> set[Tensor]:
        """The parameters as a set."""
        return set(self.params)


class IVON(torch.optim.Optimizer):
    r"""Variational online Newton: an optimizer whose iterate is a Gaussian posterior N(m, sigma^2) per parameter.

    Follows "Variational Learning is Effective for Large Deep Networks" (arXiv:2402.17641, Algorithm 1), with the
    positional arguments of ``ivon.IVON``, and prunes LoRA ranks inside :meth:`step` when it is given a pruner
    (arXiv:2409.10673)::

        sample      theta = m + sigma eps,  sigma^2 = 1 / (ess (h + weight_decay))
        curvature   f = ghat eps / sigma  ("price"),  ess ghat^2  ("gradsq"),  or  batch_size ghat^2  ("fisher")
        momentum    g <- beta1 g + (1 - beta1) ghat
        hessian     u = (1 - beta2)(f - h) / (h + weight_decay);  h <- h + (h + weight_decay)(u + u^2/2)
                    for "fisher":  h <- beta2 h + (1 - beta2) f
        mean        m <- m - lr clip((g / (1 - beta1^t) + weight_decay m) / (h + weight_decay), +-clip_radius)
                    for step_rule "adam":  ... / (sqrt(h / batch_size) + 1e-8) ...

    The defaults are those of the paper and of ivon-opt. :meth:`from_adamw` takes AdamW's learning rate and finds the
    rest.

    The parameters hold the posterior mean (MEAN) except between :meth:`train`, which draws a sample into them
    (SAMPLED), and the next :meth:`step` or :meth:`eval`. The Hugging Face Trainer and Accelerate call ``train`` and
    ``eval`` themselves; a plain loop needs one line, ``optimizer.attach(model)``.

    Args:
        params: tensors, groups, or ``model.named_parameters()``.
        lr: learning rate of the mean; multiplied by ``hess_init + weight_decay`` if ``rescale_lr``. May be 0.
        ess: lambda > 0, effective sample size in examples; the number of training examples divided by a temperature.
            "auto" is ``num_examples / temperature``.
        hess_init: h0 > 0, initial Hessian; ``sigma = 1 / sqrt(ess (hess_init + weight_decay))`` at the start. "auto"
            is the mean of the squared gradients' curvature over a parameter's first 10 updates, which are made at the
            mean, without noise; until then the posterior is the prior. Needs ``weight_decay > 0``.
        beta1: in [0, 1), decay of the momentum.
        beta2: in [0, 1], decay of the Hessian. "auto" needs no number of steps: ``1 - beta2`` is
            ``max(1/t, 1 / max(10, t / 10))`` in a parameter's t-th update, a mean over the last tenth of the run. For
            "price" it is at most ``0.1 batch_size / ess``, the rate at which its bias is 5 %. For "gradsq" the
            Hessian is then a plain mean.
        weight_decay: delta >= 0, precision of the Gaussian prior per effective example.
        mc_samples: posterior samples per step for ``step(closure)``.
        hess_approx: how the curvature H (the Hessian's diagonal) is estimated, see
            :func:`~ivon_lora.reference.estimate_curvature`: "price" is unbiased, very noisy for large ``ess``, and
            settles at ``H (1 + (1 - beta2) ess / (2 batch_size))``; "gradsq", ivon-opt's, is ``ess / batch_size`` times
            too large; "fisher" has the right size and little noise, and needs ``batch_size`` and ``weight_decay > 0``.
        clip_radius: xi > 0, bound of an element of the preconditioned step, before the learning rate.
        sync: replicas of a process group draw noise of their own, and :meth:`step` averages gradients and curvatures
            over them: as many samples per step as there are replicas. Needs the gradients before anybody averages
            them, which ``attach(model)`` sees to under DistributedDataParallel (see `replicas`); no fp16 GradScaler,
            which may skip the step on some replicas only. Without it (default) replicas share their noise by
            construction, DDP averages their gradients as always, and nothing else is exchanged. Without a process
            group it changes nothing.
        debias: divide the momentum by ``1 - beta1^t``.
        rescale_lr: see ``lr``. Without effect with ``step_rule="adam"`` or ``hess_init="auto"``.
        seed: 64-bit seed of the noise; the global random state is never touched.
        backend: "auto" (the Triton kernels on a GPU, eager elsewhere), "eager", "triton", or "compile" (CPU; needs a
            C++ compiler). All give the same fp32 bits.
        pruner: a :class:`~ivon_lora.pruning.RankPruner` whose adapters' tensors are all in ``params``.
        batch_size: examples whose mean loss has the gradient that :meth:`step` reads: all accumulated micro-batches and
            all replicas. Only "fisher" and the "auto"s of "price" read it. "auto" counts them in the forwards of the
            model given to :meth:`attach`. The posterior's precision is proportional to it. Examples must be
            independent: where the tokens of a sequence are correlated, count sequences.
        step_rule: "newton" divides the mean's step by h + weight_decay, "adam" (with "fisher" only) by
            ``sqrt(h / batch_size) + 1e-8``. The posterior is the same, since a positive divisor does not move the point
            where the expected step is zero. h / batch_size is Adam's second moment, so ``lr`` is AdamW's: a step is at
            most about lr in root mean square, and a wrong ``batch_size`` does not change it.
        num_examples, temperature: of ``ess="auto"``: number of training examples, and what sharpens the posterior: 1 is
            Bayes' rule, smaller is more certain.
        antithetic: the samples of a step come in pairs with opposite eps (``mc_samples`` must be even). On one batch,
            as in ``step(closure)``, "price" then is a difference of two gradients: the mean gradient and the batch's
            noise in it cancel. Where the Hessian is nearly diagonal, what is left of its standard deviation is about
            ``sqrt(2) H`` instead of ``sqrt(ess / batch_size) H``: it can follow the data as fast as "fisher", for twice
            the passes.
        prior_std: sets ``weight_decay = 1 / (ess prior_std^2)``, so that the prior's standard deviation is this, in
            place of ``weight_decay``; a group may have its own.

    State of a parameter ``p`` (``optimizer.state[p]``), fp32 for fp32 and 16-bit parameters, fp64 for fp64 ones:
        ``step`` (updates so far), ``momentum``, ``hess``; ``mean`` while a sample is live, and always for a 16-bit
        parameter; for tensors of a pruner's adapters ``rank_snr`` (r,), the score of each rank of the adapter under the
        pruner's criterion after the last update and before its allocation (0 for ranks pruned for good), and
        ``rank_mask`` (r,), False for pruned ranks. On CPU scores are computed where an allocation needs them and when
        ``optimizer.state`` is read: keep no reference to its contents from step to step if you want them up to date.

    Raises:
        ValueError: an argument outside its bounds, duplicate, complex or integer parameters.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = IVON(model.parameters(), lr=0.1, ess=100)
        >>> x, y = torch.ones(4, 3), torch.zeros(4, 1)
        >>> for _ in range(3):
        ...     optimizer.train()
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> optimizer.posterior(model.weight).stddev.shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor,
        ess: float | str,
        hess_init: float | str = 1.0,
        beta1: float = 0.9,
        beta2: float | str = 0.99999,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        hess_approx: str = "price",
        clip_radius: float = math.inf,
        sync: bool = False,
        debias: bool = True,
        rescale_lr: bool = True,
        *,
        seed: int = 0,
        backend: str = "auto",
        pruner: RankPruner | None = None,
        batch_size: int | str | None = None,
        step_rule: str = "newton",
        num_examples: int | None = None,
        temperature: float = 1.0,
        prior_std: float | None = None,
        antithetic: bool = False,
    ) -> None:
        NoiseKey(seed, 0)  # checks the seed
        ess = resolve_ess(ess, num_examples, temperature)
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "mc_samples": mc_samples,
            "hess_approx": hess_approx,
            "clip_radius": clip_radius,
            "sync": sync,
            "debias": debias,
            "rescale_lr": rescale_lr,
            "batch_size": batch_size,
            "step_rule": step_rule,
            "antithetic": bool(antithetic),
            "seed": seed,
            "completed_steps": 0,
            "prediction_draws": 0,
        }
        check_group({**defaults, "weight_decay": 1.0 if prior_std is not None else weight_decay})
        self._prior_std = prior_std
        self._examples = ExampleCounter()
        self._backend_name = backend
        self._backends: dict[torch.device, Backend] = {}
        self._live: _Live | None = None
        self._pending: NoiseKey | None = None  # the sample at which the gradients in p.grad were taken
        self._pending_of_context = False
        self._sampled: list[Tensor] = []  # the parameters that took part in it
        self._banked: dict[Tensor, tuple[Tensor, Tensor]] = {}  # sums of gradients and curvatures over earlier samples
        self._n_banked = 0
        self.in_context = False  # inside `sampled_params`, or the closure of a recorded step
        self._roster: Roster | None = None
        self._given: set[Tensor] = set()  # all parameters that `add_param_group` has seen
        self._plans: dict[str, Plan] = {}
        self._unsettled: tuple[NoiseKey, dict[Tensor, Tensor]] | None = None
        self._buffers: dict[Tensor, Tensor] = {}  # memory of the means, kept from sample to sample
        self._warned: set[str] = set()
        self._replicas_agree = False  # checked at the first step that shows it
        self._nonfinite_before = 0  # counted by the optimizer this one is a copy of
        self.pruner: RankPruner | None = None
        super().__init__(params, defaults)
        if weight_decay and not any(group["weight_decay"] for group in self.param_groups):
            self._warn_once(
                "weight_decay",
                f"every group sets weight_decay=0, so the argument weight_decay={weight_decay:g} has no effect. "
                "transformers' Trainer makes such groups for optimizer_cls_and_kwargs=(IVON, ...): pass (IVONFactory, "
                "...) there, or optimizers=(IVON(...), None). If 0 is meant, pass weight_decay=0.0",
            )
        for device in dict.fromkeys(p.device for _, p, _ in self._parameters()):
            self._backend(device)  # refuses here what cannot run
        if pruner is not None:
            pruner.bind(self)
            self.pruner = pruner
            notice = beta2_notice(self.param_groups, pruner.total_steps)
            if notice is not None:
                logger.info(notice)

    @classmethod
    def from_adamw(
        cls,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        *,
        num_examples: int,
        batch_size: int | str = "auto",
        temperature: float = 1e-3,
        prior_std: float = 0.05,
        beta1: float = 0.9,
        seed: int = 0,
        backend: str = "auto",
        pruner: RankPruner | None = None,
    ) -> IVON:
        """The optimizer for a loop that trains with AdamW: same learning rate, same steps, and a posterior at the end.

        Where you have ``AdamW(params, lr=1e-3)``, write ``IVON.from_adamw(params, lr=1e-3, num_examples=len(dataset))``
        and, once, ``optimizer.attach(model)``. Schedulers, clipping and accumulation stay as they are. The steps are
        those of Adam; each is taken at weights with a little noise, whose size follows how sharply the loss reacts to
        each weight. Everything else is found from the data: nothing but the learning rate needs tuning.

        Args:
            params: tensors, groups (a group may have its own ``lr`` and ``prior_std``; AdamW's other entries are
                dropped, with a notice in the log), or ``model.named_parameters()``.
            lr: AdamW's learning rate.
            num_examples: number of training examples, e.g. ``len(train_dataset)``. For language models: sequences.
            batch_size: examples per optimizer step: micro-batch x accumulated micro-batches x processes. "auto" counts
                them in the training forwards of the model given to :meth:`attach`. The loss must be the *mean* over
                these examples: under accumulation, divide each micro-batch's loss by their number.
            temperature: how much the posterior is sharpened. 1 is Bayes' rule; smaller means less noise in training and
                predictions that are more certain. 1e-3 suits fine-tuning of LoRA adapters.
            prior_std: standard deviation of a weight about which the data say nothing; the noise is never larger.
                It takes the place of AdamW's weight decay.
            beta1: decay of the momentum, the first of AdamW's ``betas``.
            seed, backend, pruner: as for :class:`IVON`.

        The same as ``IVON(params, lr, ess="auto", hess_init="auto", beta2="auto", hess_approx="fisher",
        step_rule="adam", ...)``.

        Raises:
            ValueError: an argument outside its bounds, duplicate, complex or integer parameters.
        """
        return cls(
            without_adamw_entries(params),
            lr,
            AUTO,
            hess_init=AUTO,
            beta1=beta1,
            beta2=AUTO,
            hess_approx="fisher",
            seed=seed,
            backend=backend,
            pruner=pruner,
            batch_size=batch_size,
            step_rule="adam",
            num_examples=num_examples,
            temperature=temperature,
            prior_std=prior_std,
        )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        act_inside(cls)

    # ---------------------------------------------------------------- groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters get the next indices of the noise.

        Raises:
            ValueError: a hyperparameter outside its bounds, a duplicate, complex or integer parameter.
        """
        params = param_group["params"]
        if not isinstance(params, Tensor | set):  # torch takes the one and refuses the other
            param_group = {**param_group, "params": list(params)}
            tensors = [p[1] if isinstance(p, tuple) else p for p in param_group["params"]]
            if len({id(p) for p in tensors}) < len(tensors):
                twice = next(n for n, p in enumerate(tensors) if any(p is q for q in tensors[:n]))
                raise ValueError(f"parameter {twice} of the group appears twice in it; pass every parameter once")
        prior_std = param_group.get("prior_std", None if "weight_decay" in param_group else self._prior_std)
        super().add_param_group({name: value for name, value in param_group.items() if name != "prior_std"})
        group = self.param_groups[-1]
        plain_numbers(group)
        try:
            if prior_std is not None:
                group["weight_decay"] = weight_decay_of(prior_std, group["ess"])
            for name in COUNTERS:
                group[name] = self.param_groups[0][name]
            check_group(group)
            for i, p in enumerate(group["params"]):
                name = group["param_names"][i] if "param_names" in group else f"number {i} of its group"
                check_layout(name, p)
                if group["sync"] and is_sharded(p):
                    raise ValueError(f"sync=True needs whole parameters, and {name} is sharded; take sync=False")
        except ValueError:
            self.param_groups.pop()
            raise
        self._given.update(group["params"])

    def _place(self, p: Tensor) -> tuple[int, dict[str, Any]]:
        """Index and group of a parameter.

        Raises:
            ValueError: it is not a parameter of this optimizer.
        """
        place = None if self._roster is None else self._roster.place(p)
        if place is None:  # never seen, or somebody has re-arranged the groups
            place = self._census().place(p)
        if place is None:
            raise ValueError("this tensor is not a parameter of the optimizer; pass one that was given to IVON(params)")
        return place

    def _census(self) -> Roster:
        """All parameters as they are arranged now."""
        if self._roster is None or not self._roster.holds(self.param_groups, self.entries):
            check_replaced([p for group in self.param_groups for p in group["params"]], self._given)
            with torch.inference_mode(False):
                self._roster = Roster(self.param_groups, self.entries)
        return self._roster

    def index_of(self, p: Tensor) -> int:
        """Index of a parameter, its identity for the noise.

        Raises:
            ValueError: it is not a parameter of this optimizer.
        """
        return self._place(p)[0]

    def _parameters(self) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """(index, parameter, group) in the order that identifies parameters for the noise."""
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                yield index, p, group
                index += 1

    @property
    def entries(self) -> dict[Tensor, dict[str, Any]]:
        """The state as it lies there: `rank_snr` may be older than the last step."""
        return self.__dict__["state"]

    @property
    def state(self) -> Any:
        """State of each parameter, see the class; reading it brings the scores of ranks up to date."""
        if self.__dict__.get("pruner") is not None:
            self._refresh_scores()
        return self.entries

    @state.setter
    def state(self, state: Any) -> None:
        self.__dict__["state"] = state

    @_untracked
    def _refresh_scores(self) -> None:
        assert self.pruner is not None
        self.pruner.refresh(self)

    @property
    def seed(self) -> int:
        """Seed of the noise."""
        return self.param_groups[0]["seed"]

    @property
    def completed_steps(self) -> int:
        """Calls of :meth:`step` so far; the step of the noise key."""
        return self.param_groups[0]["completed_steps"]

    @property
    def is_sampled(self) -> bool:
        """Whether the parameters hold a posterior sample (SAMPLED), not the mean (MEAN)."""
        return self._live is not None

    def _count(self, counter: str) -> None:
        for group in self.param_groups:
            group[counter] += 1

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state, dtype = self.entries[p], state_dtype(p)
        if "hess" not in state:
            _, group = self._place(p)
            state["step"] = torch.zeros((), dtype=torch.float32)
            part = local(p)
            state["momentum"] = like(p, torch.zeros(part.shape, dtype=dtype, device=p.device))
            state["hess"] = like(p, torch.full(part.shape, initial_hess(group), dtype=dtype, device=p.device))
        if p.dtype != dtype and "mean" not in state:
            state["mean"] = like(p, local(p).detach().to(dtype, memory_format=torch.contiguous_format))
        return state

    def mean_of(self, p: Tensor) -> Tensor:
        """Where the mean is now: the parameter, its copy while a sample is live, or the fp32 mean of a 16-bit one.

        Of a sharded parameter, the part in this process.
        """
        mean = self.entries[p].get("mean")
        part = local(p).detach()
        if mean is None:
            return part
        mean = local(mean)
        if not self._holds_sample(p):
            # Somebody may have written to a 16-bit parameter: where the mean no longer rounds to it, it is the truth.
            mean.copy_(torch.where(mean.to(p.dtype) == part, mean, part.to(mean.dtype)))
        return mean

    def _holds_sample(self, p: Tensor) -> bool:
        return self._live is not None and p in self._live.members

    def _backend(self, device: torch.device) -> Backend:
        if device not in self._backends:
            name, reason = choose_backend(self._backend_name, device)
            logger.info("backend %s for parameters on %s: %s", name, device, reason)
            self._backends[device] = make_backend(name, device)
        return self._backends[device]

    def backend_of(self, device: torch.device) -> Backend:
        """The backend that runs parameters on a device."""
        return self._backend(device)

    def _masks_are_hard(self) -> bool:
        return self.pruner is not None and self.pruner.is_hard(self.completed_steps)

    def _work(self, p: Tensor) -> Work:
        """The parameter's work in the state it is in: MEAN or SAMPLED. It has no gradient yet."""
        state = self._state_of(p)
        mask = state.get("rank_mask") if self._masks_are_hard() else None
        half = p.dtype != state["hess"].dtype
        mean = state.get("mean")
        return Work(
            index=self.index_of(p),
            param=local(p),
            mean=(local(p).detach() if mean is None else local(mean)).contiguous(),
            momentum=local(state["momentum"]),
            hess=local(state["hess"]),
            mean_state=local(state["mean"]) if half else None,
            rank_mask=mask,
            rank_dim=self.pruner.rank_dim(p) if mask is not None and self.pruner is not None else 0,
            reread=half and not self._holds_sample(p),
            offset=first_element(p),
        )

    def _work_of_draw(self, p: Tensor) -> Work:
        """The same, with the memory that keeps the mean while the parameter holds a sample."""
        work = self._work(p)
        if work.mean_state is None:
            work.mean_copy = self._buffer_of(p, work.hess)
        return work

    def _buffer_of(self, p: Tensor, hess: Tensor) -> Tensor:
        """The memory that keeps the mean while the parameter holds a sample."""
        buffer = self._buffers.get(p)
        if buffer is None or buffer.shape != hess.shape or buffer.device != hess.device:
            buffer = self._buffers[p] = torch.empty_like(hess)
        return buffer

    def _plan(self, task: str, params: list[Tensor], roster: Roster) -> Plan:
        """The backend calls for ``params`` (in the roster's order); made anew only when something has changed."""
        context = None if self._live is None else self._live.params, self._masks_are_hard()
        plan = self._plans.get(task)
        if plan is None or not plan.renew(params, roster, context):
            states = [self._state_of(p) for p in params]
            build = self._work_of_draw if task == "draw" else self._work
            works = [build(p) for p in params]  # may have made new state: hence the new census
            groups = [self._place(p)[1] for p in params]
            plan = self._plans[task] = Plan(params, works, states, groups, self._census(), self._backend, context)
        return plan

    # ---------------------------------------------------------------- MEAN <-> SAMPLED

    def train(self) -> None:
        """Draw a posterior sample into the parameters, unless one is live.

        Every draw of one step gives the same sample, so all its micro-batches see the same weights.
        """
        if self._live is None and not self.in_context:
            self._draw(self._training_key())

    def eval(self) -> None:
        """Restore the mean, if a sample is live. What was written meanwhile becomes the mean, with a warning."""
        self._settle()
        if self._live is not None:
            self._drop_live(self._live.params)

    @_untracked
    def _draw(self, key: NoiseKey, written: bool = False) -> None:
        """Write a sample into the parameters, and its means into their memory, or learn that both are there."""
        self._settle()
        self._unsettled = None
        roster = self._census()
        plan = self._plan("draw", trainable(roster.params), roster)
        # refuses here what is out of bounds
        hypers = [self._hyper(part.group, part.updates, key.prediction) for part in plan.parts]
        for part in plan.parts:
            for p, entry, work in zip(part.params, part.entries, part.works, strict=True):
                if work.mean_copy is not None:
                    entry["mean"] = like(p, work.mean_copy)
        live = self._live = _Live(key, plan.params)
        if not key.prediction:
            self._pending, self._sampled = key, plan.params
        try:
            for part, hyper in zip(plan.parts, hypers, strict=True):
                if not written:
                    part.backend.sample(part.works, hyper, key)
        except BaseException:
            for part in plan.parts:
                for p, work in zip(part.params, part.works, strict=True):
                    if (mean := work.mean_copy) is not None:  # where p is no sample of the copy, it still is the mean
                        mean.copy_(torch.where(self._written_elements(p, mean, key), local(p), mean))
            self._drop_live(plan.params)
            raise
        torch.autograd.graph.increment_version(plan.params)
        if not plan.is_plain:
            forget_copies(plan.params)
        live.seals = [(part, part.places(), part.backend.marks(part.works)) for part in plan.parts]
        live.complete = True

    @_untracked
    def _drop_live(self, params: list[Tensor]) -> None:
        """End SAMPLED; ``params`` get their mean back, all others already hold it."""
        if params:
            torch._foreach_copy_([local(p) for p in params], [local(self.entries[p]["mean"]) for p in params])
            forget_copies(params)
        live, self._live = self._live, None
        if live is not None and live.seals is not None:
            for part, _, _ in live.seals:
                for entry, work in zip(part.entries, part.works, strict=True):
                    if work.mean_copy is not None:
                        entry.pop("mean", None)
        elif live is not None:
            for p in live.params:
                if p.dtype == self.entries[p]["hess"].dtype:
                    del self.entries[p]["mean"]

    @_untracked
    def _settle(self) -> None:
        """Find what the user wrote over a sample, and keep it as the mean of the elements written."""
        if self._unsettled is not None:
            # A checkpoint of sampled weights was loaded: the model's, loaded after ours, may still hold the sample.
            key, means = self._unsettled
            for p, mean in means.items():
                part, written = local(p), self._written_elements(p, mean, key)
                part.copy_(torch.where(written, part, mean.to(p.dtype)))
                if p.dtype != mean.dtype:
                    local(self.entries[p]["mean"]).copy_(torch.where(written, part.to(mean.dtype), mean))
        if self._live is None or not self._live.complete:
            return
        for p in self._suspects(self._live):
            mean = local(self.entries[p]["mean"])
            written = self._written_elements(p, mean, self._live.key)
            if bool(written.any()):
                mean.copy_(torch.where(written, local(p).to(mean.dtype), mean))
                self._warn_once(
                    "written",
                    "parameters were written while they held a posterior sample; the values written become the mean. "
                    "Call optimizer.eval() before loading or changing weights.",
                )

    @staticmethod
    def _suspects(live: _Live) -> list[Tensor]:
        """Parameters that may have been written since the sample was."""
        if live.seals is None:
            return live.params
        suspects = []
        for part, places, marks in live.seals:
            moved = not np.array_equal(part.places(), places)
            if moved or not np.array_equal(part.backend.marks(part.works), marks):
                suspects += part.params
        return suspects

    def _written_elements(self, p: Tensor, mean: Tensor, key: NoiseKey) -> Tensor:
        """True where the local part of ``p`` is neither ``mean`` nor its sample ``key``."""
        work = self._work(p)
        part = work.param
        work.param, work.mean, work.mean_state, work.reread = torch.empty_like(part), mean, None, False
        hyper = self._hyper(self._place(p)[1], int(self.entries[p]["step"].item()), key.prediction)
        self._backend(p.device).sample([work], hyper, key)
        return (work.param != part) & (mean.to(p.dtype) != part)

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Posterior sample inside, posterior mean after, whatever happens inside.

        Args:
            train: draw a sample for the next :meth:`step` (several contexts before it are averaged); False draws one
                for prediction, from a stream of its own.

        A context inside another passes through: it neither draws nor restores. If a training context raises, its
        gradient does not count. The last sample's gradient is read at :meth:`step`, after clipping and unscaling;
        those before it are read when the next context, or :meth:`zero_grad`, follows: a GradScaler wants one sample.
        """
        if self.in_context:
            yield
            return
        resume = self._live is not None and not train
        if not train:
            self.eval()
            key = NoiseKey(self.seed, self.param_groups[0]["prediction_draws"], prediction=True)
            self._count("prediction_draws")
            self._draw(key)
        elif self._live is None:
            self._next_sample()
        self._pending_of_context = self._pending_of_context or train
        self.in_context = True
        try:
            yield
        except BaseException:
            if train:
                self._pending = None
            raise
        finally:
            self.in_context = False
            self.eval()
            if resume:
                self.train()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; between two training contexts of one step, average the first one's in before."""
        if self._pending_of_context and self._live is None:
            self._bank()
        super().zero_grad(set_to_none)

    def _next_sample(self) -> None:
        """Start a new training sample; the gradients of the one before, if any, are banked and cleared."""
        self.eval()
        self._bank()
        self._draw(self._training_key())

    def _training_key(self) -> NoiseKey:
        replicas = self._replicas()
        sample = self._n_banked if replicas is None else replicas.sample_number(self._n_banked)
        return self._key_of(self.completed_steps, sample)

    def _key_of(self, step: int, sample: int) -> NoiseKey:
        """Of a training sample; an antithetic one with an odd number mirrors the one before it."""
        if self.param_groups[0]["antithetic"]:
            return NoiseKey(self.seed, step, sample // 2, mirrored=bool(sample % 2))
        return NoiseKey(self.seed, step, sample)

    @_untracked
    def _bank(self) -> None:
        """Add gradient and curvature of the pending sample to the sums of this step."""
        roster = self._census()
        took_part = set(self._sampled)
        params = [p for p in self._with_gradient(roster) if p in took_part]
        if self._pending is None or not params:
            return
        self._require_examples()
        replicas = self._replicas()
        parts = 1 if replicas is None else replicas.size
        self._open_bank(params)
        for part in self._plan("bank", params, roster).parts:
            with self._gradients(part):
                hyper = hyper_of(part.group, part.updates + 1, self._examples.batch, parts=parts)
                part.backend.bank(part.works, hyper, self._pending)
        for p in params:
            if p.grad is not None:
                p.grad.zero_()  # the next sample's gradient must not contain this one's
        self._n_banked += 1
        self._examples.next_sample()
        self._pending, self._pending_of_context = None, False

    def _open_bank(self, params: list[Tensor]) -> None:
        for p in params:
            if p not in self._banked:  # an earlier sample without a gradient counts as a gradient of zero
                hess = local(self._state_of(p)["hess"])
                self._banked[p] = torch.zeros_like(hess), torch.zeros_like(hess)

    def _hyper(self, group: dict[str, Any], updates: int, prediction: bool = False) -> Hyper:
        """The scalars of the update that follows ``updates`` of them, or of the draw before it."""
        return hyper_of(group, updates + 1, self._examples.batch, prediction)

    def _require_examples(self) -> None:
        """Before a curvature is computed.

        Raises:
            RuntimeError: a group counts its examples, and none were seen.
        """
        if self._examples.batch is None and any(
            group["batch_size"] == AUTO and needs_batch_size(group) for group in self.param_groups
        ):
            raise RuntimeError(
                "batch_size='auto' counts the examples of training forwards, and there was none since the last step: "
                "call optimizer.attach(model) once, for the model whose forward the loop calls, or pass batch_size=, "
                "the number of examples that one step's gradient averages over"
            )

    def count_examples(self, n: int) -> None:
        """Say that the gradient of the coming step averages over ``n`` more examples on this process.

        The hooks of :meth:`attach` do; a loop without them may, for ``batch_size="auto"``.
        """
        self._examples.add(n)

    @property
    def counted_examples(self) -> int | None:
        """Examples that the gradient of the coming step averages over, on all processes; None if none were counted."""
        return self._examples.batch

    def _check_batch_size(self, n_samples: int) -> None:
        for group in self.param_groups:
            if isinstance(group["batch_size"], int) and needs_batch_size(group):
                complaint = self._examples.complaint(group["batch_size"], n_samples)
                if complaint is not None:
                    self._warn_once("batch_size", complaint)
                return

    @contextmanager
    def _gradients(self, part: Part, own: bool = True) -> Iterator[None]:
        """Give the works gradients and banked sums, and take them back: they are not the optimizer's to keep.

        Args:
            own: False: all gradients are zero, because those of all samples are banked already.
        """
        grad_of: Callable[[Tensor], Tensor | None] = attrgetter("grad") if part.is_plain else local_grad
        grads = [grad_of(p) if own else None for p in part.params]
        part.works.give("grad", [_gradient(g, w) for g, w in zip(grads, part.works, strict=True)])
        if self._banked:
            sums = [self._banked.get(p, (None, None)) for p in part.params]
            for work, (grad, curvature) in zip(part.works, sums, strict=True):
                work.banked_grad, work.banked_curvature = grad, curvature
            part.works.read("banked_grad")
            part.works.read("banked_curvature")
        try:
            yield
        finally:
            part.works.forget("grad")
            if self._banked:
                part.works.forget("banked_grad")
                part.works.forget("banked_curvature")

    def attach(self, model: nn.Module) -> Attachment:
        """Make an AdamW loop an IVON loop: sample at training forwards, mean at other forwards and in ``state_dict``.

        Training forwards are also where ``batch_size="auto"`` counts examples: the size of dimension 0 of the first
        tensor among the arguments.

        Args:
            model: the model whose forward the loop calls; attach before wrapping it (DDP, compile), but after
                ``fully_shard``.

        Returns:
            handle; ``handle.remove()`` detaches.
        """
        return Attachment(self, model)

    # ---------------------------------------------------------------- step

    def step(self, closure: Callable[[], Any] | None = None, *, resample: bool = False) -> Any:
        """Update the posterior from ``p.grad`` as it stands now; the parameters are the mean afterwards.

        Args:
            closure: clears the gradients, evaluates the loss, calls backward and returns the loss. Evaluated
                ``mc_samples`` times, each time at its own posterior sample; a live sample serves first.
            resample: call :meth:`train` at the end, with the hyperparameters as they are now. The Triton kernels then
                write the next sample in the launch of the update, with 32 bytes of memory traffic per fp32 element
                instead of 44, except in steps that allocate ranks. For loops of one's own: whoever saves, evaluates
                or changes weights calls :meth:`eval` first.

        Returns:
            the mean loss of the closure, or None.

        Raises:
            RuntimeError: sparse gradients; nothing counted for ``batch_size="auto"``; with ``sync``, gradients that are
                averaged already, or replicas that differ. Nothing has changed then.

        Without a sample (neither ``train`` nor a context nor a closure before it) mean and momentum move and the
        Hessian stays, with one warning.
        """
        if closure is not None and evaluates_nothing(closure):
            closure()  # hooks only
            closure = None
        loss = None if closure is None else self._evaluate(closure)
        self._update(resample)
        if resample:
            self.train()
        return loss

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        wanted = max(group["mc_samples"] for group in self.param_groups)
        losses: list[Any] = []
        try:
            # A closure that opens sampled_params itself, several times perhaps, has drawn its samples already.
            while not losses or self._n_banked + 1 < wanted:
                if losses or (self._pending_of_context and self._live is None):
                    self._next_sample()
                else:
                    self.train()  # again the sample of the micro-batches before, if an evaluation dropped it
                with torch.enable_grad():
                    losses.append(closure())
        except BaseException:
            self.eval()
            self._forget_samples()
            raise
        if any(loss is None for loss in losses):
            return None
        return losses[0] if len(losses) == 1 else sum(losses) / len(losses)

    def _with_gradient(self, roster: Roster) -> list[Tensor]:
        """Parameters to update, checked: nothing has been changed when this raises."""
        params = trainable(roster.params)
        found = [p.grad for p in params]
        grads = [grad for grad in found if grad is not None]
        if len(grads) < len(params):
            params = [p for p, grad in zip(params, found, strict=True) if grad is not None or p in self._banked]
        if any(map(is_sparse, grads)):
            raise RuntimeError("IVON does not take sparse gradients; build the embedding with sparse=False")
        return params

    @_untracked
    def _update(self, resample: bool = False) -> None:
        roster = self._census()
        params = self._with_gradient(roster)
        if self._pending is not None:
            self._require_examples()
        self._settle()
        self._unsettled = None
        groups = [hyper_of(group, 1) for group in self.param_groups]  # checks what schedulers wrote
        key = self._pending
        # torch.distributed.checkpoint steps a fresh optimizer at lr 0 to make it create its state; nothing may move.
        n_samples = self._n_banked + (key is not None)
        rehearsal = n_samples == 0 and all(hyper.lr == 0 for hyper in groups)
        if n_samples == 0 and params and not rehearsal:
            self._warn_once(
                "unsampled",
                "step() without a posterior sample: mean and momentum move, the Hessian does not. Call "
                "optimizer.train() before the forward pass, use sampled_params(train=True), or attach(model) once.",
            )
        self._check_batch_size(n_samples)
        replicas = self._replicas()
        if replicas is not None and not rehearsal:
            params = self._exchange(replicas)
            key, n_samples = None, self._n_banked * replicas.size
        # the others were added or thawed since the draw, or nothing was drawn
        sampled, fresh = self._by_part_taken(params) if n_samples else ([], params)
        plans = self._plan("step", sampled, roster), self._plan("fresh", fresh, roster)
        ranker = self._begin_ranking(params, allocate=not rehearsal)
        following = None
        if resample and self._can_resample(params, plans, ranker):
            following = NoiseKey(self.seed, self.completed_steps + 1)
        for part in plans[0].parts:
            with self._gradients(part, own=key is not None):
                # without a last sample any key will do: a gradient of zero brings a curvature of zero
                examples = self._examples.batch if key else self._examples.batch_of_step
                hyper = hyper_of(part.group, part.updates + 1, examples)
                if following is None:
                    part.backend.step(part.works, hyper, key or NoiseKey(0, 0), n_samples)
                else:
                    self._step_and_sample(part, hyper, key or NoiseKey(0, 0), n_samples, following)
        for part in plans[1].parts:
            with self._gradients(part):
                part.backend.step(part.works, self._hyper(part.group, part.updates), None, 1)
        if ranker is not None:
            ranker.finish_ranking()
        if self._live is not None:
            self._drop_live([] if same(self._live.params, params) else _without(self._live.params, params))
        torch.autograd.graph.increment_version(params)
        if not all(plan.is_plain for plan in plans):
            forget_copies(params)
        for plan in plans:
            for part in plan.parts:
                self._census().count(part.positions)
        self._forget_samples()
        self._count("completed_steps")
        if self.pruner is not None and ranker is None:
            self.pruner.after_update(self, params, allocate=not rehearsal)
        if following is not None:
            self._draw(following, written=True)

    def _can_resample(self, params: list[Tensor], plans: tuple[Plan, Plan], ranker: Backend | None) -> bool:
        """Whether the launches of this step can end with the sample that the next step begins with."""
        step = self.completed_steps + 1
        return (
            not self.in_context
            and len(params) == len(trainable(self._census().params))
            and bool(plans[0].parts)
            and not plans[1].parts
            and all(part.backend.resamples and part.is_plain for part in plans[0].parts)
            and all(part.works[0].hess.dtype == torch.float32 for part in plans[0].parts)
            and (
                self.pruner is None
                or (
                    ranker is not None
                    and not self.pruner.is_due(step)
                    and self.pruner.is_hard(step) == self.pruner.is_hard(step - 1)
                )
            )
        )

    def _step_and_sample(self, part: Part, hyper: Hyper, key: NoiseKey, n_samples: int, following: NoiseKey) -> None:
        if part.works[0].mean_state is None:
            buffers = [self._buffer_of(p, w.hess) for p, w in zip(part.params, part.works, strict=True)]
            part.works.give("mean_copy", buffers)
        try:
            backend = cast(Resampling, part.backend)
            backend.step(part.works, hyper, key, n_samples, (self._hyper(part.group, part.updates + 1), following))
        finally:
            part.works.forget("mean_copy")

    def _by_part_taken(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Those that took part in a sample of this step, and the others."""
        if self._n_banked:
            drawn = set(self._sampled)
            self._open_bank([p for p in params if p in drawn])
        elif same(params, self._sampled):
            return params, []
        took_part = {*self._sampled, *self._banked}
        return [p for p in params if p in took_part], [p for p in params if p not in took_part]

    @property
    def draws_own_noise(self) -> bool:
        """Whether this process is a replica that draws noise of its own, and needs its own gradient (``sync``)."""
        return self._replicas() is not None

    def _replicas(self) -> Replicas | None:
        return find_replicas() if any(group["sync"] for group in self.param_groups) else None

    def _exchange(self, replicas: Replicas) -> list[Tensor]:
        """Sum gradients and curvatures over all replicas and samples; the parameters with a gradient on any replica.

        Afterwards ``p.grad`` holds the mean gradient, as after DDP's own reduction.
        """
        candidates = [p for _, p, _ in self._parameters() if p.requires_grad]
        device = candidates[0].device if candidates else torch.device("cpu")
        if not self._replicas_agree:
            states = [self._state_of(p)["hess"] for p in candidates]
            own = [p.grad for p in candidates if p.grad is not None] + [g for g, _ in self._banked.values()]
            same = [len(candidates), checksum([self.mean_of(p) for p in candidates]), checksum(states)]
            same += [self.completed_steps, self.seed & MASK, self.seed >> 32]
            self._replicas_agree = replicas.check(same, checksum(own), device)
        samples = self._n_banked + (self._pending is not None)
        has_gradient = [p.grad is not None or p in self._banked for p in candidates]
        *anywhere, most, least = replicas.maximum([*map(int, has_gradient), samples, -samples], device)
        if most != -least:
            raise RuntimeError(f"sync=True: some replicas drew {-least} samples for this step, others {most}")
        params = [p for p, found in zip(candidates, anywhere, strict=True) if found]
        self._bank()
        if self._pending is not None:  # no gradient here: a sample with gradients of zero
            self._pending, self._pending_of_context, self._n_banked = None, False, self._n_banked + 1
            self._examples.next_sample()
        drawn = set(self._sampled) if samples else set()
        sampled = [p for p in params if p in drawn]
        self._open_bank(sampled)
        gradients = {p: self._banked[p][0] for p in sampled}
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if p not in gradients:  # added or thawed since the draw, or nothing was drawn
                gradients[p] = p.grad.to(state_dtype(p), copy=True)
        replicas.sum_([*gradients.values(), *(self._banked[p][1] for p in sampled)])
        for p, total in gradients.items():
            assert p.grad is not None
            p.grad.copy_(total / (replicas.size * (samples if p in self._banked else 1)))
        return params

    def _begin_ranking(self, params: list[Tensor], allocate: bool) -> Backend | None:
        """The backend that scores and allocates ranks within the launches of this step, if one can."""
        if self.pruner is None or not any(backend.ranks for backend in self._backends.values()):
            return None
        updated = set(params)
        tensors = [p for adapter in self.pruner.adapters for _, p, _ in adapter.tensors()]
        backend = self._backend(tensors[0].device)
        if (
            not backend.ranks
            or any(p not in updated or p.grad is None or p.device != tensors[0].device for p in tensors)
            or any(is_sharded(p) for p in tensors)  # their scores take an exchange
            or any(state_dtype(p) != torch.float32 for p in tensors)
            or (self.pruner.criterion == "sensitivity" and self._n_banked)  # needs the last gradient, not their mean
        ):
            return None
        backend.begin_ranking(self.pruner.ranking(self, allocate))
        return backend

    def _forget_samples(self) -> None:
        self._pending, self._pending_of_context, self._sampled = None, False, []
        self._banked, self._n_banked = {}, 0
        self._examples.next_step()

    # ---------------------------------------------------------------- reading the posterior

    @_untracked
    def _mean_and_hess(self, p: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        _, group = self._place(p)
        self._settle()
        hess = local(self._state_of(p)["hess"])
        return self.mean_of(p), hess, group

    @_untracked
    def posterior(self, p: Tensor) -> Normal:
        """Posterior of one parameter: ``Normal(m, sigma)``, of its shape, in the state's dtype.

        A snapshot, the same in MEAN and SAMPLED. Ranks pruned for good have mean 0 and standard deviation 0.

        Raises:
            ValueError: ``p`` is not a parameter of this optimizer.
        """
        mean, hess, group = self._mean_and_hess(p)
        mask = None
        if self.pruner is not None and self.pruner.is_hard(self.completed_steps) and "rank_mask" in self.entries[p]:
            rank_dim = self.pruner.rank_dim(p)
            mask = (mask_part(p, self.entries[p]["rank_mask"], rank_dim), rank_dim)
        normal = _posterior.normal(mean, hess, group["ess"], group["weight_decay"], mask)
        if not is_sharded(p):
            return normal
        return Normal(like(p, normal.loc), like(p, normal.scale), validate_args=False)

    @_untracked
    def snr(self, p: Tensor, criterion: str = "snr") -> Tensor:
        """Importance of each element of a parameter (see `scores`), of its shape, in the state's dtype.

        Args:
            criterion: "snr" |m|/sigma, "snr_abs", "magnitude", "inverse_std", or "sensitivity" (only under a pruner
                that uses it).

        Raises:
            ValueError: an unknown criterion, or ``p`` is not a parameter of this optimizer.
        """
        return like(p, self.local_snr(p, criterion))

    @_untracked
    def local_snr(self, p: Tensor, criterion: str) -> Tensor:
        """:meth:`snr` of the part of a sharded parameter that is in this process; the same for an ordinary one."""
        mean, hess, group = self._mean_and_hess(p)
        running = {name: local(x) for name, x in self.entries[p].items() if name in RUNNING_MEANS}
        return _posterior.importance_of(mean, hess, group["ess"], group["weight_decay"], criterion, running)

    @_untracked
    def rank_sums(self, params: list[Tensor], criterion: str) -> list[np.ndarray] | None:
        """What `Backend.rank_sums` says of parameters of the pruner's adapters; None if it does not of all of them."""
        if self.pruner is None or criterion == "sensitivity" or any(is_sharded(p) for p in params):
            return None
        self._settle()
        found: dict[Tensor, np.ndarray] = {}
        for part in self._plan("scores", params, self._census()).parts:
            dims = [self.pruner.rank_dim(p) for p in part.params]
            sums = part.backend.rank_sums(part.works, dims, criterion, part.group["ess"], part.group["weight_decay"])
            if sums is None:
                return None
            found |= zip(part.params, sums, strict=True)
        return [found[p] for p in params]

    @_untracked
    def zero_ranks(self, params: list[Tensor]) -> list[Tensor]:
        """Set mean and momentum of pruned ranks to zero; returns the parameters of which the backend does not."""
        assert self.pruner is not None
        works: dict[torch.device, list[Work]] = {}
        left = [p for p in params if is_sharded(p)]
        for p in params:
            if not is_sharded(p):
                work = self._work(p)
                work.rank_mask, work.rank_dim = self.entries[p]["rank_mask"], self.pruner.rank_dim(p)
                works.setdefault(p.device, []).append(work)
        for device, mine in works.items():
            if not self._backend(device).zero_ranks(mine):
                left += [p for p in params if not is_sharded(p) and p.device == device]
        return left

    def metrics(self) -> dict[str, float]:
        """Flat dictionary of floats for loggers: ranks, SNR and sigma quantiles, curvature, skipped elements."""
        from ivon_lora.metrics import metrics

        return metrics(self)

    def rank_table(self) -> list[dict[str, Any]]:
        """One row per adapter of the pruner: name, rank, live ranks, scores and mask.

        Raises:
            ValueError: the optimizer has no pruner.
        """
        from ivon_lora.metrics import rank_table

        return rank_table(self)

    def nonfinite_elements(self) -> int:
        """Gradient elements skipped so far because they, or the update they led to, were not finite."""
        return self._nonfinite_before + sum(int(backend.nonfinite_elements()) for backend in self._backends.values())

    # ---------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Complete in both states of the weights: while a sample is live it holds the means and names the sample."""
        self._settle()
        saved = super().state_dict()
        saved["state"] = {
            index: {name: x.clone() if name == "step" else x for name, x in entry.items()}
            for index, entry in saved["state"].items()
        }  # our dictionaries change with the next step, and our counts share one memory
        live = NO_SAMPLE
        if self._live is not None:
            key, pairs = self._live.key, self.param_groups[0]["antithetic"]
            live = PREDICTION_SAMPLE if key.prediction else 2 * key.sample + key.mirrored if pairs else key.sample
        for group in saved["param_groups"]:
            group["live_sample"] = live
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of :meth:`state_dict`, or of ivon-opt; the weights are the mean afterwards.

        The model may be loaded before or after, and from a model state dict that holds a sample.

        Raises:
            ValueError: another optimizer's state dict, other groups, or other shapes. Nothing has changed then.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        if is_ivon_opt(state_dict):
            state_dict = from_ivon_opt(state_dict, self.param_groups)
        check_state_dict(state_dict, self.param_groups)
        self.eval()
        self._load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @_untracked
    def _load(self, state_dict: dict[str, Any]) -> None:
        self._forget_samples()
        self._buffers, self._plans, self._roster, self._unsettled = {}, {}, None, None
        live_sample = state_dict["param_groups"][0].get("live_sample", NO_SAMPLE)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            saved = {**ADDED_ENTRIES, **saved}
            group.update({name: value for name, value in saved.items() if name not in ("params", "live_sample")})
        self.entries.clear()
        means: dict[Tensor, Tensor] = {}
        for (_, p, _), entry in zip(self._parameters(), entries(state_dict), strict=True):
            if not entry:
                continue
            state, dtype = self.entries[p], state_dtype(p)
            for name, value in entry.items():
                # torch's own loading would cast all but "step" to the parameter's dtype: hess to bf16, masks to floats
                of_shape = name in STATE_TENSORS
                if of_shape and is_sharded(p):
                    value = local(value) if is_sharded(value) else part_of(p, value)
                device = "cpu" if name == "step" else p.device
                value = value.detach().to(device, dtype if of_shape else value.dtype, copy=True).contiguous()
                state[name] = like(p, value) if of_shape else value
            if p.dtype == dtype and "mean" in state:  # saved while a sample was live
                means[p] = local(state.pop("mean"))
                local(p).copy_(means[p])
            elif live_sample != NO_SAMPLE and "mean" in state:
                means[p] = local(state["mean"]).clone()
                local(p).copy_(means[p])
        if means and live_sample != NO_SAMPLE:
            prediction = live_sample == PREDICTION_SAMPLE
            step = self.param_groups[0]["prediction_draws"] - 1 if prediction else self.completed_steps
            key = NoiseKey(self.seed, step, prediction=True) if prediction else self._key_of(step, live_sample)
            self._unsettled = key, means

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps defaults, state and groups only; a copy or a pickle of ours must be able to go on.
        self._settle()
        own = ["_backend_name", "_pending", "_pending_of_context", "_sampled", "_banked", "_n_banked"]
        own += ["_unsettled", "_warned", "_examples", "_prior_std", "pruner", "_replicas_agree"]
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in own},
            "_live": None if self._live is None else replace(self._live, seals=None),
            "_nonfinite_before": self.nonfinite_elements(),
            "in_context": False,
            "_backends": {},
            "_buffers": {},
            "_plans": {},
            "_roster": None,
            "_given": {p for group in self.param_groups for p in group["params"]},
        }

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=4)


def _without(params: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    left_out = set(others)
    return [p for p in params if p not in left_out]


def _gradient(grad: Tensor | None, work: Work) -> Tensor:
    return torch.zeros_like(work.hess) if grad is None else grad if grad.is_contiguous() else grad.contiguous()
