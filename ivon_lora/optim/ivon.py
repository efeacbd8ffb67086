"""IVON as a torch optimizer: what users call. The parts it is made of are in the rooms beside it.

No formula lives here (see `reference`), no kernel (see `backends`) and no decision about ranks (see `pruning`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from ivon_lora.backends import Backend
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.members import refuse_duplicates
from ivon_lora.optim import reading as _posterior
from ivon_lora.optim.batch_size import disagreement
from ivon_lora.optim.lr_limit import with_limited_lrs
from ivon_lora.optim.model_hooks import Attachment
from ivon_lora.optim.param_groups import (
    ADAPTER_TEMPERATURE,
    AUTO,
    COUNTERS,
    adapter_temperature,
    adapter_weight_decay,
    beta2_notice,
    check_group,
    check_total_steps,
    needs_batch_size,
    plain_numbers,
    resolve_ess,
    weight_decay_of,
    with_own_temperatures,
    without_adamw_entries,
)
from ivon_lora.optim.sharding import is_sharded, like, local, mask_part
from ivon_lora.optim.state_dict import check_state_dict, from_ivon_opt, is_ivon_opt, number_of
from ivon_lora.optim.wrappers import act_inside, evaluates_nothing
from ivon_lora.parts import PICKLED, Parts
from ivon_lora.untracked import untracked

if TYPE_CHECKING:
    from ivon_lora.lora.rank_pruner import RankPruner

logger = logging.getLogger(__name__)

#: state of the criterion "sensitivity"
RUNNING_MEANS = ("sensitivity", "uncertainty")


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
            `functional.ivon.estimate_curvature`: "price" is unbiased, very noisy for large ``ess``, and
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
        pruner: a :class:`~ivon_lora.lora.rank_pruner.RankPruner` whose adapters' tensors are all in ``params``.
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
        maximize: maximise the objective instead of minimising it, as in torch's optimizers: the bits are those of
            minimising its negative. A group may have its own.
        noise_warmup: number of examples over which the standard deviation of the training noise grows linearly to that
            of the posterior, and the prior's pull with its square (the weight of the KL term); 0: both are there at
            once. With ``hess_approx="fisher"`` only. :meth:`from_adamw` takes one epoch: while every example is new
            there is nothing to overfit, and noise and prior only slow learning down.
        prior: "fixed": ``weight_decay`` is what it is. "empirical": every parameter tensor has a weight_decay of its
            own, ``1 / (ess mean(m^2 + sigma^2))`` over its elements, found again after each tenth update (empirical
            Bayes: the prior's variance is the posterior's second moment, see `prior`). It starts at ``weight_decay``
            and only grows, by a factor of 100 at most: the prior's standard deviation falls to a tenth at most, so
            ``prior_std`` is the largest noise of a weight here, too. It still pulls the mean. For "fisher" and
            "gradsq".
        total_steps: length of the run, for one purpose: a warning in the log if ``beta2 ** total_steps > 0.5``, for
            then the Hessian hardly leaves its initial value. A pruner knows it, and so does the Trainer.

    State of a parameter ``p`` (``optimizer.state[p]``), fp32 for fp32 and 16-bit parameters, fp64 for fp64 ones:
        ``step`` (updates so far), ``momentum``, ``hess``; ``mean`` while a sample is live, and always for a 16-bit
        parameter; for tensors of a pruner's adapters ``rank_snr`` (r,), the score of each rank of the adapter under the
        pruner's criterion after the last update and before its allocation (0 for ranks pruned for good), and
        ``rank_mask`` (r,), False for pruned ranks; with an empirical prior ``weight_decay``, fp32, one element. On CPU
        scores are computed where an allocation or a prior needs them and when ``optimizer.state`` is read: keep no
        reference to its contents from step to step if you want them up to date.

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
        maximize: bool = False,
        noise_warmup: int = 0,
        prior: str = "fixed",
        total_steps: int | None = None,
    ) -> None:
        NoiseKey(seed, 0)  # checks the seed
        check_total_steps(total_steps)
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
            "maximize": maximize,
            "noise_warmup": noise_warmup,
            "prior": prior,
            "seed": seed,
            "completed_steps": 0,
            "prediction_draws": 0,
            "examples_seen": 0,
        }
        check_group({**defaults, "weight_decay": 1.0 if prior_std is not None else weight_decay})
        self._prior_std = prior_std
        self.pruner: RankPruner | None = None
        self.in_context = False  # inside `sampled_params`, or the closure of a recorded step
        self._nonfinite_before = 0  # counted by the optimizer this one is a copy of
        self._parts = Parts(self, backend)
        super().__init__(params, defaults)
        if weight_decay and not any(group["weight_decay"] for group in self.param_groups):
            self._parts.notices.warn(
                "weight_decay",
                f"every group sets weight_decay=0, so the argument weight_decay={weight_decay:g} has no effect. "
                "transformers' Trainer makes such groups for optimizer_cls_and_kwargs=(IVON, ...): pass (IVONFactory, "
                "...) there, or optimizers=(IVON(...), None). If 0 is meant, pass weight_decay=0.0",
            )
        for device in dict.fromkeys(p.device for p in self._parts.members):
            self.backend_of(device)  # refuses here what cannot run
        if pruner is not None:
            pruner.bind(self)
            self.pruner = pruner
            total_steps = total_steps or pruner.total_steps
        self.expect(total_steps)

    @classmethod
    def from_adamw(
        cls,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        num_examples: int,
        batch_size: int | str = "auto",
        temperature: float | None = None,
        weight_decay: float | None = None,
        prior_std: float | None = None,
        noise_warmup: int | None = None,
        seed: int = 0,
        backend: str = "auto",
        pruner: RankPruner | None = None,
        maximize: bool = False,
        prior: str | None = None,
        total_steps: int | None = None,
        lr_limit: str | None = AUTO,
    ) -> IVON:
        """The optimizer for a loop that trains with AdamW: same learning rate, same steps, and a posterior at the end.

        Where you have ``AdamW(params, lr=1e-3)``, write ``IVON.from_adamw(params, lr=1e-3, num_examples=len(dataset))``
        and, once, ``optimizer.attach(model)``. Schedulers, clipping and accumulation stay as they are. The steps are
        those of Adam; each is taken at weights with a little noise, whose size follows how sharply the loss reacts to
        each weight. Everything else is found from the data: nothing but the learning rate needs tuning.

        Args:
            params: tensors, groups (a group may have its own ``lr``, ``betas``, ``prior_std``, ``prior`` and
                ``maximize``; AdamW's other entries are dropped, with a notice in the log), or
                ``model.named_parameters()``.
            lr, betas: AdamW's. The second of ``betas`` is the curvature's memory too: a mean over all steps so far,
                until that is 1 / (1 - beta2) steps long.
            num_examples: number of training examples, e.g. ``len(train_dataset)``. For language models: sequences.
            batch_size: examples per optimizer step: micro-batch x accumulated micro-batches x processes. "auto" counts
                them in the training forwards of the model given to :meth:`attach`. The loss must be the *mean* over
                these examples: under accumulation, divide each micro-batch's loss by their number.
            temperature: how much the posterior is sharpened. 1 is Bayes' rule; smaller means less noise in training and
                predictions that are more certain. None: 3e-3, which suits fine-tuning of LoRA adapters; for learning
                rates below 3e-3 so much less that the noise is proportional to them.
            weight_decay: curvature that every weight is given beforehand, as in :class:`IVON` and not as in AdamW. The
                noise is never larger than ``sqrt(temperature / (num_examples * weight_decay))``. None: 1e-3 (0.02 at
                7,500 examples), or more where that would let the noise exceed 0.1 (below 300 examples). From there each
                tensor finds its own, see ``prior``.
            prior_std: sets ``weight_decay`` by this largest standard deviation.
            noise_warmup: examples over which the noise of training and the prior's pull grow to their full size. None:
                ``num_examples``, the first epoch.
            seed, backend, pruner, maximize, total_steps: as for :class:`IVON`.
            prior: "fixed": ``weight_decay`` is what it is; "empirical": the data choose the width of each tensor's
                prior, which starts there, see :class:`IVON`. None: fixed where ``weight_decay`` or ``prior_std`` states
                it, empirical elsewhere.
            lr_limit: "auto" lowers learning rates at which fresh LoRA adapters tend to collapse, with a warning in the
                log: where a group starts as LoRA does, with zeros in B beside what is drawn for A, to 0.064 divided by
                the square root of A's number of inputs (0.0033 at 384, 0.001 at 4096). That is low enough for
                ``lora_alpha / sqrt(rank)`` up to some 7; an optimizer does not see alpha. Schedulers made afterwards
                scale what they find. Elsewhere nothing is lowered: AdaLoRA's gates E, for one, have far to go. None:
                learning rates are what you say.

        The same as ``IVON(params, lr, ess="auto", hess_init="auto", beta1=0.9, beta2=0.999, hess_approx="fisher",
        step_rule="adam", ...)``.

        Raises:
            ValueError: an argument outside its bounds, duplicate, complex or integer parameters.
        """
        beta1, beta2 = betas
        groups = without_adamw_entries(params)
        if lr_limit == AUTO:
            groups, lr = with_limited_lrs(groups, lr)
        elif lr_limit is not None:
            raise ValueError(f"lr_limit must be 'auto' or None, got {lr_limit!r}")
        if prior is None:
            prior = "empirical" if weight_decay is None and prior_std is None else "fixed"
        if weight_decay is None:
            weight_decay = adapter_weight_decay(
                num_examples, ADAPTER_TEMPERATURE if temperature is None else temperature
            )
        if temperature is None:
            groups = with_own_temperatures(groups, num_examples)
            temperature = adapter_temperature(float(lr))
        return cls(
            groups,
            lr,
            AUTO,
            hess_init=AUTO,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            hess_approx="fisher",
            seed=seed,
            backend=backend,
            pruner=pruner,
            batch_size=batch_size,
            step_rule="adam",
            num_examples=num_examples,
            temperature=temperature,
            prior_std=prior_std,
            maximize=maximize,
            noise_warmup=num_examples if noise_warmup is None else noise_warmup,
            prior=prior,
            total_steps=total_steps,
        )

    def expect(self, total_steps: int | None = None, batch_size: int | None = None) -> None:
        """Say what is known of the run to come, so that what does not fit it is noticed.

        Args:
            total_steps: number of optimizer steps, if nobody has said it before. A Hessian that will hardly leave its
                initial value (``beta2 ** total_steps > 0.5``) is logged as a warning.
            batch_size: examples per optimizer step, over all micro-batches and processes. Another ``batch_size`` that
                was stated, and matters, leads to a warning.
        """
        notices = self._parts.notices
        if total_steps is not None and notices.first("total_steps"):
            notice = beta2_notice(self.param_groups, total_steps)
            if notice is not None:
                logger.warning(notice)
        for group in self.param_groups:
            stated = group["batch_size"]
            if batch_size is not None and isinstance(stated, int) and needs_batch_size(group) and stated != batch_size:
                notices.warn("batch_size", disagreement(stated, batch_size))

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
            refuse_duplicates(param_group["params"])
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
            self._parts.members.admit(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def index_of(self, p: Tensor) -> int:
        """Index of a parameter, its identity for the noise.

        Raises:
            ValueError: it is not a parameter of this optimizer.
        """
        return self._parts.members.place(p)[0]

    @property
    def entries(self) -> dict[Tensor, dict[str, Any]]:
        """The state as it lies there: `rank_snr` may be older than the last step, and `mean` not there yet."""
        return self.__dict__["state"]

    def entries_of(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """:attr:`entries` of some parameters, for a list that nobody changes."""
        return self._parts.members.census().entries_of(params)

    @property
    def state(self) -> Any:
        """State of each parameter, see the class; reading it brings it up to date."""
        if (parts := self.__dict__.get("_parts")) is not None:
            parts.works.show_means()
        pruner: RankPruner | None = self.__dict__.get("pruner")
        if pruner is not None:
            untracked(pruner.refresh)(self)
        return self.entries

    @state.setter
    def state(self, state: Any) -> None:
        self.__dict__["state"] = state

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
        return self._parts.works.live is not None

    def mean_of(self, p: Tensor) -> Tensor:
        """Where the mean is now: the parameter, its copy while a sample is live, or the fp32 mean of a 16-bit one.

        Of a sharded parameter, the part in this process.
        """
        return self._parts.works.mean_of(p)

    def backend_of(self, device: torch.device) -> Backend:
        """The backend that runs parameters on a device."""
        return self._parts.members.backend(device)

    # ---------------------------------------------------------------- MEAN <-> SAMPLED

    def train(self) -> None:
        """Draw a posterior sample into the parameters, unless one is live.

        Every draw of one step gives the same sample, so all its micro-batches see the same weights.
        """
        if not self.in_context:
            self._parts.weights.train()

    def eval(self) -> None:
        """Restore the mean, if a sample is live. What was written meanwhile becomes the mean, with a warning."""
        self._parts.weights.eval()

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
        resume = self.is_sampled and not train
        if not train:
            self.eval()
            key = NoiseKey(self.seed, self.param_groups[0]["prediction_draws"], prediction=True)
            self._parts.members.count("prediction_draws")
            self._parts.weights.draw(key)
        elif not self.is_sampled:
            self._parts.weights.next_sample()
        self._parts.samples.of_context = self._parts.samples.of_context or train
        self.in_context = True
        try:
            yield
        except BaseException:
            if train:
                self._parts.samples.pending = None
            raise
        finally:
            self.in_context = False
            self._parts.weights.restore()
            if resume:
                self.train()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; between two training contexts of one step, average the first one's in before."""
        if self._parts.samples.of_context and not self.is_sampled:
            self._parts.samples.bank()
        super().zero_grad(set_to_none)

    def count_examples(self, n: int) -> None:
        """Say that the gradient of the coming step averages over ``n`` more examples on this process.

        The hooks of :meth:`attach` do; a loop without them may, for ``batch_size="auto"``.
        """
        self._parts.works.examples.add(n)

    @property
    def counted_examples(self) -> int | None:
        """Examples that the gradient of the coming step averages over, on all processes; None if none were counted."""
        return self._parts.works.examples.batch

    def attach(self, model: nn.Module) -> Attachment:
        """Make an AdamW loop an IVON loop: sample at training forwards, mean at other forwards and in ``state_dict``.

        Training forwards are also where ``batch_size="auto"`` counts examples: the size of dimension 0 of the first
        tensor among the arguments.

        Args:
            model: the model whose forward the loop calls; attach before wrapping it (DDP, compile), but after
                ``fully_shard``. For ``compile(fullgraph=True)`` attach to the compiled model: the hooks of the one
                inside break its graph.

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
        self._parts.update(self, resample)
        if resample:
            self.train()
        return loss

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        wanted = max(group["mc_samples"] for group in self.param_groups)
        losses: list[Any] = []
        try:
            # A closure that opens sampled_params itself, several times perhaps, has drawn its samples already.
            while not losses or self._parts.samples.n_banked + 1 < wanted:
                if losses or (self._parts.samples.of_context and not self.is_sampled):
                    self._parts.weights.next_sample()
                else:
                    self.train()  # again the sample of the micro-batches before, if an evaluation dropped it
                with torch.enable_grad():
                    losses.append(closure())
        except BaseException:
            self.eval()
            self._parts.samples.forget()
            raise
        if any(loss is None for loss in losses):
            return None
        return losses[0] if len(losses) == 1 else sum(losses) / len(losses)

    @property
    def draws_own_noise(self) -> bool:
        """Whether this process is a replica that draws noise of its own, and needs its own gradient (``sync``)."""
        return self._parts.members.replicas() is not None

    # ---------------------------------------------------------------- reading the posterior

    @untracked
    def _mean_and_precision(self, p: Tensor) -> tuple[Tensor, Tensor, float, float | Tensor]:
        """m, h, lambda and delta of the local part."""
        _, group = self._parts.members.place(p)
        self._parts.weights.settle()
        works = self._parts.works
        hess = local(works.state_of(p)["hess"])
        return self.mean_of(p), hess, float(group["ess"]), works.weight_decay_of(p)

    @untracked
    def posterior(self, p: Tensor) -> Normal:
        """Posterior of one parameter: ``Normal(m, sigma)``, of its shape, in the state's dtype.

        A snapshot, the same in MEAN and SAMPLED. Ranks pruned for good have mean 0 and standard deviation 0.

        Raises:
            ValueError: ``p`` is not a parameter of this optimizer.
        """
        mean, hess, ess, decay = self._mean_and_precision(p)
        mask = None
        if self.pruner is not None and self.pruner.is_hard(self.completed_steps) and "rank_mask" in self.entries[p]:
            rank_dim = self.pruner.rank_dim(p)
            mask = (mask_part(p, self.entries[p]["rank_mask"], rank_dim), rank_dim)
        normal = _posterior.normal(mean, hess, ess, decay, mask)
        if not is_sharded(p):
            return normal
        return Normal(like(p, normal.loc), like(p, normal.scale), validate_args=False)

    @untracked
    def snr(self, p: Tensor, criterion: str = "snr") -> Tensor:
        """Importance of each element of a parameter (see `scores`), of its shape, in the state's dtype.

        Args:
            criterion: "snr" |m|/sigma, "snr_abs", "magnitude", "inverse_std", or "sensitivity" (only under a pruner
                that uses it).

        Raises:
            ValueError: an unknown criterion, or ``p`` is not a parameter of this optimizer.
        """
        return like(p, self.local_snr(p, criterion))

    @untracked
    def local_snr(self, p: Tensor, criterion: str) -> Tensor:
        """:meth:`snr` of the part of a sharded parameter that is in this process; the same for an ordinary one."""
        mean, hess, ess, decay = self._mean_and_precision(p)
        running = {name: local(x) for name, x in self.entries[p].items() if name in RUNNING_MEANS}
        return _posterior.importance_of(mean, hess, ess, decay, criterion, running)

    @untracked
    def rank_sums(self, params: list[Tensor], dims: list[int], criterion: str) -> np.ndarray | None:
        """What `Backend.rank_sums` says of parameters of the pruner's adapters; None if it does not of all of them."""
        self._parts.weights.settle()
        return self._parts.ranks.sums(params, dims, criterion)

    @untracked
    def score_ranks(self) -> bool:
        """Bring the scores of the pruner's adapters in the state up to date, if the backend does it; see `RankWork`."""
        self._parts.weights.settle()
        return self._parts.ranks.score(self)

    @untracked
    def zero_ranks(self, params: list[Tensor]) -> list[Tensor]:
        """Set mean and momentum of pruned ranks to zero; returns the parameters of which the backend does not."""
        return self._parts.ranks.zero(params)

    def metrics(self) -> dict[str, float]:
        """Flat dictionary of floats for loggers: ranks, SNR and sigma quantiles, curvature, skipped elements."""
        from ivon_lora.optim.metrics import metrics

        return metrics(self)

    def rank_table(self) -> list[dict[str, Any]]:
        """One row per adapter of the pruner: name, rank, live ranks, scores and mask.

        Raises:
            ValueError: the optimizer has no pruner.
        """
        from ivon_lora.optim.metrics import rank_table

        return rank_table(self)

    def nonfinite_elements(self) -> int:
        """Gradient elements skipped so far because they, or the update they led to, were not finite."""
        return self._nonfinite_before + sum(
            int(backend.nonfinite_elements()) for backend in self._parts.members.backends.values()
        )

    # ---------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Complete in both states of the weights: while a sample is live it holds the means and names the sample."""
        self._parts.weights.settle()
        saved = super().state_dict()
        saved["state"] = {
            index: {name: x.clone() if name == "step" else x for name, x in entry.items()}
            for index, entry in saved["state"].items()
        }  # our dictionaries change with the next step, and our counts share one memory
        live = self._parts.works.live
        number = number_of(None if live is None else live.key, self.param_groups[0]["antithetic"])
        for group in saved["param_groups"]:
            group["live_sample"] = number
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
        self._parts.load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps defaults, state and groups only; a copy or a pickle of ours must be able to go on.
        return {
            **self._parts.pickled(),
            **super().__getstate__(),
            "_prior_std": self._prior_std,
            "_nonfinite_before": self.nonfinite_elements(),
            "in_context": False,
            "pruner": self.pruner,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name not in PICKLED})
        if state.keys() >= PICKLED.keys():  # torch's own calls bring state and groups only
            self._parts = Parts(self, state["_backend_name"])
            self._parts.unpickle(state)
