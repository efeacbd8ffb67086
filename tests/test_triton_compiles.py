"""What the compilers make of the kernels, for GPUs that need not be there: vectors, spills, registers, barriers."""

import re

import pytest

pytest.importorskip("triton")
from tests.offline_compile import AMD_GFX942, NVIDIA_SM80, NVIDIA_SM90, NVIDIA_SM100, Compiled, Kernel, compile_all

pytestmark = pytest.mark.slow  # half a minute of compilers, once

TABLES = {"tensors": "*i64", "items": "*i64", "scalars": "*i64"}
RANKING = {"score_sums": "*i64", "adapters": "*i64", "owners": "*i64", "keys": "*i32", "selection": "*i64"}
STEP = {**TABLES, **RANKING, "nonfinite": "*i64", "n_slots": "i32", "done": "*i32"}
STEP_CONSTANTS = {
    "TILE": 512,
    "DTYPE": 0,
    "GRAD_DTYPE": 0,
    "CURVATURE": 1,
    "ADAM": False,
    "BANKED": False,
    "MASKED": False,
    "MEAN_STATE": False,
    "REREAD": False,
    "CRITERION": 0,
    "SCORED": True,
    "SELECT": False,
    "PRIOR": False,
    "NEXT_SAMPLE": False,
    "SCORE_BLOCK": 128,
    "SELECT_BLOCK": 1024,
}


def sample(**constants: object) -> Kernel:
    every = {"TILE": 512, "DTYPE": 0, "MASKED": False, "COPY": True, "REREAD": False}
    return Kernel("ivon_lora.kernels.sample", "sample_kernel", TABLES, every | constants, tuple(TABLES))


def step(**constants: object) -> Kernel:
    aligned = tuple(name for name, kind in STEP.items() if kind.startswith("*"))
    return Kernel("ivon_lora.kernels.step", "step_kernel", STEP, {**STEP_CONSTANTS, **constants}, aligned)


# name: kernel, most registers per thread (compilers of other versions may take some more than are taken now), targets.
# What differs between architectures shows in one kernel; the others need one compiler each.
KERNELS = {
    "sample": (sample(), 48, (NVIDIA_SM90,)),
    "sample with masks": (sample(MASKED=True), 56, (NVIDIA_SM90,)),
    "step": (step(), 80, (NVIDIA_SM90,)),
    "step and the next sample": (step(NEXT_SAMPLE=True), 96, (NVIDIA_SM90,)),
    "fisher, adam, and the next sample": (
        step(CURVATURE=3, ADAM=True, NEXT_SAMPLE=True),
        96,
        (NVIDIA_SM90, AMD_GFX942),
    ),
    "step of a bf16 model, with masks": (
        step(DTYPE=1, GRAD_DTYPE=1, MEAN_STATE=True, MASKED=True),
        96,
        (NVIDIA_SM90, AMD_GFX942),
    ),
    "step with scores": (step(CRITERION=1), 128, (NVIDIA_SM80, NVIDIA_SM100)),
    "step with a prior": (step(CURVATURE=3, ADAM=True, PRIOR=True), 96, (NVIDIA_SM90, AMD_GFX942)),
    "bf16 step, prior, scores, masks": (
        step(DTYPE=1, GRAD_DTYPE=1, MEAN_STATE=True, MASKED=True, CURVATURE=3, ADAM=True, CRITERION=1, PRIOR=True),
        128,
        (NVIDIA_SM90,),
    ),
    "step with scores and selection": (
        step(CRITERION=1, SELECT=True),
        168,
        (NVIDIA_SM80, NVIDIA_SM90, AMD_GFX942),
    ),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Compiled]]:
    """Everything for every target, in one subprocess."""
    return compile_all({name: (kernel, targets) for name, (kernel, _, targets) in KERNELS.items()})


def on_nvidia(codes: dict[str, Compiled]) -> dict[str, Compiled]:
    """Those for NVIDIA's architectures."""
    return {target: code for target, code in codes.items() if target.startswith("cuda")}


@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_and_no_double_precision(name: str, compiled: dict[str, dict[str, Compiled]]) -> None:
    for target, code in compiled[name].items():
        assert code.spills == 0, target
        assert code.count(r"\.f64\b|_f64\b") == 0, target
        assert 16 < code.registers <= KERNELS[name][1], (target, code.registers)


@pytest.mark.parametrize("name", KERNELS)
def test_nvidia_code_has_only_operations_that_ieee_defines(name: str, compiled: dict[str, dict[str, Compiled]]) -> None:
    for target, code in on_nvidia(compiled[name]).items():
        assert code.count(r"\bmul(?:\.rn)?\.f32\b") > 20  # the patterns below would find what they look for
        assert code.count(r"\bdiv\.rn\.f32\b") > 0
        for forbidden in (r"\bfma\.rn\.f32\b", r"\.approx\b", r"\.ftz\b", r"\bdiv\.full\b"):
            assert code.count(forbidden) == 0, (target, forbidden)


@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    [
        ("sample", 2, 2),
        ("step", 4, 3),
        ("step and the next sample", 4, 4),
        ("step with scores", 4, 3),
        ("step with a prior", 4, 3),
    ],
)
def test_each_array_is_read_and_written_in_16_byte_vectors(
    name: str, loads: int, stores: int, compiled: dict[str, dict[str, Compiled]]
) -> None:
    """Four warps and 512 elements: one vector per thread and array."""
    for target, code in on_nvidia(compiled[name]).items():
        assert code.count_sass(r"\bLDG\.E\.128\b") == loads, target
        assert code.count_sass(r"\bSTG\.E\.128\b") == stores, target


def test_amd_reads_in_vectors_too(compiled: dict[str, dict[str, Compiled]]) -> None:
    code = compiled["step with scores and selection"][AMD_GFX942]
    assert code.count(r"\b(?:global|buffer)_load_dwordx4\b") >= 4
    assert code.count(r"\b(?:global|buffer)_store_dwordx4\b") == 3


@pytest.mark.parametrize(("name", "counters"), [("step with scores and selection", 2), ("step with a prior", 1)])
def test_the_last_program_finishes_after_a_barrier_and_an_acquire_release(
    name: str, counters: int, compiled: dict[str, dict[str, Compiled]]
) -> None:
    codes = compiled[name]
    lines = codes[NVIDIA_SM90].assembly.splitlines()
    events = [line for line in lines if re.search(r"\bbar(?:rier)?\.|\bred\.|\batom\.", line)]
    counter = [i for i, line in enumerate(events) if "acq_rel" in line]
    assert len(counter) == counters
    for i in counter:
        assert re.search(r"\bbar", events[i - 1]), "an addition to the sums may come after the counter"
    amd = codes[AMD_GFX942].assembly
    assert re.search(r"s_barrier", amd)
    assert re.search(r"buffer_wbl2", amd), "the counter's atomic must make earlier writes visible"
    assert re.search(r"buffer_inv", amd)
