"""Time the Triton kernels on a GPU against a measured copy and their peers; without a GPU, read their machine code.

    python -m benchmarks.kernels                        # every case, on the GPU; offline figures where there is none
    python -m benchmarks.kernels --cases llama,one- --budget-seconds 540 --out part1.csv
    python -m benchmarks.kernels --merge part1.csv part2.csv
    python -m benchmarks.kernels --offline              # the offline figures, also where there is a GPU

A step is all that happens between `backward()` and the next forward pass, as in `benchmarks.step`. GB/s counts the
bytes that the equations must move (sample 16, step 28 per fp32 parameter), so the copy is the ceiling;
`benchmarks.gpu` says how times are taken. Nothing is timed until the kernels have given the bits of the eager backend,
in fp32 and bf16, of IVON and VAdam. Rows are written after every peer, so what a time limit interrupts is not lost; a
peer that fails or runs out of memory is left out, with a message, and the others go on.

Peers: `ivon-lora[triton]`; `+prune` scores ranks and allocates them in every tenth step; `+final` is in the final phase
of a pruner, where masks are fixed and pruned ranks frozen; `+vadam` is `VAdam`, with a prior for every tensor, changed
in every tenth step; AdamW as torch has it, fused and foreach; and ivon-opt, with fp32 parameters only, and not where it
is not installed or would take too long.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CASES, Case, many_linears
from benchmarks.gate import GateError
from benchmarks.gpu import Timing, copy_bandwidth, count_launches, time_steps
from benchmarks.kernel_rows import BASELINE, REFERENCE, KernelRow, read_rows, render, write_rows
from benchmarks.machine import ROOT, describe_commit
from benchmarks.roofline import draw
from ivon_lora import IVON, LoraAdapter, RankPruner, VAdam

RESULTS = ROOT / "benchmarks" / "results" / "kernels.csv"
#: what one step must read and write: sample (mean, hess; mean kept, theta) and update (g, m, h, mean; m, h, mean)
BYTES = {torch.float32: 16 + 28, torch.bfloat16: (2 + 4 + 4 + 4 + 2) + (2 + 4 + 4 + 4 + 4 + 4 + 4 + 2)}
ADAMW_BYTES = {torch.float32: 28, torch.bfloat16: 14}
#: memory that the largest peer needs per element at once, gradient and temporaries included
MEMORY = {torch.float32: 40, torch.bfloat16: 40}
#: steps of which one allocates ranks
INTERVAL = 10
#: of the check before anything is timed: allocations at 4, 8 and 12, another prior at 10
STEPS = 14
#: of VAdam, whose priors change in every tenth step
VADAM: dict[str, Any] = {"lr": 0.01, "num_examples": 10_000, "batch_size": 16, "noise_warmup": 0}
#: ivon-opt is given no more elements than this: it is slow, and keeps many copies
REFERENCE_ELEMENTS = 10**8
#: how long a case of this many elements takes at most, both dtypes and all peers (seconds, a guess until measured)
SECONDS_PER_BILLION, SECONDS_PER_CASE = 60.0, 20.0
#: and a peer, whose kernels may have to be compiled first
SECONDS_PER_PEER = 15.0

# The most telling cases first: a budget of seconds may end the sweep early.
KERNEL_CASES = (
    *(case for case in CASES if case.name.startswith("llama")),
    *(Case(f"one-{n:.0e}", 5, flat=n) for n in (10**9, 10**8, 10**7, 10**6, 10**5)),
    *(
        Case(f"tensors-{2 * n}", 5, many_linears(n, features=10_000_000 // (2 * n * 16)), rank=16)
        for n in (1, 20, 2000)
    ),
    *(Case(f"rank-{r}", 5, many_linears(64, features=4096), rank=r) for r in (4, 16, 64, 256)),
)


@dataclass(frozen=True)
class Peer:
    """One way to step, and the bytes per element that its equations must move."""

    name: str
    step: Callable[[], Any]
    n_bytes: int | None


@dataclass(frozen=True)
class Limits:
    """What a measurement must keep to.

    Attributes:
        deadline: of `time.monotonic`, when it should be over.
        failures: names of peers that failed, filled on the way.
    """

    deadline: float
    failures: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status: 0, or 1 when the results are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offline", action="store_true", help="only what the compilers say")
    parser.add_argument("--cases", default="", help="only cases whose name contains one of these, with commas between")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no case that may end later")
    parser.add_argument("--merge", type=Path, nargs="+", default=None, help="measure nothing: join these CSV files")
    parser.add_argument(
        "--out", type=Path, default=None, help=f"CSV file (default, with all cases: {RESULTS.relative_to(ROOT)})"
    )
    options = parser.parse_args(argv)
    begin = time.monotonic()
    if options.merge is not None:
        return report([row for path in options.merge for row in read_rows(path)], options.out or RESULTS)
    if options.offline or not torch.cuda.is_available():
        from benchmarks.offline import write_offline_table

        if not options.offline:
            print("No GPU: torch.cuda.is_available() is False. No time is measured; these figures come from compilers.")
        print(write_offline_table(options.out))
        return 0
    wanted = options.cases.split(",")
    cases = [case for case in KERNEL_CASES if any(word in case.name for word in wanted)]
    if not cases:
        parser.error(
            f"--cases: no name contains {options.cases!r}; there are {', '.join(c.name for c in KERNEL_CASES)}"
        )
    if options.cases and options.out is None:
        parser.error("--cases measures a part: say with --out where it goes")
    device = torch.device("cuda")
    try:
        check_bits(device)
    except GateError as error:
        print(f"gate: {error}", file=sys.stderr)
        return 1
    limits = Limits(begin + options.budget_seconds, [])
    if find_spec("ivon") is None:
        print(f"{REFERENCE} is left out: it is not installed (pip install ivon-lora[bench])")
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {copy:.0f} GB/s (read and written)")
    rows: list[KernelRow] = []
    out = options.out or RESULTS
    for case in cases:
        for dtype in (torch.float32, torch.bfloat16):
            if (reason := reason_to_skip(case, dtype, limits.deadline - time.monotonic())) is not None:
                print(f"skipped {case.name}, {dtype}: {reason}")
                continue
            print(f"{time.monotonic() - begin:6.0f} s: measuring {case.name}, {dtype}", file=sys.stderr, flush=True)
            found: list[KernelRow] = []
            for found in measure(case, dtype, device, copy, limits):
                write_rows(out, rows + found)
            rows += found
    return max(report(rows, out), int(bool(limits.failures)))


def report(rows: list[KernelRow], out: Path) -> int:
    """Write, print and draw the rows."""
    write_rows(out, rows)
    print(render(rows))
    if any(row.gb_per_s is not None for row in rows):
        try:
            draw(rows, out.with_suffix(".png"))
        except ModuleNotFoundError as error:
            print(f"no picture: {error}; pip install ivon-lora[bench]", file=sys.stderr)
    return 0


def reason_to_skip(case: Case, dtype: torch.dtype, seconds_left: float) -> str | None:
    """Why a case cannot be measured here and now, or None."""
    elements = elements_of(case)
    seconds = SECONDS_PER_CASE / 2 + elements / 1e9 * SECONDS_PER_BILLION / 2
    if seconds > seconds_left:
        return f"it may take {seconds:.0f} s, and {max(seconds_left, 0):.0f} s of --budget-seconds are left"
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    needed = elements * MEMORY[dtype]
    if needed > free:
        return f"it needs about {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
    return None


def build(
    case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[list[Tensor], list[LoraAdapter]]:
    """Fresh tensors with gradients in place, and the adapters they form."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = []
    for shape in case.shapes():
        p = torch.randn(shape, generator=generator, device=device).mul_(0.02).to(dtype).requires_grad_()
        p.grad = torch.randn(shape, generator=generator, device=device).mul_(0.01).to(dtype)
        tensors.append(p)
    pairs = zip(tensors[::2], tensors[1::2], strict=True) if case.linears else ()
    return tensors, [LoraAdapter(f"layer{i}", a, b) for i, (a, b) in enumerate(pairs)]


