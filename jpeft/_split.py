"""Which axes of a program's values are split over devices, where those of its parameters are.

What a compiler's partitioner does, followed forwards: an axis stays split through whatever keeps
it, a product sums over devices what it contracts, and what nothing is known of is whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from jpeft._compat import scan_counts
from jpeft._flat import PRODUCTS, REDUCTIONS, Equation, Flat

# By how many devices each axis of a value is split.
Split = tuple[int, ...]


def splits(flat: Flat, given: Sequence[Split]) -> dict[int, Split]:
    """How every value of a program is split, from how its operands are."""
    found = {v: whole(aval.shape) for v, aval in enumerate(flat.avals)}
    found.update(zip(flat.ins, given, strict=True))
    for e in flat.equations:
        ins = [whole(()) if v is None else found[v] for v in e.ins]
        shapes = [() if v is None else tuple(flat.avals[v].shape) for v in e.ins]
        outs = [tuple(flat.avals[v].shape) for v in e.outs]
        for v, shape, split in zip(e.outs, outs, _of(e, ins, shapes, outs), strict=True):
            found[v] = split if len(split) == len(shape) else whole(shape)
    return found


def whole(shape: Sequence[int]) -> Split:
    """Not split at all."""
    return (1,) * len(shape)


def into_loop(e: Equation, ins: Sequence[Split]) -> list[Split]:
    """How a loop's steps find their operands split: what is carried is so before and after."""
    consts, carries = scan_counts(e.eqn)
    body = Flat(e.eqn.params["jaxpr"])
    given = [*ins[: consts + carries], *(s[1:] for s in ins[consts + carries :])]
    for _ in range(carries + 1):
        found = splits(body, given)
        after = [
            given[consts + n] if v is None else _joined(given[consts + n], found[v])
            for n, v in enumerate(body.outs[:carries])
        ]
        if after == given[consts : consts + carries]:
            break
        given[consts : consts + carries] = after
    return given


# -- what an equation does with axes ---------------------------------------------------------------

Shapes = Sequence[tuple[int, ...]]


def _of(e: Equation, ins: Sequence[Split], shapes: Shapes, outs: Shapes) -> list[Split]:
    rule = _RULES.get(e.name)
    if rule is not None:
        return rule(e, ins, shapes, outs)
    # Elementwise, or what keeps an axis where it keeps its length.
    return _same_axes(e, ins, shapes, outs)


def _joined(*parts: Split) -> Split:
    """Split where any of them is."""
    return tuple(max(axis) for axis in zip(*parts, strict=True))


def _loop(e: Equation, ins: Sequence[Split], shapes: Shapes, outs: Shapes) -> list[Split]:
    _, carries = scan_counts(e.eqn)
    body = Flat(e.eqn.params["jaxpr"])
    found = splits(body, into_loop(e, ins))
    return [
        whole(out) if v is None else found[v] if n < carries else (1, *found[v])
        for n, (v, out) in enumerate(zip(body.outs, outs, strict=True))
    ]


def _product(e: Equation, ins: Sequence[Split], shapes: Shapes, outs: Shapes) -> list[Split]:
    if e.name != "dot_general":
        return [whole(out) for out in outs]
    contracted, batched = e.eqn.params["dimension_numbers"]
    together = [max(ins[0][i], ins[1][j]) for i, j in zip(*batched, strict=True)]
    free = [
        split
        for side in (0, 1)
        for i, split in enumerate(ins[side])
        if i not in contracted[side] and i not in batched[side]
    ]
    return [(*together, *free)]


def _reduced(e: Equation, ins: Sequence[Split], shapes: Shapes, outs: Shapes) -> list[Split]:
    axes = e.eqn.params["axes"]
    return [tuple(s for i, s in enumerate(ins[0]) if i not in axes) for _ in outs]


def _broadcast(e: Equation, ins: Sequence[Split], shapes: Shapes, outs: Shapes) -> list[Split]:
    split = [1] * len(outs[0])
    for i, at in enumerate(e.eqn.params["broadcast_dimensions"]):
        if shapes[0][i] == outs[0][at]:
            split[at] = ins[0][i]
    return [tuple(split)]


def _transposed(e: Equation, ins: Sequence[Split], shapes: Shapes, outs: Shapes) -> list[Split]:
    return [tuple(ins[0][i] for i in e.eqn.params["permutation"])]


def _reshaped(e: Equation, ins: Sequence[Split], shapes: Shapes, outs: Shapes) -> list[Split]:
    """Of axes that become others, the first one's split is that of the first of those."""
    before, after, split = shapes[0], outs[0], [1] * len(outs[0])
    if not math.prod(before):
        return [whole(after)]
    i = j = 0
    while i < len(before) and j < len(after):
        first, to, n, m = i, j, before[i], after[j]
        while n != m:
            if n < m:
                i += 1
                n *= before[i]
            else:
                j += 1
                m *= after[j]
        led = next((k for k in range(first, i + 1) if before[k] > 1), first)
        gets = next((k for k in range(to, j + 1) if after[k] > 1), to)
        if after[gets] % ins[0][led] == 0:
            split[gets] = ins[0][led]
        i, j = i + 1, j + 1
    return [tuple(split)]


def _same_axes(e: Equation, ins: Sequence[Split], shapes: Shapes, outs: Shapes) -> list[Split]:
    """An axis that keeps its length keeps its split: elementwise, of slices, of parts joined."""
    made = []
    for out in outs:
        alike = [(s, x) for s, x in zip(ins, shapes, strict=True) if len(x) == len(out)]
        made.append(
            tuple(max((s[i] for s, x in alike if x[i] == n), default=1) for i, n in enumerate(out))
        )
    return made


def _looked_up(e: Equation, ins: Sequence[Split], shapes: Shapes, outs: Shapes) -> list[Split]:
    """Rows of a table: their own axes stay split, and the one that is looked along is summed."""
    numbers, sizes = e.eqn.params["dimension_numbers"], e.eqn.params["slice_sizes"]
    gone = (*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ()))
    kept = [i for i in range(len(shapes[0])) if i not in gone]
    split = [1] * len(outs[0])
    for at, i in zip(numbers.offset_dims, kept, strict=True):
        split[at] = ins[0][i] if sizes[i] == shapes[0][i] else 1
    return [tuple(split)]


def _first(e: Equation, ins: Sequence[Split], shapes: Shapes, outs: Shapes) -> list[Split]:
    return [ins[0] if shapes[0] == out else whole(out) for out in outs]


def _squeezed(e: Equation, ins: Sequence[Split], shapes: Shapes, outs: Shapes) -> list[Split]:
    return [tuple(s for i, s in enumerate(ins[0]) if i not in e.eqn.params["dimensions"])]


def _expanded(e: Equation, ins: Sequence[Split], shapes: Shapes, outs: Shapes) -> list[Split]:
    own = iter(ins[0])
    new = e.eqn.params["dimensions"]
    return [tuple(1 if i in new else next(own) for i in range(len(outs[0])))]


_Rule = Callable[[Equation, Sequence[Split], Shapes, Shapes], list[Split]]
_RULES: dict[str, _Rule] = {
    "scan": _loop,
    "broadcast_in_dim": _broadcast,
    "transpose": _transposed,
    "reshape": _reshaped,
    "squeeze": _squeezed,
    "expand_dims": _expanded,
    "gather": _looked_up,
    "scatter": _first,
    "scatter-add": _first,
    "dynamic_update_slice": _first,
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(REDUCTIONS, _reduced),
}


def devices(split: Split) -> int:
    """How many devices have a part of their own."""
    return math.prod(split)
