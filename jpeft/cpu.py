"""Products on a CPU: the same numbers, with operands in the order that it multiplies fastest."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jpeft._cpu_features import multiplies_bf16
from jpeft._cpu_low_rank import branched, summed
from jpeft._cpu_products import added, apart, dot, gathered, trained, trained_short, whole
from jpeft.adapter import Adapted
from jpeft.by_layer import Layers
from jpeft.leaf import IN_PLACE, Call, Leaf, Weight, dense, is_leaf, register, static
from jpeft.lowrank import LowRank
from jpeft.paths import flatten, replace
from jpeft.rescale import Scaled
from jpeft.site import Placed
from jpeft.transform import Params
from jpeft.uses import Uses

# What leaves a matrix one, however it is laid out.
ARRANGED = IN_PLACE | {"transpose", "reshape", "squeeze", "slice", "dynamic_slice"}


def cpu_products(
    rewritten: Params, params: Params, *, uses: Uses | None = None, bf16: bool | None = None
) -> Params:
    """The same parameters, whose products with activations have gradients made for a CPU.

    It is for training, after `Transform.rewrite` and before `lift`:

    - A matrix that is trained whole, an adapter's two among them, has its gradient worked out by
      itself, with the narrower of what it is a product of turned round first. Left to the compiler
      it is turned itself, and woven into the copy to where gradients of layers are stacked, which
      is slower.
    - A matrix with a low-rank update multiplies by the sum `base + scale A B`, formed anew for each
      product of as many rows as the matrix has or more. The branch `(x A) B` goes over the
      activations several times, which costs more than the sum. What comes back to A and B goes
      through their rank as before.
    - What goes back through a matrix, trained or not, is worked out before anything is made of it,
      where barriers are left in the program (see `by_layer`). Else the compiler can weave all from
      one norm to the next into one kernel, whose temporaries it holds beside the program's.
    - The gradient of a bias in bf16 is added up in fp32.
    - The gradient of a table that is looked up in, and of which `uses` says that nothing else is
      done with it, takes its memory when it is made, and not before.

    In bf16, on a processor that has products of it (AVX-512 BF16, AMX):

    - Every product with a weight is of bf16 with sums in fp32, which XLA for CPUs does where the
      result is wanted in fp32 alone, and is rounded then: 1.5 to 2 times the rate of products in
      fp32.
    - A low-rank update stays a branch. What its factors have beyond bf16 is a product too, so that
      they count in fp32.

    On other processors LoRA's sum and product are in the factors' fp32, in which small updates are
    not lost, and the result is rounded; and a product of bf16 whose result is wanted in fp32
    (logits) is one of fp32: of the two that the compiler may choose it is the faster one.

    A weight under an adapter, a prefix or a rescaling is multiplied in the same way. Everything
    else, such as a quantised base or dropout in the low-rank branch, is multiplied as it was.
    Forward-mode derivatives (`jax.jvp`) are not defined through it. On an accelerator leave it out:
    some round what they multiply to bf16, and the sum would lose small updates.

    **Arguments:** `rewritten`, from `Transform.rewrite`; `params`, what was given to it: an array
    of two axes or more that is no longer the same is one that is trained; `uses`, from
    `jpeft.uses`; `bf16`, whether the processor multiplies it: without it, as Linux says of this
    machine's.
    """
    before, short = flatten(params), multiplies_bf16() if bf16 is None else bf16
    # One that is multiplied too is left alone: its gradient is that product's, to which the
    # compiler adds the rest in place.
    tables = {p for p, of in (uses or {}).items() if {u.primitive for u in of} == {"gather"}}

    def on(path: str, x: Any) -> Any:
        if isinstance(x, LowRank):
            return CpuProduct(x, x.path, bf16=short)
        if isinstance(x, Scaled | Placed):  # concrete ones are dataclasses
            x = dataclasses.replace(x, base=on(path, x.base))  # type: ignore[type-var]
        if isinstance(x, Adapted):
            return dataclasses.replace(x, times=trained_short if short else trained)
        if isinstance(x, Layers) or (not is_leaf(x) and x.ndim > 1):
            frozen = x is before.get(path)
            return CpuProduct(x, path, frozen=frozen, table=path in tables, bf16=short)
        return x

    found = {path: on(path, x) for path, x in flatten(rewritten).items()}
    return replace(rewritten, found)


@register
@dataclasses.dataclass(frozen=True)
class CpuProduct(Weight):
    """A weight as it is, but for its products: see `cpu_products`.

    **Attributes:** `base`, an array or a `LowRank`; `frozen`, an array that is not trained;
    `table`, one that is looked up in alone; `bf16`, whether the processor multiplies it.
    """

    base: Any
    path: str = static("")
    frozen: bool = static(False)
    table: bool = static(False)
    bf16: bool = static(False)

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
        if call.name == "gather" and index == 0 and self._is_added_up:
            how = tuple(call.params.items())
            return [gathered(self.base, call.operands[1], self.shape, how)]
        if call.name == "add":
            other = call.operands[1 - index]
            if self._adds_in_fp32(other, call.shape):
                return [added(other, self.base)]
        results = call.rebind(index, self.base)
        if call.name not in ARRANGED or not jnp.issubdtype(results[0].dtype, jnp.floating):
            return results
        return [dataclasses.replace(self, base=results[0])]

    @property
    def _is_added_up(self) -> bool:
        """Whether this is a table whose gradient is wanted."""
        real = jnp.issubdtype(self.dtype, jnp.floating)
        return self.table and real and not self.frozen and not isinstance(self.base, Leaf)

    def _adds_in_fp32(self, other: Any, shape: tuple[int, ...]) -> bool:
        """Whether this is added to an array of the result's shape, as a trained bias in bf16."""
        return (
            self.dtype == jnp.bfloat16
            and not (self.frozen or isinstance(self.base, LowRank) or isinstance(other, Leaf))
            and other.shape == shape != self.shape
        )

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
        short = self.bf16 and x.dtype == jnp.bfloat16
        axis, precision = mine[0], call.params["precision"]
        if isinstance(self.base, LowRank) and not self._suits(
            x.dtype if short else wide, math.prod(x.shape[:-1]), axis, short
        ):
            return None
        x = apart(x.reshape(-1, x.shape[-1]))
        if short:
            made = self._short(x, axis, precision, wide)
        else:
            made = self._product(x.astype(wide), axis, precision)
        return made.reshape(call.shape)

    def _suits(self, dtype: Any, rows: int, axis: int, short: bool) -> bool:
        """Whether the low-rank update of a plain matrix is multiplied here."""
        leaf: LowRank = self.base
        if isinstance(leaf.base, Leaf) or sorted(leaf.kinds) != ["i", "o"]:
            return False
        if (leaf.key is not None and leaf.dropout) or not (short or rows >= leaf.shape[axis]):
            return False
        return jnp.promote_types(dtype, leaf.a.dtype) == leaf.a.dtype

    def _short(self, x: Array, axis: int, precision: Any, out: Any) -> Array:
        if isinstance(self.base, LowRank):
            return branched(x, dataclasses.replace(self.base, key=None), axis, precision, out)
        return whole(x, dense(self.base), axis, precision, out, self.frozen)

    def _product(self, x: Array, axis: int, precision: Any) -> Array:
        if isinstance(self.base, LowRank):
            return summed(x, dataclasses.replace(self.base, key=None), axis, precision)
        w = self.base.astype(x.dtype)
        if self.frozen:
            return dot(x, w, (1, axis), precision)
        return whole(x, w, axis, precision, None, False)
