"""A step whose launches are recorded once and made again has the bits of an ordinary one, whatever has changed."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ivon_lora import IVON, LoraAdapter, RankPruner
from ivon_lora.graphs import GraphedStep
from ivon_lora.kernels.recording import Launch
from tests.optimizer_problem import assert_same_state


@pytest.fixture(autouse=True)
def _numpy_may_meet_nan() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where a GPU is silent."""
    with np.errstate(all="ignore"):
        yield


class Bed:
    """One adapter and a bias under a pruner, and a quadratic loss whose gradient has the same bits everywhere."""

    def __init__(self, backend: str, device: str, total_steps: int = 50, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(5)
        shapes = ((4, 8), (8, 4), (4,))
        self.params = [
            (torch.randn(s, generator=generator) * 0.3).to(dtype).to(device).requires_grad_() for s in shapes
        ]
        self.targets = [torch.randn(s, generator=generator).to(device) for s in shapes]
        adapter = LoraAdapter("a", self.params[0], self.params[1])
        self.pruner = RankPruner([adapter], 2, total_steps=total_steps, warmup=total_steps // 8, final=0.4, interval=3)
        self.optimizer = IVON(
            self.params, 0.05, 50, hess_init=0.5, beta2=0.9, clip_radius=0.3, pruner=self.pruner, backend=backend
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total_steps)

    def closure(self) -> Tensor:
        """Assigns new gradients, as a backward pass does that found none; the loss is of no interest."""
        with torch.no_grad():
            for p, t in zip(self.params, self.targets, strict=True):
                p.grad = ((p.float() - t) * 0.5).to(p.dtype)
            return self.params[2].sum()

    def plain_step(self) -> Tensor:
        self.optimizer.train()
        loss = self.closure()
        self.optimizer.step()
        self.scheduler.step()
        return loss


@pytest.mark.parametrize(
    ("dtype", "total_steps", "kinds"),
    [(torch.float32, 17, 4), (torch.bfloat16, 7, 3)],
    ids=["float32", "bfloat16"],
)
def test_recorded_steps_have_the_bits_of_ordinary_ones(
    dtype: torch.dtype, total_steps: int, kinds: int, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allocations, final masks and a schedule of the learning rate on the way; each kind of step is recorded once."""
    eager, ours = Bed("eager", "cpu", total_steps, dtype), Bed("triton", triton_device, total_steps, dtype)
    graphed = GraphedStep(ours.optimizer, ours.closure, warmup=2)
    made: list[Launch] = []
    run = Launch.run

    def noting(self: Launch, device: torch.device) -> None:
        made.append(self)
        run(self, device)

    for step in range(total_steps):
        eager.plain_step()
        with monkeypatch.context() as patch:
            if step >= 2:
                patch.setattr(Launch, "run", noting)
            loss = graphed()
        ours.scheduler.step()
        assert loss.shape == ()
        assert_same_state(eager.optimizer, ours.optimizer, step)
        assert ours.optimizer.completed_steps == step + 1
    live = int(ours.pruner.mask(ours.pruner.adapters[0]).sum())
    assert live == ours.pruner.target_budget < ours.pruner.initial_budget
    recorded = [launch for program in graphed._programs.values() for launch in program.launches]
    assert len(graphed._programs) == kinds  # soft, soft with an allocation, the last allocation, final masks
    assert {id(launch) for launch in made} == {id(launch) for launch in recorded}


def test_a_closure_that_raises_leaves_the_mean_in_the_weights(triton_device: str) -> None:
    bed = Bed("triton", triton_device)
    graphed = GraphedStep(bed.optimizer, bed.closure, warmup=1)
    graphed()
    before = [p.detach().clone() for p in bed.params]
    hess = bed.optimizer.state[bed.params[0]]["hess"].clone()

    def fails() -> None:
        assert not torch.equal(bed.params[0], before[0]), "at a sample"
        bed.optimizer.train()  # as hooks of the model do: the sample that is there will do
        raise KeyboardInterrupt

    graphed._closure = fails
    with pytest.raises(KeyboardInterrupt):
        graphed()
    bed.optimizer.eval()
    assert all(torch.equal(p, q) for p, q in zip(bed.params, before, strict=True))
    assert torch.equal(bed.optimizer.state[bed.params[0]]["hess"], hess)


def test_an_error_while_recording_leaves_the_optimizer_as_it_says_it_is(triton_device: str) -> None:
    bed = Bed("triton", triton_device)
    graphed = GraphedStep(bed.optimizer, bed.closure, warmup=1)
    graphed()
    before = [p.detach().clone() for p in bed.params]
    bed.optimizer.param_groups[0]["beta1"] = 2.0
    with pytest.raises(ValueError, match="beta1"):
        graphed()
    bed.optimizer.param_groups[0]["beta1"] = 0.9
    bed.optimizer.eval()
    assert all(torch.equal(p, q) for p, q in zip(bed.params, before, strict=True))


def test_what_cannot_be_recorded_is_refused(triton_device: str) -> None:
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="needs the Triton kernels, and backend 'eager'"):
        GraphedStep(IVON([p], 0.1, 10), lambda: None)
    there = torch.ones(3, device=triton_device, requires_grad=True)
    with pytest.raises(ValueError, match="mc_samples is 2"):
        GraphedStep(IVON([there], 0.1, 10, mc_samples=2, backend="triton"), lambda: None)
    with pytest.raises(ValueError, match="at least 1 step"):
        GraphedStep(IVON([there], 0.1, 10, backend="triton"), lambda: None, warmup=0)
    strided = torch.ones(3, 4, device=triton_device).t().requires_grad_()
    with pytest.raises(ValueError, match=r"number 0 has dtype torch.float32, shape \(4, 3\) and strides \(1, 4\)"):
        GraphedStep(IVON([strided], 0.1, 10, backend="triton"), lambda: None)


def test_a_parameter_that_lost_its_gradient_is_an_error_before_anything_changes(triton_device: str) -> None:
    params = [torch.ones(3, device=triton_device, requires_grad=True) for _ in range(2)]
    optimizer = IVON(params, 0.1, 10, backend="triton")
    graphed = GraphedStep(optimizer, lambda: setattr(params[0], "grad", torch.ones_like(params[0])), warmup=1)
    graphed()
    with pytest.raises(RuntimeError, match="parameter 1 got no gradient"):
        graphed()
    assert optimizer.completed_steps == 1


@pytest.mark.parametrize("call", ["train", "step"])
def test_a_capture_of_ones_own_is_refused_before_anything_changes(
    call: str, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of the launches alone would repeat the noise of one step for ever."""
    bed = Bed("triton", triton_device)
    bed.plain_step()
    bed.closure()
    if call == "step":
        bed.optimizer.train()
    before = [x.clone() for p in bed.params for x in (p.detach(), bed.optimizer.state[p]["hess"])]
    sampled = bed.optimizer.is_sampled
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            getattr(bed.optimizer, call)()
    assert bed.optimizer.is_sampled == sampled
    assert bed.optimizer.completed_steps == 1
    after = [x for p in bed.params for x in (p.detach(), bed.optimizer.state[p]["hess"])]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    bed.optimizer.train()
    bed.optimizer.step()
    assert bed.optimizer.completed_steps == 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_of_ones_own_on_a_gpu_is_refused() -> None:
    bed = Bed("triton", "cuda")
    bed.plain_step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        bed.optimizer.train()
    bed.plain_step()
    assert bed.optimizer.completed_steps == 2


@pytest.mark.gpu
def test_a_thread_that_pins_batches_meanwhile_breaks_no_capture() -> None:
    """As a DataLoader with pin_memory=True does: captures happen in the midst of training."""
    stop, errors = threading.Event(), []

    def pin() -> None:
        kept: list[Tensor] = []  # so that CUDA is asked for more each time
        try:
            while not stop.is_set():
                kept = [*kept, torch.empty(1 << 14).pin_memory()] if len(kept) < 500 else []
        except RuntimeError as error:
            errors.append(error)

    bed = Bed("triton", "cuda", total_steps=60)
    graphed = GraphedStep(bed.optimizer, bed.closure, warmup=2)
    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for _ in range(60):
            graphed()
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert graphed.graphs >= 2


@pytest.mark.gpu
def test_a_graph_on_another_device_than_the_current_one() -> None:
    last = torch.cuda.device_count() - 1
    if last == 0:
        pytest.skip("needs two GPUs")
    eager, ours = Bed("eager", "cpu"), Bed("triton", f"cuda:{last}")
    graphed = GraphedStep(ours.optimizer, ours.closure)
    for step in range(20):
        eager.plain_step()
        graphed()
        ours.scheduler.step()
        assert_same_state(eager.optimizer, ours.optimizer, step)
    assert torch.cuda.current_device() == 0
    assert graphed.graphs


@pytest.mark.gpu
def test_cuda_graphs_have_the_bits_of_ordinary_steps() -> None:
    """A real model with a real backward pass, allocations on the way: 50 steps, most of them replays."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.A = torch.nn.Parameter(torch.randn(8, 64, generator=generator) * 0.2)
            self.B = torch.nn.Parameter(torch.randn(48, 8, generator=generator) * 0.2)
            self.head = torch.nn.Linear(48, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(x @ self.A.T @ self.B.T))

    def run(graphed: bool) -> tuple[list[Tensor], list[float], int]:
        torch.manual_seed(0)
        model = Model().cuda()
        pruner = RankPruner([LoraAdapter("a", model.A, model.B)], 3, total_steps=50, warmup=4, final=0.4, interval=7)
        optimizer = IVON(model.parameters(), 0.05, 500, beta2=0.99, pruner=pruner, backend="triton")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        batches = torch.randn(50, 16, 64, generator=torch.Generator().manual_seed(1)).cuda()
        labels = torch.randint(0, 3, (50, 16), generator=torch.Generator().manual_seed(2)).cuda()
        x, y = batches[0].clone(), labels[0].clone()

        def closure() -> Tensor:
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss.detach()

        step = GraphedStep(optimizer, closure)
        losses = []
        for i in range(50):
            x.copy_(batches[i])
            y.copy_(labels[i])
            if graphed:
                losses.append(step().clone())
            else:
                optimizer.zero_grad()
                optimizer.train()
                losses.append(closure())
                optimizer.step()
            scheduler.step()
        state = [optimizer.state[p][name] for p in model.parameters() for name in ("momentum", "hess")]
        masks = [pruner.mask(a) for a in pruner.adapters]
        return [*map(torch.clone, model.parameters()), *state, *masks], [float(v) for v in losses], step.graphs

    expected, expected_losses, _ = run(False)
    found, losses, graphs = run(True)
    assert graphs >= 2  # soft and final
    assert losses == expected_losses
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
