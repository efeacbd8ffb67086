"""A whole training step (sample, forward, backward, update) from a CUDA graph, with up-to-date numbers.

Before each replay the optimizer's own code runs as ever: it counts the step, asks the schedules, and writes what
changes (learning rate, key, bias correction, budget) into small tables that keep their addresses; only its launches are
noted instead of made. Equal launches mean that the graph captured from them does the step, whatever the numbers are.
Other launches (ranks are allocated, masks become final ...) make a graph of their own the second time they occur.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ivon_lora.kernels.recording import Launch, Recording
    from ivon_lora.optim.ivon import IVON

#: graphs kept at once: soft and final masks, with and without an allocation, and as many again
MAX_PROGRAMS = 8


@dataclass
class _Program:
    """The launches of one kind of step, and the graph captured from them.

    Attributes:
        launches: the first ``n_before`` come before the forward pass.
        gradients: of each parameter, where the graph writes them.
        output: what the closure returned when the graph was captured; its tensors are the graph's.
    """

    launches: list[Launch]
    n_before: int
    graph: torch.cuda.CUDAGraph | None = None
    gradients: list[Tensor | None] | None = None
    output: Any = None


class GraphedStep:
    """``train()``, a closure with forward and backward pass, and ``step()``, replayed from a CUDA graph.

    Args:
        optimizer: an :class:`~ivon_lora.IVON` whose parameters are on one GPU, contiguous, with fp32 state, and run by
            the Triton kernels. Hyperparameters, schedulers, seed and a pruner may change what they like at any time.
        closure: computes the loss from tensors that stay where they are (copy each batch into them), calls
            ``backward()`` and returns the loss. It must do the same every time and never wait for the GPU (no
            ``.item()``), as for every CUDA graph. Clipping gradients belongs into it.
        warmup: steps done without a graph first; they create the state and compile the kernels.

    Calling the object does one step and returns what the closure returned. In a replay that is the graph's own memory,
    overwritten by the next step (so are the gradients): clone what is to be kept. The weights are the mean afterwards.
    Hooks of ``step()`` run before the launches.
    If the closure raises, the weights are the mean as well, and the step has been counted without an update.

    Does not go together with ``batch_size="auto"``, ``mc_samples`` above 1 and a ``GradScaler``, which decide on the
    host what a graph cannot see. On the CPU (Triton's interpreter) there are no graphs: the same launches are repeated
    one by one, for tests.

    Raises:
        ValueError: the optimizer cannot be recorded; the message says why.

    Example:
        >>> def closure():                      # doctest: +SKIP
        ...     loss = loss_fn(model(static_x), static_y)
        ...     loss.backward()
        ...     return loss
        >>> step = GraphedStep(optimizer, closure)       # doctest: +SKIP
        >>> for x, y in loader:                 # doctest: +SKIP
        ...     static_x.copy_(x), static_y.copy_(y)
        ...     loss = step()
        ...     scheduler.step()
    """

    def __init__(self, optimizer: IVON, closure: Callable[[], Any], warmup: int = 3) -> None:
        if not isinstance(warmup, int) or warmup < 1:
            raise ValueError(f"warmup must be at least 1 step, which creates the state, got {warmup!r}")
        self._optimizer = optimizer
        self._closure = closure
        self._left_to_warm_up = warmup
        self._backend = _recordable_backend(optimizer)
        self._device: torch.device = self._backend.device
        self._gradients: list[Tensor | None] = []
        self._programs: dict[Hashable, _Program] = {}
        self._pool: Any = None
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def __call__(self) -> Any:
        """One step."""
        if self._left_to_warm_up:
            self._left_to_warm_up -= 1
            return self._plainly()
        self._set_gradients(self._gradients)
        recording, n_before = self._record()
        signature = (n_before, *(launch.signature for launch in recording.launches))
        program = self._programs.get(signature)
        if program is None:
            while len(self._programs) >= MAX_PROGRAMS:
                del self._programs[next(iter(self._programs))]
            self._programs[signature] = _Program(recording.launches, n_before)
            return self._run(recording.launches, n_before, recording)
        if self._stream is None:
            return self._run(program.launches, n_before, recording)
        if program.graph is None:
            self._capture(program, recording)
        assert program.graph is not None
        assert program.gradients is not None
        if any(a is not b for a, b in zip(self._gradients, program.gradients, strict=True)):
            self._set_gradients(program.gradients)
            recording.use_gradients(program.gradients)
        program.graph.replay()
        return program.output

    @property
    def graphs(self) -> int:
        """CUDA graphs captured so far and still in use."""
        return sum(program.graph is not None for program in self._programs.values())

    def _params(self) -> list[Tensor]:
        """In the order of their index."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _set_gradients(self, gradients: list[Tensor | None]) -> None:
        params = self._params()
        if len(params) != len(gradients):
            raise RuntimeError("a parameter group was added after the warm-up; make a new GraphedStep")
        for number, (p, grad) in enumerate(zip(params, gradients, strict=True)):
            if p.requires_grad and grad is None:
                raise RuntimeError(
                    f"parameter {number} got no gradient in the step before; freeze it with requires_grad_(False), "
                    "or make a new GraphedStep if it was thawed"
                )
            p.grad = grad
        self._gradients = gradients

    def _record(self) -> tuple[Recording, int]:
        """The optimizer's share of the step on the host: its launches, and how many come before the forward pass."""
        _check_ranks(self._optimizer)
        with self._backend.recording() as recording:
            try:
                self._optimizer.train()
                n_before = len(recording.launches)
                self._optimizer.step()
            except BaseException:
                for launch in recording.launches:  # or the weights would not be what the optimizer takes them for
                    launch.run(self._device)
                raise
        return recording, n_before

    def _plainly(self) -> Any:
        with self._aside():
            self._optimizer.zero_grad()
            self._optimizer.train()
            with torch.enable_grad():
                output = _detached(self._closure())
            self._gradients = [p.grad for p in self._params()]
            self._optimizer.step()
        return output

    def _run(self, launches: list[Launch], n_before: int, recording: Recording) -> Any:
        """Make launches one by one; ``recording`` knows the tensors of this step."""
        with self._aside():
            for launch in launches[:n_before]:
                launch.run(self._device)
            try:
                output = self._evaluate()
                self._gradients = [p.grad for p in self._params()]
                recording.use_gradients(self._gradients)
            except BaseException:
                recording.restore_means()
                raise
            for launch in launches[n_before:]:
                launch.run(self._device)
        return output

    def _capture(self, program: _Program, recording: Recording) -> None:
        graph, launches = torch.cuda.CUDAGraph(), program.launches
        # In the midst of training other threads are busy, such as that of a DataLoader which pins batches: what they
        # ask of CUDA is none of the graph's business, but in the default mode would break the capture, and them.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            for launch in launches[: program.n_before]:
                launch.run(self._device)
            program.output = self._evaluate()
            for launch in launches[program.n_before :]:
                launch.run(self._device)
        self._pool = graph.pool()
        program.gradients = [p.grad for p in self._params()]
        self._set_gradients(program.gradients)
        recording.use_gradients(program.gradients)
        program.graph = graph

    def _evaluate(self) -> Any:
        """The closure, with gradients that start from nothing."""
        for p in self._params():
            p.grad = None
        self._optimizer.in_context = True  # the weights hold their sample: nobody shall draw another one
        try:
            with torch.enable_grad():
                return _detached(self._closure())
        finally:
            self._optimizer.in_context = False

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream of the captures: autograd remembers the stream on which it first met a parameter."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)


def _detached(output: Any) -> Any:
    """Without what autograd saved for it, whose memory a graph could not use again."""
    return output.detach() if isinstance(output, Tensor) else output


def _check_ranks(optimizer: IVON) -> None:
    """A pruner whose adapters are not all updated reads its scores from the state, between launches.

    Raises:
        ValueError: it would have to.
    """
    adapters = () if optimizer.pruner is None else optimizer.pruner.adapters
    for adapter in adapters:
        for key, p, _ in adapter.tensors():
            if not p.requires_grad:
                raise ValueError(
                    f"GraphedStep needs every tensor of the pruner's adapters to train, and {key} of {adapter.name!r} "
                    "is frozen: leave its adapter out of the RankPruner, or step without a graph"
                )


def _recordable_backend(optimizer: IVON) -> Any:
    """The one backend of the optimizer.

    Raises:
        ValueError: there are several, or it cannot be recorded.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    devices = {p.device for p in params}
    if len(devices) != 1:
        raise ValueError(f"GraphedStep needs all parameters on one device, they are on {sorted(map(str, devices))}")
    backend = optimizer.backend_of(next(iter(devices)))
    if backend.name != "triton":
        raise ValueError(
            f"GraphedStep needs the Triton kernels, and backend {backend.name!r} runs these parameters: put them on a "
            "GPU, and leave backend at 'auto'"
        )
    for number, p in enumerate(params):
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not p.is_contiguous():
            raise ValueError(
                f"GraphedStep takes contiguous fp32, bf16 and fp16 parameters; number {number} has dtype {p.dtype}, "
                f"shape {tuple(p.shape)} and strides {p.stride()}"
            )
    for group in optimizer.param_groups:
        if group["mc_samples"] != 1:
            raise ValueError(f"GraphedStep draws one sample per step, but mc_samples is {group['mc_samples']}")
        if group.get("prior") == "empirical" and any(p.numel() >= 2**31 for p in group["params"]):
            raise ValueError(
                "prior='empirical' adds up tensors of 2^31 elements and more between launches, which GraphedStep "
                "cannot record: take prior='fixed' for their group"
            )
        if group.get("batch_size") == "auto":
            raise ValueError("GraphedStep cannot count examples: give batch_size as a number instead of 'auto'")
    return backend
