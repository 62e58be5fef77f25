"""Control flow that takes a rewritten leaf, rebuilt with the public JAX API around its body."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft._compat import evaluate, function_name, open_jaxpr, scan_counts
from jpeft.by_layer import Layers
from jpeft.leaf import Call, Leaf, LeafError, Site, dense, layer_of, tell_once

# Functions of this package whose own derivative rule saves work, and changes nothing.
SAVES_WORK = frozenset({"jpeft_next_token_loss", "jpeft_wide_dot_general"})

Interpret = Callable[[Any, Sequence[Any]], list[Any]]


def _jit(call: Call, interpret: Interpret) -> list[Any]:
    p = call.params

    def body(*operands: Any) -> list[Any]:
        return interpret(p["jaxpr"], operands)

    body.__name__ = body.__qualname__ = p["name"]
    options: dict[str, Any] = {}
    if any(isinstance(s, jax.sharding.Sharding) for s in p["in_shardings"]):
        options["in_shardings"] = tuple(
            s if isinstance(s, jax.sharding.Sharding) and not isinstance(x, Leaf) else None
            for s, x in zip(p["in_shardings"], call.operands, strict=True)
        )
    if any(isinstance(s, jax.sharding.Sharding) for s in p["out_shardings"]):
        options["out_shardings"] = [
            s if isinstance(s, jax.sharding.Sharding) else None for s in p["out_shardings"]
        ]
    donated = tuple(i for i, d in enumerate(p["donated_invars"]) if d)
    return jax.jit(
        body,
        donate_argnums=donated,
        keep_unused=p["keep_unused"],
        inline=p["inline"],
        compiler_options=dict(p["compiler_options_kvs"]) or None,
        **options,
    )(*call.operands)


def _call(call: Call, interpret: Interpret) -> list[Any]:
    inner = call.params.get("call_jaxpr", call.params.get("jaxpr"))
    return interpret(inner, call.operands)


def _remat(call: Call, interpret: Interpret) -> list[Any]:
    p = call.params

    def body(*operands: Any) -> list[Any]:
        return interpret(p["jaxpr"], operands)

    return jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])(*call.operands)


def _carried(
    call: Call, body: Any, before: int, carries: Sequence[Any]
) -> tuple[list[bool], list[Any]]:
    """Which carries the body hands on untouched, and the carries as they may enter the loop.

    A leaf that every step hands on is an invariant of the loop and can stay a leaf; one that
    the loop changes becomes an array on its way in.
    """
    program, _ = open_jaxpr(body)
    kept = [
        program.outvars[i] is program.invars[before + i] and isinstance(x, Leaf)
        for i, x in enumerate(carries)
    ]
    for x, keep in zip(carries, kept, strict=True):
        if isinstance(x, Site) and not keep:
            raise LeafError(
                f"{type(x).__name__} at '{x.path}' is changed inside a '{call.name}': it acts "
                "where it is used and cannot be computed with"
            )
    return kept, [None if keep else dense(x) for x, keep in zip(carries, kept, strict=True)]


def _filled(carry: Sequence[Any], invariant: Sequence[Any], kept: Sequence[bool]) -> list[Any]:
    return [i if k else c for c, i, k in zip(carry, invariant, kept, strict=True)]


def _emptied(carry: Sequence[Any], kept: Sequence[bool]) -> list[Any]:
    return [None if k else dense(c) for c, k in zip(carry, kept, strict=True)]


def _scan(call: Call, interpret: Interpret) -> list[Any]:
    p = call.params
    n_consts, n_carry = scan_counts(call.eqn)
    consts = call.operands[:n_consts]
    carries = call.operands[n_consts : n_consts + n_carry]
    xs = call.operands[n_consts + n_carry :]
    kept, init = _carried(call, p["jaxpr"], n_consts, carries)
    straight = 0 < p["length"] <= p["unroll"]
    xs = tuple(_as_stacked(x, p["length"], straight) for x in xs)

    def body(carry: list[Any], x: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
        outs = interpret(p["jaxpr"], [*consts, *_filled(carry, carries, kept), *x])
        return _emptied(outs[:n_carry], kept), outs[n_carry:]

    if straight:
        final, ys = _straight(body, init, xs, p["length"], p["reverse"])
    else:
        final, ys = jax.lax.scan(
            body, init, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
        )
    return [*_filled(final, carries, kept), *ys]


def _as_stacked(x: Any, length: int, straight: bool) -> Any:
    """An operand of a loop that is sliced by its steps. **Raises:** `LeafError`."""
    if not isinstance(x, Leaf):
        return x
    x = x.scanned(length)

    def apart(y: Any) -> bool:
        return isinstance(y, Layers)

    if any(y.shape[:1] != (length,) for y in jax.tree.leaves(x, is_leaf=apart)):
        raise LeafError(
            f"'{x.path}' is stacked over {length} layers, which {type(x).__name__} was "
            "made without knowing: pass uses=jpeft.uses(apply, params, *inputs) to init"
        )
    return x if straight else jax.tree.map(lambda y: dense(y), x, is_leaf=apart)


def _straight(
    body: Callable[..., Any], carry: Any, xs: Sequence[Any], length: int, reverse: bool
) -> tuple[Any, list[Any]]:
    """A loop of which every step is a piece of the program: nothing of it has to be stacked."""
    results: dict[int, list[Any]] = {}
    for i in reversed(range(length)) if reverse else range(length):
        carry, results[i] = body(carry, tuple(layer_of(x, i) for x in xs))
    columns = zip(*(results[i] for i in range(length)), strict=True)
    return carry, [jnp.stack([dense(y) for y in column]) for column in columns]


def _while(call: Call, interpret: Interpret) -> list[Any]:
    p = call.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts = call.operands[:n_cond]
    body_consts = call.operands[n_cond : n_cond + n_body]
    carries = call.operands[n_cond + n_body :]
    kept, init = _carried(call, p["body_jaxpr"], n_body, carries)

    def cond(carry: list[Any]) -> Any:
        return interpret(p["cond_jaxpr"], [*cond_consts, *_filled(carry, carries, kept)])[0]

    def body(carry: list[Any]) -> list[Any]:
        outs = interpret(p["body_jaxpr"], [*body_consts, *_filled(carry, carries, kept)])
        return _emptied(outs, kept)

    return _filled(jax.lax.while_loop(cond, body, init), carries, kept)


def _cond(call: Call, interpret: Interpret) -> list[Any]:
    index, *operands = call.operands

    def branch(jaxpr: Any) -> Callable[..., list[Any]]:
        return lambda *xs: [dense(y) for y in interpret(jaxpr, xs)]

    branches = [branch(j) for j in call.params["branches"]]
    return jax.lax.switch(dense(index), branches, *operands)


def _interpreted(call: Call) -> Callable[..., list[Any]]:
    """The equation on dense operands, with its own derivative rule."""
    return lambda *operands: evaluate(call.eqn, operands)


def _custom_jvp(call: Call, interpret: Interpret) -> list[Any]:
    done = _without_own_rule(call, interpret)
    if done is not None:
        return done

    def primal(*operands: Any) -> list[Any]:
        return [dense(y) for y in interpret(call.params["call_jaxpr"], operands)]

    def jvp(primals: Any, tangents: Any) -> Any:
        # The function's own rule, on what the leaves stand for.
        arrays, moves = jax.jvp(lambda *xs: [dense(x) for x in xs], primals, tangents)
        return jax.jvp(_interpreted(call), arrays, moves)

    rebuilt = jax.custom_jvp(primal)
    rebuilt.defjvp(jvp)
    return rebuilt(*call.operands)


def _custom_vjp(call: Call, interpret: Interpret) -> list[Any]:
    done = _without_own_rule(call, interpret)
    if done is not None:
        return done

    def primal(*operands: Any) -> list[Any]:
        return [dense(y) for y in interpret(call.params["call_jaxpr"], operands)]

    def forward(*operands: Any) -> tuple[list[Any], Any]:
        return primal(*operands), operands

    def backward(operands: Any, cotangents: list[Any]) -> Any:
        # The function's own rule, on what the leaves stand for; its forward pass runs again.
        def own(*xs: Any) -> list[Any]:
            return _interpreted(call)(*[dense(x) for x in xs])

        _, pullback = jax.vjp(own, *operands)
        return pullback(cotangents)

    rebuilt = jax.custom_vjp(primal)
    rebuilt.defvjp(forward, backward)
    return rebuilt(*call.operands)


def _without_own_rule(call: Call, interpret: Interpret) -> list[Any] | None:
    """The results where a function's own derivative rule does not fit its rewritten body."""
    body = call.params["call_jaxpr"]
    name = function_name(body)
    if name in SAVES_WORK:
        return interpret(body, call.operands)
    leaves = [x for x in call.operands if isinstance(x, Leaf)]
    for x in leaves:
        if isinstance(x, Site):
            tell_once(x, name, "which then has its body's derivative in place of its own rule")
            return interpret(body, call.operands)
    for x in leaves:
        if any(jnp.issubdtype(y.dtype, jax.dtypes.prng_key) for y in jax.tree.leaves(x)):
            tell_once(x, name, "whose own derivative rule has the dense weight: without dropout")
            return _interpreted(call)(*map(dense, call.operands))
    return None