def make_peers(case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Callable[[], Peer]]]:
    """Names of all peers, and what makes each with tensors of its own: together they may not fit.

    The baseline is the first. A peer's function knows its name.
    """
    options: dict[str, Any] = {"lr": 0.1, "ess": 1e4, "hess_init": 0.01, "clip_radius": 1e-3}
    ours = "ivon-lora[triton]"

    def adamw(name: str, **kind: Any) -> Peer:
        return _adamw(name, torch.optim.AdamW(build(case, dtype, device)[0], lr=1e-3, **kind), dtype)

    def plain(name: str) -> Peer:
        return _ivon(name, IVON(build(case, dtype, device)[0], backend="triton", **options), dtype)

    def vadam(name: str) -> Peer:
        return _ivon(name, VAdam(build(case, dtype, device)[0], backend="triton", **VADAM), dtype)

    def pruned(name: str, total_steps: int = 100_000) -> Peer:
        return _ivon(name, _pruned(case, dtype, device, options, total_steps), dtype)

    peers: dict[str, Callable[[str], Peer]] = {
        BASELINE: functools.partial(adamw, fused=True), ours: plain, f"{ours}+vadam": vadam,
    }  # fmt: skip
    if case.linears:
        peers[f"{ours}+prune"] = pruned
        peers[f"{ours}+final"] = functools.partial(pruned, total_steps=2)
    peers["adamw[foreach]"] = functools.partial(adamw, foreach=True)
    if elements_of(case) <= REFERENCE_ELEMENTS and dtype == torch.float32 and find_spec("ivon") is not None:
        peers[REFERENCE] = lambda name: _ivon_opt(name, build(case, dtype, device)[0], options)
    for name, make in peers.items():
        yield name, functools.partial(make, name)


