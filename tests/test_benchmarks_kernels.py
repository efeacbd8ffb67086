"""The benchmark of the kernels: what can be known of it without a GPU."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import executed, kernels, offline
from benchmarks.cases import Case, many_linears
from benchmarks.gate import GateError
from benchmarks.gpu import Timing
from benchmarks.kernel_rows import COLUMNS, KernelRow, read_rows, render, write_rows
from benchmarks.roofline import draw
from ivon_lora.kernels.launch import TritonBackend
from tests.offline_compile import Compiled


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so it would be measured")
def test_without_a_gpu_it_says_so_and_prints_what_compilers_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sass = "        /*0000*/ LDG.E.128 R4 ;\n        /*0010*/ FMUL R4 ;\n        /*0020*/ STG.E.128 R4 ;\n"

    def compiled_already(requests: dict[str, tuple[object, tuple[str, ...]]]) -> dict[str, dict[str, Compiled]]:
        return {n: {t: Compiled("", sass, 64, 100) for t in targets} for n, (_, targets) in requests.items()}

    monkeypatch.setattr("tests.offline_compile.compile_all", compiled_already)  # compiling takes a minute
    counted = executed.ExecutedRow("ours", "float32", "step_kernel", 1.0, 190.5, 28.01, "sm_90", "3.9", "abc")
    monkeypatch.setattr(offline, "executed_rows", lambda: [counted])  # and so does counting
    assert kernels.main(["--out", str(tmp_path / "offline.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("No GPU: torch.cuda.is_available() is False. No time is measured;")
    first = (tmp_path / "offline.csv").read_text().splitlines()
    assert first[0] == ",".join(f.name for f in dataclasses.fields(offline.OfflineRow))
    assert first[1].startswith("sample,cuda:80:32,100,0,64,3,1,1,")
    assert "sample and step 44; AdamW 28." in "\n".join(lines)
    assert "\nours,float32,step_kernel,1.0,190.5,28.01," in (tmp_path / "kernels_executed.csv").read_text()
    assert lines[-2].split() == ["ours", "float32", "together", "1.0", "190.5", "28.01"]


def test_the_cases_span_what_they_promise() -> None:
    sizes = {case.name: (kernels.elements_of(case), len(case.shapes())) for case in kernels.KERNEL_CASES}
    assert min(n for n, _ in sizes.values()) == 10**5
    assert max(n for n, _ in sizes.values()) == 10**9
    assert sizes["tensors-4000"][1] == 4000
    assert sizes["tensors-4000"][0] == pytest.approx(sizes["tensors-2"][0], rel=0.01)
    assert sizes["llama-3.2-3b-lora-r16"] == (24_313_856, 392)
    assert {case.rank for case in kernels.KERNEL_CASES} >= {4, 16, 64, 256}
    assert next(iter(sizes)).startswith("llama"), "what matters most comes first"


def test_every_peer_steps(triton_device: str) -> None:
    case = Case("tiny", 1, many_linears(1, features=8), rank=4)
    names = []
    for name, make in kernels.make_peers(case, torch.float32, torch.device(triton_device)):
        peer = make()
        peer.step()
        assert peer.name == name
        names.append(name)
    ours = [f"ivon-lora[triton]{kind}" for kind in ("", "+vadam", "+prune", "+final")]
    assert names == ["adamw[fused]", *ours, "adamw[foreach]", "ivon-opt"]


@pytest.mark.parametrize("broken", [False, True])
def test_the_gate_sees_a_wrong_kernel(broken: bool, triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "STEPS", 3)
    if not broken:
        kernels.check_bits(torch.device(triton_device))
        return
    monkeypatch.setattr(TritonBackend, "sample", lambda *_: None)
    with pytest.raises(GateError, match="differs from the eager backend"):
        kernels.check_bits(torch.device(triton_device))


@pytest.fixture
def _host_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step took a millisecond: what is measured is not the matter here."""
    monkeypatch.setattr(kernels, "time_steps", lambda *_: Timing(1.0, 0.9, 1.1, 2.0, 0.5))
    monkeypatch.setattr(kernels, "count_launches", lambda _: 2)
    monkeypatch.setattr(kernels, "INTERVAL", 1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")


@pytest.mark.usefixtures("_host_times")
def test_a_peer_that_fails_or_does_not_fit_is_left_out_and_the_others_are_kept(
    triton_device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: object, **__: object) -> kernels.Peer:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")

    def broken(*_: object) -> kernels.Peer:
        raise ZeroDivisionError("a peer's own fault")

    monkeypatch.setattr(kernels, "_ivon_opt", broken)
    monkeypatch.setattr(kernels, "_pruned", too_large)
    case, limits = Case("tiny", 1, many_linears(1, features=8), rank=4), kernels.Limits(float("inf"), [])
    *_, rows = kernels.measure(case, torch.float32, torch.device(triton_device), 4000.0, limits)
    assert [row.peer for row in rows] == [
        "adamw[fused]", "ivon-lora[triton]", "ivon-lora[triton]+vadam", "adamw[foreach]",
    ]  # fmt: skip
    assert limits.failures == ["ivon-opt"]
    said = capsys.readouterr()
    assert "+prune: out of memory (CUDA out of memory. Tried to allocate 2 GiB.)" in said.out
    assert "+final: out of memory" in said.out
    assert "a peer's own fault" in said.err
    assert [row.ratio_to_adamw_fused for row in rows] == [1.0] * 4
    assert [row.bytes_per_element for row in rows] == [28, 44, 44, 28]


@pytest.mark.usefixtures("_host_times")
def test_the_budget_is_kept_between_peers_too(triton_device: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A compiler may take longer than thought: what is left is for one more peer, or for none."""
    limits = kernels.Limits(time.monotonic() + kernels.SECONDS_PER_PEER / 2, [])
    case = Case("tiny", 1, flat=8)
    found = list(kernels.measure(case, torch.float32, torch.device(triton_device), 4000.0, limits))
    assert [[row.peer for row in rows] for rows in found] == [["adamw[fused]"]]
    assert "skipped tiny, torch.float32, ivon-lora[triton] and the peers after it" in capsys.readouterr().out


def test_a_case_that_would_end_too_late_or_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 << 30, 80 << 30))
    small, large = Case("small", 1, flat=1000), Case("large", 1, flat=10**9)
    assert kernels.reason_to_skip(small, torch.float32, 600.0) is None
    assert kernels.reason_to_skip(small, torch.float32, -1.0) == (
        "it may take 10 s, and 0 s of --budget-seconds are left"
    )
    reason = kernels.reason_to_skip(large, torch.float32, 600.0)
    assert reason == "it needs about 37 GiB, and 8 GiB are free"


def synthetic_rows() -> list[KernelRow]:
    """A machine of 4000 GB/s with 5 us per step: bandwidth rises with the number of elements."""
    rows = []
    for dtype, n_bytes in (("float32", 44), ("bfloat16", 44)):
        for peer, latency in (("ivon-lora[triton]", 5e-3), ("adamw[fused]", 9e-3)):
            for elements, tensors in ((10**5, 1), (10**7, 1), (10**9, 1), (24_313_856, 392)):
                ms = latency + elements * n_bytes / 3.8e9
                rows.append(
                    KernelRow(
                        f"one-{elements:.0e}", peer, dtype, elements, tensors, 0, ms, 0.9 * ms, 1.1 * ms, ms, 0.1, 2,
                        n_bytes, elements * n_bytes / ms / 1e6, 4000.0, 1.25, 1.5, None, "2", "3", "made up",
                        "2026-01-01", "",
                    )
                )  # fmt: skip
    return [*rows, dataclasses.replace(rows[0], peer="ivon-opt", launches=None, bytes_per_element=None, gb_per_s=None)]


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = synthetic_rows()
    write_rows(tmp_path / "x.csv", rows)
    assert (tmp_path / "x.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    found = read_rows(tmp_path / "x.csv")
    assert [r.peer for r in found] == [r.peer for r in rows]
    assert found[-1].gb_per_s is None
    assert found[-1].launches is None
    assert found[2].gb_per_s == pytest.approx(rows[2].gb_per_s, rel=1e-4)
    assert found[2].elements == 10**9
    (tmp_path / "y.csv").write_text("case,peer\n")
    with pytest.raises(ValueError, match="has the columns"):
        read_rows(tmp_path / "y.csv")


def test_merging_writes_draws_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = synthetic_rows()
    for number, part in enumerate((rows[:5], rows[5:])):
        write_rows(tmp_path / f"{number}.csv", part)
    out = tmp_path / "all.csv"
    assert kernels.main(["--merge", str(tmp_path / "0.csv"), str(tmp_path / "1.csv"), "--out", str(out)]) == 0
    assert len(read_rows(out)) == len(rows)
    assert (tmp_path / "all.png").stat().st_size > 10_000
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(rows)
    assert "95 %" in table[3]
    assert "1.25x" in table[3]
    assert render(rows).splitlines() == table


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(synthetic_rows()[-1:], tmp_path / "x.png")
