"""Compile Triton kernels for GPUs that need not be there, and read the machine code.

Triton's interpreter accepts programs that the compiler rejects, and says nothing about what a GPU would run. Offline
compilation needs TRITON_INTERPRET unset before triton is imported, hence the subprocess: this file is also its script.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NVIDIA_SM80, NVIDIA_SM90, NVIDIA_SM100 = "cuda:80:32", "cuda:90:32", "cuda:100:32"
AMD_GFX942 = "hip:gfx942:64"


def compiler_environment() -> dict[str, str]:
    """Of a subprocess in which Triton compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@dataclass(frozen=True)
class Kernel:
    """One kernel, in the form in which it is to be compiled.

    module, name: where the `@triton.jit` function lives.  types: argument -> Triton type ("*fp32", "i64", ...).
    constants: constexpr arguments.  aligned: addresses and sizes that are multiples of 16.  flags, flags_name: the
    argument FLAGS, and its class in the module.
    """

    module: str
    name: str
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    flags: dict[str, Any] = field(default_factory=dict)
    flags_name: str = ""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made: PTX and SASS (NVIDIA) or the assembly (AMD); shared memory in bytes.

    registers: 32-bit vector registers per thread.
    """

    assembly: str
    sass: str
    shared: int
    registers: int

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


def compile_offline(kernel: Kernel, *targets: str) -> dict[str, Compiled]:
    """Compile for targets ("backend:architecture:warp size"); raises AssertionError with the compiler's words."""
    return compile_all({"": (kernel, targets)})[""]


def compile_all(kernels: dict[str, tuple[Kernel, tuple[str, ...]]]) -> dict[str, dict[str, Compiled]]:
    """Compile several kernels, each for its targets, in one subprocess; see `compile_offline`."""
    with tempfile.TemporaryDirectory() as cache:
        env = compiler_environment() | {
            "TRITON_CACHE_DIR": cache,
            "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
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
    if kernel.flags:
        flags = {**kernel.flags}
        if "TILE" in flags:  # one 16-byte vector per thread of four warps, as the launches have it
            flags["TILE"] *= int(warp_size) // 32
        constants["FLAGS"] = getattr(module, kernel.flags_name)(**flags)
    source = ASTSource(
        fn=fn,
        signature={name: kernel.types.get(name, "constexpr") for name in fn.arg_names},
        constexprs={(fn.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in kernel.aligned},
    )
    target = GPUTarget(backend, int(architecture) if backend == "cuda" else architecture, int(warp_size))
    options = {"num_warps": kernel.num_warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=target, options=options)
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
    }


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    request = json.load(sys.stdin)
    answers = {
        name: {target: _compile(Kernel(**kernel), target) for target in targets}
        for name, (kernel, targets) in request.items()
    }
    print(json.dumps(answers))
