"""What the compilers make of the kernels, for GPUs that need not be there: vectors, spills, registers, operations."""

import csv
import inspect
from importlib.metadata import version
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.offline import RESULTS
from ivon_lora.kernels import runtime
from tests.offline_compile import (
    AMD_GFX942,
    KERNELS,
    NVIDIA_SM80,
    NVIDIA_SM90,
    NVIDIA_SM100,
    TARGETS,
    Compiled,
    compile_all,
)
from tests.optimizer_problem import make_params
from tests.triton_runs import ivon, make_pruner, run

pytestmark = pytest.mark.slow  # half a minute of compilers, once

#: but for those that are a part of another; the table of `benchmarks.offline` has them all
NAMES = [name for name in KERNELS if name not in ("sample", "step", "step, vadam, bf16")]
#: what differs between architectures shows in few kernels
ELSEWHERE = {
    "step, scores, vadam, bf16, masks": (NVIDIA_SM80, NVIDIA_SM100, AMD_GFX942),
    "score": (AMD_GFX942,),
}
#: those with arithmetic that must be IEEE's
WITH_DIVISIONS = [name for name in NAMES if name.startswith(("sample", "step, ", "importance"))]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Compiled]]:
    """Everything, in one subprocess."""
    return compile_all({name: (KERNELS[name], (NVIDIA_SM90, *ELSEWHERE.get(name, ()))) for name in NAMES})


@pytest.mark.parametrize("name", NAMES)
def test_no_spills_few_registers_and_a_short_compilation(name: str, compiled: dict[str, dict[str, Compiled]]) -> None:
    """The published table knows the releases of Triton that are not here, and has their seconds."""
    for target, code in compiled[name].items():
        assert code.spills == 0, target
        assert code.count(r"\.f64\b|_f64\b") == 0, target
        assert 8 < code.registers <= (104 if target == AMD_GFX942 else 96), (target, code.registers)
        assert code.seconds <= 6, (target, code.seconds)


@pytest.mark.parametrize("name", WITH_DIVISIONS)
def test_nvidia_code_has_only_operations_that_ieee_defines(name: str, compiled: dict[str, dict[str, Compiled]]) -> None:
    code = compiled[name][NVIDIA_SM90]
    assert code.count(r"\bmul(?:\.rn)?\.f32\b") > 5  # the patterns below would find what they look for
    assert code.count(r"\bdiv\.rn\.f32\b") > 0
    for forbidden in (r"\bfma\.rn\.f32\b", r"\.approx\b", r"\.ftz\b", r"\bdiv\.full\b"):
        assert code.count(forbidden) == 0, forbidden


@pytest.mark.skipif(not version("triton").startswith("3.7."), reason="other releases tell them apart")
def test_nvidia_code_is_the_same_for_every_capability_below_10(compiled: dict[str, dict[str, Compiled]]) -> None:
    """So that `test_triton_emulated` need not run it for each."""
    codes = compiled["step, scores, vadam, bf16, masks"]
    assert codes[NVIDIA_SM90].assembly.count(".target sm_90a") == 1
    assert codes[NVIDIA_SM80].assembly == codes[NVIDIA_SM90].assembly.replace(".target sm_90a", ".target sm_80")


@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    [
        ("sample, masks", 2, 2),
        ("step, masks", 4, 3),
        ("step, scores", 4, 3),
        ("step, scores, vadam, bf16, masks", 3, 3),  # those of four bytes an element
    ],
)
def test_each_array_is_read_and_written_in_16_byte_vectors(
    name: str, loads: int, stores: int, compiled: dict[str, dict[str, Compiled]]
) -> None:
    """Four warps and 512 elements: one vector per thread and array: a sample moves 16 bytes an element, a step 28."""
    for target, code in compiled[name].items():
        if target != AMD_GFX942:
            assert code.count_sass(r"\bLDG\.E\.128\b") == loads, target
            assert code.count_sass(r"\bSTG\.E\.128\b") == stores, target


@pytest.mark.parametrize("name", NAMES)
def test_no_program_waits_for_others_or_counts_them(name: str, compiled: dict[str, dict[str, Compiled]]) -> None:
    """Launches are what orders memory: atomics only add, without order and without asking what was there."""
    for target, code in compiled[name].items():
        if target == AMD_GFX942:
            assert code.count(r"buffer_wbl2|buffer_inv|global_atomic_\w+ .*\bsc0\b") == 0
        else:
            assert code.count(r"\bfence\b|\bmembar\b|\bacq|\batom\.(?!global\.gpu\.relaxed\.add)") == 0
            assert (code.count(r"\b(?:atom|red)\.") > 0) == name.startswith(("step", "importance"))


def test_the_published_table_holds_what_is_said_of_it() -> None:
    """Of every kernel for every target, with the releases of Triton that it was made with."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    versions = {row["triton"] for row in rows}
    assert {"3.6.0", "3.9.0"} <= versions
    assert {(r["kernel"], r["target"], r["triton"]) for r in rows} == {
        (kernel, target, version) for kernel in KERNELS for target in TARGETS for version in versions
    }
    assert {row["spills"] for row in rows} == {"0"}
    nvidia = [row for row in rows if row["target"] != AMD_GFX942]
    assert max(int(row["registers"]) for row in nvidia) <= 96
    assert max(float(row["seconds"]) for row in nvidia) <= 3.0


def test_no_number_of_a_run_leads_to_another_kernel(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    """What Triton makes kernels of their own for: constants, integers that are not excepted, addresses mod 16."""
    launched: dict[str, set[str]] = {}

    def note(kernel: Any, grid: Any, *arguments: Any, num_warps: int, **constants: Any) -> None:
        names = inspect.signature(kernel.fn).parameters
        kinds = []
        for name, value in zip(names, arguments, strict=False):
            if isinstance(value, torch.Tensor):
                kinds.append(f"{value.dtype} {value.data_ptr() % 16}")
            else:
                kinds.append(type(value).__name__ if name == "n_slots" else repr(value))
        launched.setdefault(f"{kernel.__name__} {constants} {num_warps}", set()).add(" ".join(kinds))

    monkeypatch.setattr(runtime, "run", note)
    for n_adapters, rank in ((1, 1), (2, 8), (3, 5)):
        params = make_params([(rank, 8), (6, rank)] * n_adapters, device=triton_device)
        pruner = make_pruner(params, 1, total_steps=16, final=4)
        optimizer = ivon(pruner=pruner)(params, "triton")
        for number in range(16):
            for group in optimizer.param_groups:
                group["lr"], group["ess"], group["seed"] = 0.1 / (1 + number), 50.0 + number, number**12
                group["weight_decay"], group["beta1"] = float(number % 2), 0.5 if number % 3 else 0.0
            run(optimizer, params, 1)
    kernels = [name.split()[0] for name in launched]
    assert {name: len(kinds) for name, kinds in launched.items() if len(kinds) != 1} == {}
    assert set(kernels) == {"sample_kernel", "step_kernel", "score_kernel", "select_kernel"}
