"""The benchmark of whole steps: its shapes, its gate, its arithmetic and its files. No test looks at a time."""

import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ivon_lora.lora.rank_pruner
from benchmarks import measure, memory, step
from benchmarks.cases import CASES, QUICK_CASES, Case, build
from benchmarks.gate import GateError, check
from benchmarks.machine import ROOT, TUNED_MALLOC, describe_commit, describe_machine, malloc_environment
from benchmarks.measure import Cost, cost_of_step, steps_needed
from benchmarks.peers import BASELINE, REFERENCE, Peer, make_peers
from benchmarks.table import COLUMNS, Row, merge_csv, read_csv, render, write_csv
from ivon_lora import IVON

CASE = {case.name: case for case in (*CASES, *QUICK_CASES)}

ROW = Row(
    case="case",
    peer="peer",
    threads=1,
    elements=6,
    tensors=2,
    median_ms=2.0,
    p20_ms=1.0,
    p80_ms=3.0,
    rounds=5,
    ratio_to_adamw_fused=0.5,
    speedup_over_ivon_opt=None,
    malloc="default",
    torch="2",
    machine="2 vCPU Thing, shared",
    date="2026-01-02",
    commit="abc",
    peak_extra_mib=None,
    median_cpu_ms=1.23456,
)


@pytest.fixture(autouse=True)
def _plain_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the benchmark would start a process of its own, out of reach of the tests."""
    for name in [*(n for n in os.environ if n.startswith("MALLOC_")), "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name, raising=False)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("minilm-lora-r8", 72, 331_776),
        ("minilm-adalora-r12", 108, 498_096),
        ("llama-3.2-3b-lora-r16", 392, 24_313_856),
        ("one-tensor-5m", 1, 5_000_000),
        ("4000-tensors-5m", 4000, 5_000_000),
    ],
)
def test_cases_have_the_sizes_of_the_real_adapters(name: str, tensors: int, elements: int) -> None:
    shapes = CASE[name].shapes()
    assert (len(shapes), sum(math.prod(shape) for shape in shapes)) == (tensors, elements)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft still asks for a name that is about to go
def test_shapes_are_those_that_peft_gives_the_real_models() -> None:
    from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

    def shapes(model: PreTrainedModel, config: PeftConfig) -> Counter[tuple[int, ...]]:
        adapted = get_peft_model(model, config)
        return Counter(tuple(p.shape) for name, p in adapted.named_parameters() if "lora_" in name)

    targets = ["query", "key", "value", "dense"]
    minilm = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, vocab_size=10
    )
    llama = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=10,
    )
    lora, adalora = (
        LoraConfig(r=8, target_modules=targets),
        AdaLoraConfig(init_r=12, total_step=10, target_modules=targets),
    )
    with torch.device("meta"):
        bert = [BertModel(minilm, add_pooling_layer=False) for _ in range(2)]
        llama_model = LlamaForCausalLM(llama)
    assert shapes(bert[0], lora) == Counter(CASE["minilm-lora-r8"].shapes())
    assert shapes(bert[1], adalora) == Counter(CASE["minilm-adalora-r12"].shapes())
    with torch.device("meta"):
        found = shapes(llama_model, LoraConfig(r=16, target_modules="all-linear"))
    assert found == Counter(CASE["llama-3.2-3b-lora-r16"].shapes())


@pytest.mark.parametrize("case", QUICK_CASES, ids=lambda case: case.name)
def test_built_tensors_have_the_shapes_of_the_case_and_a_gradient(case: Case) -> None:
    built = build(case)
    assert [tuple(p.shape) for p in built.tensors] == case.shapes()
    assert all(p.grad is not None and p.grad.shape == p.shape and bool(p.grad.any()) for p in built.tensors)
    assert sum(len(a.tensors()) for a in built.adapters) == (0 if case.flat else len(built.tensors))


# ---------------------------------------------------------------- peers


@pytest.mark.parametrize("name", ["quick-minilm-lora-r8", "quick-minilm-adalora-r12"])
def test_every_peer_moves_every_tensor_and_keeps_the_gradients(name: str) -> None:
    peers = make_peers(CASE[name], steps_needed(1), ["eager"])
    assert {p.name for p in peers} >= {
        BASELINE,
        REFERENCE,
        "ivon-lora[eager]",
        "ivon-lora[eager]+prune",
        "adalora+adamw[fused]",
    }
    for peer in peers:
        before = [p.detach().clone() for p in peer.tensors]
        gradients = [p.grad.clone() for p in peer.tensors if p.grad is not None]
        peer.step()
        for p, old, grad in zip(peer.tensors, before, gradients, strict=True):
            assert not torch.equal(p, old), peer.name
            assert torch.isfinite(p).all(), peer.name
            assert p.grad is not None
            assert torch.equal(p.grad, grad), peer.name


def test_pruning_peers_allocate_every_other_step_and_prune() -> None:
    case = CASE["quick-minilm-adalora-r12"]
    n_steps = steps_needed(case.rounds)
    pruning = [peer for peer in make_peers(case, n_steps, ["eager"]) if peer.allocates_next is not None]
    assert len(pruning) == 2
    total = case.rank * len(case.linears)
    for peer in pruning:
        assert peer.allocates_next is not None
        for done in range(n_steps):
            assert peer.allocates_next() == (done % 2 == 1)
            peer.step()
        gates = [p for p in peer.tensors if p.shape[-1] == 1]
        live = sum(int((p != 0).sum()) for p in gates)  # the last step allocated: masked gates are exactly zero
        assert case.target_rank * len(case.linears) <= live < total / 2


def test_cost_of_a_pruning_peer_is_the_mean_over_ten_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    costs = iter([Cost(10.0, 1.0), Cost(30.0, 2.0)])
    monkeypatch.setattr(measure, "_cost", lambda call: (call(), next(costs))[1])
    peer = Peer("peer", [], lambda: calls.append(0), lambda: len(calls) % 2 == 1)
    cost = cost_of_step(peer)
    assert (cost.wall_ms, cost.cpu_ms) == pytest.approx(((9 * 10 + 30) / 10, (9 * 1 + 2) / 10))
    assert len(calls) == 2
    with pytest.raises(RuntimeError, match="out of step"):
        cost_of_step(replace(peer, allocates_next=lambda: True))


def test_peers_that_end_without_finite_parameters_are_not_reported() -> None:
    p = torch.zeros(3)

    def diverge() -> None:
        p[1] = math.nan

    with pytest.raises(RuntimeError, match="not finite"):
        measure.interleave([Peer("peer", [p], diverge)], rounds=1)


@pytest.mark.parametrize("make", [lambda n: torch.ones(n // 4), lambda n: np.ones(n // 8)], ids=["torch", "numpy"])
def test_peak_memory_counts_temporaries_of_torch_and_numpy(make: Callable[[int], object]) -> None:
    make(1 << 20)  # whatever is loaded at the first use

    def call() -> None:
        make(64 << 20)

    nothing, peak = memory.peak_extra_bytes(lambda: None), memory.peak_extra_bytes(call)
    if nothing is None or peak is None:
        pytest.skip("this system does not tell its peak memory")
    assert nothing < 4 << 20
    assert abs(peak - (64 << 20)) < 4 << 20


# ---------------------------------------------------------------- gate


def test_gate_is_green() -> None:
    check("eager")


def test_wrong_equations_give_exit_status_1_and_no_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = IVON.step

    def wrong(optimizer: IVON) -> None:
        right(optimizer)
        for state in optimizer.state.values():
            state["hess"] *= 1 + 1e-4

    monkeypatch.setattr(IVON, "step", wrong)
    out = tmp_path / "step.csv"
    assert step.main(["--quick", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "differs from ivon-opt" in captured.err
    assert not list(tmp_path.iterdir())


def test_gate_notices_a_budget_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ivon_lora.lora.rank_pruner.select_top
    monkeypatch.setattr(
        ivon_lora.lora.rank_pruner, "select_top", lambda scores, budget, *rest: right(scores, budget + 1, *rest)
    )
    with pytest.raises(GateError, match="but the budget is"):
        check("eager")


# ---------------------------------------------------------------- the run


def test_quick_run_writes_tidy_rows_and_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "step.csv"
    assert step.main(["--quick", "--rounds", "2", "--note", "shared", "--out", str(out)]) == 0
    rows = read_csv(out)
    printed = capsys.readouterr().out
    keys = [(row["case"], row["peer"], row["threads"]) for row in rows]
    assert len(set(keys)) == len(keys)
    for case in QUICK_CASES:
        of_case = {row["peer"]: row for row in rows if row["case"] == case.name}
        assert len(of_case) == (5 if case.flat else 7)
        shapes = case.shapes()
        for peer, row in of_case.items():
            p20, median, p80 = (float(row[name]) for name in ("p20_ms", "median_ms", "p80_ms"))
            assert 0 < p20 <= median <= p80
            # ratios are of the unrounded medians; four digits are written
            assert float(row["ratio_to_adamw_fused"]) == pytest.approx(
                median / float(of_case[BASELINE]["median_ms"]), rel=2e-3
            )
            assert float(row["speedup_over_ivon_opt"]) == pytest.approx(
                float(of_case[REFERENCE]["median_ms"]) / median, rel=2e-3
            )
            extra = len(case.linears) if peer.startswith("adalora") and not case.triplets else 0  # an E per layer
            assert int(row["tensors"]) == len(shapes) + extra
            assert int(row["elements"]) == sum(map(math.prod, shapes)) + case.rank * extra
            assert (row["threads"], row["rounds"], row["malloc"], row["torch"]) == (
                "1",
                "2",
                "default",
                torch.__version__,
            )
            assert row["machine"].endswith(", shared")
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
        assert printed.count(f"{case.name}: ") == 1


def test_threads_are_set_for_each_run_and_committed_results_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def watched(peers: Sequence[Peer], rounds: int) -> dict[str, list[Cost]]:
        seen.append(torch.get_num_threads())
        return measure.interleave(peers, rounds)

    monkeypatch.setattr(step, "interleave", watched)
    monkeypatch.setattr(step, "RESULTS", tmp_path / "committed.csv")
    out = tmp_path / "step.csv"
    assert (
        step.main(["--quick", "--cases", "quick-one-tensor", "--rounds", "1", "--threads", "1,2", "--out", str(out)])
        == 0
    )
    assert seen == [1, 2]
    assert torch.get_num_threads() == 1
    assert Counter(row["threads"] for row in read_csv(out)) == {"1": 5, "2": 5}


def test_tuned_malloc_and_memory_run_in_processes_of_their_own(tmp_path: Path) -> None:
    try:
        malloc_environment("tuned", {})
    except ValueError as error:
        pytest.skip(str(error))
    out = tmp_path / "step.csv"
    arguments = [
        "--quick",
        "--cases",
        "quick-one-tensor",
        "--rounds",
        "1",
        "--malloc",
        "tuned",
        "--memory",
        "--out",
        str(out),
    ]
    assert step.main(arguments) == 0
    rows = read_csv(out)
    assert len(rows) == 5
    assert {row["malloc"] for row in rows} == {"tuned"}
    assert all(row["peak_extra_mib"] == "" or 0 <= float(row["peak_extra_mib"]) < 20 for row in rows)
    assert len({row["peak_extra_mib"] == "" for row in rows}) == 1  # all known, or none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads must be numbers of at least 1"),
        (["--threads", "two"], "--threads must be numbers of at least 1"),
        (["--cases", "nothing"], "there are quick-minilm-lora-r8"),
        (["--malloc", "best"], "--malloc must be one or several of default, tuned, got 'best'"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_give_exit_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        step.main(["--quick", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_peer_gives_exit_status_2_and_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert step.main(["--quick"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "cannot import peft: pip install 'ivon-lora[bench]' brings the peers\n"


def test_an_unknown_backend_gives_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--quick", "--backends", "eager,abacus"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--backends: backend must be one of" in captured.err


def test_committed_results_are_of_the_cases_there_are() -> None:
    rows = read_csv(ROOT / "benchmarks" / "results" / "step.csv")
    assert rows
    names = {case.name for case in CASES}
    for row in rows:
        assert row["case"] in names
        case = CASE[row["case"]]
        extra = len(case.linears) if row["peer"].startswith("adalora") and not case.triplets else 0
        assert int(row["tensors"]) == len(case.shapes()) + extra
        assert int(row["elements"]) == sum(map(math.prod, case.shapes())) + case.rank * extra


# ---------------------------------------------------------------- files and machine


def test_csv_round_trip_and_merge(tmp_path: Path) -> None:
    first, second, both = tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "both.csv"
    write_csv(first, [ROW])
    write_csv(second, [replace(ROW, malloc="tuned")])
    merge_csv(both, [first, second])
    rows = read_csv(both)
    assert [row["malloc"] for row in rows] == ["default", "tuned"]
    assert (rows[0]["speedup_over_ivon_opt"], rows[0]["median_cpu_ms"], rows[0]["machine"]) == (
        "",
        "1.235",
        ROW.machine,
    )
    assert both.read_text().splitlines()[0] == ",".join(COLUMNS)


def test_other_columns_are_refused_and_the_old_file_survives(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    write_csv(good, [ROW])
    bad.write_text("case,peer\n1,2\n")
    with pytest.raises(ValueError, match="has the columns"):
        merge_csv(good, [good, bad])
    assert len(read_csv(good)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.csv", "good.csv"]


def test_columns_start_with_the_stable_ones() -> None:
    stable = (
        "case peer threads elements tensors median_ms p20_ms p80_ms rounds ratio_to_adamw_fused speedup_over_ivon_opt"
    )
    assert COLUMNS[:16] == (*stable.split(), "malloc", "torch", "machine", "date", "commit")


def test_table_shows_every_row_and_blanks_for_missing_numbers() -> None:
    fused = replace(ROW, peer=BASELINE, peak_extra_mib=2.5, median_cpu_ms=0.5)
    text = render([ROW, fused, replace(fused, peer=REFERENCE, median_cpu_ms=5.0), replace(ROW, threads=2)])
    one, two = (block.splitlines() for block in text.split("\n\n"))
    assert one[0] == "case: 1 thread, malloc default, 5 rounds"
    assert two[0] == "case: 2 threads, malloc default, 5 rounds"
    common = ["2", "6", "2.00", "1.00", "3.00", "0.50x"]  # the speed relative to ivon-opt by the clock is not known
    assert one[2].split() == ["peer", *common, "1.23", "2.47x", "4.05x"]
    assert one[3].split() == [BASELINE, *common, "0.50", "1.00x", "10.00x", "2.5"]
    assert one[4].split() == [REFERENCE, *common, "5.00", "10.00x", "1.00x", "2.5"]
    assert two[2].split() == ["peer", *common, "1.23"]
    assert len({len(line) for line in (one[1], one[3], one[4])}) == 1


def test_machine_is_described_by_its_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Thing 9\nflags\t\t: fpu hypervisor\n\nprocessor\t: 1\nmodel name\t: Thing 9\n"
    )
    assert describe_machine("shared", cpuinfo) == f"{os.cpu_count()} vCPU Thing 9, shared"
    cpuinfo.write_text("model name : Thing 9\nflags : fpu\n")
    assert describe_machine("", cpuinfo) == f"{os.cpu_count()} CPU Thing 9"


def test_commit_says_whether_the_tree_was_dirty(tmp_path: Path) -> None:
    assert describe_commit(tmp_path) == ""
    (tmp_path / "ivon_lora").mkdir()
    source = tmp_path / "ivon_lora" / "a.py"
    source.write_text("1\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    assert re.fullmatch(r"[0-9a-f]{7,}", describe_commit(tmp_path))
    source.write_text("2\n")
    assert describe_commit(tmp_path).endswith("+dirty")


def test_malloc_settings_set_and_clear_the_variables() -> None:
    environ = {"PATH": "/bin", "MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "x"}
    assert malloc_environment("default", environ) == {"PATH": "/bin"}
    try:
        tuned = malloc_environment("tuned", environ)
    except ValueError:
        return  # not glibc, and refused
    assert tuned == {"PATH": "/bin", **TUNED_MALLOC}
