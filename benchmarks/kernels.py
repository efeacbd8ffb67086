"""Time the Triton kernels on a GPU against a measured copy and their peers; without a GPU, read their machine code.

    python -m benchmarks.kernels                        # every case, on the GPU; offline figures where there is none
    python -m benchmarks.kernels --cases llama --out x.csv
    python -m benchmarks.kernels --offline              # the offline figures, also where there is a GPU

A step is all that happens between `backward()` and the next forward pass, as in `benchmarks.step`. Device time is that
of CUDA events around many steps; host time is what the process spends before it could go on. GB/s counts the bytes that
the equations must move (sample 16, step 28 per fp32 parameter), so the copy is the ceiling. Nothing is timed until the
backend has given the bits of the eager one.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CASES, Case, many_linears
from benchmarks.gate import GateError
from benchmarks.machine import ROOT, describe_commit
from ivon_lora import IVON, LoraAdapter, RankPruner

RESULTS = ROOT / "benchmarks" / "results" / "kernels.csv"
#: what one step must read and write: sample (mean, hess; mean kept, theta) and update (g, m, h, mean; m, h, mean)
BYTES = {torch.float32: 16 + 28, torch.bfloat16: (2 + 4 + 4 + 4 + 2) + (2 + 4 + 4 + 4 + 4 + 4 + 4 + 2)}
ADAMW_BYTES = {torch.float32: 28, torch.bfloat16: 14}
INTERVAL = 10

KERNEL_CASES = (
    *(Case(f"one-{n:.0e}", 20, flat=n) for n in (10**5, 10**6, 10**7, 10**8, 10**9)),
    *(Case(f"rank-{r}", 20, many_linears(64, features=4096), rank=r) for r in (4, 16, 64, 256)),
    *(
        Case(f"tensors-{2 * n}", 20, many_linears(n, features=10_000_000 // (2 * n * 16)), rank=16)
        for n in (1, 20, 2000)
    ),
    *(case for case in CASES if case.name.startswith("llama")),
)


@dataclass(frozen=True)
class Row:
    """One row of the results; the fields are the columns of the CSV file. Add columns at the end only."""

    case: str
    peer: str
    dtype: str
    elements: int
    tensors: int
    device_ms: float
    host_ms: float
    launches: int
    gb_per_s: float | None
    of_copy: float | None
    ratio_to_adamw_fused: float | None
    torch: str
    triton: str
    machine: str
    commit: str


@dataclass(frozen=True)
class Peer:
    """One way to step, and the bytes per element that its equations must move."""

    name: str
    step: Callable[[], Any]
    n_bytes: int | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status: 0, or 1 when the results are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offline", action="store_true", help="only what the compilers say")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, default=None, help=f"CSV file (default, with all cases: {RESULTS.name})")
    options = parser.parse_args(argv)
    if options.offline or not torch.cuda.is_available():
        if not options.offline:
            print("No GPU: torch.cuda.is_available() is False. No time is measured; these figures come from compilers.")
        print(offline_table())
        return 0
    cases = [case for case in KERNEL_CASES if options.cases in case.name]
    if not cases:
        parser.error(
            f"--cases: no name contains {options.cases!r}; there are {', '.join(c.name for c in KERNEL_CASES)}"
        )
    device = torch.device("cuda")
    try:
        check_bits(device)
    except GateError as error:
        print(f"gate: {error}", file=sys.stderr)
        return 1
    copy = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {copy:.0f} GB/s (read and written)")
    rows = []
    for case in cases:
        for dtype in (torch.float32, torch.bfloat16):
            print(f"measuring {case.name}, {dtype}", file=sys.stderr)
            rows += measure(case, dtype, device, copy)
    print(render(rows))
    out = options.out or (None if options.cases else RESULTS)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows)
    return 0


# ---------------------------------------------------------------- on a GPU


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


def make_peers(case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Peer]:
    """Every peer with tensors of its own, one after the other: together they may not fit."""
    options: dict[str, Any] = {"lr": 0.1, "ess": 1e4, "hess_init": 0.01, "clip_radius": 1e-3}
    yield _ivon("ivon-lora[triton]", IVON(build(case, dtype, device)[0], backend="triton", **options), dtype)
    if case.linears:
        tensors, adapters = build(case, dtype, device)
        target = max(1, case.rank // 3)
        pruner = RankPruner(adapters, target, total_steps=10_000, warmup=0, final=1, interval=INTERVAL)
        yield _ivon("ivon-lora[triton]+prune", IVON(tensors, pruner=pruner, backend="triton", **options), dtype)
        del tensors, adapters, pruner
    yield _adamw("adamw[fused]", torch.optim.AdamW(build(case, dtype, device)[0], lr=1e-3, fused=True), dtype)
    yield _adamw("adamw[foreach]", torch.optim.AdamW(build(case, dtype, device)[0], lr=1e-3, foreach=True), dtype)
    if elements_of(case) <= 10**8 and dtype == torch.float32:
        yield _ivon_opt(build(case, dtype, device)[0], options)


def elements_of(case: Case) -> int:
    """Elements of all tensors of a case."""
    return sum(torch.Size(shape).numel() for shape in case.shapes())


def _ivon(name: str, optimizer: IVON, dtype: torch.dtype) -> Peer:
    def step() -> None:
        optimizer.train()
        optimizer.step()

    return Peer(name, step, BYTES[dtype])


def _adamw(name: str, optimizer: torch.optim.AdamW, dtype: torch.dtype) -> Peer:
    return Peer(name, optimizer.step, ADAMW_BYTES[dtype])


def _ivon_opt(tensors: list[Tensor], options: dict[str, Any]) -> Peer:
    import ivon

    optimizer = ivon.IVON(tensors, **options)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            pass
        optimizer.step()

    return Peer("ivon-opt", step, None)


def measure(case: Case, dtype: torch.dtype, device: torch.device, copy: float) -> list[Row]:
    """One row per peer."""
    import triton

    elements, tensors = elements_of(case), len(case.shapes())
    results = []
    for peer in make_peers(case, dtype, device):
        for _ in range(2 * INTERVAL + 2):
            peer.step()
        device_ms, host_ms = times(peer.step, rounds=case.rounds)
        results.append((peer.name, peer.n_bytes, device_ms, host_ms, count_launches(peer.step)))
        del peer
    fused = next(ms for name, _, ms, _, _ in results if name == "adamw[fused]")
    rows = []
    for name, n_bytes, device_ms, host_ms, launches in results:
        speed = None if n_bytes is None else elements * n_bytes / device_ms / 1e6
        rows.append(
            Row(
                case=case.name,
                peer=name,
                dtype=str(dtype).removeprefix("torch."),
                elements=elements,
                tensors=tensors,
                device_ms=device_ms,
                host_ms=host_ms,
                launches=launches,
                gb_per_s=speed,
                of_copy=None if speed is None else speed / copy,
                ratio_to_adamw_fused=device_ms / fused,
                torch=torch.__version__,
                triton=triton.__version__,
                machine=torch.cuda.get_device_name(),
                commit=describe_commit(),
            )
        )
    return rows


def times(step: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Medians of device and host milliseconds per step, each over an interval of `INTERVAL` steps."""
    device_ms, host_ms = [], []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        start.record()
        for _ in range(INTERVAL):
            step()
        stop.record()
        host_ms.append((time.perf_counter() - begin) * 1e3 / INTERVAL)
        torch.cuda.synchronize()
        device_ms.append(start.elapsed_time(stop) / INTERVAL)
    return statistics.median(device_ms), statistics.median(host_ms)


