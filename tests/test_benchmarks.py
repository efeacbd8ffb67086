"""The benchmark of whole steps, and what all benchmarks share: no test looks at a time."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import ledger, peers, step, step_report
from benchmarks.cases import FLAT, LLAMA, MANY, MINILM, QUICK_CASES
from benchmarks.machine import peak_extra_mib
from benchmarks.peers import ADALORA, BASELINE, REFERENCE, ours
from ivon_lora import IVON

QUICK = {case.name: case for case in QUICK_CASES}
#: of these transformers and peft, not of ours
LIBRARIES = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.mark.parametrize("name", [MINILM, FLAT])
def test_every_peer_moves_every_tensor_and_keeps_the_gradients(name):
    made = peers.make_peers(QUICK[name], 4, ["eager"])
    pruning = set() if name == FLAT else {ours("eager", pruned=True), ADALORA}
    assert {peer.name for peer in made} == {BASELINE, REFERENCE, ours("eager"), *pruning}
    for peer in made:
        before = [(p.detach().clone(), p.grad.clone()) for p in peer.tensors]
        peer.step()
        for p, (old, gradient) in zip(peer.tensors, before, strict=True):
            assert not torch.equal(p, old), peer.name
            assert torch.isfinite(p).all(), peer.name
            assert torch.equal(p.grad, gradient), peer.name


@LIBRARIES
def test_a_quick_run_writes_rows_and_a_page(tmp_path, capsys):
    known = [case.name for case in QUICK_CASES]
    step.run(tmp_path, [*known, step_report.TRAINING], ["eager"], rounds=1, quick=True)
    rows = pd.read_csv(tmp_path / "step.csv")
    assert Counter(rows.case) == {MINILM: 5, LLAMA: 5, FLAT: 3, MANY: 5, step_report.TRAINING: 3}
    assert not rows[["case", "peer"]].duplicated().any()
    assert ((rows.p20_ms <= rows.cpu_ms) & (rows.cpu_ms <= rows.p80_ms) & (rows.p20_ms > 0)).all()
    for case in QUICK_CASES:
        plain = rows[(rows.case == case.name) & (rows.peer == BASELINE)].iloc[0]
        assert (plain.tensors, plain.elements) == (len(case.shapes()), sum(map(math.prod, case.shapes())))
    assert (rows[rows.case == step_report.TRAINING].passes_ms > 0).all()
    page = (tmp_path / "step.md").read_text()
    assert capsys.readouterr().out == page + "\n"
    cells = [
        f"| {r.peer} |" if r.case == step_report.TRAINING else f"| {r.case} | {r.peer} |" for r in rows.itertuples()
    ]
    assert all(cell in page for cell in cells)
    (tmp_path / "step.md").unlink()
    assert step.main(["--report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "step.md").read_text() == page


def test_wrong_equations_give_exit_status_1_and_no_numbers(monkeypatch, tmp_path, capsys):
    right = IVON.step

    def wrong(optimizer):
        right(optimizer)
        for state in optimizer.state.values():
            state["hess"] *= 1 + 1e-4

    monkeypatch.setattr(IVON, "step", wrong)
    assert step.main(["--backends", "eager", "--out", str(tmp_path)]) == 1
    assert "differs from ivon-opt" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--cases", "nothing"], "there are minilm-lora-r8"), (["--backends", "eager,abacus"], "backend must be one of")],
)
def test_wrong_arguments_give_exit_status_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        step.main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_ledger_grows_by_whole_runs_and_knows_what_is_done(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    assert not ledger.has(ledger.read(path), method="a", lr=1e-3)
    ledger.append(path, [{"method": "a", "lr": 1e-3, "nll": 0.12345678}])
    rows = ledger.append(path, [{"method": "b", "lr": 1e-3, "nll": 0.5}, {"method": "b", "lr": 1e-3, "nll": 0.6}])
    assert len(rows) == 3
    assert ledger.has(ledger.read(path), method="a", lr=1e-3)
    assert not ledger.has(ledger.read(path), method="a", lr=1e-2)
    assert ledger.read(path).nll.tolist() == [0.123457, 0.5, 0.6]
    assert path.read_text().splitlines()[0] == "method,lr,nll,torch,machine,date,commit"
    assert [file.name for file in path.parent.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize("commit", ["4e49581", "0123456", ""])  # an infinite number, a number, no number
def test_the_commit_of_a_run_stays_text(commit, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "provenance", lambda: {"torch": "2.11", "commit": commit})
    for _ in range(2):
        ledger.append(tmp_path / "rows.csv", [{"nll": 0.5}])
    assert ledger.read(tmp_path / "rows.csv").to_numpy().tolist() == [[0.5, "2.11", commit]] * 2


def test_intervals_are_students_and_differences_are_paired_by_seed():
    mean, half = ledger.interval(pd.Series([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (mean, half) == pytest.approx((3, 2.776445 * math.sqrt(2.5 / 5)), rel=1e-6)
    assert ledger.show(pd.Series([0.25])) == "0.2500"
    luck = {1: 10.0, 2: -5.0, 3: 2.0, 4: 7.0}
    rows = [{"arm": "ours", "seed": seed, "nll": value + 1} for seed, value in luck.items() if seed < 4]
    rows += [{"arm": "theirs", "seed": seed, "nll": value} for seed, value in luck.items()]
    found = ledger.paired(pd.DataFrame(rows), "nll", "arm", "theirs")
    assert ledger.show(found["ours"], sign=True) == "+1.0000 ± 0.0000"
    assert ledger.paired(pd.DataFrame(rows), "nll", "arm", "nobody") == {}


@pytest.mark.parametrize("make", [lambda n: torch.ones(n // 4), lambda n: np.ones(n // 8)], ids=["torch", "numpy"])
def test_peak_memory_counts_temporaries_of_torch_and_numpy(make):
    make(1 << 20)  # whatever is loaded at the first use
    nothing, peak = peak_extra_mib(lambda: None), peak_extra_mib(lambda: [make(64 << 20), None][1])
    if nothing is None or peak is None:
        pytest.skip("this system does not tell its peak memory")
    assert nothing < 4
    assert abs(peak - 64) < 4
