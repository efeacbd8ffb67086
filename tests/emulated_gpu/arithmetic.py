"""What the PTX instructions of the kernels compute, on arrays of one value per thread.

Registers are unsigned integers of 16, 32 or 64 bits, or predicates (bool); an instruction's type says what it reads in
them. Floats round to nearest even without flushing denormals, and a NaN that arithmetic produces is NVIDIA's one NaN.
Instructions whose rounding NVIDIA leaves open (`.approx`, `.ftz`, `.full`) and fused multiply-adds are not here: the
kernels have none, and must not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tests.emulated_gpu.ptx import Instruction

Values = np.ndarray

_UNSIGNED = {f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)}
_SIGNED = {f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
_OTHERS = {"pred": np.dtype(bool), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f32x2": np.dtype("u8")}
DTYPES: dict[str, np.dtype] = _UNSIGNED | _SIGNED | _OTHERS


def read(values: Values, dtype: np.dtype) -> Values:
    """Register contents as a type: the low bits, if the register is wider."""
    if values.dtype.itemsize != dtype.itemsize:
        values = values.astype(f"u{dtype.itemsize}")
    return values.view(dtype) if values.dtype != dtype else values


def constant(text: str, dtype: np.dtype) -> Values:
    """A number in the program, as a type: an array without dimensions."""
    if text.startswith(("0f", "0F")):
        return np.array(int(text[2:], 16), np.uint32).view(dtype)
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.array(value != 0)
    return np.array(value & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").view(dtype)


def compute(instruction: Instruction, operands: list[Values]) -> Values:
    """The result; operands are of `operand_dtypes`."""
    if instruction.type == "f32x2":  # two floats to a register
        single = replace(instruction, name=(*instruction.name[:-1], "f32"))
        return compute(single, [x.view(np.float32) for x in operands]).view(np.uint64)
    values = _OPERATIONS[instruction.base](instruction, *operands)
    return values if instruction.base in ("abs", "mov", "neg", "selp") else _one_nan(values)


def _one_nan(values: Values) -> Values:
    if values.dtype.kind != "f":
        return values
    return np.where(np.isnan(values), _NAN[values.dtype.itemsize].view(values.dtype), values)


def operand_dtypes(instruction: Instruction) -> list[np.dtype]:
    """What the operands that are read are, in their order.

    Raises:
        NotImplementedError: an instruction, or a rounding, that is not here.
    """
    name, base, dtype = instruction.name, instruction.base, DTYPES.get(instruction.type)
    known = _ON_FLOATS if instruction.type.startswith("f") else _OPERATIONS.keys()
    if base not in known or dtype is None or _NOT_HERE & set(name):
        raise NotImplementedError(f"{'.'.join(name)}, at {instruction.source}")
    if base in ("shl", "shr"):
        return [dtype, DTYPES["u32"]]
    if base == "selp":
        return [dtype, dtype, DTYPES["pred"]]
    if base == "bfe":
        return [dtype, DTYPES["u32"], DTYPES["u32"]]
    if base == "mad" and "wide" in name:
        return [dtype, dtype, _wider(dtype)]
    return [dtype] * (len(instruction.operands) - 1)


def _wider(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def _multiply(instruction: Instruction, a: Values, b: Values) -> Values:
    if not {"wide", "hi"} & set(instruction.name):
        return a * b
    wide = a.astype(_wider(a.dtype)) * b.astype(_wider(a.dtype))
    return wide if "wide" in instruction.name else (wide >> (8 * a.dtype.itemsize)).astype(a.dtype)


def _divide(_: Instruction, a: Values, b: Values) -> Values:
    """Integers: towards zero."""
    if a.dtype.kind == "f":
        return a / b
    quotient = (_magnitude(a) // _magnitude(b)).view(a.dtype)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def _magnitude(a: Values) -> Values:
    return np.abs(a).view(f"u{a.dtype.itemsize}")  # of the least number too


def _shift_left(_: Instruction, a: Values, n: Values) -> Values:
    bits = 8 * a.dtype.itemsize
    return np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(_: Instruction, a: Values, n: Values) -> Values:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n < bits, shifted, a.dtype.type(0))


def _select(_: Instruction, a: Values, b: Values, chosen: Values) -> Values:
    return np.where(chosen, a, b)


def _compare(instruction: Instruction, a: Values, b: Values) -> Values:
    """False where one is a NaN."""
    numbers = (a == a) & (b == b)
    return numbers if instruction.name[1] == "num" else numbers & _RELATIONS[instruction.name[1]](a, b)


def _extremum(instruction: Instruction, a: Values, b: Values) -> Values:
    """Floats: -0 is less than +0; a NaN loses."""
    least = instruction.base == "min"
    chosen = np.fmin(a, b) if least else np.fmax(a, b)
    if a.dtype.kind != "f":
        return chosen
    x, y = a.view(np.uint32), b.view(np.uint32)
    return np.where((a == 0) & (b == 0), ((x | y) if least else (x & y)).view(a.dtype), chosen)


def _convert(instruction: Instruction, a: Values, low: Values | None = None) -> Values:
    """Two values are packed into one word, the first above the second."""
    if low is not None and instruction.name[1:] == ("rn", "f16x2", "f32"):
        halves = [_one_nan(x.astype(np.float16)).view(np.uint16).astype(np.uint32) for x in (a, low)]
        return (halves[0] << 16) | halves[1]
    return a.astype(DTYPES[instruction.name[-2]])


def _permute(_: Instruction, a: Values, b: Values, selectors: Values) -> Values:
    """Bytes of two words; bit 3 of a selector repeats the byte's sign."""
    both = (b.astype(np.uint64) << 32) | a
    result = np.zeros_like(both)
    for place in range(4):
        selector = (selectors.astype(np.uint64) >> (4 * place)) & 0xF
        byte = (both >> (8 * (selector & 7))) & 0xFF
        byte = np.where(selector & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint64)
        result |= byte << (8 * place)
    return result.astype(np.uint32)


