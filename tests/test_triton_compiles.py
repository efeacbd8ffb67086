"""What the compilers make of the kernels, for GPUs that need not be there: vectors, spills, registers, operations."""

import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from ivon_lora.kernels import runtime
from tests.offline_compile import AMD_GFX942, NVIDIA_SM80, NVIDIA_SM90, Compiled, Kernel, compile_all
from tests.triton_runs import ivon, make_params, make_pruner, run

pytestmark = pytest.mark.slow  # half a minute of compilers, once

TABLES = {"rows_ptr": "*i64", "items_ptr": "*i64", "hyper_ptr": "*fp32", "key_ptr": "*i64"}
SUMS = {"sums_ptr": "*i64", "n_slots": "i32"}
ALIGNED = (*TABLES, "nonfinite_ptr", "sums_ptr")


def sample(**flags: Any) -> Kernel:
    every = {"TILE": 512, "DTYPE": "fp32", "MASKED": False, **flags}
    return Kernel("ivon_lora.kernels.sample", "sample_kernel", TABLES, {}, tuple(TABLES), 4, every, "SampleFlags")


def step(**flags: Any) -> Kernel:
    every = {"TILE": 512, "DTYPE": "fp32", "GRAD_DTYPE": "fp32", "CURVATURE": "price", **flags}
    types = {**TABLES, "nonfinite_ptr": "*i64", **SUMS}
    return Kernel("ivon_lora.kernels.step", "step_kernel", types, {}, ALIGNED, 4, every, "StepFlags")


def bank() -> Kernel:
    every = {"TILE": 512, "GRAD_DTYPE": "bf16", "CURVATURE": "price"}
    return Kernel("ivon_lora.kernels.step", "bank_kernel", TABLES, {}, tuple(TABLES), 4, every, "BankFlags")


def ranks(name: str, types: dict[str, str], **constants: Any) -> Kernel:
    aligned = tuple(n for n, kind in types.items() if kind.startswith("*"))
    return Kernel("ivon_lora.kernels.ranks", name, types, constants, aligned)


BF16 = {"DTYPE": "bf16", "GRAD_DTYPE": "bf16", "MASKED": True}
SCORE = {"adapters_ptr": "*i64", "sums_ptr": "*i64", "n_slots": "i32", "keys_ptr": "*i64"}

# name: kernel, targets. What differs between architectures shows in few kernels; the others need one compiler each.
KERNELS = {
    "sample": (sample(), (NVIDIA_SM90,)),
    "bank": (bank(), (NVIDIA_SM90,)),
    "step with scores": (step(CRITERION="snr_abs"), (NVIDIA_SM80, NVIDIA_SM90)),
    "banked step of an fp16 model": (step(DTYPE="fp16", GRAD_DTYPE="fp16", BANKED=True), (NVIDIA_SM90,)),
    "vadam of a bf16 model, with masks": (step(CURVATURE="fisher", **BF16), (NVIDIA_SM90, AMD_GFX942)),
    "score": (ranks("score_kernel", SCORE, FROZEN=True, R=64), (AMD_GFX942,)),
    "select": (ranks("select_kernel", {"adapters_ptr": "*i64", "keys_ptr": "*i64"}), (NVIDIA_SM90,)),
}
#: those with arithmetic that must be IEEE's
STEPS = [name for name in KERNELS if "step" in name or "vadam" in name]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Compiled]]:
    """Everything for every target, in one subprocess."""
    return compile_all(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_and_no_double_precision(name: str, compiled: dict[str, dict[str, Compiled]]) -> None:
    for target, code in compiled[name].items():
        assert code.spills == 0, target
        assert code.count(r"\.f64\b|_f64\b") == 0, target
        assert 8 < code.registers <= 168, (target, code.registers)


@pytest.mark.parametrize("name", STEPS)
def test_nvidia_code_has_only_operations_that_ieee_defines(name: str, compiled: dict[str, dict[str, Compiled]]) -> None:
    code = compiled[name][NVIDIA_SM90]
    assert code.count(r"\bmul(?:\.rn)?\.f32\b") > 20  # the patterns below would find what they look for
    assert code.count(r"\bdiv\.rn\.f32\b") > 0
    for forbidden in (r"\bfma\.rn\.f32\b", r"\.approx\b", r"\.ftz\b", r"\bdiv\.full\b"):
        assert code.count(forbidden) == 0, forbidden


@pytest.mark.parametrize(("name", "loads", "stores"), [("sample", 2, 2), ("step with scores", 4, 3)])
def test_each_array_is_read_and_written_in_16_byte_vectors(
    name: str, loads: int, stores: int, compiled: dict[str, dict[str, Compiled]]
) -> None:
    """Four warps and 512 elements: one vector per thread and array."""
    for target, code in compiled[name].items():
        assert code.count_sass(r"\bLDG\.E\.128\b") == loads, target
        assert code.count_sass(r"\bSTG\.E\.128\b") == stores, target


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
        params = make_params([(rank, 8), (6, rank)] * n_adapters, torch.float32, triton_device)
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
