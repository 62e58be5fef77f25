"""Rewritten leaves: what a model reads at one place of its parameter tree."""

from __future__ import annotations

import abc
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jpeft._compat import shape_of

if TYPE_CHECKING:
    from jax.extend.core import JaxprEqn

logger = logging.getLogger("jpeft")
L = TypeVar("L")


# Primitives that keep every element in its place: they act on what a leaf stands on.
IN_PLACE = frozenset(
    (
        "convert_element_type",
        "copy",
        "copy_p",
        "sharding_constraint",
        "reduce_precision",
        "pvary",
    )
)


class LeafError(TypeError):
    """A rewritten leaf met an operation that it cannot take part in."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One equation of the model's program that reads at least one rewritten leaf.

    **Attributes:** `eqn`, the equation; `operands`, its operands, arrays or leaves;
    `dispatch`, how a call made from inside a rule is looked up again.
    """

    eqn: JaxprEqn
    operands: tuple[Any, ...]
    dispatch: Callable[[Call], list[Any]]

    @property
    def name(self) -> str:
        """The primitive's name, such as `dot_general`."""
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """The primitive's static parameters."""
        return self.eqn.params

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first result."""
        return shape_of(self.eqn.outvars[0])

    def rebind(self, index: int, operand: Any) -> list[Any]:
        """The same equation with operand `index` replaced by one of the same shape."""
        operands = (*self.operands[:index], operand, *self.operands[index + 1 :])
        return self.dispatch(dataclasses.replace(self, operands=operands))


class Leaf(abc.ABC):
    """What a model reads at one place of a rewritten tree.

    A concrete leaf is a frozen dataclass, registered as a pytree by `register`, with a field
    `base` (the array, or the leaf, that was there before) and a static field `path`. Its array
    fields are typed `Any`, since JAX fills a pytree with other things too (axes, shardings).
    A method named `rule_PRIMITIVE(call, index)` says what that JAX primitive does when its
    operand `index` is this leaf. It returns the list of the equation's results (arrays or
    leaves), or None where it does not apply.
    """

    base: Any
    path: str

    @property
    def proxy(self) -> Any:
        """An array (or a `jax.ShapeDtypeStruct`) of the shape and type that the model sees here."""
        return self.base.proxy if isinstance(self.base, Leaf) else self.base

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the model sees."""
        return tuple(self.proxy.shape)

    @property
    def ndim(self) -> int:
        """The number of axes that the model sees."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements that the model sees."""
        return int(self.proxy.size)

    @property
    def dtype(self) -> jnp.dtype:
        """The element type that the model sees."""
        return self.proxy.dtype

    @abc.abstractmethod
    def specs(self, spec: PartitionSpec) -> Any:
        """This leaf with a `PartitionSpec` for each of its arrays, when the base has `spec`."""

    @property
    def leading(self) -> int:
        """How many of the parameter's first axes are stacked (layers, experts)."""
        return 0

    def scanned(self, length: int) -> Leaf:
        """This leaf as a loop over its first axis is to slice it."""
        del length
        return self

    def layer(self, i: int) -> Any:
        """What step `i` of a loop over the first axis reads, where the loop is straight-line code.

        An array where nothing but an array is left.
        """
        return jax.tree.map(
            lambda x: layer_of(x, i), self, is_leaf=lambda x: isinstance(x, Leaf) and x is not self
        )

    def divided(self, parts: Sequence[int]) -> Leaf:
        """This leaf as a `shard_map` is to divide it among devices.

        **Arguments:** `parts`, how many there are along each axis that the model sees.

        **Raises:** `LeafError` where a part cannot stand by itself.
        """
        if not isinstance(self.base, Leaf):
            return self
        return dataclasses.replace(self, base=self.base.divided(parts))  # type: ignore[type-var]

    def switched(self, on: jax.Array) -> Leaf:
        """This leaf, having no effect where the boolean `on` is false; `base` is not touched.

        **Raises:** `LeafError` where that cannot be.
        """
        del on
        raise LeafError(f"{type(self).__name__} at '{self.path}' cannot be one of many tasks")

    def rule(self, call: Call, index: int) -> list[Any] | None:
        """The results of `call`, whose operand `index` is this leaf; None without a rule.

        What keeps every element in its place (a cast among real types, a copy) acts on the base.
        """
        method = getattr(self, f"rule_{call.name}", None)
        if method is not None:
            return method(call, index)
        to = call.params.get("new_dtype")
        if call.name not in IN_PLACE or (to is not None and not jnp.issubdtype(to, jnp.floating)):
            return None
        (base,) = call.rebind(index, self.base)
        return [dataclasses.replace(self, base=base)]  # type: ignore[type-var]


class Weight(Leaf):
    """A leaf that stands for a dense array: a primitive without a rule reads that array."""

    @abc.abstractmethod
    def materialise(self) -> jax.Array:
        """The dense array, of this leaf's shape and dtype."""


class Site(Leaf):
    """A leaf that acts where it is used: a primitive without a rule is an error."""


def register(cls: type[L]) -> type[L]:
    """Register a frozen dataclass as a pytree; fields with `metadata={"static": True}` are aux."""
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    meta = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if not f.metadata.get("static")]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)


def static(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that belongs to the tree's structure rather than to its arrays."""
    return dataclasses.field(default=default, metadata={"static": True})


def is_leaf(x: Any) -> TypeGuard[Leaf]:
    """Whether `x` is a rewritten leaf, for `jax.tree.map(..., is_leaf=jpeft.is_leaf)`."""
    return isinstance(x, Leaf)


def layer_of(x: Any, i: int) -> Any:
    """Element `i` of the first axis of an array or a leaf."""
    if isinstance(x, Leaf):
        return x.layer(i)
    return jax.lax.index_in_dim(x, i, keepdims=False)


def dense(x: Any) -> Any:
    """`x` as an array: a weight is materialised, an array stays.

    **Raises:** `LeafError` for a site, which stands for no array.
    """
    if isinstance(x, Weight):
        return x.materialise()
    if isinstance(x, Leaf):
        raise LeafError(f"{type(x).__name__} at '{x.path}' acts where it is used: it has no array")
    return x


def wide(dtype: Any) -> Any:
    """The type to add up numbers of `dtype` in: fp32, or fp64 for fp64."""
    is_wider = jnp.dtype(dtype).itemsize > 4
    return jnp.promote_types(dtype, jnp.float32) if is_wider else jnp.dtype(jnp.float32)


def without_rule(call: Call) -> Sequence[Any]:
    """The operands of a call that no leaf has a rule for, all dense.

    **Raises:** `LeafError` that names the leaf and the primitive, for a site.
    """
    for leaf in call.operands:
        if isinstance(leaf, Site):
            raise LeafError(
                f"{type(leaf).__name__} at '{leaf.path}' cannot be read by the operation "
                f"'{call.name}': target another parameter, or use another method there"
            )
        if isinstance(leaf, Leaf):
            told = "which has no rule for it: the dense weight is computed there"
            tell_once(leaf, call.name, told)
    return [dense(x) for x in call.operands]


def tell_once(leaf: Leaf, reader: str, what: str) -> None:
    """Log that a leaf is read by an operation or a function, and what follows; each one once."""
    _warn(type(leaf).__name__, leaf.path, reader, what)


@functools.lru_cache(maxsize=4096)
def _warn(kind: str, path: str, reader: str, what: str) -> None:
    logger.warning("%s at '%s' is read by '%s', %s", kind, path, reader, what)
