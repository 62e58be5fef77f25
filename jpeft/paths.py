"""Path strings of a parameter tree, and the patterns that choose among them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from flax.core.meta import AxisMetadata

from jpeft.leaf import is_leaf

T = TypeVar("T")


class TargetError(ValueError):
    """A pattern that chooses nothing, or something that the method cannot act on."""


def path_string(path: Sequence[Any]) -> str:
    """The `/`-joined path of a JAX key path: `layers/0/kernel`.

    Attribute, dictionary and sequence keys are all written plainly.
    """
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return "/".join(p.lstrip(".") for p in parts)


def map_with_paths(
    f: Callable[[str, Any], Any], tree: Any, is_leaf: Callable[[Any], bool] = is_leaf
) -> Any:
    """The tree with `f(path, x)` for every leaf `x`, whose path is a string.

    The `value` of a Flax variable is left out of it, so that a state and its pure dictionary have
    the same paths.
    """
    boxes, _ = jax.tree_util.tree_flatten_with_path(tree, lambda x: is_leaf(x) or _is_box(x))
    boxed = {path for path, x in boxes if _is_box(x)}
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    new = [f(path_string(p[:-1] if p[:-1] in boxed else p), x) for p, x in leaves]
    return treedef.unflatten(new)


def _is_box(x: Any) -> bool:
    return isinstance(x, nnx.Variable | AxisMetadata)


def flatten(params: Any) -> dict[str, Any]:
    """Every array or rewritten leaf of a tree by its path string, in tree order.

    What is neither, such as a function in an Equinox module, is left out.

    **Raises:** `TargetError` for two with one path.
    """
    found: dict[str, Any] = {}

    def add(path: str, x: Any) -> None:
        if not (is_leaf(x) or is_array(x)):
            return
        if path in found:
            raise TargetError(f"two parameters have the path '{path}': rename one of them")
        found[path] = x

    map_with_paths(add, params)
    return found


def is_array(x: Any) -> bool:
    """Whether `x` is an array, or the shape and type of one."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def replace(params: Any, new: Mapping[str, Any]) -> Any:
    """The tree with the leaves at the given paths replaced.

    **Raises:** `TargetError` for a path that the tree does not have.
    """
    paths = flatten(params)
    for path in new:
        if path not in paths:
            raise TargetError(
                f"the trained state has '{path}', which these parameters do not have"
                f"{_near(path, paths)}"
            )
    return map_with_paths(new.get, params)


def match(patterns: str | Sequence[str], paths: Iterable[str]) -> list[str]:
    """The paths in which any of the patterns is found by `re.search`, in the given order.

    **Raises:** `TargetError` for a pattern that is no regular expression, or that is found in no
    path: it names the nearest ones.
    """
    paths = list(paths)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [p for p in paths if compiled(pattern).search(p)]
        if not found:
            raise TargetError(
                f"the pattern '{pattern}' matches no parameter{_near(pattern, paths)}"
            )
        chosen.update(found)
    if not chosen:
        raise TargetError("no pattern was given: nothing would be trained")
    return [p for p in paths if p in chosen]


def by_pattern(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern found in `path`, or the default."""
    for pattern, value in patterns.items():
        if compiled(pattern).search(path):
            return value
    return default


def compiled(pattern: str) -> re.Pattern[str]:
    """The compiled pattern. **Raises:** `TargetError` where it is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as e:
        raise TargetError(f"'{pattern}' is not a regular expression: {e}") from e


def _near(pattern: str, paths: Iterable[str]) -> str:
    """`; the nearest are: ...`, by likeness of the plain words in the pattern."""
    paths = list(paths)
    if not paths:
        return ": the tree has no parameters"
    words = [w.lower() for w in re.findall(r"\w+", re.sub(r"\\.", " ", pattern))] or [pattern]

    def likeness(path: str) -> float:
        parts = [part.lower() for part in path.split("/")]
        return sum(
            max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts)
            for word in words
        )

    nearest = sorted(paths, key=likeness, reverse=True)[:5]
    return "; the nearest are: " + ", ".join(f"'{p}'" for p in nearest)
