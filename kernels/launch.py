"""The host side of the kernels: one launch for all tensors of a kind.

`TritonBackend` runs the equations of `functional.ivon` with the bits of the eager backend. What changes from step
to step (learning rate, step, seed ...) travels in one small table of scalars per call, so no value leads to a
recompilation and nothing waits for the device. All tables keep their addresses (see `tables`), so the launches of a
step can be recorded and made again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from ivon_lora.kernels import tiles
from ivon_lora.kernels.formulas import CRITERIA
from ivon_lora.kernels.ranking import RankLayout, fingerprint, no_ranking, rank_layout
from ivon_lora.kernels.recording import Launch, Recording
from ivon_lora.kernels.sample import sample_kernel
from ivon_lora.kernels.scores import importance_kernel
from ivon_lora.kernels.select import score_kernel, select_kernel, zero_kernel
from ivon_lora.kernels.step import bank_kernel, step_kernel
from ivon_lora.kernels.tables import (
    BANK,
    CURVATURES,
    DTYPES,
    SAMPLE,
    SCORE,
    STEP,
    ZERO,
    Hyper,
    Key,
    Part,
    Reads,
    Site,
    Staged,
    Work,
    scalars,
    write,
)


@dataclass(frozen=True)
class LaunchConfig:
    """How kernels are launched; results do not depend on it.

    Attributes:
        tile: elements per program, a power of two from 4 to 2^15. 512 is one 16-byte vector per thread of four warps of
            32 threads.
        num_warps: warps per program.
        score_block: ranks scored at once, a power of two.
        select_block: ranks compared at once by the selection, a power of two.
    """

    tile: int = 512
    num_warps: int = 4
    score_block: int = 128
    select_block: int = 1024

    def __post_init__(self) -> None:
        for name in ("tile", "score_block", "select_block"):
            value = getattr(self, name)
            if value < 4 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two of at least 4, got {value}")
        if self.tile > tiles.LARGEST.value:
            raise ValueError(f"tile must be at most {tiles.LARGEST.value}, got {self.tile}")
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"num_warps must be a power of two from 1 to 32, got {self.num_warps}")

    @classmethod
    def of(cls, device: torch.device) -> LaunchConfig:
        """What suits a device: one 16-byte vector per thread and array."""
        if device.type != "cuda":
            return cls()
        return cls(tile=4 * cls.num_warps * getattr(torch.cuda.get_device_properties(device), "warp_size", 32))


#: compute capability of the oldest NVIDIA GPUs that the kernels compile for
OLDEST = (7, 0)

#: `ivon_lora.backends.Ranking`, which this room may not know
Ranking = Any


class Fallback(Protocol):
    """What is asked of another backend: see `ivon_lora.backends.Backend`."""

    def sample(self, works: Sequence[Any], hyper: Any, key: Any) -> None:
        """See `TritonBackend.sample`."""

    def bank(self, works: Sequence[Any], hyper: Any, key: Any) -> None:
        """See `TritonBackend.bank`."""

    def step(self, works: Sequence[Any], hyper: Any, key: Any, n_samples: int) -> None:
        """See `TritonBackend.step`."""

    def marks(self, works: Sequence[Any]) -> Any:
        """See `TritonBackend.marks`."""

    def forget_noise(self) -> None:
        """See `TritonBackend.forget_noise`."""

    def nonfinite_elements(self) -> Tensor | int:
        """See `TritonBackend.nonfinite_elements`."""
        ...


def supports(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the kernels can run on tensors of a device and dtype, and why (not)."""
    if dtype not in DTYPES:
        return False, f"the kernels take fp32, bf16 and fp16 parameters, not {dtype}"
    interpreted = isinstance(step_kernel, InterpretedFunction)
    if device.type == "cpu":
        if interpreted:
            return True, "TRITON_INTERPRET=1 runs the kernels in Triton's interpreter (slow: for tests)"
        return False, "Triton needs a GPU (or, for tests, TRITON_INTERPRET=1 set before triton is first imported)"
    if device.type == "cuda":
        if interpreted:
            return False, "TRITON_INTERPRET=1 is set: unset it to run the kernels on the GPU"
        return gpu_supports(device)
    return False, f"Triton has no support for tensors on {device.type!r}"


