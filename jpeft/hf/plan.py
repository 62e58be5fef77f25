"""Which tensors of a directory make which parameters, before any is loaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jpeft.hf.bitsandbytes import Packed
from jpeft.hf.files import Tensors
from jpeft.hf.names import Family, Place, normal_name

# safetensors' names of the types that weights may have.
REAL = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass
class Plan:
    """Which tensors make each parameter (in order of layers), which are new, and what is wrong."""

    sources: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    new: set[str] = dataclasses.field(default_factory=set)
    ignored: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def plan_of(
    tensors: Tensors,
    want: Mapping[str, Any],
    table: Mapping[str, Place],
    family: Family,
    packed: Mapping[str, Packed],
) -> Plan:
    """What to read for every parameter.

    **Arguments:** `want`, path to shape and type; `table`, path to place; `packed`, the weights
    that bitsandbytes quantised, by name.
    """
    plan = Plan()
    parts = {part for p in packed.values() for part in p.parts}
    found = {normal_name(family, name): name for name in tensors.names() if name not in parts}
    used: set[str] = set()
    for path, leaf in want.items():
        spot = table[path]
        names = [spot.of_layer(i) for i in range(leaf.shape[0])] if spot.stacked else [spot.name]
        sources = [
            _find(found, name, family.prefix) or found.get(family.shared.get(name, ""))
            for name in names
        ]
        if not any(sources) and re.search(family.new, path):
            plan.new.add(path)
            continue
        shape = tuple(leaf.shape[1:] if spot.stacked else leaf.shape)
        shape = shape[::-1] if spot.transposed else shape
        for name, source in zip(names, sources, strict=True):
            if source is None:
                plan.problems.append(f"missing: {name}")
                continue
            used.add(source)
            by = packed.get(source)
            if by is not None and not path.endswith("/kernel"):
                plan.problems.append(
                    f"quantised: {source} is {by.format} of bitsandbytes, and is no kernel"
                )
                continue
            # Quantised, those of a Conv1D too are (out, in).
            asked = shape if by is None else tuple(leaf.shape[:-3:-1])
            have = tensors.shape(source) if by is None else by.shape
            if have != asked:
                if re.search(family.replaced, path):
                    plan.new.add(path)
                    plan.ignored.append(source)
                else:
                    plan.problems.append(f"misshapen: {source} is {have}, not {asked}")
            elif by is None and tensors.kind(source) not in REAL:
                plan.problems.append(
                    f"mistyped: {source} is {tensors.kind(source)}, not one of {', '.join(REAL)}"
                )
        plan.sources[path] = [s for s in sources if s is not None]
    for name, source in found.items():
        if source in used:
            continue
        copied = _find(found, family.copies.get(name, ""), family.prefix)
        if copied is not None and not tensors.equal(source, copied):
            plan.problems.append(f"differs: {source} is no copy of {copied}: {family.untied}")
        elif copied is not None or re.search(family.ignored, name):
            plan.ignored.append(source)
        else:
            plan.problems.append(f"unexpected: {source}")
    return plan


def _find(found: Mapping[str, str], name: str, prefix: str) -> str | None:
    for spelling in (name, prefix + name, name.removeprefix(prefix)):
        if spelling in found:
            return found[spelling]
    return None
