"""The kernels on a GPU, in one command: are they right, and how fast are they?

    ./dev gpu                      # everything, within nine minutes; needs torch and triton, and installs nothing
    ./dev gpu --budget-seconds 200 --out part/gpu.csv
    ./dev gpu --report             # write page and picture again, from the CSV file; needs no GPU

The most important comes first: every kernel against the eager backend, bit for bit; the selection of ranks under
stress; then the times, from a Llama adapter in two groups on. What was measured is written after every task and not
measured again in a later run of the same commit on the same machine, so a run that was cut off is continued by the same
command. A task that fails is named, and the others go on, in a new process where the GPU takes no more work of the old
one; nothing is timed where bits were wrong.

A step is all that happens between `backward()` and the next forward pass, as in `benchmarks.step`. Peers take turns,
round by round: `ivon-lora[triton]`; `+prune` scores and allocates ranks in every tenth step; `+final` is in the final
phase of a pruner, where pruned ranks are frozen; `vadam[triton]` is `VAdam`, with a prior for every tensor; AdamW as
torch has it, fused; and ivon-opt where it is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.cases import CASES, LLAMA, Case, many_linears
from benchmarks.device_time import Step, copy_bandwidth, count_launches, time_interleaved, waits_for_device
from benchmarks.gpu_report import FINAL, MANY, ONE, OURS, PRUNING, VADAM, Row, draw, page, read_rows, write_rows
from benchmarks.peers import BASELINE, INTERVAL, IVON_OPTIONS, REFERENCE, step_of_ivon_opt, step_of_ours
from ivon_lora import IVON, LoraAdapter, RankPruner, VAdam
from ivon_lora.backends.eager import EagerBackend
from ivon_lora.functional.importance import CRITERIA, select_top
from ivon_lora.kernels.launch import TritonBackend
from tests.batches import HYPERS, KEY, about_to_draw, assert_same_bits, make_batch, means_of, moved, ranking_of
from tests.triton_runs import assert_equal_runs, ivon, make_pruner, vadam

RESULTS = machine.RESULTS / "gpu.csv"
#: what one step must read and write: sample (param, hess; mean kept, theta) and update (g, m, h, mean; m, h, mean)
BYTES = {torch.float32: 16 + 28, torch.bfloat16: (2 + 4 + 4 + 4 + 2) + (2 + 4 + 4 + 4 + 4 + 4 + 4 + 2)}
ADAMW_BYTES = {torch.float32: 28, torch.bfloat16: 14}
#: memory that all peers of a case need per element, gradients and temporaries included; and ivon-opt for itself
MEMORY, REFERENCE_MEMORY = 100, 60
ROUNDS = 9
VADAM_OPTIONS: dict[str, Any] = {"lr": 0.01, "num_examples": 10_000, "batch_size": 16, "noise_warmup": 0}

GPU_CASES = {
    case.name: case
    for case in (
        *(case for case in CASES if case.name == LLAMA),
        Case(ONE, 0, flat=10**9),
        Case(MANY, 0, many_linears(2000, features=625), rank=4),
        Case("one-1e7", 0, flat=10**7),
        Case("rank-12", 0, many_linears(64, features=4096), rank=12),
        Case("rank-64", 0, many_linears(64, features=4096), rank=64),
    )
}


class Task(NamedTuple):
    """A part of the run; ``seconds``: what it takes at most, a guess until measured."""

    name: str
    seconds: float
    run: Callable[[], Iterator[Row]]


def tasks(device: torch.device) -> list[Task]:
    """Everything, the most important first."""
    found = [
        Task(f"bits {name} {_name(dtype)}", 25.0, functools.partial(bits, name, dtype, device))
        for name, dtype in itertools.product(("kernels", "ranks", "IVON", "VAdam"), BYTES)
    ]
    found.append(Task("selection", 30.0, functools.partial(selection, device)))
    found.append(Task("sums", 20.0, functools.partial(sums, device)))
    found.append(Task("copy", 5.0, copy))
    order = [(LLAMA, torch.float32), (ONE, torch.float32), (MANY, torch.float32), (LLAMA, torch.bfloat16)]
    order += [(name, torch.float32) for name in ("rank-12", "rank-64", "one-1e7")] + [(ONE, torch.bfloat16)]
    for name, dtype in order:
        found.append(
            Task(f"times {name} {_name(dtype)}", 45.0, functools.partial(times, GPU_CASES[name], dtype, device))
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status: 1 where something was wrong."""
    parser = argparse.ArgumentParser(
        prog="./dev gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget-seconds", type=float, default=510.0, help="start no task that may end later (510)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file; page and picture lie beside it")
    parser.add_argument("--failed", nargs="+", default=[], metavar="TASK", help="tasks to leave out as failed before")
    parser.add_argument("--report", action="store_true", help="measure nothing: page and picture of the CSV file")
    options = parser.parse_args(argv)
    begin = time.monotonic()
    rows = read_rows(options.out)
    if options.report:
        print(write_page(rows, options.out))
        return 0
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; `./dev bench-kernels` compiles for GPUs that are not here")
        return 2
    here = provenance()
    rows = [row for row in rows if all(getattr(row, name) == value for name, value in here.items() if name != "date")]
    failures = options.failed
    for task in tasks(torch.device("cuda")):
        started = time.monotonic()
        left = options.budget_seconds - (started - begin)
        if task.name in failures or any(row.task == task.name for row in rows):
            print(f"{task.name}: {'failed' if task.name in failures else 'measured'} before")
        elif task.seconds > left:
            print(f"{task.name}: left out, it may take {task.seconds:.0f} s and {max(left, 0):.0f} s are left")
        elif task.name.startswith("times") and any(row.metric == "faults" and row.value for row in rows):
            print(f"{task.name}: left out, as results were wrong")
        else:
            print(f"{started - begin:4.0f} s: {task.name}", flush=True)
            try:
                rows += [dataclasses.replace(row, task=task.name, **here) for row in task.run()]
            except Exception:  # what can be measured still will be
                failures.append(task.name)
                traceback.print_exc()
                if not _gpu_lives():
                    _go_on_in_a_new_process(options.out, left - (time.monotonic() - started), failures)
            write_rows(options.out, rows)
            options.out.with_suffix(".md").write_text(page(rows))
            gc.collect()
            torch.cuda.empty_cache()
    print(write_page(rows, options.out))
    if failures:
        print(f"failed: {', '.join(failures)}")
    return int(bool(failures) or any(row.metric == "faults" and row.value > 0 for row in rows))


