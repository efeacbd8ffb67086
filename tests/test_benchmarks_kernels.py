"""The run on a GPU and the table of the compilers: what can be known of them without a GPU."""

import os
from functools import partial
from timeit import timeit

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, gpu_report, offline
from benchmarks.cases import LLAMA, Case, many_linears
from benchmarks.device_time import Timing
from benchmarks.gpu_report import FINAL, MANY, ONE, OURS, PRUNING, VADAM, Row, read_rows
from benchmarks.peers import BASELINE, REFERENCE
from ivon_lora.kernels import runtime
from ivon_lora.kernels.launch import TritonBackend
from tests.offline_compile import KERNELS, TARGETS, Compiled

TINY = Case(LLAMA, 1, many_linears(1, features=8), rank=4)


@pytest.fixture
def device(triton_device, monkeypatch):
    """Where kernels run; the tensors are few and small, and so are the rankings."""
    monkeypatch.setattr(gpu, "LAYOUT", [((3, 9), 0), ((9, 6), 1), ((), None)])
    monkeypatch.setattr(gpu, "RUN_SHAPES", ((3, 9), (5, 3), (3, 8), (4, 3), (2,)))
    monkeypatch.setattr(gpu, "RUN_SCHEDULE", {"total_steps": 4, "warmup": 0, "final": 1, "interval": 2})
    monkeypatch.setattr(gpu, "INTERVAL", 6)
    monkeypatch.setattr(gpu, "GPU_CASES", dict.fromkeys(gpu.GPU_CASES, TINY))
    monkeypatch.setattr(gpu, "selection", partial(gpu.selection, trials=3, most_adapters=5))
    monkeypatch.setattr(gpu, "sums", partial(gpu.sums, repeats=2))
    return torch.device(triton_device)


def test_a_wrong_kernel_is_a_fault(device, monkeypatch, capsys):
    monkeypatch.setattr(TritonBackend, "sample", lambda *_: None)
    monkeypatch.setattr(TritonBackend, "rank", lambda *_: None)
    assert [row.value for row in gpu.bits("kernels", torch.float32, device)] == [1] * 6
    assert "fisher grad, float32: ('param', 0, (3, 9), " in capsys.readouterr().out
    assert all(row.value > 0 for row in gpu.selection(device))


def test_the_most_important_comes_first():
    names = [task.name for task in gpu.tasks(torch.device("cuda"))]
    assert names[0] == "bits kernels float32"
    assert names.index("selection") < names.index(f"times {LLAMA} float32") < names.index(f"times {ONE} float32")
    assert sum(task.seconds for task in gpu.tasks(torch.device("cuda"))) > 500, "the budget is what ends it"
    sizes = {name: (gpu.elements_of(case), len(case.shapes())) for name, case in gpu.GPU_CASES.items()}
    assert (sizes[LLAMA], sizes[ONE], sizes[MANY][1]) == ((24_313_856, 392), (10**9, 1), 4000)


