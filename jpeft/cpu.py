"""Products on a CPU: the same numbers, with operands in the order that it multiplies fastest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jpeft.by_layer import Layers
from jpeft.leaf import IN_PLACE, Call, Leaf, Weight, dense, is_leaf, register, static
from jpeft.lowrank import LowRank
from jpeft.paths import flatten, replace
from jpeft.rescale import Scaled
from jpeft.transform import Params

# What leaves a matrix one, however it is laid out.
ARRANGED = IN_PLACE | {"transpose", "reshape", "squeeze", "slice", "dynamic_slice"}
# What a result that is worth keeping is known by, to `jpeft.models.layers.keep_products`.
KEPT = "jpeft_kept"


def cpu_products(rewritten: Params, params: Params) -> Params:
    """The same parameters, whose products with activations have gradients made for a CPU.

    It is for training, after `Transform.rewrite` and before `lift`:

    - A matrix that is trained whole has its gradient worked out by itself, activations first. Left
      to the compiler it is turned, and woven into the copy to where gradients of layers are
      stacked, which is slower.
    - A matrix with a low-rank update multiplies by the sum `base + scale A B`, formed anew for each
      product of as many rows as the matrix has or more. The branch `(x A) B` goes over the
      activations several times, which costs more than the sum. What comes back to A and B goes
      through their rank as before. On a base in bf16 the sum and the product are in the factors'
      fp32, in which small updates are not lost, and the result is rounded.
    - A product of bf16 whose result is wanted in fp32 (logits) is one of fp32: of the two that a
      compiler may choose it is the faster one.
    - What goes back through a matrix, trained or not, is worked out before anything is made of it,
      where barriers are left in the program (see `by_layer`). Else the compiler can weave all from
      one norm to the next into one kernel, whose temporaries it holds beside the program's.

    Everything else, such as a quantised base or dropout in the low-rank branch, is multiplied as it
    was. Forward-mode derivatives (`jax.jvp`) are not defined through it. On an accelerator leave it
    out: some round what they multiply to bf16, and the sum would lose small updates; in bf16 also
    on a CPU that multiplies it faster than fp32 (AMX).

    **Arguments:** `rewritten`, from `Transform.rewrite`; `params`, what was given to it: an array
    of two axes or more that is no longer the same is one that is trained.
    """
    before = flatten(params)

    def on(path: str, x: Any) -> Any:
        if isinstance(x, LowRank):
            return CpuProduct(x, x.path)
        if isinstance(x, Scaled) and isinstance(x.base, LowRank):
            return dataclasses.replace(x, base=CpuProduct(x.base, x.path))
        if isinstance(x, Layers) or (not is_leaf(x) and x.ndim > 1):
            return CpuProduct(x, path, frozen=x is before.get(path))
        return x

    found = {path: on(path, x) for path, x in flatten(rewritten).items()}
    return replace(rewritten, found)


@register
@dataclasses.dataclass(frozen=True)
class CpuProduct(Weight):
    """A weight as it is, but for its products: see `cpu_products`.

    **Attributes:** `base`, an array or a `LowRank`; `frozen`, an array that is not trained.
    """

    base: Any
    path: str = static("")
    frozen: bool = static(False)

    @property
    def leading(self) -> int:
        """As the base has it."""
        return self.base.leading if isinstance(self.base, Leaf) else 0

    def materialise(self) -> Array:
        """The dense array."""
        return dense(self.base)

    def specs(self, spec: PartitionSpec) -> Any:
        """This leaf with a `PartitionSpec` for each array, when the base has `spec`."""
        inner = self.base.specs(spec) if isinstance(self.base, Leaf) else spec
        return dataclasses.replace(self, base=inner)

    def rule(self, call: Call, index: int) -> list[Any]:
        """A product `x W` or `x W^T` over the last axis of `x`; all else is the base's."""
        if call.name == "dot_general" and index == 1:
            found = self._multiplied(call)
            if found is not None:
                return [found]
        results = call.rebind(index, self.base)
        if call.name not in ARRANGED or not jnp.issubdtype(results[0].dtype, jnp.floating):
            return results
        return [dataclasses.replace(self, base=results[0])]

    def _multiplied(self, call: Call) -> Array | None:
        (theirs, mine), batch = call.params["dimension_numbers"]
        x, wanted = call.operands[0], call.params["preferred_element_type"]
        if isinstance(x, Leaf) or any(map(len, batch)) or tuple(theirs) != (x.ndim - 1,):
            return None
        wide = self.dtype if wanted is None else wanted
        if self.ndim != 2 or x.dtype != self.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
            return None
        if jnp.promote_types(x.dtype, wide) != wide:
            return None
        product = self._product(x.astype(wide), mine[0], call.params["precision"])
        if product is None:
            return None
        flat = _apart(x.reshape(-1, x.shape[-1])).astype(wide)
        return product(flat).reshape(*x.shape[:-1], -1)

    def _product(self, x: Array, axis: int, precision: Any) -> Callable[[Array], Array] | None:
        base = self.base
        if self.frozen:
            return lambda flat: _dot(flat, base.astype(x.dtype), (1, axis), precision)
        if not isinstance(base, LowRank):
            return lambda flat: _trained(flat, base.astype(x.dtype), axis, precision)
        if isinstance(base.base, Leaf) or x.size < x.shape[-1] ** 2:
            return None
        if jnp.promote_types(x.dtype, base.a.dtype) != base.a.dtype:
            return None
        if sorted(base.kinds) != ["i", "o"] or (base.key is not None and base.dropout):
            return None
        leaf = dataclasses.replace(base, key=None)
        return lambda flat: _low_rank(flat, leaf, axis, precision)


