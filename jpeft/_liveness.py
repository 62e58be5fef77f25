"""How much memory a program needs beside its arguments: a walk over its equations.

What a compiler does is followed where it decides about memory. Elementwise work is fused into what
reads it, and has no buffer of its own, unless it is costly and read twice, or what it is made of
would have to stay for it. Products, reductions, gathers and loops have one, from where it is made
to where it is read last. What a loop carries and the stacks that it reads and writes stand once,
outside it; its step has a peak of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from jpeft._buffers import Buffer, Compiler, Operand, Peak
from jpeft._compat import open_jaxpr, scan_counts
from jpeft._flat import (
    ALIASES,
    COSTLY,
    FUSED,
    PRODUCTS,
    REDUCTIONS,
    Equation,
    Flat,
    bytes_of,
    for_products,
    in_checkpoint,
)
from jpeft._split import devices, into_loop, splits, whole


class Walk:
    """Buffers of a flat program, and its peak.

    **Arguments:** `size(equation, aval, parts)`, bytes on one device of what an equation makes, of
    which it has one of so many parts; `stacked`, of a loop's step, what it adds to stacks.
    """

    def __init__(
        self,
        flat: Flat,
        operands: Sequence[Operand],
        size: Callable[[Equation | None, Any, int], int],
        compiler: Compiler,
        stacked: Iterable[int] = (),
    ) -> None:
        self.flat, self.compiler, self.size = flat, compiler, size
        self.stacked = set(stacked)
        self.split = splits(
            flat,
            [
                o.split or whole(flat.avals[v].shape)
                for v, o in zip(flat.ins, operands, strict=True)
            ],
        )
        self.maker = {v: i for i, e in enumerate(flat.equations) for v in e.outs}
        self.readers: dict[int, list[int]] = {}
        for i, e in enumerate(flat.equations):
            for v in {v for v in e.ins if v is not None}:
                self.readers.setdefault(v, []).append(i)
        self.sharded: set[int] = set()
        self.buffers: dict[int, Buffer] = {}
        # For each value, the buffers that it is in, or that it is computed from where it is read.
        self.roots: dict[int, frozenset[int]] = {}
        self.transient: dict[int, int] = {}
        for v, operand in zip(flat.ins, operands, strict=True):
            self._receive(v, operand)
        for i, e in enumerate(flat.equations):
            for v in e.outs:
                self._decide(i, e, v)
        self._date()

    # -- which values have a buffer ------------------------------------------------------------

    def _receive(self, v: int, operand: Operand) -> None:
        aval = self.flat.avals[v]
        if operand.sharded:
            self.sharded.add(v)
        narrow = self.compiler.narrow and aval.dtype == jnp.float32
        if (
            operand.sharded
            or (operand.piece and self._asked(v))
            or (operand.parameter and narrow and for_products(self.flat, v))
        ):
            self._new(v, -1, gathered=operand.sharded)
        self.roots[v] = frozenset([v] if v in self.buffers else [])

    def _decide(self, i: int, e: Equation, v: int) -> None:
        sources = [x for x in e.ins if x is not None]
        reads = frozenset[int]().union(*(self.roots.get(x, ()) for x in sources))
        keeps = e.name in ALIASES or e.name in ("convert_element_type", "slice", "dynamic_slice")
        if keeps and sources and sources[0] in self.sharded:
            # Still a device's part: what is gathered is what comes of it.
            self.sharded.add(v)
            self._new(v, -1, gathered=True)
            self.roots[v] = frozenset([v])
            return
        own = not self._fused(e) or (e.name not in ALIASES and self._worth(e, v, reads))
        if own:
            self._new(v, i)
        self.roots[v] = frozenset([v]) if own else reads

    def _new(self, v: int, i: int, gathered: bool = False) -> None:
        aval = self.flat.avals[v]
        made_by = self.flat.equations[i] if i >= 0 else None
        size = self._bytes(v) if gathered else self.size(made_by, aval, self._parts(v))
        if self.compiler.narrow and aval.dtype == jnp.float32 and for_products(self.flat, v):
            size //= 2
        self.buffers[v] = Buffer(size, i, i, gathered)

    def _parts(self, v: int) -> int:
        return devices(self.split[v])

    def _bytes(self, v: int) -> int:
        return bytes_of(self.flat.avals[v]) // self._parts(v)

    def _seen(self, v: int) -> Iterable[int]:
        """The equations that read a value, seen through what keeps its buffer."""
        for i in self.readers.get(v, ()):
            e = self.flat.equations[i]
            if e.name in ALIASES:
                yield from self._seen(e.outs[0])
            else:
                yield i

    def _asked(self, v: int) -> list[int]:
        """The equations that read the value from a buffer."""
        fuses = FUSED | REDUCTIONS | (PRODUCTS if self.compiler.into_products else frozenset())
        return [
            i
            for i in self._seen(v)
            if self.flat.equations[i].name not in fuses
            and not self._fused(self.flat.equations[i])
            and not self._carried(i, v)
            and not self._sunk(i, v)
        ]

    def _carried(self, i: int, v: int) -> bool:
        """Whether a loop starts from the value: then it is made in the loop's own buffer."""
        e = self.flat.equations[i]
        if e.name != "scan":
            return False
        consts, carries = scan_counts(e.eqn)
        at = [n for n, x in enumerate(e.ins) if x is not None and self._base(x) == self._base(v)]
        return all(consts <= n < consts + carries for n in at)

    def _sunk(self, i: int, v: int) -> bool:
        """Whether a loop's steps make the value anew, of something smaller, such as a mask that is
        the same for all heads.
        """
        e = self.flat.equations[i]
        if not self.compiler.recomputes or e.name != "scan":
            return False
        consts, _ = scan_counts(e.eqn)
        base = self._base(v)
        if any(x is not None and self._base(x) == base for x in e.ins[consts:]):
            return False
        made_of, waiting = set[int](), [base]
        while waiting:
            x = waiting.pop()
            made = self.maker.get(x)
            if made is None or x in self.buffers or not self._fused(self.flat.equations[made]):
                made_of.add(x)
            else:
                waiting += [y for y in self.flat.equations[made].ins if y is not None]
        return sum(self._bytes(x) for x in made_of) < self._bytes(v)

    def _base(self, v: int) -> int:
        while v in self.maker and self.flat.equations[self.maker[v]].name in ALIASES:
            source = self.flat.equations[self.maker[v]].ins[0]
            if source is None:
                return v
            v = source
        return v

    def _worth(self, e: Equation, v: int, reads: frozenset[int]) -> bool:
        asked = self._asked(v)
        if v in self.stacked and self.compiler.pieces:
            return True
        if len(asked) == 1:
            return True
        if not asked and len(set(self._seen(v))) + (v in self.flat.outs) < 2:
            return False
        if e.name in COSTLY and not self.compiler.recomputes:
            return True
        # Computed by each reader anew, unless what it is made of would have to stay for that.
        until = self._extent(v, None, {})
        longer = (r for r in reads if r in self.buffers and self._extent(r, v, {}) < until)
        size = self.size(e, self.flat.avals[v], self._parts(v))
        if sum(self.buffers[r].size for r in longer) > size:
            return True
        for i in asked:
            self.transient[i] = self.transient.get(i, 0) + size
        return False

    def _extent(self, v: int, without: int | None, known: dict[int, int]) -> int:
        """The last equation that reads a value, but through `without`, if what is fused is computed
        by its readers.
        """
        if v not in known:
            last = -1
            for i in self.readers.get(v, ()):
                e = self.flat.equations[i]
                if without in e.outs:
                    continue
                last = max(last, i)
                if self._fused(e):
                    last = max(last, *(self._extent(x, without, known) for x in e.outs))
            known[v] = last
        return known[v]

    # -- from when to when ---------------------------------------------------------------------

    def _date(self) -> None:
        """When each buffer is made, for those that are made when first read, and read last."""
        for i, e in enumerate(self.flat.equations):
            if not self._runs(e):
                continue
            for r in {r for v in e.ins if v is not None for r in self.roots.get(v, ())}:
                buffer = self.buffers[r]
                if buffer.gathered and e.name == "scan" and self._gathers_inside(e, r):
                    continue
                if buffer.made < 0:
                    buffer.made = i
                buffer.last = i
        self.buffers = {v: b for v, b in self.buffers.items() if b.made >= 0}
        if self.compiler.pieces:
            for v in self.stacked.intersection(self.buffers):
                self.buffers[v].last = len(self.flat.equations) - 1

    def _gathers_inside(self, e: Equation, v: int) -> bool:
        """Whether a loop's steps gather the value: a layer's part each, or in `jax.checkpoint`.

        What else is the same in every step is gathered once, before the loop.
        """
        consts, _ = scan_counts(e.eqn)
        at = [n for n, x in enumerate(e.ins) if x is not None and v in self.roots.get(x, ())]
        return all(n >= consts or in_checkpoint(e, n) for n in at)

    def _runs(self, e: Equation) -> bool:
        """Whether an equation is work of its own, not part of its readers'."""
        written = any(v in self.flat.outs or v in self.buffers for v in e.outs)
        return written or not self._fused(e)

    def _fused(self, e: Equation) -> bool:
        """Whether what an equation makes can be computed where it is read."""
        if e.name != "scatter-add" or not self.compiler.recomputes:
            return e.name in FUSED
        return not e.eqn.params["dimension_numbers"].update_window_dims

    # -- the peak ------------------------------------------------------------------------------

    def peak(self) -> Peak:
        """The most bytes at once."""
        best = Peak()
        starts: dict[int, list[int]] = {}
        for v, b in self.buffers.items():
            starts.setdefault(b.made, []).append(v)
        live: dict[int, Buffer] = {}
        for i, e in enumerate(self.flat.equations):
            live.update({v: self.buffers[v] for v in starts.get(i, ())})
            inside = self._inside(e)
            working = inside.total - inside.gathered + self.transient.get(i, 0)
            total = sum(b.size for b in live.values()) + inside.gathered + working
            total -= self._taken_over(i, e)
            if total > best.total:
                best = Peak(total, i, dict(live), inside.gathered, working)
            live = {v: b for v, b in live.items() if b.last > i}
        return best

    def _taken_over(self, i: int, e: Equation) -> int:
        """Bytes of operands that die here, and whose buffers the results take over."""
        if not self._fused(e) and e.name not in ("scan", "while", "scatter-add", "scatter"):
            return 0
        read = {r for x in e.ins if x is not None for r in self.roots.get(x, ())}
        dying = [
            self.buffers[r].size
            for r in read
            if r in self.buffers and self.buffers[r].last == i and self.buffers[r].made < i
        ]
        total = 0
        for v in e.outs:
            size = self.buffers[v].size if v in self.buffers else 0
            if size and size in dying:
                dying.remove(size)
                total += size
        return total

    def _inside(self, e: Equation) -> Peak:
        """The peak of a loop's step, or of a branch."""
        if e.name == "scan":
            consts, carries = scan_counts(e.eqn)
            inside = into_loop(e, [whole(()) if v is None else self.split[v] for v in e.ins])
            # What is gathered before the loop is whole inside.
            parts = {v for v in e.ins if v in self.sharded and self._gathers_inside(e, v)}
            given = [
                Operand(n >= consts + carries, v in parts, split=inside[n])
                for n, v in enumerate(e.ins)
            ]
            return self._body(e.eqn.params["jaxpr"], given, carries)
        if e.name not in ("while", "cond"):
            return Peak()
        bodies = [
            x
            for p in e.eqn.params.values()
            for x in (p if isinstance(p, tuple | list) else [p])
            if hasattr(open_jaxpr(x)[0], "eqns")
        ]
        peaks = [self._body(b, [Operand()] * len(open_jaxpr(b)[0].invars)) for b in bodies]
        return max(peaks, key=lambda p: p.total, default=Peak())

    def _body(self, jaxpr: Any, given: Sequence[Operand], carries: int | None = None) -> Peak:
        flat = Flat(jaxpr)
        stacked = [] if carries is None else [v for v in flat.outs[carries:] if v is not None]
        peak = Walk(flat, given, _share, self.compiler, stacked).peak()
        gathered = peak.gathered + sum(b.size for b in peak.buffers.values() if b.gathered)
        return dataclasses.replace(peak, gathered=gathered, working=peak.total - gathered)


def _share(made_by: Equation | None, aval: Any, parts: int) -> int:
    return bytes_of(aval) // parts
