"""What a transform is, and the two simplest: a chain of transforms, and training what is there."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from jpeft._states import check_shapes, put
from jpeft.leaf import Leaf, dense, wide
from jpeft.multitask import per_example
from jpeft.paths import TargetError, flatten, is_array, match
from jpeft.quantized import Quantized
from jpeft.uses import Uses

Params = Any
Trainable = Any


class Transform(abc.ABC):
    """A fine-tuning method: the arrays that it trains, and how a model reads them.

    Its methods are pure, and run under `jax.jit`, `jax.eval_shape` and the other JAX
    transformations. A transform is a frozen dataclass of plain values.
    """

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray, params: Params, *, uses: Uses | None = None) -> Trainable:
        """The trainable arrays at the start, a pytree that holds nothing else.

        **Arguments:** `key`, a PRNG key; `params`, the model's parameters (arrays, or their
        `jax.ShapeDtypeStruct`s under `jax.eval_shape`); `uses`, what `jpeft.uses` found, needed
        where the shape of a parameter does not tell how it is used.

        **Raises:** `jpeft.TargetError` for a pattern that matches nothing, or a parameter that
        the method cannot act on.
        """

    @abc.abstractmethod
    def place(
        self, params: Params, trainable: Trainable, key: PRNGKeyArray | None = None
    ) -> Params:
        """What `rewrite` does for one trained state: a new method implements this and `init`."""

    def rewrite(
        self,
        params: Params,
        trainable: Trainable,
        *,
        key: PRNGKeyArray | None = None,
        task: Int[Array, " b"] | None = None,
    ) -> Params:
        """The parameters as the model is to read them, with `trainable` in place.

        **Arguments:** `key` switches on what is random in training, such as dropout; `task`, with
        a trained state made by `jpeft.stack`, gives each example's number in that stack, or -1 for
        the model as it is. Examples then stand along the first axis of the model's inputs.

        **Raises:** `jpeft.TargetError` when `trainable` belongs to other parameters or another
        transform.
        """
        if task is None:
            return self.place(params, trainable, key)
        return per_example(lambda p, s: self.place(p, s, key), params, trainable, task)

    def clash(self, other: Transform) -> str | None:
        """Why this transform cannot stand in one chain with `other`; None where it can."""
        del other
        return None

    def overwrites(self, trainable: Trainable) -> Collection[str]:
        """The paths of the parameters that `place` writes over, whatever stands there: what an
        earlier transform of a chain has made of them would be lost.
        """
        del trainable
        return ()

    def decoding(self) -> Transform:
        """The transform for those steps of generation that read a cache: prompts and prefixes
        stand in it already, other methods act as before. The trained state is the same.
        """
        return self


@dataclasses.dataclass(frozen=True)
class Train(Transform):
    """Train parameters as they are: full fine-tuning of what the patterns match.

    The trained copies are fp32 (fp64 of what is fp64); the model reads them in its own type.
    `Train(r".*")` is full fine-tuning, `Train(r"^classifier/")` a new head.

    **Arguments:** `last`, of parameters that are stacked over layers along their first axis, as
    many in each, train only so many layers, the last ones.
    """

    targets: str | Sequence[str]
    last: int | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ValueError(f"last counts layers from the end, at least 1; got {self.last}")

    def __hash__(self) -> int:
        return hash(repr(self))

    def init(self, key: PRNGKeyArray, params: Params, *, uses: Uses | None = None) -> Trainable:
        """`{path: array of the parameter's shape}`, or of its last layers', starting there."""
        del key, uses
        leaves = flatten(params)
        chosen = match(self.targets, leaves)
        depths = {leaves[p].shape[:1]: p for p in chosen}
        if self.last is not None and len(depths) > 1:
            found = ", ".join(f"'{p}' {tuple(leaves[p].shape)}" for p in depths.values())
            raise TargetError(
                f"last={self.last} of the layers along the first axis, but what is matched is not "
                f"one stack: {found}"
            )
        trainable: dict[str, Any] = {}
        for path in chosen:
            leaf = leaves[path]
            if isinstance(leaf, Leaf):
                if isinstance(leaf, Quantized):
                    raise TargetError(
                        f"'{path}' is quantised ({leaf.format}): it cannot be trained itself. "
                        "Train what is added to it, such as LoRA's factors, or do not quantise it"
                    )
                raise TargetError(
                    f"'{path}' was already rewritten ({type(leaf).__name__}): put Train before the "
                    "method that rewrites it, or leave it out of one of the two"
                )
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TargetError(f"'{path}' is {leaf.dtype}: only real numbers can be trained")
            if self.last is not None:
                if not leaf.shape or leaf.shape[0] < self.last:
                    raise TargetError(
                        f"'{path}' has shape {tuple(leaf.shape)}: it has no {self.last} layers to "
                        "train the last of"
                    )
                leaf = leaf[-self.last :]
            # A copy even where it is fp32 already: a step that donates it must not eat the model.
            trainable[path] = jnp.array(leaf, dtype=wide(leaf.dtype), copy=True)
        return trainable

    def place(
        self, params: Params, trainable: Trainable, key: PRNGKeyArray | None = None
    ) -> Params:
        """The parameters with the trained ones in place, in the model's type."""
        del key

        def rewritten(path: str, leaf: Any, value: Any) -> Any:
            if not is_array(value):
                raise TargetError(
                    f"the trained state at '{path}' is a {type(value).__name__}, no array: it is "
                    "of another method"
                )
            shape = leaf.shape if self.last is None else (self.last, *leaf.shape[1:])
            check_shapes(path, {"the array": value}, {"the array": shape})
            value = value.astype(leaf.dtype)
            if self.last is None:
                return value
            return jnp.concatenate([dense(leaf)[: -self.last], dense(value)])

        return put(params, trainable, rewritten)

    def overwrites(self, trainable: Trainable) -> Collection[str]:
        """Every trained parameter."""
        return trainable.keys()


