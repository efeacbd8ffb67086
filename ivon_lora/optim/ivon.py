"""IVON as a torch optimizer: what users call.

No formula lives here (see `functional`), no kernel (`backends`) and no decision about ranks (`lora.rank_pruner`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from ivon_lora.functional.noise import NoiseKey
from ivon_lora.optim import parameter_posterior
from ivon_lora.optim.closures import evaluate
from ivon_lora.optim.example_counter import Counts, ExampleCounter
from ivon_lora.optim.guards import in_backward, no_autograd
from ivon_lora.optim.metrics import metrics, rank_table
from ivon_lora.optim.model_hooks import Attachment
from ivon_lora.optim.ownership import first_free_index, take_over
from ivon_lora.optim.param_groups import COUNTERS, DEFAULTS, check_group, check_params, integer, listed, plain_numbers
from ivon_lora.optim.parameters import Parameters
from ivon_lora.optim.sampling import Sampling
from ivon_lora.optim.sharding import check_replaced
from ivon_lora.optim.state_dict import load, save
from ivon_lora.optim.step import update
from ivon_lora.optim.tied import TiedParameters
from ivon_lora.optim.wrappers import act_inside

if TYPE_CHECKING:
    from ivon_lora.lora.rank_pruner import RankPruner

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class IVON(torch.optim.Optimizer):
    r"""Variational online Newton: an optimizer whose iterate is a Gaussian posterior N(m, sigma^2) per parameter.

    Follows "Variational Learning is Effective for Large Deep Networks" (arXiv:2402.17641, Algorithm 1), with the
    positional arguments of ``ivon.IVON``, and prunes LoRA ranks inside :meth:`step` when it is given a pruner
    (arXiv:2409.10673)::

        sample      theta = m + sigma eps,  sigma^2 = 1 / (ess (h + weight_decay))
        curvature   f = ghat eps / sigma  ("price")  or  ess ghat^2  ("gradsq")
        momentum    g <- beta1 g + (1 - beta1) ghat
        hessian     u = (1 - beta2)(f - h) / (h + weight_decay);  h <- h + (h + weight_decay)(u + u^2/2)
        mean        m <- m - lr clip((g / (1 - beta1^t) + weight_decay m) / (h + weight_decay), +-clip_radius)

    The defaults are those of the paper and of ivon-opt. :class:`~ivon_lora.VAdam` takes AdamW's learning rate and finds
    the rest.

    The parameters hold the posterior mean (MEAN) except between :meth:`train`, which draws a sample into them
    (SAMPLED), and the next :meth:`step` or :meth:`eval`. The Hugging Face Trainer and Accelerate call ``train`` and
    ``eval`` themselves; a plain loop needs one line, ``optimizer.attach(model)``.

    Args:
        params: tensors, groups, or ``model.named_parameters()``.
        lr: learning rate of the mean; multiplied by ``hess_init + weight_decay`` if ``rescale_lr``. May be 0.
        ess: lambda > 0, effective sample size in examples; the number of training examples divided by a temperature.
        hess_init: h0 > 0, initial Hessian; ``sigma = 1 / sqrt(ess (hess_init + weight_decay))`` at the start.
        beta1: in [0, 1), decay of the momentum.
        beta2: in [0, 1], decay of the Hessian.
        weight_decay: delta >= 0, precision of the Gaussian prior per effective example.
        mc_samples: posterior samples per step for ``step(closure)``.
        hess_approx: how the Hessian's diagonal is estimated, see `functional.ivon.estimate_curvature`: "price" is
            unbiased and very noisy for large ``ess``; "gradsq", as in ivon-opt, is ``ess / batch_size`` times too
            large.
        clip_radius: xi > 0, bound of an element of the preconditioned step, before the learning rate.
        sync: replicas of a process group draw noise of their own, and :meth:`step` averages gradients and curvatures
            over them (see `replicas`). Needs ``attach(model)`` under DistributedDataParallel, so that nobody averages
            gradients before, and no fp16 GradScaler, which may skip the step on some replicas only. False: replicas
            share their noise, and DDP averages their gradients as always.
        debias: divide the momentum by ``1 - beta1^t``.
        rescale_lr: see ``lr``.
        seed: 64-bit seed of the noise; the global random state is never touched.
        backend: "auto" (the Triton kernels on a GPU; on a CPU "cpp" where there is a C++ compiler, else eager),
            "eager", "triton", or "cpp". All give the same fp32 bits.
        pruner: a :class:`~ivon_lora.RankPruner` whose adapters' tensors are all in ``params``.
        maximize: maximise the objective instead of minimising it, as in torch's optimizers: the bits are those of
            minimising its negative. A group may have its own.

    State of a parameter ``p`` (``optimizer.state[p]``), fp32 for fp32 and 16-bit parameters, fp64 for fp64 ones:
        ``step`` (updates so far), ``momentum``, ``hess``; ``mean`` while a sample is live, and always for a 16-bit
        parameter; for tensors of a pruner's adapters ``rank_snr`` (r,), the scores of the last scoring step (every
        ``interval``; 0 for ranks pruned for good), and ``rank_mask`` (r,), False for pruned ranks.

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
        params: Params,
        lr: float | Tensor,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
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
        maximize: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr, ess=ess, hess_init=hess_init, beta1=beta1, beta2=beta2, weight_decay=weight_decay,
            mc_samples=mc_samples, hess_approx=hess_approx, clip_radius=clip_radius, sync=sync, debias=debias,
            rescale_lr=rescale_lr, maximize=maximize,
        )  # fmt: skip
        self._start(params, defaults, seed, backend, pruner)

    def _start(
        self, params: Params, defaults: dict[str, Any], seed: int, backend: str, pruner: RankPruner | None
    ) -> None:
        """What all optimizers of this family have in common."""
        defaults = {**DEFAULTS, **defaults, **COUNTERS, "seed": NoiseKey(integer("seed", seed, low=0), 0).seed}
        plain_numbers(defaults)
        check_group(defaults)
        self.pruner: RankPruner | None = None
        self._given: set[Tensor] = set()
        self._begin(backend)
        super().__init__(params, defaults)
        if defaults["weight_decay"] and not any(group["weight_decay"] for group in self.param_groups):
            self.warn_once(
                "weight_decay",
                f"every group sets weight_decay=0, so the argument weight_decay={defaults['weight_decay']:g} has no "
                "effect. transformers' Trainer makes such groups for optimizer_cls_and_kwargs=(IVON, ...): call "
                "attach_trainer(trainer), or pass optimizers=(IVON(...), None). If 0 is meant, pass weight_decay=0.0",
            )
        for device in dict.fromkeys(p.device for p in self.parameters):
            self.parameters.backend(device)  # refuses here what cannot run
        if pruner is not None:
            pruner.check_covers(set(self.parameters))
            self.pruner = pruner

    def _begin(self, backend: str) -> None:
        """What a new optimizer and a copy start with."""
        self.in_context = self.is_attached = False  # inside `sampled_params`; to a model, at least once
        self.superseded: set[int] = set()  # ids of parameters that another optimizer drives now
        self.examples = ExampleCounter()
        self.warned: set[str] = set()
        self.replicas_agree = False
        self.parameters = Parameters(self, backend)
        self.sampling = Sampling(self, self.parameters)

    #: the older spelling of :class:`~ivon_lora.VAdam`, for one release (set where that class is)
    from_adamw: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        act_inside(cls)

    # ---------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters get the next indices of the noise. Raises what making the optimizer does."""
        if not isinstance(param_group["params"], set):  # which torch refuses
            param_group = {**param_group, "params": listed(param_group["params"])}
        super().add_param_group(self._own_entries(param_group))
        group = self.param_groups[-1]
        plain_numbers(group)
        try:
            for name in COUNTERS:
                group[name] = self.param_groups[0][name]
            check_group(group)
            check_params(group)
            self.parameters.tied = TiedParameters(self.parameters)
        except ValueError:
            self.param_groups.pop()
            raise
        self._given.update(group["params"])
        take_over(self, group["params"])

    def _own_entries(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """A group as the user gave it, with the entries that this class keeps."""
        return param_group

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
        return self.sampling.key is not None

    @property
    def masks_are_hard(self) -> bool:
        """Whether ranks that are masked now are pruned for good."""
        return self.pruner is not None and self.pruner.is_hard(self.completed_steps)

    def once(self, kind: str) -> bool:
        """Whether nothing of this kind was said before; from now on it was."""
        is_new = kind not in self.warned
        self.warned.add(kind)
        return is_new

    def warn_once(self, kind: str, message: str) -> None:
        """Warn, unless a warning of this kind was given before."""
        if self.once(kind):
            warnings.warn(message, stacklevel=4)

    # ---------------------------------------------------------------- MEAN <-> SAMPLED

    def train(self) -> None:
        """Draw a posterior sample into the parameters, unless one is live.

        Every draw of one step gives the same sample, so all its micro-batches see the same weights. RuntimeError if
        DeepSpeed has replaced the parameters.
        """
        if not self.in_context:
            check_replaced(self.parameters, self._given)
            self.sampling.train()

    def eval(self) -> None:
        """Let the parameters be the mean. What was written over a sample reaches the mean as the change that it was.

        Between a training forward of an attached model and its backward the sample stays where the graph needs it, and
        the mean is shown in memory of its own until the backward begins.

        Raises:
            RuntimeError: a backward is running, which still needs the sample.
        """
        if self.is_sampled and in_backward():
            raise RuntimeError(
                "eval() while a backward is running would change the weights that it still needs: call it afterwards, "
                "or read optimizer.posterior(p).mean"
            )
        self.sampling.eval()

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Posterior sample inside, posterior mean after, whatever happens inside.

        Args:
            train: draw a sample for the next :meth:`step` (several contexts before it are averaged); False draws one
                for prediction, from a stream of its own.

        A context inside another neither draws nor restores. If a training context raises, its gradient does not count.
        The last sample's gradient is read at :meth:`step`, after clipping and unscaling; those before it are read when
        the next context, or :meth:`zero_grad`, follows: a GradScaler wants one sample.
        """
        if self.in_context:
            yield
            return
        resume = self.is_sampled and not train
        use = self.sampling.forward_was_attached, self.sampling.backward_began
        if not train:
            self.eval()
            key = NoiseKey(self.seed, self.param_groups[0]["prediction_draws"], prediction=True)
            for group in self.param_groups:
                group["prediction_draws"] += 1
            self.sampling.draw(key)
        elif not self.is_sampled:
            self.sampling.next_sample()
        self.sampling.of_context = self.sampling.of_context or train
        self.in_context = True
        try:
            yield
        except BaseException:
            if train:
                self.sampling.pending, self.sampling.of_context = None, False
            raise
        finally:
            self.in_context = False
            self.sampling.leave()
            if resume:
                self.train()
                self.sampling.forward_was_attached, self.sampling.backward_began = use

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the examples counted for them.

        Between two training contexts of one step the first one's gradient is averaged in before. A sample whose
        backward is over is of no more use: the parameters are the mean again.
        """
        if self.sampling.of_context and not self.is_sampled:
            self.sampling.bank()
        self.examples.drop_gradients(any(p.grad is not None for p in self.parameters))
        super().zero_grad(set_to_none)
        self.sampling.drop_unused()

    def attach(self, model: nn.Module) -> Attachment:
        """Make an AdamW loop an IVON loop: sample at training forwards, mean at other forwards and in ``state_dict``.

        Training forwards are also where ``batch_size="auto"`` counts examples, see `optim.example_counter`. Of several
        optimizers attached to one model each draws noise of its own, although all have the default seed.

        Args:
            model: the model whose forward the loop calls; attach before wrapping it (DDP, compile), but after
                ``fully_shard``. For ``compile(fullgraph=True)`` attach to the compiled model: the hooks of the one
                inside break its graph.

        Returns:
            handle; ``handle.remove()`` detaches.
        """
        take_over(self, self.parameters)
        if self.completed_steps == self.sampling.taken == 0:
            for group in self.param_groups:
                group["first_index"] = first_free_index(self, model)
        self.is_attached = True
        return Attachment(self, model)

    def count_examples(self, n: int, labels: int | None = None) -> None:
        """Say that the gradient of the coming step averages over ``n`` more examples on this process.

        In place of what the hooks of :meth:`attach` would count.

        Args:
            n: examples.
            labels: what the mean is taken over, if an example has several labels: the tokens of a sequence whose loss
                counts. None: one an example.
        """
        n = integer("n", n, low=0)
        labels = integer("labels", labels or 0, low=0)  # none at all: there is no gradient either
        self.examples.add(Counts(n, labels or n))

    @property
    def counted_examples(self) -> int | None:
        """Examples that the gradient of the coming step averages over, in this process; None if none were counted."""
        counted = self.examples.of_step()
        return None if counted is None else counted.examples

    # ---------------------------------------------------------------- step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the posterior from ``p.grad`` as it stands now; the parameters are the mean afterwards.

        Args:
            closure: clears the gradients, evaluates the loss, calls backward and returns the loss. Evaluated
                ``mc_samples`` times, each time at its own posterior sample; a live sample serves first.

        Returns:
            the mean loss of the closure, or None.

        Raises:
            RuntimeError: sparse gradients; nothing counted for ``batch_size="auto"``; with ``sync``, gradients that are
                averaged already, or replicas that differ. Nothing has changed then.

        Without a sample (neither ``train`` nor a context nor a closure before it) mean and momentum move and the
        Hessian stays, with one warning.
        """
        loss = None if closure is None else evaluate(self, closure)
        check_replaced(self.parameters, self._given)
        update(self)
        return loss

    # ---------------------------------------------------------------- reading the posterior

    @no_autograd
    def posterior(self, p: Tensor) -> Normal:
        """Posterior of one parameter: ``Normal(m, sigma)``, of its shape, in the state's dtype.

        A snapshot, the same in MEAN and SAMPLED. Ranks pruned for good have mean 0 and standard deviation 0, and so
        has a parameter that has always been frozen beside its value. ValueError if ``p`` is none of this optimizer's.
        """
        return parameter_posterior.normal(self, p)

    @no_autograd
    def snr(self, p: Tensor, criterion: str = "snr") -> Tensor:
        """Importance of each element of a parameter (see `functional.importance`), of its shape, in the state's dtype.

        Args:
            criterion: "snr" |m|/sigma, "snr_abs", "magnitude", "inverse_std", or "sensitivity" (only under a pruner
                that uses it).

        Raises:
            ValueError: an unknown criterion, "sensitivity" without its running means, or ``p`` is not a parameter of
                this optimizer, or has always been frozen.
        """
        return parameter_posterior.importance_of(self, p, criterion)

    @no_autograd
    def metrics(self) -> dict[str, float]:
        """Flat dictionary of floats for loggers: ranks, SNR and sigma quantiles, curvature, skipped elements."""
        return metrics(self)

    @no_autograd
    def rank_table(self) -> list[dict[str, Any]]:
        """One row per adapter of the pruner: ``name``, ``rank``, ``live``, ``snr_min``, ``snr_mean``, ``snr_max``
        (scores of its ranks under the pruner's criterion, computed now), ``scores`` and ``mask`` (lists of length r).
        ValueError without a pruner.
        """
        return rank_table(self)

    # ---------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Complete in both states of the weights: while a sample is live it holds the means and names the sample."""
        self.sampling.settle()
        return save(super().state_dict(), self.sampling)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of :meth:`state_dict`, or of ivon-opt; the weights are the mean afterwards.

        The model may be loaded before or after, and from a model state dict that holds a sample.

        Raises:
            ValueError: another optimizer's state dict, other groups, or other shapes. Nothing has changed then.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        load(self, state_dict)
        self.parameters.forget_batches()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps defaults, state and groups only; a copy or a pickle of ours must be able to go on
        self.sampling.settle()
        own = self.parameters.backend_name, self.pruner, self.examples, self.sampling.pickled()
        return {**super().__getstate__(), "ivon_lora": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "ivon_lora"})
        if "ivon_lora" in state:  # torch's own calls bring state and groups only
            backend, self.pruner, examples, samples = state["ivon_lora"]
            self._begin(backend)
            self._given = set(self.parameters)
            self.examples = examples
            self.parameters.tied = TiedParameters(self.parameters)
            self.sampling.unpickle(samples)
            take_over(self, self.parameters)
