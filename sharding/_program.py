"""The few places where JAX's program representation is read.

JAX 0.12 merged `ClosedJaxpr` into `Jaxpr`; scan changed its parameters in 0.11. What is here is
written so that it does not depend on either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex


def traced(fun: Callable[..., Any], *args: Any) -> tuple[Any, Sequence[Any], Any]:
    """The program of `fun`, its constants, and the structure of what it returns."""
    closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
    program, consts = opened(closed)
    return program, consts, jax.tree.structure(shape)


def typed(x: Any) -> jax.ShapeDtypeStruct:
    """What a program is traced for in an array's place, wherever the array is."""
    weak = bool(getattr(x, "weak_type", False))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=weak)


def opened(jaxpr: Any) -> tuple[jex.Jaxpr, Sequence[Any]]:
    """The program and its constants, from a closed or an open jaxpr."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def bind(eqn: jex.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """One equation as it stands, run as the program of that equation alone."""
    given: dict[Any, Any] = {
        v: x for v, x in zip(eqn.invars, operands, strict=True) if not isinstance(v, jex.Literal)
    }
    info = jax.api_util.debug_info("sharding", _step, (), {})
    info = info._replace(arg_names=None, result_paths=None)
    program = jex.Jaxpr([], list(given), eqn.outvars, [eqn], eqn.effects, debug_info=info)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(program, []))(*given.values())  # type: ignore[no-any-return]


def named_like(eqn: jex.JaxprEqn) -> contextlib.AbstractContextManager[Any]:
    """The name stack of an equation, so that profiles show what is done for it beside it."""
    scope = str(eqn.source_info.name_stack)
    return jax.named_scope(scope) if scope else contextlib.nullcontext()


def _step() -> None:
    """Stands for the training step in JAX's debug information."""


def shape_of(atom: Any) -> tuple[int, ...]:
    """The shape of an equation's operand or result."""
    return tuple(atom.aval.shape)


def scan_parts(eqn: jex.JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    body, _ = opened(eqn.params["jaxpr"])

    def ranks(outer: Sequence[Any], inner: Sequence[Any]) -> list[bool]:
        pairs = zip(outer, inner, strict=True)
        return [len(shape_of(a)) == len(shape_of(b)) for a, b in pairs]

    carried = sum(ranks(eqn.outvars, body.outvars))
    return sum(ranks(eqn.invars, body.invars)) - carried, carried