def _dot(x: Any, y: Any, over: tuple[int, int], precision: Any) -> Any:
    return jax.lax.dot_general(x, y, (((over[0],), (over[1],)), ((), ())), precision=precision)


@jax.custom_vjp
def _apart(x: Array) -> Array:
    """The same; its gradient is worked out by itself."""
    return x


_apart.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _trained(x: Float[Array, "n k"], w: Any, axis: int, precision: Any) -> Float[Array, "n m"]:
    return _dot(x, w, (1, axis), precision)


def _trained_forward(x: Any, w: Any, axis: int, precision: Any) -> Any:
    return checkpoint_name(_dot(x, w, (1, axis), precision), KEPT), (x, w)


def _trained_backward(axis: int, precision: Any, saved: Any, g: Any) -> Any:
    x, w = saved
    pair = (x, g) if axis == 0 else (g, x)
    dx = _dot(g, w, (1, 1 - axis), precision)
    # By themselves: the compiler is not to turn the gradient round for whatever comes after. Both
    # together: an optimiser that moves the weight in place is to come after its last product.
    return jax.lax.optimization_barrier((dx, _dot(*pair, (0, 0), precision)))


_trained.defvjp(_trained_forward, _trained_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _low_rank(
    x: Float[Array, "n k"], leaf: LowRank, axis: int, precision: Any
) -> Float[Array, "n m"]:
    wide = leaf.a.dtype
    return _dot(x.astype(wide), _sum(leaf), (1, axis), precision).astype(x.dtype)


def _sum(leaf: LowRank) -> Array:
    """The dense sum, not rounded to the base's type: an update may be less than that can tell."""
    return dataclasses.replace(leaf, base=leaf.base.astype(leaf.a.dtype)).materialise()


def _low_rank_forward(x: Any, leaf: Any, axis: int, precision: Any) -> Any:
    return checkpoint_name(_low_rank(x, leaf, axis, precision), KEPT), (x, leaf)


def _low_rank_backward(axis: int, precision: Any, saved: Any, g: Any) -> Any:
    x, leaf = saved
    short, dot = x.dtype, functools.partial(_dot, precision=precision)
    x, g = x.astype(leaf.a.dtype), g.astype(leaf.a.dtype)
    # The sum is formed again: kept from the forward pass it would be a copy of the weights.
    dx = dot(g, _sum(leaf), (1, 1 - axis)).astype(short)
    d_base = dot(*((x, g) if axis == 0 else (g, x)), (0, 0))  # of a frozen base nobody asks for it
    d_base = d_base.astype(leaf.base.dtype)
    turned = leaf.kinds[axis] == "o"
    # (k, r) and (r, m), whichever of the factors comes first.
    first, second = (leaf.b.T, leaf.a.T) if turned else (leaf.a, leaf.b)
    d_first = dot(leaf.scale * dot(g, second, (1, 1)), x, (0, 0)).T
    d_second = dot(leaf.scale * dot(x, first, (1, 0)), g, (0, 0))
    da, db = (d_second.T, d_first.T) if turned else (d_first, d_second)
    return dx, dataclasses.replace(leaf, base=d_base, a=da, b=db)


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)
