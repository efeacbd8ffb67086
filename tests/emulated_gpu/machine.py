"""All threads of a launch, one basic block at a time: control flow, barriers, shuffles, and access to memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tests.emulated_gpu import ordering
from tests.emulated_gpu.arithmetic import DTYPES, compute, constant, operand_dtypes, read
from tests.emulated_gpu.counting import Counter
from tests.emulated_gpu.memory import Fault, GlobalMemory, SharedMemory, Who
from tests.emulated_gpu.ordering import Ordering
from tests.emulated_gpu.ptx import Instruction, Module

WARP = 32
_REGISTERS = {"%p": np.dtype(bool), "%rs": np.dtype(np.uint16), "%r": np.dtype(np.uint32), "%rd": np.dtype(np.uint64)}


class Launch:
    """One launch of a kernel, on a grid of one or two dimensions.

    Args:
        n_blocks: of all dimensions together.
        width: of the first dimension; None: there is only that one.
        arguments: integers, as many as the kernel has parameters.
        shared_bytes: shared memory of a block of threads.
        rng: which warps go on first wherever there is a choice; None: the least advanced, all together.
        checks_order: look for accesses that nothing orders, too.
        counter: counts what is executed and moved.
    """

    def __init__(
        self, module: Module, n_blocks: int, arguments: list[int], shared_bytes: int, memory: GlobalMemory,
        rng: np.random.Generator | None = None, checks_order: bool = True, counter: Counter | None = None,
        width: int | None = None,
    ) -> None:  # fmt: skip
        if len(arguments) != len(module.parameters):
            raise ValueError(f"{module.name} has {len(module.parameters)} parameters, got {len(arguments)} arguments")
        self._module, self._n_blocks, self._rng, self._counter = module, n_blocks, rng, counter
        self._arguments = dict(zip(module.parameters, arguments, strict=True))
        n = n_blocks * module.threads
        self._threads = np.arange(n)
        self._block_of = self._threads // module.threads
        self._warp_of = self._threads // WARP
        self._warps_per_block = module.threads // WARP
        self._special = {
            "%tid.x": (self._threads % module.threads).astype(np.uint32),
            "%ctaid.x": (self._block_of % (width or n_blocks)).astype(np.uint32),
            "%ctaid.y": (self._block_of // (width or n_blocks)).astype(np.uint32),
            "%nctaid.x": np.full(n, width or n_blocks, np.uint32),
            "%nctaid.y": np.full(n, n_blocks // (width or n_blocks), np.uint32),
            "%laneid": (self._threads % WARP).astype(np.uint32),
        }
        self._registers: dict[str, np.ndarray] = {}
        self._memory = memory
        self._shared = SharedMemory(n_blocks, shared_bytes, self._warps_per_block, checks_order)
        self._barriers = np.zeros(n_blocks, np.int32)  # that a block has passed
        self._ordering = Ordering(n_blocks, self._warps_per_block) if checks_order else None
        self._at = np.zeros(n, np.int32)  # the basic block of a thread; past the last one: it has left
        self._waits = np.zeros(n, bool)

    def run(self) -> None:
        """Run it to its end.

        Raises:
            Fault: see `emulated_gpu`.
            NotImplementedError: an instruction that is not known here.
        """
        end = len(self._module.blocks)
        with np.errstate(all="ignore"):
            while (self._at < end).any():
                runs = (self._at < end) & ~self._waits
                if not runs.any():
                    raise Fault(f"{self._module.name}: some warps wait at a barrier for warps that have left")
                self._run_block(*self._choose(runs))
        if self._ordering is not None:
            self._ordering.check()

    def _choose(self, runs: np.ndarray) -> tuple[int, np.ndarray]:
        """A basic block, and the threads that run it: of each warp those that are least advanced, which rejoin so."""
        far = np.iinfo(np.int32).max
        least = np.where(runs, self._at, far).reshape(-1, WARP).min(axis=1)
        if self._rng is None:
            chosen = least.min()
            warps = least == chosen
        else:
            chosen = self._rng.choice(np.unique(least[least < far]))
            warps = least == chosen
            some = warps & (self._rng.random(len(warps)) < 0.5)
            warps = some if some.any() else warps
        return int(chosen), runs & (self._at == chosen) & np.repeat(warps, WARP)

    def _run_block(self, index: int, active: np.ndarray) -> None:
        self._at[active] = index + 1
        if self._counter is not None:
            self._counter.instructions += int(active.sum()) * len(self._module.blocks[index])
        for instruction in self._module.blocks[index]:
            threads = active
            if instruction.predicate is not None:
                register, negated = instruction.predicate
                threads = active & (self._register(register) ^ negated)
            handler = _HANDLERS.get(instruction.base)
            if handler is not None:
                handler(self, instruction, threads)
            else:
                self._compute(instruction, threads)

    # Registers.

    def _value(self, operand: str, dtype: np.dtype) -> np.ndarray:
        if operand in self._special:
            return read(self._special[operand], dtype)
        if operand.startswith("%"):
            return read(self._register(operand), dtype)
        if operand[0].isdigit() or operand[0] == "-":
            return np.full(len(self._threads), constant(operand, dtype))
        return np.zeros(len(self._threads), dtype)  # a symbol: shared memory, which begins at 0

    def _register(self, name: str) -> np.ndarray:
        """What a register holds; garbage before it is written."""
        if name not in self._registers:
            dtype = _REGISTERS[name.rstrip("0123456789")]
            self._registers[name] = np.full(len(self._threads), 0xA5A5A5A5A5A5A5A5 >> (64 - 8 * dtype.itemsize), dtype)
        return self._registers[name]

    def _set(self, register: str, values: np.ndarray, threads: np.ndarray) -> None:
        if register == "_":
            return
        dtype = _REGISTERS[register.rstrip("0123456789")]
        values = values if dtype.kind == "b" else read(values, dtype)
        self._registers[register] = values if threads.all() else np.where(threads, values, self._register(register))

    def _compute(self, instruction: Instruction, threads: np.ndarray) -> None:
        destination, *sources = instruction.operands
        if instruction.base == "mov" and isinstance(destination, tuple):
            self._unpack(destination, self._value(str(sources[0]), DTYPES[instruction.type]), threads)
        elif instruction.base == "mov" and isinstance(sources[0], tuple):
            self._set(str(destination), self._pack(sources[0], DTYPES[instruction.type]), threads)
        elif instruction.type == "f16x2" and instruction.base == "setp":
            self._compare_halves(instruction, threads)
        else:
            dtypes = operand_dtypes(instruction)
            operands = [self._value(str(x), dtype) for x, dtype in zip(sources, dtypes, strict=True)]
            self._set(str(destination), compute(instruction, operands), threads)

    def _unpack(self, registers: tuple[str, ...], values: np.ndarray, threads: np.ndarray) -> None:
        parts = values.view(f"u{values.dtype.itemsize // len(registers)}").reshape(len(values), -1)
        for register, part in zip(registers, parts.T, strict=True):
            self._set(register, part.copy(), threads)

    def _pack(self, registers: tuple[str, ...], dtype: np.dtype) -> np.ndarray:
        part = np.dtype(f"u{dtype.itemsize // len(registers)}")
        return np.stack([self._value(r, part) for r in registers], axis=1).view(dtype)[:, 0]

    def _compare_halves(self, instruction: Instruction, threads: np.ndarray) -> None:
        """Two comparisons, of the low and of the high halves of two words."""
        low, high, *sources = (str(x) for x in instruction.operands)
        single = replace(instruction, name=(*instruction.name[:-1], "f16"))
        words = [self._value(x, DTYPES["u32"]) for x in sources]
        for register, shift in ((low, 0), (high, 16)):
            halves = [(w >> shift).astype(np.uint16).view(np.float16) for w in words]
            self._set(register, compute(single, halves), threads)

    # Control flow.

    def _branch(self, instruction: Instruction, threads: np.ndarray) -> None:
        self._at[threads] = self._module.labels[str(instruction.operands[0])]

    def _leave(self, instruction: Instruction, threads: np.ndarray) -> None:
        self._at[threads] = len(self._module.blocks)

    def _barrier(self, instruction: Instruction, threads: np.ndarray) -> None:
        if instruction.name == ("bar", "warp", "sync"):
            return self._whole_warps(instruction, threads)
        if instruction.name != ("bar", "sync") or instruction.operands != ("0",):
            raise NotImplementedError(f"{'.'.join(instruction.name)}, at {instruction.source}")
        self._waits |= threads
        arrived = np.logical_and.reduce(self._waits.reshape(self._n_blocks, -1), axis=1)
        for block in np.flatnonzero(arrived):
            self._barriers[block] += 1
            if self._ordering is not None:
                self._ordering.barrier(int(block))
        self._waits &= ~arrived[self._block_of]

    # Exchange within a warp.

    def _whole_warps(self, instruction: Instruction, threads: np.ndarray) -> None:
        together = threads.reshape(-1, WARP)
        if (together.any(axis=1) != together.all(axis=1)).any():
            raise Fault(f"{instruction.source}: {'.'.join(instruction.name)} without some threads of the warp")

    def _shuffle(self, instruction: Instruction, threads: np.ndarray) -> None:
        self._whole_warps(instruction, threads)
        mode = instruction.name[2]
        destination, source, distance, clamp, _ = (str(x) for x in instruction.operands)
        if (mode, clamp) not in (("bfly", "31"), ("up", "0"), ("idx", "31")):
            raise NotImplementedError(f"{'.'.join(instruction.name)} with {clamp}, at {instruction.source}")
        lane = self._threads % WARP
        by = self._value(distance, DTYPES["u32"]).astype(np.int64)
        of = {"bfly": lane ^ by, "up": np.where(lane >= by, lane - by, lane), "idx": by}[mode]
        self._set(destination, self._value(source, DTYPES["u32"])[self._threads - lane + of % WARP], threads)

    def _reduce_warp(self, instruction: Instruction, threads: np.ndarray) -> None:
        self._whole_warps(instruction, threads)
        destination, source, _ = (str(x) for x in instruction.operands)
        dtype = DTYPES[instruction.type]
        values = self._value(source, dtype).reshape(-1, WARP)
        reduce = {"add": np.add, "min": np.minimum, "max": np.maximum}[instruction.name[2]].reduce
        self._set(destination, np.repeat(reduce(values, axis=1, dtype=dtype), WARP), threads)

    # Memory.

    def _address(self, instruction: Instruction, threads: np.ndarray) -> np.ndarray:
        assert instruction.address is not None
        base, offset = instruction.address
        width = DTYPES["u32"] if instruction.name[1] == "shared" else DTYPES["u64"]
        return self._value(base, width)[threads].astype(np.int64) + offset

    def _load(self, instruction: Instruction, threads: np.ndarray) -> None:
        space, dtype = instruction.name[1], DTYPES[instruction.type]
        operand = instruction.operands[0]
        registers = operand if isinstance(operand, tuple) else (operand,)
        if space == "param":
            assert instruction.address is not None
            value = self._arguments[instruction.address[0]]
            return self._set(registers[0], np.full(len(self._threads), constant(str(value), dtype)), threads)
        if not threads.any():
            return self._keep(registers, dtype)
        at = self._address(instruction, threads)
        source = self._check(instruction, threads, at, dtype.itemsize * len(registers), ordering.READ)
        for i, register in enumerate(registers):
            place = at + i * dtype.itemsize
            found = (
                self._shared.load(self._who(threads), place, dtype.itemsize, source)
                if space == "shared"
                else self._memory.load(place, dtype.itemsize)
            )
            values = np.zeros(len(self._threads), found.dtype)
            values[threads] = found
            self._set(register, values, threads)

    def _keep(self, registers: tuple[str, ...], dtype: np.dtype) -> None:
        for register in registers:
            self._set(register, np.zeros(len(self._threads), f"u{dtype.itemsize}"), np.zeros_like(self._waits))

    def _store(self, instruction: Instruction, threads: np.ndarray) -> None:
        space, dtype = instruction.name[1], DTYPES[f"u{instruction.type[1:]}"]
        operand = instruction.operands[0]
        registers = operand if isinstance(operand, tuple) else (operand,)
        if not threads.any():
            return
        at = self._address(instruction, threads)
        source = self._check(instruction, threads, at, dtype.itemsize * len(registers), ordering.WRITE)
        for i, register in enumerate(registers):
            place, values = at + i * dtype.itemsize, self._value(register, dtype)[threads]
            if space == "shared":
                self._shared.store(self._who(threads), place, values, source)
            else:
                self._memory.store(place, values)

    def _load_matrix(self, instruction: Instruction, threads: np.ndarray) -> None:
        """Four matrices of 8 rows of 16 bytes: lane 8 i + j holds the address of row j of the i-th.

        Lane t gets word t of each.
        """
        if instruction.name != ("ldmatrix", "sync", "aligned", "m8n8", "x4", "shared", "b16"):
            raise NotImplementedError(".".join(instruction.name))
        self._whole_warps(instruction, threads)
        assert instruction.address is not None
        base, offset = instruction.address
        rows = self._value(base, DTYPES["u32"]).astype(np.int64) + offset
        source = self._check(instruction, threads, rows[threads], 16, ordering.READ)
        lane = self._threads % WARP
        for i, register in enumerate(instruction.operands[0]):
            words = rows[self._threads - lane + 8 * i + lane // 4] + 4 * (lane % 4)
            values = np.zeros(len(self._threads), np.uint32)
            values[threads] = self._shared.load(self._who(threads), words[threads], 4, source)
            self._set(register, values, threads)

    def _atomic(self, instruction: Instruction, threads: np.ndarray) -> None:
        """atom and red: name[1:] is (global, gpu, semantics, add, type)."""
        if instruction.name[1:3] != ("global", "gpu") or instruction.name[4] != "add":
            raise NotImplementedError(f"{'.'.join(instruction.name)}, at {instruction.source}")
        semantics, dtype = instruction.name[3], DTYPES[f"u{instruction.type[1:]}"]
        returns = instruction.base == "atom"
        *destination, operand = (x[0] if isinstance(x, tuple) else x for x in instruction.operands)
        if not threads.any():
            return self._keep(tuple(destination), dtype) if returns else None
        at = self._address(instruction, threads)
        self._check(instruction, threads, at, dtype.itemsize, ordering.ATOMIC)
        found = self._memory.add(at, self._value(operand, dtype)[threads])
        if semantics == "acq_rel" and self._ordering is not None:
            for warp, address in zip(self._warp_of[threads], at, strict=True):
                self._ordering.acquire_release(int(warp), int(address))
        elif semantics not in ("acq_rel", "relaxed"):
            raise NotImplementedError(f"{'.'.join(instruction.name)}, at {instruction.source}")
        if returns:
            values = np.zeros(len(self._threads), dtype)
            values[threads] = found
            self._set(destination[0], values, threads)

    def _who(self, threads: np.ndarray) -> Who:
        blocks = self._block_of[threads]
        return Who(blocks, self._warp_of[threads] % self._warps_per_block, self._barriers[blocks])

    def _check(self, instruction: Instruction, threads: np.ndarray, at: np.ndarray, size: int, kind: int) -> str:
        """Check addresses, and keep accesses to global memory for what else may touch the same; says where it is."""
        source = f"{instruction.source} ({'.'.join(instruction.name)})"
        if "shared" in instruction.name:
            self._shared.check(at, size, source)
        else:
            self._memory.check(at, size, source)
            if self._counter is not None:
                self._counter.note(at, kind)
            if self._ordering is not None:
                self._ordering.note(self._warp_of[threads], at, size, kind, source)
        return source


_HANDLERS: dict[str, Callable[[Launch, Instruction, np.ndarray], None]] = {
    "atom": Launch._atomic,
    "bar": Launch._barrier,
    "bra": Launch._branch,
    "ld": Launch._load,
    "ldmatrix": Launch._load_matrix,
    "red": Launch._atomic,
    "redux": Launch._reduce_warp,
    "ret": Launch._leave,
    "shfl": Launch._shuffle,
    "st": Launch._store,
}
