"""Sharded parameters gathered where they are used, and their gradients sharded as they are made.

Left to itself, the compiler may split a product over the sharded axis of its weight, and pass
activations around instead of weights. Here a loss is walked, equation by equation, and each sharded
parameter carries its shards along until something reads it: there it is gathered. A loop over
layers hands each step its layer's shards, so that one layer at a time is whole; in the backward
pass it is gathered again, and its gradient is summed and scattered in the same place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.sharding import NamedSharding, PartitionSpec

from sharding._program import bind, named_like, opened, scan_parts, shape_of, traced


@dataclasses.dataclass(frozen=True)
class Placed:
    """How a parameter stands on a mesh.

    **Attributes:** `stored`, its shards; `used`, as the loss reads it; `gradient`, None for what is
    not differentiated.
    """

    stored: NamedSharding
    used: NamedSharding
    gradient: NamedSharding | None = None

    def without_first(self) -> Placed | None:
        """That of a layer, where the first axis is the layers'; None if that axis is split."""
        parts = (self.stored, self.used, self.gradient)
        if any(p is not None and p.spec and p.spec[0] is not None for p in parts):
            return None

        def rest(s: NamedSharding) -> NamedSharding:
            return NamedSharding(s.mesh, PartitionSpec(*s.spec[1:]))

        gradient = None if self.gradient is None else rest(self.gradient)
        return Placed(rest(self.stored), rest(self.used), gradient)


@dataclasses.dataclass(frozen=True)
class _Shards:
    """A parameter that nothing has read yet."""

    array: Any
    placed: Placed

    def whole(self) -> Any:
        """The parameter, gathered."""
        used, gradient = self.placed.used, self.placed.gradient
        if gradient is None:
            return jax.lax.with_sharding_constraint(self.array, used)

        @jax.custom_vjp
        def gather(x: Any) -> Any:
            return jax.lax.with_sharding_constraint(x, used)

        def forward(x: Any) -> tuple[Any, None]:
            return gather(x), None

        def backward(_: None, g: Any) -> tuple[Any]:
            return (jax.lax.with_sharding_constraint(g, gradient),)

        gather.defvjp(forward, backward)
        return gather(self.array)


def gathered(
    loss: Callable[..., Any], placed: Callable[..., Sequence[Placed | None]]
) -> Callable[..., Any]:
    """`loss`, with its parameters gathered where it reads them.

    **Arguments:** `placed`, given the loss's arguments, how each array in them stands, in the order
    of `jax.tree.leaves`; None for one to be left alone.
    """

    def walked(*args: Any) -> Any:
        where = placed(*args)
        program, consts, structure = traced(loss, *args)
        operands = [
            x if p is None else _Shards(x, p)
            for x, p in zip(jax.tree.leaves(args), where, strict=True)
        ]
        outs = _walk(program, consts, operands)
        return jax.tree.unflatten(structure, [_whole(x) for x in outs])

    return walked


def _whole(x: Any) -> Any:
    return x.whole() if isinstance(x, _Shards) else x


