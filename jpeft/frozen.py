"""The parameters that a method still reads, without those that it trains copies of."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jpeft._compat import is_literal, open_jaxpr
from jpeft.leaf import Leaf
from jpeft.paths import flatten, replace
from jpeft.transform import Params, Trainable, Transform


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What of a model's parameters a training step is given beside what it trains.

    **Attributes:** `arrays`, by path, those that are read; `like`, the whole tree's shapes.
    """

    arrays: dict[str, Any]
    like: Params

    def params(self, arrays: dict[str, Any]) -> Params:
        """The tree for `Transform.rewrite`, with a `jax.ShapeDtypeStruct` where nothing is read."""
        return replace(self.like, arrays)


def frozen(transform: Transform, params: Params, trainable: Trainable) -> Frozen:
    """The parameters that stay as they are, and are read.

    Full fine-tuning trains a copy of every parameter: the model's own is never read again, and a
    step that is given it holds it for nothing. A rewritten leaf counts as read.

    **Arguments:** `params` and `trainable`, arrays or their shapes.
    """
    leaves = flatten(params)
    plain = {path: x for path, x in leaves.items() if not isinstance(x, Leaf)}
    closed = jax.make_jaxpr(lambda p, t: transform.rewrite(replace(params, p), t))(plain, trainable)
    program, _ = open_jaxpr(closed)
    atoms = [*program.outvars, *(v for eqn in program.eqns for v in eqn.invars)]
    read = {v for v in atoms if not is_literal(v)}
    # A dictionary's arrays are the program's first operands, in the order of its keys.
    unread = {path for path, v in zip(sorted(plain), program.invars, strict=False) if v not in read}
    like = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in plain.items()}
    return Frozen({p: x for p, x in leaves.items() if p not in unread}, replace(params, like))