def _extract(_: Instruction, a: Values, start: Values, length: Values) -> Values:
    """A field of bits within the register; signed: with the sign of its highest one."""
    bits = 8 * a.dtype.itemsize
    return (a << (bits - start - length).astype(a.dtype)) >> (bits - length).astype(a.dtype)


#: roundings and modes of instructions
_NOT_HERE = {"NaN", "approx", "ftz", "full", "sat", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"}
_ON_FLOATS = {"abs", "add", "cvt", "div", "max", "min", "mov", "mul", "neg", "selp", "setp", "sqrt", "sub"}
_NAN: dict[int, Values] = {2: np.array(0x7FFF, np.uint16), 4: np.array(0x7FFFFFFF, np.uint32)}
_RELATIONS: dict[str, Callable[[Values, Values], Values]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_OPERATIONS: dict[str, Callable[..., Values]] = {
    "abs": lambda _, a: np.abs(a),
    "add": lambda _, a, b: a + b,
    "and": lambda _, a, b: a & b,
    "bfe": _extract,
    "cvt": _convert,
    "div": _divide,
    "mad": lambda instruction, a, b, c: _multiply(instruction, a, b) + c,
    "max": _extremum,
    "min": _extremum,
    "mov": lambda _, a: a.copy(),
    "mul": _multiply,
    "neg": lambda _, a: -a,
    "not": lambda _, a: ~a,
    "or": lambda _, a, b: a | b,
    "popc": lambda _, a: np.bitwise_count(a).astype(np.uint32),
    "prmt": _permute,
    "rem": lambda _, a, b: a - _divide(_, a, b) * b,
    "selp": _select,
    "setp": _compare,
    "shl": _shift_left,
    "shr": _shift_right,
    "sqrt": lambda _, a: np.sqrt(a),
    "sub": lambda _, a, b: a - b,
    "xor": lambda _, a, b: a ^ b,
}