def _walk(program: jex.Jaxpr, consts: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    values: dict[Any, Any] = {}
    known: dict[Any, Any] = {}
    values.update(zip(program.constvars, consts, strict=True))
    values.update(zip(program.invars, operands, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    def whole(atom: Any, reader: jex.JaxprEqn) -> Any:
        value = read(atom)
        if not isinstance(value, _Shards):
            return value
        if atom not in known:  # gathered once, however often it is read here
            with named_like(reader):
                known[atom] = value.whole()
        return known[atom]

    for eqn in program.eqns:
        here = [read(a) for a in eqn.invars]
        outs = None
        if any(isinstance(x, _Shards) for x in here):
            rule = _RULES.get(eqn.primitive.name)
            with named_like(eqn):
                outs = None if rule is None else rule(eqn, here)
        if outs is None:
            outs = bind(eqn, [whole(a, eqn) for a in eqn.invars])
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in program.outvars]


def _inside(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    program, consts = opened(jaxpr)
    return _walk(program, consts, operands)


def _cast(eqn: jex.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    """Before it is gathered: what goes over the wires is the narrower one."""
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return None
    (x,) = operands
    return [_Shards(bind(eqn, [x.array])[0], x.placed)]


def _layer_of(eqn: jex.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    """A slice along axes that are not split, such as a layer's out of a stack."""
    x = operands[0]
    if not isinstance(x, _Shards) or any(isinstance(o, _Shards) for o in operands[1:]):
        return None
    before, after = x.array.shape, shape_of(eqn.outvars[0])
    p = x.placed
    for s in (p.stored, p.used, p.gradient):
        spec = () if s is None else tuple(s.spec)
        if any(axis is not None and before[i] != after[i] for i, axis in enumerate(spec)):
            return None
    return [_Shards(bind(eqn, [x.array, *operands[1:]])[0], p)]


def _squeezed(eqn: jex.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    (x,) = operands
    if tuple(eqn.params["dimensions"]) != (0,):
        return None
    inner = x.placed.without_first()
    return None if inner is None else [_Shards(bind(eqn, [x.array])[0], inner)]


def _jit(eqn: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
    return [_whole(x) for x in _inside(eqn.params["jaxpr"], operands)]


def _call(eqn: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
    return _inside(eqn.params.get("call_jaxpr", eqn.params.get("jaxpr")), operands)


def _split(operands: Sequence[Any]) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """The arrays of some operands, and what makes the operands of them again."""
    placed = [x.placed if isinstance(x, _Shards) else None for x in operands]

    def joined(arrays: Sequence[Any]) -> list[Any]:
        return [x if p is None else _Shards(x, p) for x, p in zip(arrays, placed, strict=True)]

    return [x.array if isinstance(x, _Shards) else x for x in operands], joined


def _remat(eqn: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
    p = eqn.params
    arrays, joined = _split(operands)

    def body(*arrays: Any) -> list[Any]:
        return [_whole(x) for x in _inside(p["jaxpr"], joined(arrays))]

    policy = p["policy"]
    kept = None if policy is None else _without_gathered(policy)
    return jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=kept)(*arrays)


def _without_gathered(policy: Callable[..., Any]) -> Callable[..., Any]:
    """The policy, but what is gathered is never kept for the backward pass."""

    def keeps(primitive: Any, *args: Any, **params: Any) -> Any:
        inner = params.get("call_jaxpr")
        eqns = () if inner is None else opened(inner)[0].eqns
        names = [e.primitive.name for e in eqns] or [primitive.name]
        if names == ["sharding_constraint"]:
            return False
        return policy(primitive, *args, **params)

    return keeps


def _scan(eqn: jex.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    p = eqn.params
    n_consts, n_carry = scan_parts(eqn)
    # What every pass reads, such as the head that a loss in chunks reads, is gathered once.
    consts = [_whole(x) for x in operands[:n_consts]]
    init = [_whole(x) for x in operands[n_consts : n_consts + n_carry]]
    layers: list[Any] = []
    for x in operands[n_consts + n_carry :]:
        inner = x.placed.without_first() if isinstance(x, _Shards) else None
        layers.append(_Shards(x.array, inner) if inner is not None else _whole(x))
    xs, joined = _split(layers)

    def layer(consts: list[Any], carry: list[Any], x: list[Any]) -> list[Any]:
        inside = [*consts, *carry, *joined(x)]
        return [_whole(y) for y in _inside(p["jaxpr"], inside)]

    if not _forgets(opened(p["jaxpr"])[0], [*consts, *init, *layers]):
        # Or the backward pass would find every layer's gathered parameters kept.
        everything = jax.checkpoint_policies.everything_saveable
        layer = jax.checkpoint(layer, prevent_cse=False, policy=_without_gathered(everything))

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = layer(consts, carry, x)
        return outs[:n_carry], outs[n_carry:]

    final, ys = jax.lax.scan(
        body, init, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    return [*final, *ys]


def _forgets(program: jex.Jaxpr, operands: Sequence[Any]) -> bool:
    """Whether all that reads the sharded operands is in `jax.checkpoint` already."""
    shards = {v for v, x in zip(program.invars, operands, strict=True) if isinstance(x, _Shards)}
    return all(
        eqn.primitive.name in ("checkpoint", "remat2")
        for eqn in program.eqns
        if any(not isinstance(v, jex.Literal) and v in shards for v in eqn.invars)
    )


_RULES: dict[str, Callable[[jex.JaxprEqn, list[Any]], list[Any] | None]] = {
    "convert_element_type": _cast,
    "slice": _layer_of,
    "dynamic_slice": _layer_of,
    "squeeze": _squeezed,
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "checkpoint": _remat,
    "remat2": _remat,
    "scan": _scan,
}
