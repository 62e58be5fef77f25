"""A traced program as one list of equations, its calls written out, without what nobody reads."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jpeft._compat import is_literal, open_jaxpr, scan_counts

# What keeps its operand's buffer, at most in another order.
ALIASES = frozenset(
    {
        "reshape",
        "squeeze",
        "expand_dims",
        "transpose",
        "copy",
        "copy_p",
        "optimization_barrier",
        "sharding_constraint",
        "stop_gradient",
        "name",
        "reduce_precision",
    }
)
# Of what is fused, what is computed once, where more than one reads it.
COSTLY = frozenset(
    {
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "sin",
        "cos",
        "tan",
        "tanh",
        "logistic",
        "erf",
        "erfc",
        "erf_inv",
        "pow",
    }
)
# What compilers compute where it is read.
FUSED = (
    ALIASES
    | COSTLY
    | frozenset(
        {
            "convert_element_type",
            "broadcast_in_dim",
            "iota",
            "slice",
            "dynamic_slice",
            "pad",
            "concatenate",
            "rev",
            "split",
            "select_n",
            "add",
            "sub",
            "mul",
            "div",
            "rem",
            "neg",
            "sign",
            "abs",
            "max",
            "min",
            "integer_pow",
            "square",
            "sqrt",
            "rsqrt",
            "cbrt",
            "floor",
            "ceil",
            "round",
            "clamp",
            "is_finite",
            "not",
            "and",
            "or",
            "xor",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "add_any",
            "nextafter",
            "shift_left",
            "shift_right_logical",
            "shift_right_arithmetic",
            "bitcast_convert_type",
            "population_count",
            "clz",
            "atan2",
            "real",
            "imag",
        }
    )
)
REDUCTIONS = frozenset(
    {
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_prod",
        "reduce_and",
        "reduce_or",
        "argmax",
        "argmin",
    }
)
PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})
# Loops and branches stay; every other equation with a program in it is a call.
_KEPT = ("scan", "while", "cond", "shard_map", "pallas_call")
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation whose operands and results are numbers; None for a constant in the program."""

    name: str
    ins: tuple[int | None, ...]
    outs: tuple[int, ...]
    eqn: Any


class Flat:
    """A program written out.

    **Attributes:** `avals`, shape and type of every value, by its number; `ins` and `outs`, the
    program's own.
    """

    def __init__(self, jaxpr: Any) -> None:
        program, _ = open_jaxpr(jaxpr)
        self.avals: list[Any] = []
        self.equations: list[Equation] = []
        names: dict[Any, int | None] = {}
        self.ins = [self._new(v, names) for v in program.invars]
        for v in program.constvars:
            self._new(v, names)
        self._add(program, names)
        self.outs = [None if is_literal(v) else names[v] for v in program.outvars]
        self._drop_unread()

    def _new(self, var: Any, names: dict[Any, int | None]) -> int:
        number = len(self.avals)
        names[var] = number
        self.avals.append(var.aval)
        return number

    def _add(self, program: Any, names: dict[Any, int | None]) -> None:
        for eqn in program.eqns:
            ins = [None if is_literal(v) else names[v] for v in eqn.invars]
            inner = None
            if eqn.primitive.name not in _KEPT:
                inner = next((eqn.params[k] for k in _CALLS if k in eqn.params), None)
            if inner is None:
                outs = tuple(self._new(v, names) for v in eqn.outvars)
                self.equations.append(Equation(eqn.primitive.name, tuple(ins), outs, eqn))
                continue
            body, _ = open_jaxpr(inner)
            own: dict[Any, int | None] = {}
            for v in body.constvars:
                self._new(v, own)
            own.update(zip(body.invars, ins[len(ins) - len(body.invars) :], strict=True))
            self._add(body, own)
            for v, inside in zip(eqn.outvars, body.outvars, strict=True):
                if is_literal(inside):
                    self._new(v, names)
                else:
                    names[v] = own[inside]

    def _drop_unread(self) -> None:
        read = {v for v in self.outs if v is not None}
        kept: list[Equation] = []
        for e in reversed(self.equations):
            if read.intersection(e.outs) or e.eqn.effects:
                kept.append(e)
                read.update(v for v in e.ins if v is not None)
        self.equations = kept[::-1]

    def put_last(self, value: int | None) -> int:
        """Move what only this one of the results needs to the end, as compilers do with a loss's
        value, which no gradient reads. The last equation before the move's that led up to it.
        """
        made = [i for i, e in enumerate(self.equations) if value in e.outs]
        until = made[0] if made else -1
        read = {v for v in self.outs if v is not None and v != value}
        needed = [False] * len(self.equations)
        for i in reversed(range(len(self.equations))):
            e = self.equations[i]
            if read.intersection(e.outs):
                needed[i] = True
                read.update(v for v in e.ins if v is not None)
        order = sorted(range(len(self.equations)), key=lambda i: not needed[i])
        self.equations = [self.equations[i] for i in order]
        return sum(needed[: until + 1]) - 1


def bytes_of(aval: Any) -> int:
    """Bytes of a whole array, from its shape and type; a key's are its numbers'."""
    return math.prod(aval.shape) * int(aval.dtype.itemsize)


def for_products(flat: Flat, v: int) -> bool:
    """Whether products alone read a value, seen through loops and what only moves it."""
    readers = [e for e in flat.equations if v in e.ins]
    if v in flat.outs or not readers:
        return False
    return all(_for_products(flat, v, e) for e in readers)


def _for_products(flat: Flat, v: int, e: Equation) -> bool:
    if e.name in PRODUCTS:
        return True
    if e.name in ALIASES or e.name in ("slice", "dynamic_slice"):
        return for_products(flat, e.outs[0])
    if e.name != "scan":
        return False
    consts, carries = scan_counts(e.eqn)
    body = Flat(e.eqn.params["jaxpr"])
    return all(
        not consts <= n < consts + carries and for_products(body, body.ins[n])
        for n, x in enumerate(e.ins)
        if x == v
    )


def in_checkpoint(loop: Equation, n: int) -> bool:
    """Whether a loop's steps read operand `n` in `jax.checkpoint` alone."""
    body, _ = open_jaxpr(loop.eqn.params["jaxpr"])
    readers = (e for e in body.eqns if any(x is body.invars[n] for x in e.invars))
    return all(e.primitive.name in ("checkpoint", "remat2") for e in readers)
