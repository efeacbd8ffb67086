"""Compile Triton kernels for GPUs that need not be there, and read the machine code.

Triton's interpreter accepts programs that the compiler rejects, and says nothing about what a GPU would run. Offline
compilation needs TRITON_INTERPRET unset before triton is imported, hence the subprocess: this file is also its script.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NVIDIA_SM80, NVIDIA_SM89, NVIDIA_SM90, NVIDIA_SM100 = "cuda:80:32", "cuda:89:32", "cuda:90:32", "cuda:100:32"
AMD_GFX942 = "hip:gfx942:64"
TARGETS = (NVIDIA_SM80, NVIDIA_SM89, NVIDIA_SM90, NVIDIA_SM100, AMD_GFX942)


def compiler_environment() -> dict[str, str]:
    """Of a subprocess in which Triton compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@dataclass(frozen=True)
class Kernel:
    """One kernel, in the form in which it is to be compiled.

    module, name: where the `@triton.jit` function lives.  types: argument -> Triton type ("*fp32", "i64", ...); all
    addresses are multiples of 16.  constants: constexpr arguments.  flags: fields of FLAGS.
    """

    module: str
    name: str
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    flags: dict[str, Any] | None = None


_TABLE = {"rows_ptr": "*i64", "items_ptr": "*i64", "hyper_ptr": "*fp32", "key_ptr": "*i64"}
_SUMS = {"sums_ptr": "*i64", "n_slots": "i32"}
_ADAPTERS = {"adapters_ptr": "*i64", "keys_ptr": "*i64"}


def _sample(**flags: Any) -> Kernel:
    return Kernel("ivon_lora.kernels.sample", "sample_kernel", _TABLE, flags=flags)


def _step(**flags: Any) -> Kernel:
    types = {**_TABLE, "nonfinite_ptr": "*i64", **_SUMS}
    return Kernel("ivon_lora.kernels.step", "step_kernel", types, flags=flags)


_BF16 = {"DTYPE": "bf16", "GRAD_DTYPE": "bf16"}
#: every kernel, in the forms in which training launches it
KERNELS = {
    "sample": _sample(),
    "sample, masks": _sample(MASKED=True),
    "sample, bf16": _sample(DTYPE="bf16"),
    "bank": Kernel("ivon_lora.kernels.step", "bank_kernel", _TABLE, flags={}),
    "step": _step(),
    "step, masks": _step(MASKED=True),
    "step, fp16, banked": _step(DTYPE="fp16", GRAD_DTYPE="fp16", BANKED=True),
    "step, vadam, bf16": _step(CURVATURE="fisher", **_BF16),
    "step, scores": _step(CRITERION="snr_abs"),
    "step, scores, vadam, bf16, masks": _step(CRITERION="snr_abs", CURVATURE="fisher", MASKED=True, **_BF16),
    "step, sensitivity": _step(CRITERION="sensitivity", SENSITIVITY=True),
    "importance": Kernel(
        "ivon_lora.kernels.ranks", "importance_kernel", {**_TABLE, **_SUMS},
        flags={"CRITERION": "snr_abs"},
    ),
    "score": Kernel(
        "ivon_lora.kernels.ranks", "score_kernel", {**_ADAPTERS, **_SUMS}, {"FROZEN": True, "R": 16}, num_warps=1
    ),
    "select": Kernel("ivon_lora.kernels.ranks", "select_kernel", _ADAPTERS),
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What the compiler made: PTX and SASS (NVIDIA) or the assembly (AMD); shared memory in bytes.

    registers: 32-bit vector registers per thread.  seconds: of the processor, for the compilation.  triton: version.
    """

    assembly: str
    sass: str
    shared: int
    registers: int
    seconds: float = 0.0
    triton: str = ""

    def count(self, pattern: str) -> int:
        """How often the regular expression occurs in the PTX (NVIDIA) or assembly (AMD)."""
        return len(re.findall(pattern, self.assembly))

    def count_sass(self, pattern: str) -> int:
        """How often the regular expression occurs in the SASS (NVIDIA only)."""
        return len(re.findall(pattern, self.sass))

    @property
    def spills(self) -> int:
        """Local-memory instructions (NVIDIA) or spilled vector registers (AMD)."""
        if self.sass:
            return self.count_sass(r"\b(?:LDL|STL)\b")
        return sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", self.assembly))


def compile_all(
    kernels: dict[str, tuple[Kernel, tuple[str, ...]]], triton: Path | None = None
) -> dict[str, dict[str, Compiled]]:
    """Compile several kernels, each for its targets ("backend:architecture:warp size"), in one subprocess.

    Args:
        triton: a directory with another release of Triton (``pip install --target``).

    Raises:
        AssertionError: with the compiler's words.
    """
    with tempfile.TemporaryDirectory() as cache:
        env = compiler_environment() | {
            "TRITON_CACHE_DIR": cache,
            "PYTHONPATH": os.pathsep.join(
                [*([str(triton)] if triton else []), str(Path(__file__).resolve().parents[1])]
            ),
        }
        request = json.dumps({name: (vars(kernel), targets) for name, (kernel, targets) in kernels.items()})
        command = [sys.executable, "-W", "ignore", __file__]
        done = subprocess.run(command, input=request, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {
        name: {target: Compiled(**answer) for target, answer in answers.items()}
        for name, answers in json.loads(done.stdout).items()
    }


def _compile(kernel: Kernel, name: str) -> dict[str, Any]:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, architecture, warp_size = name.split(":")
    module = importlib.import_module(kernel.module)
    fn = getattr(module, kernel.name)
    constants = dict(kernel.constants)
    if kernel.flags is not None:
        from ivon_lora.kernels.runtime import Flags

        # one 16-byte vector per thread of four warps, as the launches have it
        constants["FLAGS"] = Flags(TILE=16 * int(warp_size), **kernel.flags)
    pointers = [fn.arg_names.index(name) for name, kind in kernel.types.items() if kind.startswith("*")]
    source = ASTSource(
        fn=fn,
        signature={name: kernel.types.get(name, "constexpr") for name in fn.arg_names},
        constexprs={(fn.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(position,): [["tt.divisibility", 16]] for position in pointers},
    )
    target = GPUTarget(backend, int(architecture) if backend == "cuda" else architecture, int(warp_size))
    options = {"num_warps": kernel.num_warps, "enable_fp_fusion": False}
    begin = time.process_time() + _children()
    compiled = triton.compile(source, target=target, options=options)
    seconds = time.process_time() + _children() - begin
    assembly, sass = compiled.asm["ptx" if backend == "cuda" else "amdgcn"], ""
    if backend == "cuda":
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            sass = _run(tools / "nvdisasm", "-c", cubin.name)
            registers = re.search(r"\bREG:(\d+)", _run(tools / "cuobjdump", "-res-usage", cubin.name))
    else:
        registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    assert registers, "the compiler did not say how many registers it used"
    return {
        "assembly": assembly,
        "sass": sass,
        "shared": compiled.metadata.shared,
        "registers": int(registers[1]),
        "seconds": seconds,
        "triton": triton.__version__,
    }


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    request = json.load(sys.stdin)
    answers = {
        name: {target: _compile(Kernel(**kernel), target) for target in targets}
        for name, (kernel, targets) in request.items()
    }
    print(json.dumps(answers))
