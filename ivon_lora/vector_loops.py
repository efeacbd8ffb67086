"""C++ text of a loop over elements, from the statements of one element.

Roots and divisions take a processor ten to twenty cycles each. It looks ahead some hundred instructions: where these
are a chain of several roots and divisions, it waits most of the time. So the statements of several vectors take turns,
and a long chain is cut in two halves that belong to different vectors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: vectors that a loop works on at once
COPIES = 2

#: the variables of one element: those that a `Value` makes, and those that end in ``_i``
_VARIABLE = re.compile(r"\b(v\d+|\w+(?=_i\b))(?:_i)?\b")

_DEFINITION = re.compile(r"const (v[fi]) (v\d+|\w+_i) = (.*)")
_USE = re.compile(r"\b(?:v\d+|\w+_i)\b")
_SLOW = re.compile(r"\broot\(| / ")


def copies_of(lines: Iterable[str], n: int) -> str:
    """The lines for ``n`` neighbouring vectors, statement by statement: one waits while another is computed.

    In each copy ``@I@`` becomes its first element, counted from ``i``, and ``@K@`` its number among the copies.
    """
    copies = []
    for line in lines:
        for k in range(n):
            own = _VARIABLE.sub(rf"\1_{k}", line)
            copies.append(own.replace("@I@", f"i + {k} * LANES").replace("@K@", str(k)))
    return "\n".join(copies)


def vector_loop(lines: list[str], copies: int = COPIES) -> str:
    """A loop of the lines over ``n`` elements: first ``copies`` vectors at a time, then one, the last incomplete."""
    return f"""
    int i = 0;
    for (; i + {copies} * LANES <= n; i += {copies} * LANES) {{
        const vi inside = splat(-1);
        {copies_of(lines, copies).replace("@LEFT@", "LANES")}
    }}
    {_rest(lines)}"""


def long_loop(lines: list[str]) -> str:
    """The same for a long chain: a turn of the loop begins some vectors, and ends those that the turn before began.

    Args:
        lines: definitions and, after them, what is to be done with them. Those that ``read`` may be repeated.
    """
    begin, end = _halves(lines)
    begun = {match[2]: match[1] for match in map(_DEFINITION.match, begin) if match}
    handed = [name for name in begun if name in _used(end)]
    place = f"[((@I@) / LANES) % {2 * COPIES}]"
    begin = [*_reads(lines, begin), *begin, *(f"begun_{name}{place} = {name};" for name in handed)]
    end = [*_reads(lines, end), *(f"const {begun[name]} {name} = begun_{name}{place};" for name in handed), *end]
    memory = "\n".join(f"{begun[name]} begun_{name}[{2 * COPIES}];" for name in handed)
    return f"""
    {memory}
    const int whole = n / ({COPIES} * LANES) * ({COPIES} * LANES);
    for (int turn = 0; turn < whole + {COPIES} * LANES; turn += {COPIES} * LANES) {{
        const vi inside = splat(-1);
        if (const int i = turn; i < whole) {{
            {copies_of(begin, COPIES).replace("@LEFT@", "LANES")}
        }}
        if (const int i = turn - {COPIES} * LANES; i >= 0) {{
            {copies_of(end, COPIES).replace("@LEFT@", "LANES")}
        }}
    }}
    int i = whole;
    {_rest(lines)}"""


def _rest(lines: list[str]) -> str:
    return f"""for (; i < n; i += LANES) {{
        const int left = n - i;
        const vi inside = lane_numbers() < left;
        {copies_of(lines, 1).replace("@LEFT@", "left")}
    }}"""


def _halves(lines: list[str]) -> tuple[list[str], list[str]]:
    """What does not read memory, cut before the first statement that waits for two roots or divisions."""
    computed = [line for line in lines if not _is_read(line)]
    waits: dict[str, int] = {}  # for so many roots and divisions
    for cut, line in enumerate(computed):
        before = max((waits[name] for name in _used([line]) if name in waits), default=0)
        match = _DEFINITION.match(line)
        if match is None or before == 2:
            return computed[:cut], computed[cut:]
        waits[match[2]] = before + bool(_SLOW.search(line))
    return computed, []


def _is_read(line: str) -> bool:
    match = _DEFINITION.match(line)
    return match is not None and match[3].startswith("read(")


def _reads(lines: list[str], half: list[str]) -> list[str]:
    """Those of the lines that read what a half uses."""
    used = _used(half)
    return [line for line in lines if _is_read(line) and line.split()[2] in used]


def _used(lines: Iterable[str]) -> set[str]:
    """The variables of one element that the lines mention on their right-hand sides."""
    found: set[str] = set()
    for line in lines:
        match = _DEFINITION.match(line)
        found |= set(_USE.findall(match[3] if match else line))
    return found
