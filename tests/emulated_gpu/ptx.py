"""The text of a PTX module with one kernel: its parameters, and its instructions in basic blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    name: the opcode's parts, ("add", "s64").  operands: registers, numbers, labels, symbols; a vector is a tuple.
    address: (register or symbol, bytes to add), of an instruction that reads or writes memory.  predicate: register
    that says which threads take part, and whether it is negated.  source: line of the kernel it comes from.
    """

    name: tuple[str, ...]
    operands: tuple[str | tuple[str, ...], ...]
    address: tuple[str, int] | None
    predicate: tuple[str, bool] | None
    source: str

    @property
    def base(self) -> str:
        """The operation: the first part of the name."""
        return self.name[0]

    @property
    def type(self) -> str:
        """The type of what is computed: the last part of the name."""
        return self.name[-1]


#: instructions that run one after another; the last may jump, wait or leave
Block = list[Instruction]


@dataclass(frozen=True)
class Module:
    """One kernel.

    parameters: names.  threads: per block of threads.  blocks: basic blocks, in the order in which
    control falls through.  labels: index of the basic block of each label.
    """

    name: str
    parameters: tuple[str, ...]
    threads: int
    blocks: tuple[Block, ...]
    labels: dict[str, int]


@cache
def parse(text: str) -> Module:
    """Read a module; raises ValueError if it is not what is expected here: one kernel, of blocks of known size."""
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)\s*(.*?)\n\{\n(.*?)\n\}", text, re.DOTALL)
    size = None if entry is None else re.search(r"\.reqntid\s+(\d+)", entry[3])
    if entry is None or size is None:
        raise ValueError("the module has no kernel whose .reqntid says how many threads a block has")
    parameters = tuple(re.findall(r"\.param\s+[^,]*?(\w+)\s*(?:,|$)", entry[2]))
    blocks: list[Block] = [[]]
    labels = {}
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]*)"', text))
    source = ""
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+(\$\w+)", entry[4]))  # other labels are the debugger's
    for statement in _statements(entry[4]):
        if location := re.match(r"\.loc\s+(\d+)\s+(\d+)", statement):
            source = f"{files.get(location[1], '?')}:{location[2]}"
        elif label := re.match(r"(\$\w+):", statement):
            if label[1] in targets:
                blocks.append([])
                labels[label[1]] = len(blocks) - 1
        elif not statement.startswith("."):
            instruction = _instruction(statement, source)
            blocks[-1].append(instruction)
            if instruction.base in ("bra", "ret", "bar"):
                blocks.append([])
    return Module(entry[1], parameters, int(size[1]), tuple(blocks), labels)


def _statements(body: str) -> list[str]:
    """Statements without their semicolons; labels and ``.loc`` directives, which have none, by themselves."""
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"^\s*(\.loc[^\n]*|\$\w+:)\s*$", r"\1;", body, flags=re.MULTILINE)
    return [text for part in body.split(";") if (text := " ".join(part.split()))]


def _instruction(statement: str, source: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", statement)
    if match is None:
        raise ValueError(f"not an instruction: {statement!r}")
    negated, predicate, name, rest = match.groups()
    address, operands = None, []
    for vector, place, plain in re.findall(r"\{([^}]*)\}|\[([^\]]*)\]|([^\s,{}\[\]|]+)", rest):
        if place:
            base, _, offset = place.replace(" ", "").partition("+")
            address = base, int(offset or 0)
        else:
            operands.append(tuple(x.strip() for x in vector.split(",")) if vector else plain)
    parts = tuple(name.replace("::cta", "").split("."))
    return Instruction(parts, tuple(operands), address, (predicate, bool(negated)) if predicate else None, source)
