"""An optimiser's update a layer at a time, where the parameters of all layers are stacked.

In a loop over the layers only one layer's moments have to be on the device: the compiler keeps the
loop's order, where it takes copies of whole arrays out of any order that a program gives them. The
update is that of the stacked arrays, equation by equation: an optimiser may look at shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core as jex

from sharding._program import bind, named_like, opened, shape_of, traced, typed

# Primitives whose results at a place are made of their operands at that place.
ELEMENTWISE = frozenset(
    (
        *("abs", "sign", "neg", "square", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log1p"),
        *("add", "add_any", "sub", "mul", "div", "pow", "integer_pow", "max", "min", "clamp"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "is_finite", "select_n"),
        *("convert_element_type", "bitcast_convert_type", "reduce_precision", "copy"),
        *("shift_left", "shift_right_arithmetic", "shift_right_logical", "stop_gradient"),
    )
)
# Primitives that run a program of their own once, on their operands.
CALLS = frozenset(
    ("jit", "pjit", "closed_call", "checkpoint", "custom_jvp_call", "custom_vjp_call")
)


def by_layers(
    optimiser: optax.GradientTransformation,
    grads: Any,
    state: Any,
    params: Any,
    finite: Any,
    moved: Mapping[str, bool],
    stacked: str,
) -> tuple[Any, Any] | None:
    """The new parameters and state, or None for an optimiser that is not elementwise, or a tree
    without stacked layers. What an optimiser makes of shapes it makes of the stacked arrays'.

    **Arguments:** `finite`, False for a step that is skipped; `moved`, by path, which arrays of the
    state are in the host's memory; `stacked`, a pattern of paths whose first axis is the layers'.
    """
    shapes = flat(params)
    lengths = {p: x.shape[0] for p, x in shapes.items() if x.ndim > 1 and re.search(stacked, p)}
    layers = max(lengths.values(), key=list(lengths.values()).count, default=0)
    inside = {p for p, n in lengths.items() if n == layers}
    if layers < 2:
        return None
    in_loop, outside = _only(params, inside), _only(params, set(shapes) - inside)
    like, state_like = (jax.eval_shape(optimiser.init, t) for t in (in_loop, outside))
    whole, apart, values = flat(like), flat(state_like), flat(state)
    sliced = {p for p, x in whole.items() if x.shape}
    if set(whole) | set(apart) != set(values) or any(whole[p].shape[0] != layers for p in sliced):
        return None
    given = _filled(in_loop, flat(grads)), _filled(like, values), in_loop
    program, consts, out = traced(optimiser.update, *jax.tree.map(typed, given))
    if not _is_elementwise(program, consts, layers):
        return None
    device, host = jax.memory.Space.Device, jax.memory.Space.Host

    def there(path: str, x: Any, space: Any) -> Any:
        return jax.device_put(x, space) if moved[path] else x

    def kept(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    shared = {p: there(p, values[p], device) for p in whole if p not in sliced}
    results, new = {}, {}
    if apart:
        own = _filled(outside, shapes)
        before = {p: there(p, values[p], device) for p in apart}
        gradients = _filled(outside, flat(grads))
        updates, after = optimiser.update(gradients, _filled(state_like, before), own)
        results |= flat(kept(optax.apply_updates(own, updates), own))
        new |= {p: there(p, x, host) for p, x in kept(flat(after), before).items()}

    def body(carry: Any, i: Any) -> tuple[Any, None]:
        params, state, _ = carry
        mine, moments = _layer(params, i), _layer(state, i)
        moments = {p: there(p, x, device) for p, x in moments.items()}
        own = _filled(in_loop, mine)
        gradients = _filled(in_loop, _layer({p: flat(grads)[p] for p in inside}, i))
        leaves = jax.tree.leaves((gradients, _filled(like, moments | shared), own))
        updates, after = jax.tree.unflatten(out, _of_a_layer(program, consts, leaves))
        made, found = flat(kept(optax.apply_updates(own, updates), own)), flat(after)
        moments = kept({p: found[p] for p in sliced}, moments)
        moments = {p: there(p, x, host) for p, x in moments.items()}
        counts = kept({p: found[p] for p in shared}, shared)
        return (_put(params, made, i), _put(state, moments, i), counts), None

    start = {p: shapes[p] for p in inside}, {p: values[p] for p in sliced}, shared
    (trained, moments, counts), _ = jax.lax.scan(body, start, jnp.arange(layers))
    results |= trained
    new |= moments | {p: there(p, x, host) for p, x in counts.items()}
    return _filled(params, results), _filled(state, new)


def _layer(arrays: Mapping[str, Any], i: Any) -> dict[str, Any]:
    return {p: jax.lax.dynamic_index_in_dim(x, i, 0, False) for p, x in arrays.items()}


def _put(arrays: Mapping[str, Any], layer: Mapping[str, Any], i: Any) -> dict[str, Any]:
    put = jax.lax.dynamic_update_index_in_dim
    return {p: put(x, layer[p], i, 0) for p, x in arrays.items()}


def _is_elementwise(program: jex.Jaxpr, consts: Sequence[Any], layers: int) -> bool:
    """Whether every operation on arrays acts on each place alone, and all arrays have layers."""

    def fine(eqn: jex.JaxprEqn) -> bool:
        name = eqn.primitive.name
        if name in CALLS:
            return _is_elementwise(*opened(_inside(eqn)), layers)
        arrays = [v for v in (*eqn.invars, *eqn.outvars) if shape_of(v)]
        if any(isinstance(v, jex.Literal) or shape_of(v)[0] != layers for v in arrays):
            return False
        filled = name == "broadcast_in_dim" and not shape_of(eqn.invars[0])
        return not arrays or filled or name in ELEMENTWISE

    return not any(jnp.shape(x) for x in consts) and all(fine(eqn) for eqn in program.eqns)


def _of_a_layer(program: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """What an elementwise program of stacked arrays gives for one layer of them."""
    names = (*program.constvars, *program.invars)
    values: dict[Any, Any] = dict(zip(names, (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for eqn in program.eqns:
        operands, shape = [read(a) for a in eqn.invars], shape_of(eqn.outvars[0])
        with named_like(eqn):
            if eqn.primitive.name in CALLS:
                outs = _of_a_layer(*opened(_inside(eqn)), operands)
            elif eqn.primitive.name == "broadcast_in_dim" and shape:
                outs = [jnp.broadcast_to(operands[0], shape[1:])]
            else:
                outs = bind(eqn, operands)
        values |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in program.outvars]


def _inside(eqn: jex.JaxprEqn) -> Any:
    """The program that a call runs."""
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def flat(tree: Any) -> dict[str, Any]:
    """Arrays by their paths."""
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x
        for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _only(tree: Any, paths: set[str]) -> Any:
    """The tree with None in place of what has none of these paths."""

    def of(path: Any, x: Any) -> Any:
        return x if jax.tree_util.keystr(path, simple=True, separator="/") in paths else None

    return jax.tree_util.tree_map_with_path(of, tree)


def _filled(like: Any, values: Mapping[str, Any]) -> Any:
    """A tree with the values of its paths."""

    def of(path: Any, _: Any) -> Any:
        return values[jax.tree_util.keystr(path, simple=True, separator="/")]

    return jax.tree_util.tree_map_with_path(of, like)