def _shard_map(call: Call, interpret: Interpret) -> list[Any]:
    p = call.params

    def body(*operands: Any) -> tuple[Any, ...]:
        return tuple(dense(y) for y in interpret(p["jaxpr"], operands))

    operands = [
        x.divided(_parts(spec, x.ndim, p["mesh"])) if isinstance(x, Leaf) else x
        for x, spec in zip(call.operands, p["in_specs"], strict=True)
    ]
    specs = tuple(
        x.specs(spec) if isinstance(x, Leaf) else spec
        for x, spec in zip(operands, p["in_specs"], strict=True)
    )
    return list(
        jax.shard_map(
            body,
            mesh=p["mesh"],
            in_specs=specs,
            out_specs=tuple(p["out_specs"]),
            check_vma=p["check_vma"],
            axis_names=set(p["newly_manual_axes"]),
        )(*operands)
    )


def _parts(spec: Any, ndim: int, mesh: Any) -> list[int]:
    """Into how many parts a `PartitionSpec` divides each axis."""
    names = [() if s is None else (s,) if isinstance(s, str) else s for s in spec]
    parts = [math.prod(mesh.shape[name] for name in on) for on in names]
    return [*parts, *[1] * (ndim - len(parts))]


def _barrier(call: Call, interpret: Interpret) -> list[Any]:
    del interpret
    return list(jax.lax.optimization_barrier(call.operands))


RULES: dict[str, Callable[[Call, Interpret], list[Any]]] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "shard_map": _shard_map,
    "optimization_barrier": _barrier,
}
