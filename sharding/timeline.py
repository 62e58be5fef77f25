"""What a device holds while a compiled step runs, instruction by instruction.

The program's text lists instructions in the order in which they run, and a loop's body once: here
the loops are run through, and each buffer lives from the instruction that makes it to the last one
that reads it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

from sharding._hlo import Instruction as Instruction
from sharding._hlo import Program, parse, trip_count

# Operations whose result stands where an operand stood.
_SAME_PLACE = frozenset(
    (
        "bitcast",
        "tuple",
        "get-tuple-element",
        "while",
        "conditional",
        "opt-barrier",
        "optimization-barrier",
        "dynamic-update-slice",
        "all-gather-done",
        "all-reduce-done",
        "copy-done",
    )
)


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")


@dataclasses.dataclass(frozen=True)
class Moment:
    """One instruction of a step, when it runs.

    **Attributes:** `op` and `name`; `source`, the operation in JAX that it is from; `kind`, what
    `kind_of` called its result; `loops`, which pass of each loop around it this is; `live`, bytes
    that the device holds then beside the step's arguments, by kind.
    """

    op: str
    name: str
    source: str
    kind: str
    loops: tuple[int, ...]
    live: Mapping[str, int]

    @property
    def total(self) -> int:
        """All bytes beside the arguments."""
        return sum(self.live.values())


def source_of(i: Instruction) -> str:
    """The operation in JAX that an instruction is from."""
    found = re.search(r'op_name="([^"]*)"', i.attributes)
    return found[1] if found else ""


def timeline(
    text: str | Program, kind_of: Callable[[Instruction], str], smallest: int = 1
) -> list[Moment]:
    """Every moment of a step at which a buffer of `smallest` bytes comes, and every collective.

    It is a bound from above: the compiler lets some buffers share memory that are counted apart
    here. Its own total is `memory_analysis().temp_size_in_bytes`.

    **Arguments:** `kind_of`, a name for an instruction's result.

    **Raises:** `ValueError` for text that is no program, or a loop whose passes it does not tell.
    """
    program = parse(text) if isinstance(text, str) else text
    moments: list[Moment] = []
    _run(program, program.entry, (), {}, _Log(kind_of, smallest, moments))
    return moments


@dataclasses.dataclass(frozen=True)
class _Log:
    kind_of: Callable[[Instruction], str]
    smallest: int
    moments: list[Moment]

    def write(
        self, i: Instruction, loops: tuple[int, ...], held: Iterable[tuple[str, int]]
    ) -> None:
        live: dict[str, int] = {}
        for kind, size in held:
            live[kind] = live.get(kind, 0) + size
        self.moments.append(Moment(_op(i), i.name, source_of(i), self.kind_of(i), loops, live))


def _run(
    program: Program,
    computation: str,
    loops: tuple[int, ...],
    around: dict[str, tuple[str, int]],
    log: _Log,
) -> None:
    """Run a computation's instructions; `around`, what its callers hold."""
    instructions = list(program.computations[computation].values())
    ends = _last_reads(instructions)
    # What a loop's body or the step returns stands where the carry or a donated argument stands.
    returned = _returned(program, computation)
    held: dict[str, tuple[str, int]] = {}
    for number, i in enumerate(instructions):
        size = 0 if _in_place(i) or i.name in returned else _bytes(i)
        if size:
            held[i.name] = (log.kind_of(i), size)
        if size >= log.smallest or _op(i).removesuffix("-start") in COLLECTIVES:
            log.write(i, loops, (*around.values(), *held.values()))
        if i.op == "while":
            passes = trip_count(program, i)
            if passes is None:
                raise ValueError(f"the program does not tell how often the loop {i.name} runs")
            body = i.called()["body"][0]
            inside = {**around, **{f"{computation}/{n}": b for n, b in held.items()}}
            for p in range(passes):
                _run(program, body, (*loops, p), inside, log)
        elif i.op == "call":
            inside = {**around, **{f"{computation}/{n}": b for n, b in held.items()}}
            for called in i.called().get("to_apply", []):
                _run(program, called, loops, inside, log)
        for name in [n for n in held if ends[n] <= number]:
            del held[name]


def _last_reads(instructions: list[Instruction]) -> dict[str, int]:
    """For each instruction the number of the last one that reads its buffer."""
    ends = {i.name: number for number, i in enumerate(instructions)}
    for number, i in reversed(list(enumerate(instructions))):
        # What stands in an operand's place keeps it alive for as long as itself.
        until = max(number, ends[i.name]) if _in_place(i) else number
        for name in i.operands:
            if name in ends:
                ends[name] = max(ends[name], until)
    return ends


def _returned(program: Program, computation: str) -> set[str]:
    """The buffers that a computation returns, through what makes none of its own."""
    here = program.computations[computation]
    found: set[str] = set()
    left = [program.root(computation).name]
    while left:
        i = here[left.pop()]
        found.add(i.name)
        if i.op in ("get-tuple-element", "bitcast", "tuple"):
            left += [name for name in i.operands if name in here and name not in found]
    return found


def _op(i: Instruction) -> str:
    """The operation; the TPU compiler's fused one by what it does."""
    called = [name for names in i.called().values() for name in names]
    return "reduce-scatter" if any("all-reduce-scatter" in n for n in called) else i.op


def _in_place(i: Instruction) -> bool:
    """Whether an instruction makes no buffer of its own."""
    updated = i.op == "fusion" and source_of(i).endswith("dynamic_update_slice")
    return updated or i.op in ("parameter", "constant") or i.op in _SAME_PLACE


def _bytes(i: Instruction) -> int:
    """What an instruction's result takes in main memory; of a start, what its done will be."""
    # A start's results are its operands too, but where it is an all-reduce on a GPU.
    results = i.results[1:2] if i.op.endswith("-start") and len(i.results) > 1 else i.results
    return sum(t.bytes for t in results if t.space == 0)
