"""The benchmark of the kernels: what can be known of it without a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernels
from benchmarks.cases import Case, many_linears
from benchmarks.gate import GateError
from ivon_lora.kernels.launch import TritonBackend


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so it would be measured")
def test_without_a_gpu_it_says_so_and_prints_what_compilers_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "offline_table", lambda: "registers")  # compiling takes a minute
    assert kernels.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "No GPU: torch.cuda.is_available() is False. No time is measured; these figures come from compilers.",
        "registers",
    ]


def test_the_cases_span_what_they_promise() -> None:
    sizes = {case.name: (kernels.elements_of(case), len(case.shapes())) for case in kernels.KERNEL_CASES}
    assert min(n for n, _ in sizes.values()) == 10**5
    assert max(n for n, _ in sizes.values()) == 10**9
    assert sizes["tensors-4000"][1] == 4000
    assert sizes["tensors-4000"][0] == pytest.approx(sizes["tensors-2"][0], rel=0.01)
    assert sizes["llama-3.2-3b-lora-r16"] == (24_313_856, 392)


def test_every_peer_steps(triton_device: str) -> None:
    case = Case("tiny", 1, many_linears(1, features=8), rank=4)
    names = []
    for peer in kernels.make_peers(case, torch.float32, torch.device(triton_device)):
        peer.step()
        names.append(peer.name)
    assert names == ["ivon-lora[triton]", "ivon-lora[triton]+prune", "adamw[fused]", "adamw[foreach]", "ivon-opt"]


def test_the_gate_sees_a_wrong_kernel(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "sample", lambda *_: None)
    with pytest.raises(GateError, match="differs from the eager backend"):
        kernels.check_bits(torch.device(triton_device))
