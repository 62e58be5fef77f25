"""The few places where JAX's program representation is read, kept together.

JAX 0.12 merged `ClosedJaxpr` into `Jaxpr`; scan changed its parameters in 0.11. What is here is
written so that it does not depend on either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any, TypeGuard

import jax
from jax.extend import core as jex


def open_jaxpr(jaxpr: Any) -> tuple[jex.Jaxpr, Sequence[Any]]:
    """The program and its constants, from a closed or an open jaxpr of any JAX version."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def function_name(jaxpr: Any) -> str:
    """The name of the function that a program was traced from; empty where nobody knows."""
    about = getattr(open_jaxpr(jaxpr)[0], "debug_info", None)
    return str(getattr(about, "func_name", ""))


def is_literal(atom: Any) -> TypeGuard[jex.Literal]:
    """Whether an equation's operand is a constant written into the program."""
    return isinstance(atom, jex.Literal)


def shape_of(atom: Any) -> tuple[int, ...]:
    """The shape of an equation's operand or result."""
    return tuple(atom.aval.shape)


def evaluate(eqn: jex.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Bind one equation exactly as it stands: parameters, name stack, source line and context.

    It runs as a program of that one equation, which is how public JAX evaluates an equation.
    """
    values: dict[Any, Any] = {
        v: x for v, x in zip(eqn.invars, operands, strict=True) if not is_literal(v)
    }
    info = jax.api_util.debug_info("jpeft.lift", _named, (), {})._replace(
        arg_names=None, result_paths=None
    )
    program = jex.Jaxpr([], list(values), eqn.outvars, [eqn], eqn.effects, debug_info=info)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(program, []))(*values.values())  # type: ignore[no-any-return]


def _named() -> None:
    """Stands for the interpreted function in JAX's debug information."""


@contextlib.contextmanager
def context(eqn: jex.JaxprEqn) -> Generator[None]:
    """The name stack and configuration under which `eqn` was traced."""
    scope = str(eqn.source_info.name_stack)
    with contextlib.ExitStack() as stack:
        if scope:
            stack.enter_context(jax.named_scope(scope))
        stack.enter_context(eqn.ctx.manager)
        yield


def scan_counts(eqn: jex.JaxprEqn) -> tuple[int, int]:
    """`(constants, carries)` of a scan: what is scanned loses its leading axis in the body."""
    body, _ = open_jaxpr(eqn.params["jaxpr"])
    scanned = sum(
        len(shape_of(outer)) != len(shape_of(inner))
        for outer, inner in zip(eqn.invars, body.invars, strict=True)
    )
    carries = sum(
        len(shape_of(outer)) == len(shape_of(inner))
        for outer, inner in zip(eqn.outvars, body.outvars, strict=True)
    )
    return len(eqn.invars) - scanned - carries, carries