def elements_of(case: Case) -> int:
    """Elements of all tensors of a case."""
    return sum(torch.Size(shape).numel() for shape in case.shapes())


def _pruned(case: Case, dtype: torch.dtype, device: torch.device, options: dict[str, Any], total_steps: int) -> IVON:
    """With a pruner that allocates at every `INTERVAL`-th step, until `total_steps`."""
    tensors, adapters = build(case, dtype, device)
    target = max(1, case.rank // 3)
    pruner = RankPruner(adapters, target, total_steps=total_steps, warmup=0, final=1, interval=INTERVAL)
    return IVON(tensors, pruner=pruner, backend="triton", **options)


def _ivon(name: str, optimizer: IVON, dtype: torch.dtype) -> Peer:
    def step() -> None:
        optimizer.train()
        optimizer.step()

    return Peer(name, step, BYTES[dtype])


def _adamw(name: str, optimizer: torch.optim.AdamW, dtype: torch.dtype) -> Peer:
    return Peer(name, optimizer.step, ADAMW_BYTES[dtype])


def _ivon_opt(name: str, tensors: list[Tensor], options: dict[str, Any]) -> Peer:
    import ivon

    optimizer = ivon.IVON(tensors, **options)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            pass  # forward and backward would be here
        optimizer.step()

    return Peer(name, step, None)


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, copy: float, limits: Limits
) -> Iterator[list[KernelRow]]:
    """One row per peer; all there are, after each peer."""
    timings: dict[str, Timing] = {}
    facts: dict[str, tuple[int | None, int | None]] = {}  # bytes per element and launches
    longest = SECONDS_PER_PEER
    for name, make in make_peers(case, dtype, device):
        begin = time.monotonic()
        if timings and begin + longest > limits.deadline:
            print(f"skipped {case.name}, {dtype}, {name} and the peers after it: --budget-seconds are nearly over")
            return
        try:
            timings[name], facts[name] = _measure(make(), case.rounds)
        except torch.OutOfMemoryError as error:
            print(f"skipped {case.name}, {dtype}, {name}: out of memory ({str(error).splitlines()[0]})")
        except Exception:  # what can be measured still will be
            limits.failures.append(name)
            print(f"{case.name}, {dtype}, {name}: failed", file=sys.stderr)
            traceback.print_exc()
        gc.collect()  # its tensors, before the next one's are made
        torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - begin)
        if timings:
            yield _rows(case, dtype, timings, facts, copy)


