"""The loops of the compiled backend as C++ source: the bodies come from the formulas, only the frame is text.

A loop runs over chunks of the parameters of a table of pointers, so hundreds of small tensors are one call and nothing
is packed or copied. The normals of a chunk live in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ivon_lora.backends.batch import ROWS
from ivon_lora.c_expressions import Value
from ivon_lora.functional._arrays import where
from ivon_lora.functional.ivon import NUMBERS, Hyper, draw_sample, estimate_curvature, ivon_step
from ivon_lora.functional.noise import box_muller, philox_4x32
from ivon_lora.loop_frame import CHECK, DRAW, FRAME, MARK, SEAL
from ivon_lora.vector_loops import copies_of, long_loop, vector_loop

#: elements per chunk, a multiple of 4
CHUNK = 1024

#: vectors of radius words, and of angle words, that noise is drawn from at once
REGISTERS = 4

#: numbers of a call, fp64 that are rounded to fp32, in this order: those of `Hyper`, and the number of samples
SCALARS = (*NUMBERS, "n_samples")

#: integers of a call: the counter's words 1 and 3, the key, and whether the normals are mirrored; then the address of
#: memory for normals that are not mirrored, how many elements of all works it holds, and whether they are there
#: already; and the address of memory for the marks of a sample, two for each chunk, or 0. A step over all chunks finds
#: marks there, or 0, and notes the works that it leaves out, because their parameters have others, as bytes
WORDS = ("c1", "c3", "k0", "k1", "mirrored", "noise", "room", "drawn_before", "marks", "left_out")

_LONG = ("noise", "room", "marks", "left_out")  # the others have 32 bits

_ROWS = ("mean", "hess", "mean_copy")  # whose numbers the frame wants


@dataclass(frozen=True)
class Loop:
    """What one compiled function does.

    Attributes:
        task: "sample", "bank" or "step".
        curvature: "price", "gradsq" or "fisher", or "none" for a step without a sample.
        step_rule: "newton" or "adam"; only a step depends on it.
        averaged: the step takes the mean with banked gradients and curvatures.
        half: parameters and gradients are bf16; else fp32.
    """

    task: str
    curvature: str = "price"
    step_rule: str = "newton"
    averaged: bool = False
    half: bool = False

    @property
    def has_noise(self) -> bool:
        """Whether the loop needs eps."""
        return self.task == "sample" or self.curvature == "price"

    def source(self) -> str:
        """C++ source that defines ``int64_t run(table, n_works, first, last, scalars, words)``.

        The table is that of `batch`, row by row. It does chunks ``first..last-1`` of all works and returns how many
        elements were skipped as not finite.
        """
        loop = long_loop if self.task == "step" else vector_loop
        replace = {
            "SCALARS": _lines(
                f"const vf {_local(name)} = splat((float)scalars[{i}]);" for i, name in enumerate(SCALARS)
            ),
            "WORDS": _lines(
                f"const {'int64_t' if name in _LONG else 'uint32_t'} {name} = words[{i}];"
                for i, name in enumerate(WORDS)
            ),
            "ROW": _lines(f"const int64_t {name} = table[{i} * n_works + w];" for i, name in enumerate(ROWS)),
            "PHILOX": _philox(),
            "BOX_MULLER": _box_muller(),
            "DRAW": DRAW if self.has_noise else "",
            "SEAL": SEAL if self.task == "sample" else "",
            "CHECK": CHECK if self.task == "step" else "",
            "AHEAD": "&ahead" if self.task == "sample" else "0",
            **{f"{name.upper()}_ROW": str(ROWS.index(name)) for name in _ROWS},
            "CHUNK": str(CHUNK),
            "REGISTERS": str(REGISTERS),
            "MASKED": loop(self._body(masked=True)),
            "PLAIN": loop(self._body(masked=False)),
            "ELEMENT": "uint16_t" if self.half else "float",  # last: the loops contain it
        }
        text = FRAME
        for word, value in replace.items():
            text = text.replace(f"@{word}@", value)
        return text

    def _body(self, masked: bool) -> list[str]:
        listing: list[str] = []
        loads, stores = getattr(self, f"_{self.task}")(listing, masked)
        masks = ["const vi active_i = read(active + @I@, @LEFT@) != 0;"] if masked else []
        return [*masks, *loads, *listing, *stores]

    def _sample(self, listing: list[str], masked: bool) -> tuple[list[str], list[str]]:
        mean, hess, eps = (Value(listing, "float", name) for name in ("mean_i", "hess_i", "eps_i"))
        if masked:
            eps = where(_active(listing), eps, 0.0)
        theta = draw_sample(mean, hess, eps, *_scalars(listing, "noise_ess", "weight_decay"))
        copy = f"if (mean_copy) {_store('mean_copy', mean)}"
        return [_load("mean"), _load("hess"), _EPS], [copy, _store("param", theta, "ELEMENT")]

    def _observed(self, listing: list[str]) -> tuple[list[str], Value, Value | None]:
        grad, hess, eps = (Value(listing, "float", name) for name in ("grad_i", "hess_i", "eps_i"))
        loads = [_load("hess"), _load("grad", "ELEMENT")]
        if self.curvature == "none":
            return loads, grad, None
        if self.curvature == "price":
            loads.append(_EPS)
        return loads, grad, estimate_curvature(grad, hess, eps, self._hyper(listing))

    def _hyper(self, listing: list[str]) -> Hyper:
        numbers = dict(zip(SCALARS[:-1], _scalars(listing, *SCALARS[:-1]), strict=True))
        return Hyper(**numbers, curvature=self.curvature, step_rule=self.step_rule)

    def _bank(self, listing: list[str], masked: bool) -> tuple[list[str], list[str]]:
        loads, grad, curvature = self._observed(listing)
        sums = [Value(listing, "float", f"banked_{name}_i") for name in ("grad", "curvature")]
        loads += [_load("banked_grad"), _load("banked_curvature")]
        assert curvature is not None
        return loads, [_store("banked_grad", sums[0] + grad), _store("banked_curvature", sums[1] + curvature)]

    def _step(self, listing: list[str], masked: bool) -> tuple[list[str], list[str]]:
        loads, grad, curvature = self._observed(listing)
        if self.averaged:
            (n_samples,) = _scalars(listing, "n_samples")
            loads += [_load("banked_grad"), _load("banked_curvature")]
            assert curvature is not None
            grad = (grad + Value(listing, "float", "banked_grad_i")) / n_samples
            curvature = (curvature + Value(listing, "float", "banked_curvature_i")) / n_samples
        mean, momentum, hess = (Value(listing, "float", f"{name}_i") for name in ("mean", "momentum", "hess"))
        active = _active(listing) if masked else None
        mean, momentum, hess, finite = ivon_step(mean, momentum, hess, grad, curvature, self._hyper(listing), active)
        stores = [_store("momentum", momentum), _store("hess", hess), _store("param", mean, "ELEMENT")]
        if self.half:
            stores.append(_store("mean_state", mean))
        return [*loads, _load("mean"), _load("momentum")], [*stores, f"skipped += ({finite.name} + 1) & inside;"]


def _philox() -> str:
    listing: list[str] = []
    c0 = Value(listing, "words", "c0")
    c1, c2, c3, k0, k1 = (Value(listing, "word", name) for name in ("c1", "c2", "c3", "k0", "k1"))
    key: Any = k0, k1  # annotated as integers, but any kind of number will do
    words = philox_4x32(c0, c1, c2, c3, *key)
    return _lines([*listing, *(f"const words w{i} = {x.name};" for i, x in enumerate(words))])


def _box_muller() -> str:
    """Of the words that Philox has just left in registers: two pairs of a group's words make its four normals."""
    listing: list[str] = []
    words = [Value(listing, "int", name) for name in ("radius_word_i", "angle_word_i")]
    x, y = box_muller(words[0], words[1])
    loads = [f"const vi {word.name} = both(w{n}, w{n + 2}, @K@);" for n, word in enumerate(words)]
    return copies_of([*loads, *listing, f"interleave(eps + 4 * j + 2 * LANES * @K@, {x.name}, {y.name});"], REGISTERS)


