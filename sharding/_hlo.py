"""A compiled program's text, taken apart: computations, instructions, how often each runs.

XLA prints one instruction a line: `%name = type op(%operands), attribute=value, ...`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

BITS = (
    {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
    | {f"{kind}{n}": n for kind in "su" for n in (1, 2, 4, 8, 16, 32, 64)}
    | {f"f{n}": n for n in (16, 32, 64)}
)

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(\w+)\[([^\]]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
    r"|called_computations|async_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """An array of the program: `shape` is one device's; `space`, 0 for main memory (HBM)."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Without padding."""
        # The kinds of f8 and f4 are many, and all of them say how long they are.
        bits = BITS.get(self.dtype) or int(re.sub(r"\D.*", "", self.dtype[1:]) or 0)
        return (self.elements * bits + 7) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    **Attributes:** `op`, such as `all-gather`; `results`, the arrays that it makes, those of a
    tuple one by one; `operands`, the names of what it reads; `attributes`, the rest of the line.
    """

    name: str
    op: str
    results: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    attributes: str
    inside: str
    root: bool

    def called(self) -> dict[str, list[str]]:
        """The computations that it runs, by role: `body`, `condition`, `calls` and others."""
        return {role: _names(names) for role, names in _CALLED.findall(self.attributes)}


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations by name, each with its instructions in the order in which they run."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def __iter__(self) -> Iterator[Instruction]:
        for instructions in self.computations.values():
            yield from instructions.values()

    def operands(self, of: Instruction) -> list[Instruction]:
        """What makes an instruction's operands."""
        here = self.computations[of.inside]
        return [here[name] for name in of.operands if name in here]

    def operand_types(self, of: Instruction) -> list[ArrayType]:
        """The arrays that an instruction reads."""
        return [t for i in self.operands(of) for t in i.results]

    def root(self, computation: str) -> Instruction:
        """What a computation returns."""
        return next(i for i in self.computations[computation].values() if i.root)