def _measure(peer: Peer, rounds: int) -> tuple[Timing, tuple[int | None, int | None]]:
    """Its times; its bytes per element and launches."""
    interval, rounds = (2, 2) if peer.name == REFERENCE else (INTERVAL, rounds)  # it is slow
    for _ in range(2 * interval + 4):  # creates the state, compiles the kernels
        peer.step()
    launches = count_launches(peer.step)
    for _ in range(interval - 1):  # the intervals that are timed begin where allocations do
        peer.step()
    return time_steps(peer.step, interval, rounds), (peer.n_bytes, launches)


def _rows(
    case: Case,
    dtype: torch.dtype,
    timings: dict[str, Timing],
    facts: dict[str, tuple[int | None, int | None]],
    copy: float,
) -> list[KernelRow]:
    import triton

    elements, tensors = elements_of(case), len(case.shapes())
    baseline, reference = timings.get(BASELINE), timings.get(REFERENCE)
    rows = []
    for name, timing in timings.items():
        n_bytes, launches = facts[name]
        rows.append(
            KernelRow(
                case=case.name,
                peer=name,
                dtype=str(dtype).removeprefix("torch."),
                elements=elements,
                tensors=tensors,
                rank=case.rank,
                device_ms=timing.device_ms,
                device_p20_ms=timing.device_p20_ms,
                device_p80_ms=timing.device_p80_ms,
                elapsed_ms=timing.elapsed_ms,
                host_ms=timing.host_ms,
                launches=launches,
                bytes_per_element=n_bytes,
                gb_per_s=None if n_bytes is None else elements * n_bytes / timing.device_ms / 1e6,
                copy_gb_per_s=copy,
                ratio_to_adamw_fused=None if baseline is None else timing.device_ms / baseline.device_ms,
                loop_ratio_to_adamw_fused=None if baseline is None else timing.elapsed_ms / baseline.elapsed_ms,
                speedup_over_ivon_opt=None if reference is None else reference.device_ms / timing.device_ms,
                torch=torch.__version__,
                triton=triton.__version__,
                machine=torch.cuda.get_device_name(),
                date=datetime.date.today().isoformat(),
                commit=describe_commit(),
            )
        )
    return rows


def check_bits(device: torch.device) -> None:
    """Eager on CPU and the kernels on ``device`` give the same bits on small adapters, allocations included.

    In fp32 and bf16, of IVON and VAdam.

    Raises:
        GateError: they do not.
    """

    def run(backend: str, where: torch.device, dtype: torch.dtype, algorithm: type[IVON]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((6, 9), (5, 6), (4, 8), (40, 4))
        params = [torch.randn(s, generator=generator).to(dtype).to(where).requires_grad_() for s in shapes]
        targets = [torch.randn(s, generator=generator).to(dtype).to(where) for s in shapes]
        adapters = [LoraAdapter("x", params[0], params[1]), LoraAdapter("y", params[2], params[3])]
        pruner = RankPruner(adapters, 2, total_steps=STEPS, warmup=0, final=2, interval=4)
        ivon = {"lr": 0.1, "ess": 100.0, "beta2": 0.9, "clip_radius": 0.3}
        optimizer = algorithm(params, pruner=pruner, backend=backend, **(VADAM if algorithm is VAdam else ivon))
        for _ in range(STEPS):
            optimizer.train()
            for p, t in zip(params, targets, strict=True):
                p.grad = (p.detach() - t) * 0.5
            optimizer.step()
        names = ("momentum", "hess", "rank_snr", "rank_mask", "weight_decay")
        return [*params, *(optimizer.state[p][name] for p in params for name in names if name in optimizer.state[p])]

    for dtype, algorithm in itertools.product((torch.float32, torch.bfloat16), (IVON, VAdam)):
        expected = run("eager", torch.device("cpu"), dtype, algorithm)
        found = run("triton", device, dtype, algorithm)
        for number, (a, b) in enumerate(zip(expected, found, strict=True)):
            if not torch.equal(a.detach(), b.detach().cpu()):
                raise GateError(
                    f"tensor {number} of the Triton backend differs from the eager backend's after {STEPS} steps of "
                    f"{algorithm.__name__} in {dtype}"
                )


if __name__ == "__main__":
    sys.exit(main())
