"""What a compiled program says over the wires: its collectives, with bytes and how often they run.

`compiled.as_text()` of a program for TPUs, GPUs or CPUs, after it was split over devices: every
shape in it is one device's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from sharding._hlo import ArrayType, Instruction, Program, parse, runs

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# The TPU compiler's name for a fused all-reduce of which each device keeps its part.
_SCATTERED = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, at one place that it is run from.

    **Attributes:**

    - `kind`, one of `KINDS`.
    - `shape`, that of the whole array: an all-gather's result, a reduce-scatter's operand; of
      several arrays in one collective the first one's. `dtype`, its type.
    - `elements` and `bytes`, of all arrays of it, one device's, for one run.
    - `group`, how many devices take part in it together.
    - `loops`, the trip counts of the loops around it, the outermost first; None for one that the
      program does not tell, which `times` takes for 1.
    - `times`, how often it runs in a step.
    - `operands`, the shapes that go in.
    - `name` and `computation`, where it stands; `source`, the operation in JAX that it is from.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    bytes: int
    group: int
    loops: tuple[int | None, ...]
    times: int
    operands: tuple[tuple[int, ...], ...]
    name: str
    computation: str
    source: str

    @property
    def inside_loop(self) -> bool:
        """Whether it is in a loop."""
        return bool(self.loops)

    @property
    def wire(self) -> float:
        """Bytes that a device sends in one run, as the best algorithms do: (Thakur et al. 2005)
        `(n - 1) / n` of the array, twice that for an all-reduce, all of it for a permutation.
        """
        if self.kind == "collective-permute":
            return float(self.bytes)
        part = self.bytes * (self.group - 1) / max(self.group, 1)
        return 2 * part if self.kind == "all-reduce" else part


@dataclasses.dataclass(frozen=True)
class Total:
    """All collectives of a kind in one step: how many runs, and elements, bytes, bytes sent."""

    runs: int
    elements: int
    bytes: int
    wire: float


def collectives(text: str | Program, devices: int | None = None) -> list[Collective]:
    """Every collective of a program, in the order of its text.

    One that the compiler has cut into a start, steps between other work, and an end, is one. What
    TPU programs have as a fused all-reduce of which each device keeps a part is a reduce-scatter.
    A product that TPU programs interleave with the passing on of its operand ("windowed einsum")
    has permutations in place of a gather: `sharding.aot.PLAIN` are options to compile without.

    **Arguments:** `text`, of `compiled.as_text()`; `devices`, how many there are, for groups that
    the program writes as "all".

    **Raises:** `ValueError` for text that is no program.
    """
    program = parse(text) if isinstance(text, str) else text
    places = runs(program)
    started = _started(program)
    out: list[Collective] = []
    for i in program:
        kind = _kind(i, program)
        if kind is None or _continues(i, started):
            continue
        arrays = _whole(kind, i, program)
        for how in places.get(i.inside, ()):
            out.append(
                Collective(
                    kind=kind,
                    shape=arrays[0].shape if arrays else (),
                    dtype=arrays[0].dtype if arrays else "",
                    elements=sum(a.elements for a in arrays),
                    bytes=sum(a.bytes for a in arrays),
                    group=_group(i.attributes, devices),
                    loops=how.loops,
                    times=how.times,
                    operands=tuple(t.shape for t in program.operand_types(i)),
                    name=i.name,
                    computation=i.inside,
                    source=_source(i.attributes),
                )
            )
    return out


def by_kind(found: Iterable[Collective]) -> Mapping[str, Total]:
    """The totals of a step by kind, loops multiplied; kinds that are not there are left out."""
    out: dict[str, Total] = {}
    for c in found:
        old = out.get(c.kind, Total(0, 0, 0, 0.0))
        out[c.kind] = Total(
            old.runs + c.times,
            old.elements + c.times * c.elements,
            old.bytes + c.times * c.bytes,
            old.wire + c.times * c.wire,
        )
    return {kind: out[kind] for kind in KINDS if kind in out}


def _kind(i: Instruction, program: Program) -> str | None:
    op = i.op.removesuffix("-start")
    if op not in KINDS:
        return None
    # The collective in a fused computation of that name; in the caller it is a fusion.
    if op == "all-reduce" and i.inside.startswith(_SCATTERED):
        return "reduce-scatter"
    return op


def _whole(kind: str, i: Instruction, program: Program) -> list[ArrayType]:
    """The arrays that a collective is of, each as long as it is when it is whole."""
    operands = program.operand_types(i)
    if kind != "all-gather":
        return operands
    if not i.op.endswith("-start"):
        return list(i.results)
    # A start's results are its operands, then what it makes, then what it keeps for its end.
    return list(i.results[len(operands) : 2 * len(operands)])


def _started(program: Program) -> dict[str, set[str]]:
    """Of collectives that TPU programs spread over fusions: by channel, where each is started."""
    out: dict[str, set[str]] = {}
    for name, instructions in program.computations.items():
        if any(
            'custom_call_target="AsyncCollectiveStart"' in i.attributes
            for i in instructions.values()
        ):
            for i in instructions.values():
                channel = _channel(i)
                if i.op in KINDS and channel is not None:
                    out.setdefault(channel, set()).add(name)
    return out


def _continues(i: Instruction, started: Mapping[str, set[str]]) -> bool:
    """Whether this is a step or the end of a collective that was started elsewhere."""
    starts = started.get(_channel(i) or "", set())
    return "chain_id=" in i.attributes and bool(starts) and i.inside not in starts


def _channel(i: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", i.attributes)
    return found[1] if found else None


def _group(attributes: str, devices: int | None) -> int:
    """How many devices are in a group, from any of the ways in which XLA writes groups."""
    if "source_target_pairs=" in attributes:
        return 2
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", attributes)
    if mesh:
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    if "replica_groups={}" in attributes or "replica_groups=" not in attributes:
        return 1 if devices is None else devices
    raise ValueError(f"a collective's groups are written in a way that is not known: {attributes}")


def _source(attributes: str) -> str:
    found = re.search(r'op_name="([^"]*)"', attributes)
    return found[1] if found else ""