def parse(text: str) -> Program:
    """The program in `compiled.as_text()`. **Raises:** `ValueError` for text of another kind."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif line.startswith("}"):
            current = ""
        elif current:
            found = _LINE.match(line)
            if found:
                made = _instruction(found[2], found[3], current, bool(found[1]))
                computations[current][made.name] = made
    if not entry:
        raise ValueError(
            "this is no program of XLA's: pass the text of jit(...).lower(...).compile().as_text()"
        )
    return Program(computations, entry)


def _instruction(name: str, rest: str, inside: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else _blank(rest)
    kind, rest = rest[:end], rest[end:].lstrip()
    op, _, _ = rest.partition("(")
    close = _closing(rest, len(op))
    operands = tuple(_NAME.findall(rest[len(op) : close]))
    if op in ("parameter", "constant"):
        attributes = rest[len(op) + 1 : close] + rest[close + 1 :]
    else:
        attributes = rest[close + 1 :]
    return Instruction(name, op, _types(kind), operands, attributes, inside, root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` is closed."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] == "(":
            depth += 1
        elif text[at] == ")":
            depth -= 1
            if depth == 0:
                return at
    return len(text)


def _blank(text: str) -> int:
    at = text.find(" ")
    return len(text) if at < 0 else at


def _types(text: str) -> tuple[ArrayType, ...]:
    out: list[ArrayType] = []
    for dtype, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        space = re.search(r"S\((\d+)\)", layout)
        out.append(ArrayType(dtype, shape, int(space[1]) if space else 0))
    return tuple(out)


def _names(text: str) -> list[str]:
    return [part.strip().lstrip("%") for part in text.strip("{}").split(",") if part.strip()]


@dataclasses.dataclass(frozen=True)
class Runs:
    """How a computation is run in one step.

    **Attributes:** `times`, how often; `loops`, the trip counts of the loops around it, the
    outermost first, None for one that the text does not tell; `fused`, whether it is the inside of
    one instruction, whose intermediate results are never in memory.
    """

    times: int
    loops: tuple[int | None, ...] = ()
    fused: bool = False


def runs(program: Program) -> dict[str, list[Runs]]:
    """For every computation that runs, each of the places that it is run from."""
    out: dict[str, list[Runs]] = {}

    def visit(name: str, how: Runs) -> None:
        out.setdefault(name, []).append(how)
        for i in program.computations[name].values():
            if i.op.endswith(("-done", "-update")):
                continue  # names the computation that its -start ran
            for role, names in i.called().items():
                for called in names:
                    if called in program.computations:
                        visit(called, _inner(program, i, role, how))

    visit(program.entry, Runs(1))
    return out


def _inner(program: Program, i: Instruction, role: str, how: Runs) -> Runs:
    if role in ("body", "condition") and i.op == "while":
        trips = trip_count(program, i)
        return Runs(how.times * (1 if trips is None else trips), (*how.loops, trips), how.fused)
    # What a reduction applies to each element is inside of it; a call is not.
    inside = i.op == "fusion" or (role == "to_apply" and i.op != "call")
    return Runs(how.times, how.loops, how.fused or inside)


def trip_count(program: Program, loop: Instruction) -> int | None:
    """How often a loop's body runs; None where the text does not tell.

    From `known_trip_count`; else from a condition `i < n`, where `n`, what `i` is at first, and
    what is added to it each time, are constants.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    called = loop.called()
    test = program.root(called["condition"][0])
    if test.op == "fusion":
        test = _unfused(program, test)
    if test is None or test.op != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, bound = program.operands(test)
    index = _element(counter)
    limit = _constant(program, bound, loop)
    if index is None or limit is None:
        return None
    start = _constant(program, _initial(program, loop, index), None)
    body = program.root(called["body"][0])
    step = _added(program, program.computations[body.inside][body.operands[index]], index, loop)
    if start is None or not step:
        return None
    return max(-((start - limit) // step), 0)


def _unfused(program: Program, fusion: Instruction) -> Instruction | None:
    """A comparison or a sum that is all there is in a fusion, as if it stood in its caller."""
    inner = program.root(fusion.called()["calls"][0])
    names: list[str] = []
    for operand in program.operands(inner):
        number = parameter_number(operand)
        if number is None:
            return None
        names.append(fusion.operands[number])
    return dataclasses.replace(inner, operands=tuple(names), inside=fusion.inside)


def parameter_number(i: Instruction) -> int | None:
    """Which of its computation's parameters this is; None for what is none."""
    found = re.match(r"\d+", i.attributes) if i.op == "parameter" else None
    return int(found[0]) if found else None


def _element(i: Instruction | None) -> int | None:
    """Which element of a loop's tuple this is."""
    if i is None or i.op != "get-tuple-element":
        return None
    found = re.search(r"index=(\d+)", i.attributes)
    return int(found[1]) if found else None


def _initial(program: Program, loop: Instruction, index: int) -> Instruction | None:
    """What an element of a loop's tuple is at first."""
    made = program.operands(loop)
    if not made or made[0].op != "tuple":
        return None
    return program.computations[loop.inside].get(made[0].operands[index])


def _added(program: Program, i: Instruction, index: int, loop: Instruction) -> int | None:
    """What a pass of a loop adds to its counter, if `i` is the counter's next value."""
    if i.op == "fusion":
        inner = _unfused(program, i)
        return None if inner is None else _added(program, inner, index, loop)
    if i.op in ("copy", "bitcast"):
        return _added(program, program.operands(i)[0], index, loop)
    if _element(i) == index:
        return 0
    if i.op != "add":
        return None
    first, second = program.operands(i)
    for counter, more in ((first, second), (second, first)):
        before = _added(program, counter, index, loop)
        step = _constant(program, more, loop)
        if before is not None and step is not None:
            return before + step
    return None


def _constant(program: Program, i: Instruction | None, loop: Instruction | None) -> int | None:
    """A number that is known; in a loop also one that is handed in and stays."""
    while i is not None and i.op in ("copy", "bitcast", "convert"):
        i = next(iter(program.operands(i)), None)
    index = _element(i)
    if index is not None and loop is not None:
        return _constant(program, _initial(program, loop, index), None)
    if i is None or i.op != "constant":
        return None
    value = re.match(r"-?\d+", i.attributes)
    return int(value[0]) if value else None
