"""`lift` runs a model on a rewritten tree; `merge` makes ordinary parameters of it again.

`lift` is a small interpreter of jaxprs. The model is traced on the shapes that it is to see; then
every equation without a rewritten operand is bound exactly as it stands, and the others are
looked up in their leaves' rules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import jax

from jpeft import _control
from jpeft._compat import context, evaluate, is_literal, open_jaxpr
from jpeft.leaf import Call, Leaf, dense, is_leaf, without_rule

P = ParamSpec("P")
T = TypeVar("T")


def lift(apply: Callable[P, T]) -> Callable[P, T]:
    """`apply`, able to read rewritten leaves in any of its arguments.

    **Arguments:** `apply(params, *inputs)`, any function of JAX arrays: a plain function, a Linen
    module's `apply`, `jpeft.functional(model)`'s, ... Positional or keyword arguments that are not
    JAX arrays are static, as they are for `apply` itself.

    **Returns:** a function of the same signature. Without a rewritten leaf among its arguments it
    calls `apply` itself. It traces `apply` at each call: call it under `jax.jit`.

    **Raises:** `jpeft.LeafError` where a leaf that acts at its place of use (an adapter, a prompt)
    is read by an operation that it has no rule for.
    """

    @functools.wraps(apply)
    def lifted(*args: P.args, **kwargs: P.kwargs) -> T:
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_leaf)
        if not any(isinstance(x, Leaf) for x in leaves):
            return apply(*args, **kwargs)
        traced = [i for i, x in enumerate(leaves) if isinstance(x, (Leaf, jax.Array))]

        def on_arrays(*arrays: jax.Array) -> T:
            filled = list(leaves)
            for i, array in zip(traced, arrays, strict=True):
                filled[i] = array
            call: tuple[Any, Any] = jax.tree.unflatten(treedef, filled)
            return cast("Callable[..., T]", apply)(*call[0], **call[1])

        values = [leaves[i] for i in traced]
        shapes = [x.proxy if isinstance(x, Leaf) else x for x in values]
        program, out = jax.make_jaxpr(on_arrays, return_shape=True)(*shapes)
        return jax.tree.unflatten(jax.tree.structure(out), interpret(program, values))

    return lifted


def merge(params: Any) -> Any:
    """Ordinary parameters: every rewritten weight of the tree as the dense array it stands for.

    **Raises:** `jpeft.LeafError` for a leaf that stands for no array, such as an adapter.
    """
    return jax.tree.map(dense, params, is_leaf=is_leaf)


def interpret(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of a (closed or open) jaxpr on arrays and rewritten leaves."""
    program, consts = open_jaxpr(jaxpr)
    env: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
    env.update(zip(program.invars, operands, strict=True))
    last = {v: i for i, eqn in enumerate(program.eqns) for v in eqn.invars if not is_literal(v)}
    kept = {v for v in program.outvars if not is_literal(v)}
    for i, eqn in enumerate(program.eqns):
        values = tuple(v.val if is_literal(v) else env[v] for v in eqn.invars)
        env.update(zip(eqn.outvars, dispatch(Call(eqn, values, dispatch)), strict=True))
        # Outside jit the interpreter would otherwise hold every intermediate until the end.
        for v in {v for v in eqn.invars if not is_literal(v)} - kept:
            if last[v] == i:
                del env[v]
    return [v.val if is_literal(v) else env[v] for v in program.outvars]


def dispatch(call: Call) -> list[Any]:
    """The results of one equation on arrays and rewritten leaves."""
    if not any(isinstance(x, Leaf) for x in call.operands):
        return evaluate(call.eqn, call.operands)
    with context(call.eqn):
        control = _control.RULES.get(call.name)
        if control is not None:
            return control(call, interpret)
        for index, operand in enumerate(call.operands):
            if isinstance(operand, Leaf):
                results = operand.rule(call, index)
                if results is not None:
                    return results
        operands = without_rule(call)
    return evaluate(call.eqn, operands)
