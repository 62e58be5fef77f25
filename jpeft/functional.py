"""An NNX module as a function of its parameter tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx


class Functional(NamedTuple):
    """`apply(params, *args, **kwargs)` and the parameters, a nested dictionary of arrays."""

    apply: Callable[..., Any]
    params: dict[str, Any]


class Stateful(NamedTuple):
    """`apply(params, state, *args, **kwargs) -> (output, state)`, parameters and state."""

    apply: Callable[..., Any]
    params: dict[str, Any]
    state: Any


def functional(model: nnx.Module) -> Functional:
    """A module as the pair that every transform works on.

    Variables other than `nnx.Param` (dropout's streams, batch statistics, caches) stay as they
    are in `model` now: each call starts from them and drops what it changed. `stateful` hands
    them on.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    fill = _filler(params)

    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graphdef, fill(params), rest)(*args, **kwargs)

    return Functional(apply, nnx.to_pure_dict(params))


def stateful(model: nnx.Module) -> Stateful:
    """As `functional`, for modules whose other variables change as they run."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    fill = _filler(params)

    def apply(params: Any, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        module = nnx.merge(graphdef, fill(params), state)
        out = module(*args, **kwargs)
        return out, nnx.split(module, nnx.Param, ...)[2]

    return Stateful(apply, nnx.to_pure_dict(params), rest)


def _filler(state: nnx.State) -> Callable[[Any], nnx.State]:
    """What makes the module's state of a pure dictionary, without holding the arrays."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def fill(params: Any) -> nnx.State:
        filled = jax.tree.map(lambda x: x, shapes)
        nnx.replace_by_pure_dict(filled, params)
        return filled

    return fill