def _gpu_lives() -> bool:
    """False after an access out of bounds: nothing of this process runs there any more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _go_on_in_a_new_process(out: Path, seconds: float, failures: Sequence[str]) -> NoReturn:
    print("the GPU takes no more work of this process: going on in a new one", flush=True)
    options = ["--out", str(out), "--budget-seconds", f"{seconds:.0f}", "--failed", *failures]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *options])


def write_page(rows: Sequence[Row], out: Path) -> str:
    """Write the page, and the picture where matplotlib is, beside the CSV file ``out``; returns the page."""
    picture: str | None = out.with_suffix(".png").name
    try:
        draw(rows, out.with_suffix(".png"))
    except ModuleNotFoundError:  # `./dev gpu --report` draws it elsewhere
        picture = None
    out.with_suffix(".md").write_text(text := page(rows, picture))
    return text


def provenance() -> dict[str, Any]:
    """What the numbers of this run are of."""
    import triton

    return {**machine.provenance(), "machine": torch.cuda.get_device_name(), "triton": triton.__version__}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- are they right?

LAYOUT: list[tuple[tuple[int, ...], int | None]] = [
    ((16, 3072), 0), ((1024, 16), 1), ((12, 384), 0), ((500, 12), 1), ((12, 1), 0), ((5, 2, 3, 3), 0), ((7, 99), 0),
    ((), None), ((9001,), None),
]  # fmt: skip
#: of whole runs: A, B, A, B and a bias
RUN_SHAPES = ((6, 384), (50, 6), (4, 8), (400, 4), (33,))
RUN_SCHEDULE: dict[str, Any] = {"total_steps": 14, "warmup": 0, "final": 2, "interval": 4}  # allocations at 4, 8 and 12


def bits(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """The methods of the backend, or whole runs of an optimizer, against the eager backend on the CPU."""
    checks = {
        "kernels": [
            (f"{c} {odd}".strip(), functools.partial(check_step, c, odd)) for c in HYPERS for odd in ("", "grad")
        ],
        "ranks": [(c, functools.partial(check_means, c)) for c in CRITERIA],
    }.get(name, [(name, functools.partial(check_run, name))])
    for case, check in checks:
        try:
            check(dtype, device)
            faults = 0
        except AssertionError as error:
            print(f"  {case}, {_name(dtype)}: {error}")
            faults = 1
        yield Row("", case, _name(dtype), OURS, "faults", faults)


def check_step(curvature: str, odd: str, dtype: torch.dtype, device: torch.device) -> None:
    """Sample, bank and step with everything on; ``odd``: a role whose tensors lie at odd addresses."""
    everything: dict[str, Any] = {"banked": True, "sensitivity": True}
    batch = about_to_draw(make_batch(LAYOUT, dtype, hyper=HYPERS[curvature], **everything))
    ours = moved(batch, device, odd=(odd,))
    eager, triton = EagerBackend(), TritonBackend(device)
    for call in ("sample", "bank", "step"):
        for backend, of_backend in ((eager, batch), (triton, ours)):
            getattr(backend, call)([of_backend], KEY, *((3,) if call == "step" else ()))
        assert_same_bits(batch, ours)
    assert int(triton.nonfinite_elements()) == int(eager.nonfinite_elements()), "elements that are not finite"


def check_means(criterion: str, dtype: torch.dtype, device: torch.device) -> None:
    """Means of ranks, of exponents from the smallest number to large ones."""
    layout = [(shape, dim) for shape, dim in LAYOUT if dim is not None]
    batch, generator = make_batch(layout, dtype, sensitivity=True), torch.Generator().manual_seed(0)
    for tensor in batch.mean + batch.hess:
        tensor.detach().mul_(torch.exp2(torch.randint(-60, 40, tensor.shape, generator=generator).float()))
    expected = EagerBackend().rank_means([batch], criterion)
    found = TritonBackend(device).rank_means([moved(batch, device)], criterion)
    for (shape, _), a, b in zip(layout, expected, found, strict=True):
        assert torch.equal(a, b.cpu()), f"means of {shape}"


def check_run(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Parameters and state after the steps of `RUN_SCHEDULE`, in two groups."""

    def make(params: Sequence[Tensor], backend: str) -> IVON:
        pruner = make_pruner(params[:4], min_rank=1, **RUN_SCHEDULE)
        groups: list[Any] = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.03}]
        return (vadam(pruner=pruner) if name == "VAdam" else ivon(pruner=pruner, clip_radius=0.3))(groups, backend)

    assert_equal_runs(make, RUN_SHAPES, str(device), dtype, steps=RUN_SCHEDULE["total_steps"])


