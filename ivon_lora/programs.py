"""Run a formula as numpy passes over memory that is there already.

Numpy gives every operation of an expression a new array. For blocks of some 100 kB that memory comes fresh from the
operating system and costs more than the arithmetic. A :class:`Program` is a formula of this package, recorded once with
symbols for its arguments (the formulas are made of operators and the few functions of `arrays`), as a list of numpy
calls that write into a few rows of a :class:`Scratch`. The calls are those that numpy would make for the expression, so
the bits are the same. An operation that a formula repeats is called once.

Where a formula chooses between new and old values (`arrays.keep`), a program may assume that all are new: it checks and
gives up (:class:`BrokenAssumption`) where they are not, and needs no memory and no passes for the choice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FLOAT, INT, BOOL = "float", "int", "bool"


class BrokenAssumption(Exception):
    """A condition that a program assumed to hold everywhere does not; nothing but scratch memory has been written."""


class Scratch:
    """Memory that grows to the largest request, and stays."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        #: changes when the memory has been replaced by a larger one
        self.identity = 0

    def rows(self, count: int, row_bytes: int) -> np.ndarray:
        """uint8 (count, row_bytes), each row at a multiple of 64 bytes; of the same memory as every other call."""
        stride = -(-row_bytes // 64) * 64
        if self._memory.nbytes < count * stride + 64:
            self._memory = np.empty(count * stride + 64, np.uint8)
            self.identity = next(_identities)
        first = -self._memory.ctypes.data % 64
        return self._memory[first : first + count * stride].reshape(count, stride)[:, :row_bytes]


_identities = itertools.count(1)


class Symbol:
    """An array, or a number, inside a formula that is being recorded.

    Args:
        record: where operations are recorded.
        kind: `FLOAT`, `INT` (int32) or `BOOL`.
        register: its number.
        is_number: it is one number, not an array.
        root: the register whose memory it looks at.
    """

    def __init__(self, record: _Record, kind: str, register: int, is_number: bool = False, root: int = -1) -> None:
        self.record, self.kind, self.register, self.is_number = record, kind, register, is_number
        self.root = register if root < 0 else root

    def _call(self, function: Callable[..., Any], *operands: Any, kind: str | None = None) -> Symbol:
        return self.record.call(function, operands, self.kind if kind is None else kind)

    def __add__(self, other: Any) -> Symbol:
        return self._call(np.add, self, other)

    def __sub__(self, other: Any) -> Symbol:
        return self._call(np.subtract, self, other)

    def __mul__(self, other: Any) -> Symbol:
        return self._call(np.multiply, self, other)

    def __truediv__(self, other: Any) -> Symbol:
        return self._call(np.divide, self, other)

    def __neg__(self) -> Symbol:
        return self._call(np.negative, self)

    def __and__(self, other: Any) -> Symbol:
        return self._call(np.bitwise_and, self, other)

    def __or__(self, other: Any) -> Symbol:
        return self._call(np.bitwise_or, self, other)

    def __xor__(self, other: Any) -> Symbol:
        return self._call(np.bitwise_xor, self, other)

    def __lshift__(self, other: Any) -> Symbol:
        return self._call(np.left_shift, self, other)

    def __rshift__(self, other: Any) -> Symbol:
        return self._call(np.right_shift, self, other)

    def __gt__(self, other: Any) -> Symbol:
        return self._call(np.greater, self, other, kind=BOOL)

    def all(self) -> bool:
        """Whether the record assumes so; if not, the recorded choice asks when it runs."""
        if self.record.assuming:
            self.record.require(self)
        return self.record.assuming

    def astype(self, dtype: type) -> Symbol:
        """int32 to the nearest fp32."""
        if (self.kind, dtype) != (INT, np.float32):
            raise TypeError(f"kind {self.kind} to {dtype}")
        return self._call(_convert, self, kind=FLOAT)

    def view(self, dtype: Any) -> Symbol:
        """The same bits as another type."""
        return self.record.view(self, {np.float32: FLOAT, np.int32: INT}[dtype])

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Numpy calls this for its functions of arrays; one that is not listed here is a TypeError."""
        return NotImplemented if method != "__call__" or kwargs else self._function(ufunc, inputs)

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        """The same for numpy's other functions."""
        return NotImplemented if kwargs else self._function(function, args)

    def _function(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        if function is np.sqrt:
            return self._call(np.sqrt, *args)
        if function is np.isfinite:
            return self._call(np.isfinite, *args, kind=BOOL)
        if function is np.where:
            return args[1]._call(_choose, args[1], args[0], args[2])
        if function is np.clip:  # of two bounds that are not equal; NaN stays NaN
            x, low, high = args
            if low == -math.inf and high == math.inf:
                return x
            return self._call(_minimum, self._call(_maximum, x, low), high)
        return NotImplemented


def _minimum(x: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
    np.minimum(x, y, out=out)


def _maximum(x: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
    np.maximum(x, y, out=out)


def _require(condition: np.ndarray, out: np.ndarray) -> None:
    if not condition.all():
        raise BrokenAssumption


def _convert(x: np.ndarray, out: np.ndarray) -> None:
    np.copyto(out, x, casting="unsafe")


def _choose(x: np.ndarray, condition: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
    """``where(condition, x, y)``, for a condition that nearly always holds everywhere."""
    if out is not x:
        np.copyto(out, x)
    if not condition.all():
        np.copyto(out, y, where=~condition)


class _Record:
    """The calls of a formula, in order.

    Attributes:
        kinds: of each register.
        roots: the register whose memory each register looks at, itself but for views.
        calls: (function, operand registers, result register).
        number_calls: those of them that have numbers only.
        constants: register -> its number.
        views: register -> the register that it is a view of.

    Args:
        assuming: conditions of choices are assumed to hold everywhere.
    """

    def __init__(self, assuming: bool = False) -> None:
        self.assuming = assuming
        self.kinds: list[str] = []
        self.roots: list[int] = []
        self.calls: list[tuple[Callable[..., Any], tuple[int, ...], int]] = []
        self.number_calls: list[tuple[Callable[..., Any], tuple[int, ...], int]] = []
        self.constants: dict[int, Any] = {}
        self.views: dict[int, int] = {}
        self._done: dict[Hashable, Symbol] = {}

    def new(self, kind: str, is_number: bool = False, root: int = -1) -> Symbol:
        symbol = Symbol(self, kind, len(self.kinds), is_number, root)
        self.kinds.append(kind)
        self.roots.append(symbol.root)
        return symbol

    def view(self, symbol: Symbol, kind: str) -> Symbol:
        new = self.new(kind, root=symbol.root)
        self.views[new.register] = symbol.register
        return new

    def call(self, function: Callable[..., Any], operands: Sequence[Any], kind: str) -> Symbol:
        symbols = [x if isinstance(x, Symbol) else self._constant(x, operands) for x in operands]
        registers = tuple(x.register for x in symbols)
        known = self._done.get((function, registers, kind))
        if known is not None:
            return known
        numbers_only = all(x.is_number for x in symbols)
        result = self._done[function, registers, kind] = self.new(kind, is_number=numbers_only)
        calls = self.number_calls if numbers_only else self.calls
        calls.append((function, registers, result.register))
        return result

    def require(self, condition: Symbol) -> None:
        """Both conditions of an "and" rather than the "and"."""
        for function, operands, result in self.calls:
            if result == condition.register and function is np.bitwise_and:
                for register in operands:
                    self.require(Symbol(self, BOOL, register))
                return
        if (_require, (condition.register,), BOOL) not in self._done:
            self.call(_require, [condition], BOOL)

    def drop_unused(self, results: Sequence[int]) -> None:
        """Forget the calls whose results nobody reads."""
        read = {self.roots[i] for i in results}
        calls = []
        for function, operands, result in reversed(self.calls):
            if function is _require or result in read:
                calls.append((function, operands, result))
                read |= {self.roots[i] for i in operands}
        self.calls = calls[::-1]
        self.views = {view: of for view, of in self.views.items() if self.roots[view] in read}

    def _constant(self, value: Any, operands: Sequence[Any]) -> Symbol:
        kind = next(x.kind for x in operands if isinstance(x, Symbol))
        known = self._done.get((kind, repr(value)))
        if known is None:
            known = self._done[kind, repr(value)] = self.new(kind, is_number=True)
            self.constants[known.register] = value
        return known


class Program:
    """A formula as numpy calls.

    Args:
        formula: gets a symbol for each input, by position, then one for each number; returns the results.
        inputs: kinds of the arrays.
        numbers: how many numbers follow.
        dtype: of the floats.
        assuming: assume that the conditions of all choices hold everywhere.
    """

    def __init__(
        self,
        formula: Callable[..., Sequence[Symbol]],
        inputs: Sequence[str],
        numbers: int,
        dtype: Any = np.float32,
        assuming: bool = False,
    ) -> None:
        record = _Record(assuming)
        arrays = [record.new(kind) for kind in inputs]
        scalars = [record.new(FLOAT, is_number=True) for _ in range(numbers)]
        results = formula(*arrays, *scalars)
        record.drop_unused([x.register for x in results])
        self._dtypes = {FLOAT: np.dtype(dtype), INT: np.dtype(np.int32), BOOL: np.dtype(bool)}
        self._n_inputs, self._n_numbers, self._kinds = len(inputs), numbers, record.kinds
        self._constants = {r: np.asarray(x, self._dtypes[record.kinds[r]]) for r, x in record.constants.items()}
        self._number_calls, self._calls, self._views = record.number_calls, record.calls, record.views
        self._results = [x.register for x in results]
        self._rows, self.n_rows = _assign_rows(record, {x.root for x in results})
        n_arguments = len(inputs) + numbers
        changing = {r for r in range(len(record.kinds)) if record.roots[r] < n_arguments}
        changing |= {result for _, _, result in record.number_calls}
        self._changing = [bool(changing.intersection(operands)) for _, operands, _ in record.calls]
        self._registers: dict[tuple[int, int], _Bound] = {}
        self._numbers: Sequence[Any] = ()
        self._of_numbers: dict[int, np.ndarray] = {}

    def run(
        self,
        scratch: Scratch,
        size: int,
        inputs: Sequence[np.ndarray],
        numbers: Sequence[float | np.ndarray] = (),
        out: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """The results for arrays of ``size`` elements; they lie in the scratch memory until its next use.

        Args:
            numbers: one may also be an array that has a number for each element. What follows from them alone is kept
                for the next run with the same list.
            out: memory for the result of the last call, which is the formula's only one. It may be an input's, since
                nothing is read after it is written.

        Raises:
            BrokenAssumption: a program that assumes something was wrong.
        """
        bound = self._bind(scratch, size)
        registers = list(bound.registers)
        registers[: self._n_inputs] = inputs
        if numbers is not self._numbers:
            self._numbers, self._of_numbers = numbers, self._follow(numbers)
        for register, value in self._of_numbers.items():
            registers[register] = value
        for view, of in self._views.items():
            if registers[view] is None:
                registers[view] = registers[of].view(self._dtypes[self._kinds[view]])
        calls = bound.calls
        for i, operands, result in bound.unbound:
            calls[i] = calls[i][0], [*[registers[j] for j in operands], registers[result]]
        if out is not None:
            _, operands, result = self._calls[-1]
            registers[result] = out
            calls = [*calls[:-1], (calls[-1][0], [*[registers[j] for j in operands], out])]
        try:
            for function, arguments in calls:
                function(*arguments)
        finally:
            for i, _, _ in bound.unbound:
                calls[i] = calls[i][0], []  # the arrays of others are not kept
        return [registers[i] for i in self._results]

    def _follow(self, numbers: Sequence[float | np.ndarray]) -> dict[int, np.ndarray]:
        """The registers of the numbers, and of what is computed from nothing else."""
        found = {i: np.asarray(x, self._dtypes[FLOAT]) for i, x in enumerate(numbers, self._n_inputs)}
        for function, operands, result in self._number_calls:
            found[result] = np.asarray(function(*(found.get(i, self._constants.get(i)) for i in operands)))
        return found

    def _bind(self, scratch: Scratch, size: int) -> _Bound:
        """Constants and scratch memory in place."""
        bound = self._registers.get((scratch.identity, size))
        if bound is not None:
            return bound
        rows = scratch.rows(self.n_rows, size * self._dtypes[FLOAT].itemsize)
        registers: list[Any] = [None] * len(self._kinds)
        for register, constant in self._constants.items():
            registers[register] = constant
        arrays: dict[tuple[int, str], np.ndarray] = {}  # one each, by which `_choose` sees that nothing moves
        for register, row in self._rows.items():
            kind = self._kinds[register]
            dtype = self._dtypes[kind]
            if (row, kind) not in arrays:
                arrays[row, kind] = rows[row, : size * dtype.itemsize].view(dtype)
            registers[register] = arrays[row, kind]
        calls: list[tuple[Callable[..., Any], list[Any]]] = []
        unbound = []
        for i, (function, operands, result) in enumerate(self._calls):
            calls.append((function, [*[registers[j] for j in operands], registers[result]]))
            if self._changing[i]:
                unbound.append((i, operands, result))
        if len(self._registers) >= 4:  # sizes seen: full blocks, and a few last ones
            self._registers.clear()
        bound = self._registers[scratch.identity, size] = _Bound(registers, calls, unbound)
        return bound


@dataclass(frozen=True)
class _Bound:
    """A program with its memory.

    Attributes:
        registers: None for arguments.
        calls: functions with their arguments.
        unbound: those of them that need arguments of the program: place, operands and result.
    """

    registers: list[Any]
    calls: list[tuple[Callable[..., Any], list[Any]]]
    unbound: list[tuple[int, tuple[int, ...], int]]


def _assign_rows(record: _Record, kept: set[int]) -> tuple[dict[int, int], int]:
    """A row of memory for each register that a call writes, and their number; rows are used again once read.

    Args:
        kept: registers that are results.
    """
    last_read: dict[int, int] = {}
    for time, (_, operands, _) in enumerate(record.calls):
        for i in operands:
            last_read[record.roots[i]] = time
    rows: dict[int, int] = {}
    free: list[int] = []
    n_rows = 0
    for time, (function, operands, result) in enumerate(record.calls):
        of_operands = list(dict.fromkeys(record.roots[i] for i in operands))
        dead = [i for i in of_operands if i in rows and last_read[i] == time and i not in kept]
        # the result takes the memory of an operand that nobody reads again, but bools are smaller than the others
        same_size = [i for i in dead if (record.kinds[i] == BOOL) == (record.kinds[result] == BOOL)]
        if function is _choose:
            same_size = [i for i in same_size if i == record.roots[operands[0]]]
        if same_size:
            rows[result] = rows[same_size[0]]
            dead.remove(same_size[0])
        elif free:
            rows[result] = free.pop()
        else:
            rows[result], n_rows = n_rows, n_rows + 1
        free += [rows[i] for i in dead]
    for view, of in record.views.items():
        if record.roots[of] in rows:
            rows[view] = rows[record.roots[of]]
    return rows, n_rows
