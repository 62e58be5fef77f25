"""What a transform will train, as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from jpeft.leaf import Leaf
from jpeft.paths import flatten, replace
from jpeft.transform import Chain, Params, Transform
from jpeft.uses import Uses


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter that a method acts on.

    **Attributes:** `path`; `method`, the transform's name; `shape`, the parameter's shape;
    `trainable`, how many numbers are trained there.
    """

    path: str
    method: str
    shape: tuple[int, ...]
    trainable: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Rows, and the counts: `trainable` numbers among `total` (the model's and the new ones)."""

    rows: tuple[Row, ...]
    trainable: int
    total: int

    @property
    def line(self) -> str:
        """The counts in the field's usual words."""
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {100 * self.trainable / self.total:.4f}"
        )

    def __str__(self) -> str:
        head = ("parameter", "method", "shape", "trainable")
        table = [(r.path, r.method, str(list(r.shape)), f"{r.trainable:,}") for r in self.rows]
        widths = [max(len(row[i]) for row in (head, *table)) for i in range(4)]

        def line(row: tuple[str, ...]) -> str:
            left = "  ".join(c.ljust(w) for c, w in zip(row[:3], widths[:3], strict=True))
            return f"{left}  {row[3].rjust(widths[3])}"

        rule = "-" * len(line(head))
        return "\n".join([line(head), rule, *map(line, table), rule, self.line])


def summary(transform: Transform, params: Params, *, uses: Uses | None = None) -> Summary:
    """What `transform` will train in `params`; nothing is computed or allocated.

    **Raises:** as `transform.init`.
    """
    leaves = flatten(params)
    trainable = jax.eval_shape(
        lambda p: transform.init(jax.random.key(0), replace(params, p), uses=uses), leaves
    )
    rows: list[Row] = []
    total = sum(_size(x) for x in leaves.values())
    for part, state in _parts(transform, trainable):
        name = type(part).__name__
        for path, arrays in state.items():
            count = sum(_size(x) for x in jax.tree.leaves(arrays))
            rows.append(Row(path, name, tuple(leaves[path].shape) if path in leaves else (), count))
    new = sum(r.trainable for r in rows if r.method != "Train")
    return Summary(tuple(rows), sum(r.trainable for r in rows), total + new)


def _parts(transform: Transform, trainable: Any) -> Iterator[tuple[Transform, Any]]:
    """Every transform inside chains, with its state."""
    if not isinstance(transform, Chain):
        yield transform, trainable
        return
    for part, state in zip(transform.transforms, trainable, strict=True):
        yield from _parts(part, state)


def _size(x: Any) -> int:
    return x.size if isinstance(x, Leaf) else math.prod(x.shape)