def selection(device: torch.device, trials: int = 300, most_adapters: int = 400) -> Iterator[Row]:
    """Random scores, many of them equal or NaN, of up to some ten thousand ranks, against a stable sort."""
    backend, generator, faults = TritonBackend(device), torch.Generator().manual_seed(0), 0
    for trial in range(trials):
        n_adapters = int(torch.randint(1, 3 if trial % 3 else most_adapters, (), generator=generator))
        ranks = torch.randint(1, 65, (n_adapters,), generator=generator)
        total = int(ranks.sum())
        scores = torch.rand(total, generator=generator)
        if trial % 2:  # few values
            scores = torch.tensor([0.0, 1e-42, 0.5, 1.0, 3e38, float("inf"), float("nan")])[(scores * 7).long()]
        min_rank = int(torch.randint(0, int(ranks.min()) + 1, (), generator=generator))
        budget = int(torch.randint(min_rank * n_adapters, total + 1, (), generator=generator))
        batch = moved(means_of(*scores.split(ranks.tolist())), device)
        ranking = ranking_of(batch, [[n] for n in range(n_adapters)], budget=budget, min_rank=min_rank)
        backend.rank([batch], ranking)
        found = torch.cat([adapter[0].mask for adapter in ranking.adapters]).cpu()
        owners = torch.repeat_interleave(torch.arange(n_adapters), ranks)
        faults += not torch.equal(found, select_top(scores, budget, owners, min_rank))
    yield Row("", "selection", "float32", OURS, "faults", faults)


