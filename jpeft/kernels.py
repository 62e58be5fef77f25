"""What a kernel's axes mean: which are inputs, which outputs, which are stacked."""

from __future__ import annotations

import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.leaf import Site
from jpeft.paths import TargetError
from jpeft.uses import Use, Uses


def kernel_axes(
    method: str, path: str, leaf: Any, given: str, uses: Uses | None
) -> tuple[str, bool]:
    """One letter for each axis (`b` stacked, `i` input, `o` output), and whether it is a table.

    **Arguments:** `method`, the name for errors; `given`, the letters where the user gave them,
    else the empty string; `uses`, what `jpeft.uses` found. Without either a matrix is (input,
    output), as Flax has it.

    **Raises:** `TargetError` where neither tells, or the parameter is no kernel.
    """
    if isinstance(leaf, Site):
        raise TargetError(
            f"'{path}' already has {type(leaf).__name__}, which acts on what it produces: in the "
            f"chain put {method} before it"
        )
    ndim = len(leaf.shape)
    if given:
        if len(given) != ndim or not set("io") <= set(given) <= set("bio"):
            raise TargetError(
                f"'{path}' has {ndim} axes, of sizes {tuple(leaf.shape)}; axes='{given}' must "
                "have as many letters, with at least one 'i' and one 'o'"
            )
        return given, False
    if uses is not None:
        return _from_uses(method, path, ndim, uses)
    if ndim == 2:
        return "io", bool(re.search(r"embedding$", path))
    if ndim < 2:
        raise TargetError(
            f"{method} needs a matrix, but '{path}' has shape {tuple(leaf.shape)}: make the "
            "pattern end in the kernel's name, such as r'kernel$'"
        )
    raise TargetError(
        f"'{path}' has shape {tuple(leaf.shape)}: which axes are its inputs? Pass "
        f"uses=jpeft.uses(apply, params, *inputs) to init, or give {method} axes="
        "{pattern: letters}, such as 'ioo'"
    )


def real(method: str, path: str, leaf: Any) -> None:
    """**Raises:** `TargetError` for what a method cannot change by real numbers."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TargetError(
            f"'{path}' is {leaf.dtype}: {method} changes real numbers alone; leave it out of the "
            "pattern"
        )


def placed_axes(method: str, path: str, leaf: Any, given: str, uses: Uses | None) -> str:
    """As `kernel_axes`, for what acts on a parameter's result: a bias has outputs only.

    **Raises:** `TargetError` where it cannot be told.
    """
    ndim = len(leaf.shape)
    if given:
        if len(given) != ndim or not {"o"} <= set(given) <= set("bio"):
            raise TargetError(
                f"'{path}' has {ndim} axes, of sizes {tuple(leaf.shape)}; axes='{given}' must "
                "have as many letters, with at least one 'o'"
            )
        return given
    if uses is not None:
        added = [u for u in uses.get(path, ()) if u.primitive == "add"]
        if added:
            return "".join("b" if i in added[0].scanned else "o" for i in range(ndim))
    elif ndim == 1:
        return "o"
    elif re.search(r"bias$", path):
        raise TargetError(
            f"'{path}' has shape {tuple(leaf.shape)}: is it stacked? Pass uses=jpeft.uses(apply, "
            f"params, *inputs) to init, or give {method} axes={{pattern: letters}}, such as 'bo'"
        )
    return kernel_axes(method, path, leaf, given, uses)[0]


def at(axes: str, letter: str) -> tuple[int, ...]:
    """The places of a letter."""
    return tuple(i for i, k in enumerate(axes) if k == letter)


def leading(axes: str) -> int:
    """How many first axes are stacked."""
    return len(axes) - len(axes.lstrip("b"))


def fold(key: Any, path: str) -> Any:
    """A key of its own for each path, whatever else is matched."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def _from_uses(method: str, path: str, ndim: int, uses: Uses) -> tuple[str, bool]:
    found: tuple[Use, ...] = tuple(uses.get(path, ()))
    products = [u for u in found if u.axes is not None and len(u.axes) == ndim and "o" in u.axes]
    if not products:
        how = ", ".join(dict.fromkeys(u.primitive for u in found)) or "nothing"
        what = "make the pattern end in the kernel's name, such as r'kernel$'"
        if found and ndim > 1:
            letters = "axes={pattern: letters}, such as 'io'"
            what = f"if it is a kernel all the same, give {method} {letters}; else {what}"
        raise TargetError(
            f"{method} needs a parameter that is multiplied or looked up, but '{path}' is read by "
            f"{how}: {what}"
        )
    # A table that is also the output head is looked up first: its rows are its inputs.
    products.sort(key=lambda u: u.primitive != "gather")
    axes = products[0].axes
    assert axes is not None
    table = products[0].primitive == "gather"
    if table and axes.count("o") > 1:
        raise TargetError(
            f"'{path}' is looked up in, and what is found there has {axes.count('o')} axes: give "
            f"{method} axes={{pattern: letters}}, 'bio' for a stack of kernels, else '{axes}'"
        )
    return axes, table
