"""Write formulas as C++: a kind of number that records what is computed with it.

The maths of this package is written once, with operators, for numpy arrays and torch tensors (see `arrays`). A
:class:`Value` stands for a numpy scalar in it: each operation appends one C++ statement to a listing, with numpy's type
and numpy's rounding. Run on Values, a formula leaves the body of a compiled loop behind, operation for operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

#: C++ types of the kinds. A ``float``, an ``int`` and a ``bool`` are a vector of them, as the loops' frame defines it.
#: A ``word`` is a uint64 of numpy that is known to be less than 2**32, a ``wide`` one that is not; ``words`` and
#: ``wides`` are vectors of those. `multiply`, `low` and `high` of the frame lead from one to the other.
TYPES = {
    "float": "vf",
    "int": "vi",
    "bool": "vi",
    "word": "uint32_t",
    "wide": "uint64_t",
    "words": "words",
    "wides": "wides",
}
_DTYPES: dict[Any, str] = {np.int32: "int", np.float32: "float"}
_WORD = 1 << 32


class Value:
    """A number inside a compiled loop.

    Args:
        listing: statements so far; operations append to it.
        kind: key of `TYPES`.
        name: the C++ variable that holds it.
    """

    def __init__(self, listing: list[str], kind: str, name: str) -> None:
        self.listing, self.kind, self.name = listing, kind, name

    def _new(self, kind: str, expression: str) -> Value:
        name = f"v{len(self.listing)}"
        self.listing.append(f"const {TYPES[kind]} {name} = {expression};")
        return Value(self.listing, kind, name)

    def _operand(self, other: Any) -> str:
        if isinstance(other, Value):
            if self.kind.rstrip("s") != other.kind.rstrip("s"):
                raise TypeError(f"operands of kinds {self.kind} and {other.kind}")
            return other.name
        if self.kind == "float":
            return f"{float(np.float32(other)).hex()}f"
        if isinstance(other, int) and self.kind == "int":
            return f"(int32_t)({other}LL)"
        if isinstance(other, int) and self.kind.startswith("word") and 0 <= other < _WORD:
            return f"{other}u"
        raise TypeError(f"operands of kind {self.kind} and {other!r}")

    def _arithmetic(self, symbol: str, other: Any) -> Value:
        if self.kind not in ("float", "int"):
            raise TypeError(f"{symbol} of kind {self.kind}")
        return self._new(self.kind, f"{self.name} {symbol} {self._operand(other)}")

    def _bitwise(self, symbol: str, other: Any) -> Value:
        kinds = {self.kind, other.kind} if isinstance(other, Value) else {self.kind}
        return self._new("words" if "words" in kinds else self.kind, f"{self.name} {symbol} {self._operand(other)}")

    def __add__(self, other: Any) -> Value:
        if self.kind == "word":
            return self._new("wide", f"uint64_t({self.name}) + {self._operand(other)}")
        return self._arithmetic("+", other)

    def __sub__(self, other: Any) -> Value:
        return self._arithmetic("-", other)

    def __mul__(self, other: Any) -> Value:
        if self.kind.startswith("word"):
            return self._new(self.kind.replace("word", "wide"), f"multiply({self.name}, {self._operand(other)})")
        return self._arithmetic("*", other)

    def __truediv__(self, other: Any) -> Value:
        if self.kind != "float":
            raise TypeError(f"/ of kind {self.kind}")
        return self._arithmetic("/", other)

    def __neg__(self) -> Value:
        return self._new(self.kind, f"-{self.name}")

    def __and__(self, other: Any) -> Value:
        if self.kind.startswith("wide") and other == _WORD - 1:
            return self._new(self.kind.replace("wide", "word"), f"low({self.name})")
        return self._bitwise("&", other)

    def __or__(self, other: Any) -> Value:
        return self._bitwise("|", other)

    def __xor__(self, other: Any) -> Value:
        return self._bitwise("^", other)

    def __lshift__(self, bits: int) -> Value:
        if self.kind != "int":
            raise TypeError(f"<< of kind {self.kind}")
        return self._new("int", f"{self.name} << {bits}")

    def __rshift__(self, bits: int) -> Value:
        if self.kind.startswith("wide") and bits == 32:
            return self._new(self.kind.replace("wide", "word"), f"high({self.name})")
        if self.kind != "int":
            raise TypeError(f">> of kind {self.kind}")
        return self._new("int", f"{self.name} >> {bits}")

    def __lt__(self, other: Any) -> Value:
        return self._new("bool", f"{self.name} < {self._operand(other)}")

    def __abs__(self) -> Value:
        if self.kind != "float":
            raise TypeError(f"abs of kind {self.kind}")
        return self._new("float", f"absolute({self.name})")

    def __gt__(self, other: Any) -> Value:
        return self._new("bool", f"{self.name} > {self._operand(other)}")

    def all(self) -> bool:
        """False: a compiled loop asks every element."""
        return False

    def astype(self, dtype: type) -> Value:
        """Conversion as numpy does it: an integer to the nearest fp32."""
        kind = _DTYPES[dtype]
        if (self.kind, kind) != ("int", "float"):
            raise TypeError(f"kind {self.kind} to {kind}")
        return self._new(kind, f"__builtin_convertvector({self.name}, {TYPES[kind]})")

    def view(self, dtype: type) -> Value:
        """The same 32 bits as another type."""
        kind = _DTYPES[dtype]
        return self._new(kind, f"({TYPES[kind]})({self.name})")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Numpy calls this for its functions of arrays; one that is not listed here is a TypeError."""
        return NotImplemented if method != "__call__" or kwargs else _call(ufunc, inputs)

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        """The same for numpy's other functions."""
        return NotImplemented if kwargs else _call(function, args)


def _call(function: Callable[..., Any], args: Any) -> Any:
    return _FUNCTIONS[function](*args) if function in _FUNCTIONS else NotImplemented


def _arm(x: Value, other: Any) -> str:
    """An operand of ``?:``, which does not spread a number over a vector by itself."""
    return x._operand(other) if isinstance(other, Value) else f"splat({x._operand(other)})"


def _clip(x: Value, low: Any, high: Any) -> Value:
    low, high = _arm(x, low), _arm(x, high)
    return x._new("float", f"{x.name} < {low} ? {low} : {x.name} > {high} ? {high} : {x.name}")


def _where(condition: Value, x: Value, y: Any) -> Value:
    return x._new(x.kind, f"{condition.name} ? {x.name} : {_arm(x, y)}")


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Value]] = {
    np.sqrt: lambda x: x._new("float", f"root({x.name})"),
    np.isfinite: lambda x: x._new("bool", f"is_finite({x.name})"),
    np.clip: _clip,
    np.ones_like: lambda x: x._new("float", "splat(1.0f)"),
    np.where: _where,
}