def sums(device: torch.device, repeats: int = 200) -> Iterator[Row]:
    """Sums of millions of elements come out the same in every repetition, whoever adds when."""
    shapes = GPU_CASES[LLAMA].shapes()
    batch = make_batch([(shape, number % 2) for number, shape in enumerate(shapes)])
    expected = EagerBackend().rank_means([batch], "snr_abs")
    backend, ours, first = TritonBackend(device), moved(batch, device), torch.cat(expected)
    found = [torch.cat(backend.rank_means([ours], "snr_abs")) for _ in range(repeats)]
    yield Row("", "sums", "float32", OURS, "faults", sum(not torch.equal(first, f.cpu()) for f in found))


# ---------------------------------------------------------------- how fast are they?


def copy() -> Iterator[Row]:
    """The ceiling of a step."""
    yield Row("", "copy", "uint8", "copy", "gb_per_s", copy_bandwidth())


def make_peers(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """A step of each peer, with tensors of its own; A and B are groups of their own, as LoRA+ has them."""
    all_fit = _fits(case, MEMORY + REFERENCE_MEMORY, device)

    def fresh(lr: float) -> tuple[list[dict[str, Any]], list[LoraAdapter]]:
        tensors, adapters = case.build(dtype=dtype, device=device)
        if not adapters:
            return [{"params": tensors}], []
        return [{"params": tensors[::2]}, {"params": tensors[1::2], "lr": 4 * lr}], adapters

    def pruned(total_steps: int) -> Step:
        groups, adapters = fresh(0.1)
        target = max(1, case.rank // 3)
        pruner = RankPruner(adapters, target, total_steps=total_steps, warmup=0, final=1, interval=INTERVAL)
        return step_of_ours(IVON(groups, pruner=pruner, backend="triton", **IVON_OPTIONS))

    peers: dict[str, Step] = {
        BASELINE: torch.optim.AdamW(fresh(1e-3)[0], lr=1e-3, fused=True).step,
        OURS: step_of_ours(IVON(fresh(0.1)[0], backend="triton", **IVON_OPTIONS)),
    }
    if case.linears:
        peers |= {PRUNING: pruned(100_000), FINAL: pruned(2)}
    peers[VADAM] = step_of_ours(VAdam(fresh(0.01)[0], backend="triton", **VADAM_OPTIONS))
    if find_spec("ivon") is None:
        print(f"  {REFERENCE} is not installed: left out")
    elif dtype == torch.float32 and all_fit:
        peers[REFERENCE] = step_of_ivon_opt(fresh(0.1)[0])
    return peers


def _fits(case: Case, bytes_per_element: int, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return elements_of(case) * bytes_per_element <= torch.cuda.mem_get_info()[0]


def elements_of(case: Case) -> int:
    """Elements of all tensors of a case."""
    return sum(torch.Size(shape).numel() for shape in case.shapes())


def times(case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """Times of all peers, which take turns; launches, and whether the host waits."""
    elements = elements_of(case)
    if not _fits(case, MEMORY, device):
        print(f"  left out: it needs about {elements * MEMORY / 2**30:.0f} GiB of GPU memory")
        return
    peers = make_peers(case, dtype, device)
    for name, step in peers.items():
        for _ in range(INTERVAL + 3):  # state, compiled kernels, a first allocation; the next step has none
            step()
        n_launches, waits = count_launches(step), waits_for_device(step)
        for _ in range(INTERVAL - 6):
            step()
        allocation = count_launches(step)  # step number INTERVAL
        for metric, value in (("launches", n_launches), ("launches_allocation", allocation), ("waits", int(waits))):
            if value is not None and (metric != "launches_allocation" or name == PRUNING):
                yield Row("", case.name, _name(dtype), name, metric, value)
    for name, timing in time_interleaved(peers, INTERVAL, ROUNDS).items():
        for metric in ("device", "loop", "host"):
            p20, median, p80 = getattr(timing, metric)
            yield Row("", case.name, _name(dtype), name, f"{metric}_ms", median, p20, p80)
        if name != REFERENCE:
            moved = (ADAMW_BYTES if name == BASELINE else BYTES)[dtype]
            yield Row("", case.name, _name(dtype), name, "gb_per_s", elements * moved / timing.device[1] / 1e6)


if __name__ == "__main__":
    sys.exit(main())
