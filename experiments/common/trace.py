"""Where a step's time goes: a profiler's trace, its operations summed into a few kinds.

The kinds and the time in which nothing ran add up to the step. Where several operations run at
once, each is given its share of that time.
"""

from __future__ import annotations

import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MATRIX, ATTENTION, ELEMENTWISE = "matrix products", "attention", "element-wise"
COPIES, IDLE = "copies", "idle"
KINDS: tuple[str, ...] = (MATRIX, ATTENTION, ELEMENTWISE, COPIES, IDLE)
# Operations that hold others, which have events of their own.
CONTAINERS = {"while", "conditional", "call"}
# They move numbers, and compute none.
_MOVES = {
    *("copy", "copy-start", "copy-done", "transpose", "reshape", "bitcast", "broadcast", "slice"),
    *("dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "tuple", "get-tuple-element"),
    *("parameter", "constant", "async-start", "async-done", "iota"),
}
_OPCODE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?\s([a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_BATCH = re.compile(r'lhs_batch_dims=\{\d|"lhs_batch_dimensions":\["\d')
_NAMES = (
    (ATTENTION, re.compile(r"fmha|flash|attention", re.I)),
    (MATRIX, re.compile(r"gemm|matmul|cutlass|xmma|nvjet|cublas|(^|_)dot", re.I)),
    (COPIES, re.compile(r"memcpy|memset|^copy|transpose", re.I)),
)
Event = tuple[float, float, str]


def by_name(name: str) -> str:
    """The kind of an operation that only its name, or its kernel's, is known of."""
    return next((kind for kind, pattern in _NAMES if pattern.search(name)), ELEMENTWISE)


def kinds_of(program: str) -> dict[str, str]:
    """The kind of every operation of a compiled program, None left out: containers have none.

    Attention is products with batch axes and what is fused with them, and kernels of that name; a
    softmax that stands by itself is element-wise.

    **Arguments:** `program`, its text, as `Compiled.as_text`.
    """
    inside: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        opened = _COMPUTATION.match(line)
        if opened is not None:
            lines = inside.setdefault(opened[1], [])
        elif _OPCODE.match(line):
            lines.append(line)
    found: dict[str, str] = {}
    for line in (line for body in inside.values() for line in body):
        name, opcode = _OPCODE.match(line).groups()  # type: ignore[union-attr]
        if opcode not in CONTAINERS:
            found[name] = _kind([line], inside)
    return found


def _kind(lines: Iterable[str], inside: Mapping[str, list[str]]) -> str:
    """The kind of what is fused: that of its heaviest part."""
    kinds = {_line_kind(line, inside) for line in lines}
    return next((k for k in (ATTENTION, MATRIX, ELEMENTWISE) if k in kinds), COPIES)


def _line_kind(line: str, inside: Mapping[str, list[str]]) -> str:
    found = _OPCODE.match(line)
    opcode = found[2] if found else ""
    called = re.search(r"\bcalls=%?([\w.\-]+)", line)
    if called is not None and called[1] in inside:
        return _kind(inside[called[1]], inside)
    if opcode in ("dot", "convolution"):
        return ATTENTION if _BATCH.search(line) else MATRIX
    if opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', line)
        kind = by_name(target[1] if target else "")
        return ATTENTION if kind == MATRIX and _BATCH.search(line) else kind
    return COPIES if opcode in _MOVES else ELEMENTWISE


def shares(events: Iterable[Event]) -> dict[str, float]:
    """The time of each kind, and `idle`: together, from the first start to the last end.

    **Arguments:** `events`, starts, ends and kinds.
    """
    total = dict.fromkeys(KINDS, 0.0)
    moments = sorted((t, sign, k) for a, b, k in events for t, sign in ((a, 1), (b, -1)) if b > a)
    running = dict.fromkeys(KINDS, 0)
    before = moments[0][0] if moments else 0.0
    for t, sign, kind in moments:
        count = sum(running.values())
        for name, n in running.items():
            total[name] += (t - before) * n / count if count and n else 0.0
        total[IDLE] += 0.0 if count else t - before
        running[kind] += sign
        before = t
    return total


def traced(run: Callable[[], object], program: str, steps: int) -> dict[str, float]:
    """Milliseconds of one run by kind, `KINDS`; all zero where the profiler saw no operation.

    **Arguments:** `run`, what is traced `steps` times, which ends when it is done; `program`, the
    text of the program that it runs.
    """
    import jax

    options: Any = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    run()
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            for _ in range(steps):
                run()
        finally:
            jax.profiler.stop_trace()
        files = list(pathlib.Path(folder).rglob("*.xplane.pb"))
        events = [e for file in files for e in _events(file, kinds_of(program))]
    return {kind: ns / 1e6 / steps for kind, ns in shares(events).items()}


def _events(file: pathlib.Path, kinds: Mapping[str, str]) -> list[Event]:
    from jax.profiler import ProfileData

    planes = list(ProfileData.from_file(str(file)).planes)
    devices = [p for p in planes if p.name.startswith("/device:") and "CUSTOM" not in p.name]
    out: list[Event] = []
    for plane in devices or planes:
        for line in plane.lines:
            # A device has lines that tell the same time again, by module and by step.
            if devices and not line.name.startswith(("Stream", "XLA Ops")):
                continue
            out += [e for e in (_event(x, kinds, bool(devices)) for x in line.events) if e]
    return out


def _event(event: Any, kinds: Mapping[str, str], device: bool) -> Event | None:
    stats = {str(k): v for k, v in event.stats}
    name = str(stats.get("hlo_op", ""))
    if not name and not device:
        return None  # what the host does beside
    kind = kinds.get(name)
    if kind is None:
        if name.split(".")[0] in CONTAINERS:
            return None
        kind = by_name(str(event.name))
    return event.start_ns, event.start_ns + event.duration_ns, kind