@dataclasses.dataclass(frozen=True)
class Chain(Transform):
    """Several transforms, one after another; its trainable is the tuple of theirs."""

    transforms: tuple[Transform, ...]

    def __post_init__(self) -> None:
        inside = chained(self)
        for i, a in enumerate(inside):
            for b in inside[i + 1 :]:
                reason = a.clash(b) or b.clash(a)
                if reason:
                    raise TargetError(f"{a!r} and {b!r} cannot be chained: {reason}")

    def init(self, key: PRNGKeyArray, params: Params, *, uses: Uses | None = None) -> Trainable:
        """A tuple: each transform is initialised on what those before it have rewritten.

        **Raises:** as theirs; `TargetError` for one that would write over what an earlier one
        trains, such as a parameter that is in two `Train`s.
        """
        trainables: list[Trainable] = []
        changed: dict[str, Transform] = {}
        for i, transform in enumerate(self.transforms):
            trainable = transform.init(jax.random.fold_in(key, i), params, uses=uses)
            for path in transform.overwrites(trainable):
                if path in changed:
                    raise TargetError(
                        f"'{path}' is trained by {changed[path]!r}, and {transform!r} would write "
                        "over it: leave it out of one of the two"
                    )
            before = flatten(params)
            params = transform.place(params, trainable)
            after = flatten(params)
            changed |= {path: transform for path, x in after.items() if x is not before[path]}
            trainables.append(trainable)
        return tuple(trainables)

    def place(
        self, params: Params, trainable: Trainable, key: PRNGKeyArray | None = None
    ) -> Params:
        """Each transform's rewriting in turn."""
        if not isinstance(trainable, tuple | list):
            raise TargetError(
                f"the trained state is a {type(trainable).__name__}, a chain's is a tuple with a "
                "state for each transform"
            )
        if len(trainable) != len(self.transforms):
            raise TargetError(
                f"the trained state is of {len(trainable)} transforms, the chain has "
                f"{len(self.transforms)}"
            )
        for i, (transform, part) in enumerate(zip(self.transforms, trainable, strict=True)):
            params = transform.place(
                params, part, None if key is None else jax.random.fold_in(key, i)
            )
        return params

    def overwrites(self, trainable: Trainable) -> Collection[str]:
        """Those of each."""
        parts = zip(self.transforms, trainable, strict=True)
        return {path for transform, part in parts for path in transform.overwrites(part)}

    def decoding(self) -> Chain:
        """Each transform's."""
        return Chain(tuple(t.decoding() for t in self.transforms))


@dataclasses.dataclass(frozen=True)
class Nothing(Transform):
    """What a method whose work is done leaves to do: the parameters stay as they are.

    **Arguments:** `of`, the method, which still makes the trained state.
    """

    of: Transform

    def init(self, key: PRNGKeyArray, params: Params, *, uses: Uses | None = None) -> Trainable:
        """The method's own."""
        return self.of.init(key, params, uses=uses)

    def place(
        self, params: Params, trainable: Trainable, key: PRNGKeyArray | None = None
    ) -> Params:
        """The parameters."""
        del trainable, key
        return params


def chained(transform: Transform) -> list[Transform]:
    """The transforms of a chain and of the chains in it, in order; of another, itself alone."""
    if not isinstance(transform, Chain):
        return [transform]
    return [inside for t in transform.transforms for inside in chained(t)]


def chain(*transforms: Transform) -> Chain:
    """Apply transforms one after another, as one transform.

    **Raises:** `TypeError` for an argument that is no transform; `TargetError` for two that cannot
    work together, with the reason. What depends on the model, such as an update of a parameter that
    already has an adapter, is refused by `init`.
    """
    for t in transforms:
        if not isinstance(t, Transform):
            raise TypeError(f"jpeft.chain takes transforms, got {t!r}")
    return Chain(tuple(transforms))
