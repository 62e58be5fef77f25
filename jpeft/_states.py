"""A trained state put where it belongs; one of other parameters or another method is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpeft.paths import TargetError, flatten, replace


def put(params: Any, trainable: Any, rewritten: Callable[[str, Any, Any], Any]) -> Any:
    """The parameters with `rewritten(path, parameter, state)` at every path of a trained state.

    **Raises:** `TargetError` for a state that is no dictionary, and for a path that `params` lack.
    """
    if not isinstance(trainable, Mapping):
        raise TargetError(
            f"the trained state is a {type(trainable).__name__}, not a dictionary by path: it is "
            "of another transform"
        )
    leaves = flatten(params)
    new = {
        path: rewritten(path, leaves[path], state) if path in leaves else state
        for path, state in trainable.items()
    }
    return replace(params, new)


def check_kind(path: str, parameter: Any, state: Any, kind: type) -> None:
    """**Raises:** `TargetError` for a state that is no `kind`, or whose `axes`, a letter for each
    of a parameter's, are of another one.
    """
    if not isinstance(state, kind):
        raise TargetError(
            f"the trained state at '{path}' is a {type(state).__name__}, not {kind.__name__}: it "
            "is of another method"
        )
    if len(state.axes) != len(parameter.shape):  # type: ignore[attr-defined]
        raise TargetError(
            f"the trained state at '{path}' is of a parameter with axes '{state.axes}', here it "
            f"has shape {tuple(parameter.shape)}"
        )


def check_shapes(path: str, found: Mapping[str, Any], want: Mapping[str, Sequence[int]]) -> None:
    """**Raises:** `TargetError` for an array that has not the shape that is wanted of it."""
    for name, shape in want.items():
        if tuple(found[name].shape) != tuple(shape):
            raise TargetError(
                f"the trained state at '{path}' is of another transform or model: {name} is "
                f"{tuple(found[name].shape)}, not {tuple(shape)}"
            )