def count_launches(step: Callable[[], Any]) -> int:
    """Kernels that one step runs on the GPU; copies of small tables are not kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if str(e.device_type).endswith("CUDA")]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a device copy of 1 GiB, reading and writing counted."""
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)
    device_ms, _ = times(lambda: target.copy_(source), rounds=10)
    return 2 * source.numel() * 4 / device_ms / 1e6


def check_bits(device: torch.device) -> None:
    """Eager on CPU and the kernels on ``device`` give the same bits on small adapters, allocations included.

    Raises:
        GateError: they do not.
    """

    def run(backend: str, where: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((6, 9), (5, 6), (4, 8), (40, 4))
        params = [torch.randn(s, generator=generator).to(where).requires_grad_() for s in shapes]
        targets = [torch.randn(s, generator=generator) for s in shapes]
        adapters = [LoraAdapter("x", params[0], params[1]), LoraAdapter("y", params[2], params[3])]
        pruner = RankPruner(adapters, 2, total_steps=4, warmup=0, final=1, interval=2)
        optimizer = IVON(params, 0.1, 100.0, beta2=0.9, clip_radius=0.3, pruner=pruner, backend=backend)
        for _ in range(4):
            optimizer.train()
            for p, t in zip(params, targets, strict=True):
                p.grad = ((p.detach().cpu() - t) * 0.5).to(where)
            optimizer.step()
        names = ("momentum", "hess", "rank_snr", "rank_mask")
        return [*params, *(optimizer.state[p][name] for p in params for name in names)]

    for number, (a, b) in enumerate(zip(run("eager", torch.device("cpu")), run("triton", device), strict=True)):
        if not torch.equal(a.detach(), b.detach().cpu()):
            raise GateError(f"tensor {number} of the Triton backend differs from the eager backend's after 4 steps")


def render(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    lines = [
        f"{'case':22} {'dtype':9} {'peer':26} {'tensors':>8} {'elements':>14} {'device ms':>10} {'host ms':>9} "
        f"{'launches':>8} {'GB/s':>7} {'of copy':>8} {'/ AdamW fused':>14}"
    ]
    for r in rows:
        speed = "" if r.gb_per_s is None else f"{r.gb_per_s:.0f}"
        share = "" if r.of_copy is None else f"{100 * r.of_copy:.0f} %"
        ratio = "" if r.ratio_to_adamw_fused is None else f"{r.ratio_to_adamw_fused:.2f}x"
        lines.append(
            f"{r.case:22} {r.dtype:9} {r.peer:26} {r.tensors:8,} {r.elements:14,} {r.device_ms:10.3f} "
            f"{r.host_ms:9.3f} {r.launches:8} {speed:>7} {share:>8} {ratio:>14}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- without a GPU


def offline_table() -> str:
    """Bytes per element, registers, spills and instructions of the kernels, for every target."""
    from tests.offline_compile import AMD_GFX942, NVIDIA_SM80, NVIDIA_SM90, NVIDIA_SM100, compile_all
    from tests.test_triton_compiles import KERNELS

    targets = (NVIDIA_SM80, NVIDIA_SM90, NVIDIA_SM100, AMD_GFX942)
    compiled = compile_all({name: (kernel, targets) for name, (kernel, *_) in KERNELS.items()})
    lines = [f"{'kernel':34} {'target':16} {'registers':>9} {'spills':>7} {'shared B':>9} {'instructions':>13}"]
    for name, codes in compiled.items():
        for target, code in codes.items():
            pattern = r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s" if code.sass else r"(?m)^\s+[sv]_\w+|^\s+(?:global|buffer|ds)_\w+"
            count = len(re.findall(pattern, code.sass or code.assembly))
            lines.append(f"{name:34} {target:16} {code.registers:9} {code.spills:7} {code.shared:9} {count:13}")
    fp32 = torch.float32
    lines.append(f"\nBytes per fp32 element: sample 16, step 28, together {BYTES[fp32]}; AdamW {ADAMW_BYTES[fp32]}.")
    lines.append("Instructions include the path for tensors at odd addresses, of which a tile runs one.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