def gpu_supports(device: torch.device) -> tuple[bool, str]:
    """Whether Triton can run on a GPU, and why (not): old ones it does not know, and it needs a C compiler."""
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < OLDEST:
            return (
                False,
                f"Triton needs compute capability {OLDEST[0]}.{OLDEST[1]} or more, and {device} has {major}.{minor}",
            )
    try:
        driver.active.get_current_target()  # starts it, which it else does at the first launch
    except Exception as error:  # whatever it meets: no compiler, no library, a cache that cannot be written
        return False, f"Triton's driver does not start ({type(error).__name__}: {error})"
    return True, f"{'ROCm' if torch.version.hip else 'CUDA'} tensors"


class TritonBackend:
    """Runs many parameters of one device in few launches.

    Args:
        device: where the tensors are.
        config: how to launch; None for what suits the device.
        fallback: backend for parameters whose dtype the kernels do not take (fp64).

    Raises:
        ValueError: the kernels cannot run there.
    """

    name = "triton"
    ranks = True
    resamples = True
    fits_priors = True
    reads_table = True
    checks_seals = False

    def __init__(
        self, device: torch.device, config: LaunchConfig | None = None, fallback: Fallback | None = None
    ) -> None:
        supported, reason = supports(device, torch.float32)
        if not supported:
            raise ValueError(f"backend 'triton' cannot run on {device}: {reason}")
        self.device = device
        self.config = config or LaunchConfig.of(device)
        self._fallback = fallback
        self._nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        self._sites: dict[tuple[Hashable, ...], Site] = {}
        self._layout: RankLayout | None = None
        self._ranked: Any = None  # the adapters that it is of: the very list that a `Ranking` had
        self._numbers: list[int] = []
        self._ranking: _Ranking | None = None
        self._unfinished = False  # a ranking was begun that may have left something in the sums
        self._recording: Recording | None = None

    def sample(self, works: Sequence[Work], hyper: Hyper, key: Key) -> None:
        """Write a posterior sample, mean + sigma eps(key), into every parameter."""
        if (fallback := self._fallback_for(works)) is not None:
            return fallback.sample(works, hyper, key)
        site = self._site("sample", works, SAMPLE)
        site.set_scalars(scalars(hyper, key, 1))
        for part in site.parts:
            with self._staged(part):
                self._launch(
                    sample_kernel,
                    part,
                    site.scalars,
                    TILE=self.config.tile,
                    DTYPE=DTYPES[part.kind.dtype],
                    MASKED=part.masked,
                    COPY=part.kind.copies or part.kind.reread,
                    REREAD=part.kind.reread,
                )

    def bank(self, works: Sequence[Work], hyper: Hyper, key: Key) -> None:
        """Add the gradient, and the curvature it implies, to the banked sums."""
        if (fallback := self._fallback_for(works)) is not None:
            return fallback.bank(works, hyper, key)
        site = self._site("bank", works, BANK)
        site.set_scalars(scalars(hyper, key, 1))
        for part in site.parts:
            self._launch(
                bank_kernel,
                part,
                site.scalars,
                TILE=self.config.tile,
                GRAD_DTYPE=DTYPES[_not_none(part.kind.grad_dtype)],
                CURVATURE=_curvature(hyper, key),
            )

    def step(
        self,
        works: Sequence[Work],
        hyper: Hyper,
        key: Key | None,
        n_samples: int,
        following: tuple[Hyper, Key] | None = None,
        decay_bounds: tuple[float, float] | None = None,
    ) -> None:
        """Update momentum, Hessian and mean, and write the new mean into the parameter.

        Args:
            following: write the sample that these scalars and this key give after the update into the parameter, and
                the new mean into ``mean_copy`` (or ``mean_state``): what `sample` would do next, in the same launch.
            decay_bounds: set the deltas of works that have their own, within these bounds, as `prior` does after a
                step, in the same launch. The works are whole tensors of less than 2^31 elements.
        """
        if following is not None and decay_bounds is not None:
            raise ValueError("a step that changes priors cannot draw the next sample, which takes the new ones")
        if (fallback := self._fallback_for(works)) is not None:
            if following is not None or decay_bounds is not None:
                raise ValueError("only fp32 state can be sampled, or change its prior, within the launch of a step")
            return fallback.step(works, hyper, key, n_samples)
        layout = None if self._ranking is None else self._ranking.layout
        site = self._site("step", works, STEP, layout, scored=True)
        now = scalars(hyper, key, n_samples, decay_bounds)
        site.set_scalars(now, *([] if following is None else [scalars(*following, 1)]))
        for part in site.parts:
            ranking = self._ranking if part.scores else None
            selects = ranking is not None and ranking.selects_within(part)
            with self._staged(part):
                self._launch(
                    step_kernel,
                    part,
                    site.scalars,
                    self._nonfinite,
                    *(no_ranking(self._nonfinite) if ranking is None else ranking.layout.arguments),
                    TILE=self.config.tile,
                    DTYPE=DTYPES[part.kind.dtype],
                    GRAD_DTYPE=DTYPES[_not_none(part.kind.grad_dtype)],
                    CURVATURE=_curvature(hyper, key),
                    ADAM=hyper.step_rule == "adam",
                    BANKED=part.kind.banked,
                    MASKED=part.masked,
                    MEAN_STATE=part.kind.has_mean_state,
                    REREAD=part.kind.reread,
                    CRITERION=0 if ranking is None else CRITERIA[ranking.request.criterion],
                    SCORED=ranking is not None and ranking.request.scored,
                    SELECT=selects,
                    PRIOR=len(part.moments) > 0,
                    NEXT_SAMPLE=following is not None,
                    SCORE_BLOCK=self.config.score_block,
                    SELECT_BLOCK=self.config.select_block,
                )
            if ranking is not None:
                ranking.selected |= selects
                if ranking.request.budget is not None:
                    ranking.works += [w for w in part.works if w.index in ranking.layout.slots]

    def marks(self, works: Sequence[Work]) -> Any:
        """Numbers that change when somebody writes into one of the parameters, as the fallback sees it."""
        assert self._fallback is not None
        return self._fallback.marks(works)

    def seal(self, works: Sequence[Work]) -> Any:
        """The same right after `sample`."""
        return self.marks(works)

    def rank_sums(self, works: Sequence[Work], *_: object) -> None:
        """None: scores are a by-product of `step`."""
        return None

    def moment_sums(self, works: Sequence[Work], ess: float) -> None:
        """None: `step` changes priors itself where it can."""

    def zero_ranks(self, works: Sequence[Work]) -> bool:
        """False: `finish_ranking` does it."""
        return False

    def begin_ranking(self, ranking: Ranking) -> None:
        """Score ranks, and allocate them if a budget is given, within the launches of the calls to come."""
        known = self._layout is not None and self._ranked is ranking.adapters and self._layout.is_in_place
        if self._layout is None or not (known or self._layout.fingerprint == fingerprint(ranking)):
            self._layout, self._numbers = rank_layout(ranking, self.device), []
        elif self._unfinished:
            self._layout.clear()
        self._unfinished = True
        self._ranked = ranking.adapters
        numbers = [self._layout.n_ranks, self._layout.n_slots, ranking.budget or 0, ranking.min_rank]
        if numbers != self._numbers:
            write(self._layout.numbers, np.array(numbers))
            self._numbers = numbers
        self._ranking = _Ranking(ranking, self._layout)

    def score(self, works: Sequence[Work], hyper: Hyper) -> None:
        """Score the ranks of some parameters as they are: after `begin_ranking`, in place of `step`."""
        ranking = self._ranking
        assert ranking is not None
        site = self._site("score", works, SCORE, ranking.layout, scored=True)
        site.set_scalars(scalars(hyper, None, 1))
        for part in site.parts:
            self._launch(
                importance_kernel,
                part,
                site.scalars,
                ranking.layout.sums,
                ranking.layout.n_slots,
                TILE=self.config.tile,
                CRITERION=CRITERIA[ranking.request.criterion],
            )

    def finish_ranking(self) -> None:
        """Write scores and masks if the last `step` has not; pruned ranks get mean and momentum 0."""
        ranking = self._ranking
        assert ranking is not None
        layout, blocks = ranking.layout, (self.config.score_block, self.config.select_block)
        if not ranking.request.scored:
            pass
        elif ranking.request.budget is None:
            grid = (-(-layout.n_ranks // blocks[0]),)
            self._run(score_kernel, grid, *layout.tables, FROZEN=ranking.request.frozen, BLOCK=blocks[0])
        else:
            if not ranking.selected:
                self._run(select_kernel, (1,), *layout.tables, SCORE_BLOCK=blocks[0], BLOCK=blocks[1])
            losers = [w for w in ranking.works if ranking.request.hard or w.index in layout.gates]
            for part in self._site("zero", losers, ZERO, layout).parts if losers else ():
                with self._staged(part):
                    self._launch(
                        zero_kernel,
                        part,
                        TILE=self.config.tile,
                        DTYPE=DTYPES[part.kind.dtype],
                        MEAN_STATE=part.kind.has_mean_state,
                    )
        self._ranking, self._unfinished = None, False

    def drop_ranking(self) -> None:
        """Do not rank in the coming steps, if some that should have failed."""
        self._ranking = None

    def forget_noise(self) -> None:
        """The kernels keep none; the fallback may."""
        if self._fallback is not None:
            self._fallback.forget_noise()

    def nonfinite_elements(self) -> Tensor:
        """Gradient elements skipped so far because they, or the update they led to, were not finite: int64 [1]."""
        return self._nonfinite if self._fallback is None else self._nonfinite + self._fallback.nonfinite_elements()

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Note launches instead of making them; tables and scalars are written as ever."""
        self._recording = Recording()
        try:
            yield self._recording
        finally:
            self._recording = None

    def _fallback_for(self, works: Sequence[Work]) -> Fallback | None:
        """The backend for these works (they share their state's dtype) if the kernels cannot take them."""
        if works and works[0].hess.dtype != torch.float32:
            if self._fallback is None:
                raise ValueError(f"the kernels keep their state in fp32, not {works[0].hess.dtype}")
            if self._recording is not None:
                raise RuntimeError(f"a step of parameters whose state is {works[0].hess.dtype} cannot be recorded")
            if hasattr(works, "hand_out"):
                works.hand_out()
            return self._fallback
        return None

    def _site(
        self, name: str, works: Sequence[Work], reads: Reads, layout: RankLayout | None = None, scored: bool = False
    ) -> Site:
        """The tables of a call, up to date."""
        key = (name, works[0].index if works else -1, len(works), layout is not None)
        site = self._sites.get(key)
        if site is None:
            site = self._sites[key] = Site(self.device)
        site.refresh(works, reads, self.config.tile, layout, scored)
        return site

    def _staged(self, part: Part) -> AbstractContextManager[None]:
        if part.kind.contiguous:
            return nullcontext()
        if self._recording is not None:
            raise RuntimeError("a step of parameters that are not contiguous cannot be recorded")
        return Staged(part)

    def _launch(self, kernel: Any, part: Part, *arguments: Any, **constants: Any) -> None:
        """Launch one program per tile of a part."""
        if len(part.items):
            if self._recording is not None:
                self._recording.parts.append(part)
            self._run(kernel, (len(part.items),), part.tensors, part.items, *arguments, **constants)

    def _run(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        options = {"num_warps": self.config.num_warps, "enable_fp_fusion": False}
        launch = Launch(kernel, grid, arguments, constants | options)
        if self._recording is None:
            launch.run(self.device)
        else:
            self._recording.launches.append(launch)


class _Ranking:
    """The ranking of the step that runs now."""

    def __init__(self, request: Ranking, layout: RankLayout) -> None:
        self.request = request
        self.layout = layout
        self.works: list[Work] = []
        self.selected = False

    def selects_within(self, part: Part) -> bool:
        """Whether the launch of a part can end with the selection: it holds every tensor, and some element."""
        if self.request.budget is None or not len(part.items):
            return False
        return self.layout.slots.keys() <= {w.index for w in part.works}


def _curvature(hyper: Hyper, key: Key | None) -> int:
    """The argument CURVATURE of the kernels."""
    return 0 if key is None else CURVATURES[hyper.curvature]


def _not_none(dtype: torch.dtype | None) -> torch.dtype:
    assert dtype is not None
    return dtype