def _local(scalar: str) -> str:
    """The variable that holds a scalar of the call; each work has a ``weight_decay`` for itself."""
    return "common_decay" if scalar == "weight_decay" else scalar


def _active(listing: list[str]) -> Value:
    return Value(listing, "bool", "active_i")


def _scalars(listing: list[str], *names: str) -> list[Any]:
    return [Value(listing, "float", name) for name in names]


_EPS = "const vf eps_i = read(eps + @I@, @LEFT@);"


def _load(name: str, kind: str = "float") -> str:
    kind = "@ELEMENT@" if kind == "ELEMENT" else kind
    return f"const vf {name}_i = read((const {kind} *){name} + start + @I@, @LEFT@);"


def _store(name: str, value: Value, kind: str = "float") -> str:
    kind = "@ELEMENT@" if kind == "ELEMENT" else kind
    return f"write(({kind} *){name} + start + @I@, {value.name}, @LEFT@);"


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


#: C++ source that defines ``int64_t run(table, n_works, element_size, marks, 0, 0)``: two numbers for each chunk of the
#: parameters, those that the sample loop writes
MARKS = (
    MARK
    + r"""
extern "C" int64_t run(const int64_t *table, int64_t n_works, int64_t size, uint64_t *marks, int64_t, int64_t) {
    for (int64_t w = 0; w < n_works; ++w) {
        const int64_t numel = table[@NUMEL@ * n_works + w], offset = table[@OFFSET@ * n_works + w];
        const unsigned char *const p = (const unsigned char *)table[@PARAM@ * n_works + w];
        for (int64_t start = 0, end; start < numel; start = end, marks += 2) {
            end = ((offset + start) / @CHUNK@ + 1) * @CHUNK@ - offset;
            end = end < numel ? end : numel;
            mark(p + start * size, (end - start) * size, marks);
        }
    }
    return 0;
}
"""
)
for _row in ("PARAM", "NUMEL", "OFFSET"):
    MARKS = MARKS.replace(f"@{_row}@", str(ROWS.index(_row.lower())))
MARKS = MARKS.replace("@CHUNK@", str(CHUNK))
