"""All threads of a launch, one basic block at a time: control flow, barriers, shuffles, and access to memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from tests.emulated_gpu.arithmetic import DTYPES, compute, constant, operand_dtypes, read
from tests.emulated_gpu.memory import Fault, Memory
from tests.emulated_gpu.ordering import ADD, READ, Accesses
from tests.emulated_gpu.ptx import Instruction, Module

WARP = 32
_REGISTERS = {"%p": np.dtype(bool), "%rs": np.dtype(np.uint16), "%r": np.dtype(np.uint32), "%rd": np.dtype(np.uint64)}


class Launch:
    """One launch of a kernel on a grid of ``width`` times ``height`` blocks of threads.

    Those that are least advanced go on first, so that the threads of a warp meet again. Another order would lead to the
    same where `Accesses.check` finds nothing, as integers that are added up may be added in any order.

    Args:
        arguments: integers, as many as the kernel has parameters.
        shared_bytes: shared memory of a block of threads.
    """

    def __init__(self, module: Module, width: int, height: int, arguments: list[int], shared_bytes: int) -> None:
        self._module = module
        self._arguments = dict(zip(module.parameters, arguments, strict=True))
        n_blocks = width * height
        n = n_blocks * module.threads
        self._threads = np.arange(n)
        self._block_of = self._threads // module.threads
        self._warp_of = self._threads // WARP
        self._special = {
            "%tid.x": (self._threads % module.threads).astype(np.uint32),
            "%ctaid.x": (self._block_of % width).astype(np.uint32),
            "%ctaid.y": (self._block_of // width).astype(np.uint32),
            "%nctaid.x": np.full(n, width, np.uint32),
            "%nctaid.y": np.full(n, height, np.uint32),
        }
        self._registers: dict[str, np.ndarray] = {}
        self._shared_bytes = shared_bytes
        self._shared = torch.zeros(n_blocks, shared_bytes // 16 * 16 + 16, dtype=torch.uint8)  # a row for each block
        self._shared_at = self._shared.data_ptr() + self._block_of * self._shared.shape[1]
        self._memory = Memory()  # of all tensors, that one among them
        self._accesses = {"global": Accesses(), "shared": Accesses()}
        self._barriers = np.zeros(n_blocks, np.int32)  # that a block has passed
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
                index = int(self._at[runs].min())
                self._run_block(index, runs & (self._at == index))
        for accesses in self._accesses.values():
            accesses.check()

    def _run_block(self, index: int, active: np.ndarray) -> None:
        self._at[active] = index + 1
        for instruction in self._module.blocks[index]:
            threads = active
            if instruction.predicate is not None:
                register, negated = instruction.predicate
                threads = active & (self._register(register) ^ negated)
            _HANDLERS.get(instruction.base, Launch._compute)(self, instruction, threads)

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

    def _set_some(self, register: str, some: np.ndarray, threads: np.ndarray) -> None:
        """From the values of the threads that take part."""
        values = np.zeros(len(self._threads), some.dtype)
        values[threads] = some
        self._set(register, values, threads)

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
        _require(instruction, instruction.name == ("bar", "sync") and instruction.operands == ("0",))
        self._waits |= threads
        arrived = np.logical_and.reduce(self._waits.reshape(len(self._barriers), -1), axis=1)
        self._barriers += arrived
        self._waits &= ~arrived[self._block_of]

    # Exchange within a warp.

    def _whole_warps(self, instruction: Instruction, threads: np.ndarray) -> None:
        together = threads.reshape(-1, WARP)
        if (together.any(axis=1) != together.all(axis=1)).any():
            raise Fault(f"{instruction.source}: {'.'.join(instruction.name)} without some threads of the warp")

    def _shuffle(self, instruction: Instruction, threads: np.ndarray) -> None:
        self._whole_warps(instruction, threads)
        destination, source, distance, clamp, _ = (str(x) for x in instruction.operands)
        mode = instruction.name[2]
        _require(instruction, mode in ("bfly", "idx") and clamp == "31")
        by, lane = self._value(distance, DTYPES["u32"]).astype(np.int64), self._threads % WARP
        of = self._threads - lane + (lane ^ by if mode == "bfly" else by) % WARP
        self._set(destination, self._value(source, DTYPES["u32"])[of], threads)

    def _reduce_warp(self, instruction: Instruction, threads: np.ndarray) -> None:
        self._whole_warps(instruction, threads)
        destination, source, _ = (str(x) for x in instruction.operands)
        dtype = DTYPES[instruction.type]
        values = self._value(source, dtype).reshape(-1, WARP)
        reduce = {"add": np.add, "min": np.minimum, "max": np.maximum}[instruction.name[2]].reduce
        self._set(destination, np.repeat(reduce(values, axis=1, dtype=dtype), WARP), threads)

    # Memory.

    def _addresses(self, instruction: Instruction, threads: np.ndarray, size: int) -> np.ndarray:
        """Where the threads that take part touch ``size`` bytes each, checked."""
        assert instruction.address is not None
        base, offset = instruction.address
        source = _where(instruction)
        if "shared" in instruction.name:
            at = self._value(base, DTYPES["u32"])[threads].astype(np.int64) + offset
            if (at < 0).any() or (at + size > self._shared_bytes).any():
                raise Fault(f"{source}: {size} bytes at {at.max()} of {self._shared_bytes} bytes of shared memory")
            at += self._shared_at[threads]
        else:
            at = self._value(base, DTYPES["u64"])[threads].astype(np.int64) + offset
        self._memory.check(at, size, source)
        return at

    def _note(
        self, instruction: Instruction, threads: np.ndarray, at: np.ndarray, size: int, done: int | np.ndarray
    ) -> None:
        blocks = self._block_of[threads]
        who = blocks, self._barriers[blocks], self._warp_of[threads]
        space = "shared" if "shared" in instruction.name else "global"
        self._accesses[space].note(at, size, who, done, _where(instruction))

    def _load(self, instruction: Instruction, threads: np.ndarray) -> None:
        dtype, (operand, *_) = DTYPES[instruction.type], instruction.operands
        registers = operand if isinstance(operand, tuple) else (operand,)
        if instruction.name[1] == "param":
            assert instruction.address is not None
            value = self._arguments[instruction.address[0]]
            return self._set(registers[0], np.full(len(self._threads), constant(str(value), dtype)), threads)
        at = self._addresses(instruction, threads, dtype.itemsize * len(registers))
        self._note(instruction, threads, at, dtype.itemsize * len(registers), READ)
        for i, register in enumerate(registers):
            self._set_some(register, self._memory.load(at + i * dtype.itemsize, dtype.itemsize), threads)

    def _store(self, instruction: Instruction, threads: np.ndarray) -> None:
        dtype, (operand, *_) = DTYPES[f"u{instruction.type[1:]}"], instruction.operands
        registers = operand if isinstance(operand, tuple) else (operand,)
        at = self._addresses(instruction, threads, dtype.itemsize * len(registers))
        for i, register in enumerate(registers):
            place, values = at + i * dtype.itemsize, self._value(register, dtype)[threads]
            self._memory.store(place, values, _where(instruction))
            self._note(instruction, threads, place, dtype.itemsize, values)

    def _load_matrix(self, instruction: Instruction, threads: np.ndarray) -> None:
        """Four matrices of 8 rows of 16 bytes: lane 8 i + j holds the address of row j of the i-th.

        Lane t gets word t of each.
        """
        _require(instruction, instruction.name == ("ldmatrix", "sync", "aligned", "m8n8", "x4", "shared", "b16"))
        self._whole_warps(instruction, threads)
        rows = np.zeros(len(self._threads), np.int64)
        rows[threads] = self._addresses(instruction, threads, 16)
        lane = self._threads % WARP
        for i, register in enumerate(instruction.operands[0]):
            words = (rows[self._threads - lane + 8 * i + lane // 4] + 4 * (lane % 4))[threads]
            self._note(instruction, threads, words, 4, READ)
            self._set_some(register, self._memory.load(words, 4), threads)

    def _atomic(self, instruction: Instruction, threads: np.ndarray) -> None:
        """atom, and red, which does not say what was there."""
        _require(instruction, instruction.name[1:5] == ("global", "gpu", "relaxed", "add"))
        dtype, (*destination, operand) = DTYPES[instruction.type], instruction.operands
        at = self._addresses(instruction, threads, dtype.itemsize)
        self._note(instruction, threads, at, dtype.itemsize, ADD)
        found = self._memory.add(at, self._value(str(operand), dtype)[threads])
        for register in destination:
            self._set_some(str(register), found, threads)


def _where(instruction: Instruction) -> str:
    return f"{instruction.source} ({'.'.join(instruction.name)})"


def _require(instruction: Instruction, known: bool) -> None:
    if not known:
        raise NotImplementedError(_where(instruction))


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