# ---------------------------------------------------------------- the run


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Let the run believe that there is one."""
    for name, value in {"is_available": True, "empty_cache": None, "synchronize": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    here = {"machine": "made up", "torch": "2", "triton": "3", "commit": "abc", "date": "2026-01-01"}
    monkeypatch.setattr(gpu, "provenance", lambda: here)


@pytest.fixture
def run_tasks(on_a_gpu, monkeypatch, tmp_path):
    """Run these tasks as on a GPU: status, and names of those that ran."""

    def run(*options, **values):
        ran = []

        def task(name, value):
            def measure():
                ran.append(name)
                yield Row("", "x", "float32", OURS, "faults", 1 / value if value == 0 else value - 1)

            return measure

        tasks = [gpu.Task(name.replace("_", " "), 10.0, task(name, value)) for name, value in values.items()]
        monkeypatch.setattr(gpu, "tasks", lambda _: tasks)
        return gpu.main(["--out", str(tmp_path / "gpu.csv"), *options]), ran

    return run


def test_a_run_goes_on_where_it_was_cut_off(run_tasks, tmp_path, capsys):
    assert run_tasks("--budget-seconds", "5", a=1) == (0, [])
    assert "a: left out, it may take 10 s and 5 s are left" in capsys.readouterr().out
    assert run_tasks(a=1, failing=0, b=1) == (1, ["a", "failing", "b"])
    assert run_tasks(a=1, failing=1, b=1) == (0, ["failing"])
    assert [row.task for row in read_rows(tmp_path / "gpu.csv")] == ["a", "b", "failing"]
    page = (tmp_path / "gpu.md").read_text()
    assert "| results that differ from the eager backend's | <= 0 | 0 | reached |" in page
    assert run_tasks(bits=2, times_x=1) == (1, ["bits"]), "nothing is timed where results are wrong"


def test_after_an_illegal_access_a_new_process_goes_on(run_tasks, monkeypatch):
    started = []

    def start(_, command):
        started.append(command)
        raise SystemExit

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(os, "execv", start)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(SystemExit):
        run_tasks("--budget-seconds", "100", a=1, failing=0, b=1)
    assert started[0][1:3] == ["-m", "benchmarks.gpu"]
    assert run_tasks(*started[0][5:], a=1, failing=0, b=1) == (1, ["b"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so it would be measured")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().out.startswith("no GPU: torch.cuda.is_available() is False")


@pytest.mark.slow
@pytest.mark.usefixtures("on_a_gpu")
def test_all_of_it_with_real_kernels(device, monkeypatch, tmp_path, capsys):
    """Only the clock and the counters of a GPU are replaced; what is counted are the launches."""
    all_tasks, run_kernel = gpu.tasks, runtime.run
    launched = []

    def chosen(_):
        names = ("kernels bfloat16", "ranks float32", "IVON float32", "selection", "sums", f"times {LLAMA} float32")
        return [task for task in all_tasks(device) if task.name.endswith(names)]

    def note(*arguments, **options):
        launched.append(arguments)
        run_kernel(*arguments, **options)

    def count(step):
        before = len(launched)
        step()
        return len(launched) - before or None

    def time_interleaved(steps, *_):
        return {name: Timing(*[(timeit(step, number=1),) * 3] * 3) for name, step in steps.items()}

    monkeypatch.setattr(runtime, "run", note)
    monkeypatch.setattr(gpu, "tasks", chosen)
    monkeypatch.setattr(gpu, "count_launches", count)
    monkeypatch.setattr(gpu, "waits_for_device", lambda step: bool(step()))
    monkeypatch.setattr(gpu, "time_interleaved", time_interleaved)
    out = tmp_path / "gpu.csv"
    assert gpu.main(["--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for line in (
        "results that differ from the eager backend's | <= 0 | 0 | reached |",
        "launches of a step, two groups | <= 2 | 2 | reached |",
        "launches of a step that allocates ranks | <= 4 | 4 | reached |",
        "steps in which the host waits for the device | <= 0 | 0 | reached |",
    ):
        assert line in printed
    assert printed.count("not run") == 2  # that of a large tensor, and of many
    assert "failed" not in printed
    assert "](gpu.png)" in printed
    assert (tmp_path / "gpu.png").read_bytes()[:4] == b"\x89PNG"
    peers = [BASELINE, OURS, PRUNING, FINAL, VADAM, REFERENCE]
    assert list(dict.fromkeys(row.peer for row in read_rows(out) if row.metric == "device_ms")) == peers
    assert gpu.main(["--out", str(out)]) == 0
    assert capsys.readouterr().out.count("measured before") == len(chosen(device)) == 6


# ---------------------------------------------------------------- the page


def test_goals_are_reached_missed_or_not_run():
    def row(case, peer, metric, value, dtype="float32"):
        return Row("t", case, dtype, peer, metric, value, machine="made up")

    rows = [row(LLAMA, peer, "device_ms", ms) for peer, ms in ((BASELINE, 0.4), (OURS, 0.3), (PRUNING, 0.33))]
    rows += [row("copy", "copy", "gb_per_s", 4000.0, "uint8"), row(ONE, OURS, "gb_per_s", 3500.0)]
    page = gpu_report.page(rows)
    for line in (
        "| time / AdamW fused, Llama adapter | <= 1 | 0.75 | reached |",
        "| time with pruning / without, Llama adapter | <= 1.03 | 1.1 | missed |",
        "| share of the copy's bandwidth, 1e9 in one tensor | >= 0.9 | 0.875 | missed |",
        "| times as fast as ivon-opt, Llama adapter | >= 20 |  | not run |",
        "| llama-3.2-3b-lora-r16 | float32 | ivon-lora[triton] | 0.3 |  |  | 0.75 |  |  |",
    ):
        assert line in page


def test_the_table_of_the_compilers(tmp_path, monkeypatch):
    sass = "        /*0000*/ LDG.E.128 R4 ;\n        /*0010*/ FMUL R4 ;\n        /*0020*/ STG.E.128 R4 ;\n"

    def compiled_already(requests, triton):
        version = "3.7" if triton is None else triton.name
        return {
            n: {t: Compiled("", sass, 64, 40, 1.23, version) for t in targets} for n, (_, targets) in requests.items()
        }

    monkeypatch.setattr(offline, "compile_all", compiled_already)  # compiling takes minutes
    assert offline.main(["--out", str(tmp_path / "x.csv"), "--triton", "3.6"]) == 0
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * len(KERNELS) * len(TARGETS)
    assert lines[1].startswith("sample,cuda:80:32,3.6,40,0,64,3,1,1,1.2,")
