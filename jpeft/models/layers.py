"""Small parts that several models share: activations and dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jpeft._cpu_products import CHEAP, KEPT

# Whether layers forget their activations, or a policy for what they keep.
Remat = bool | Callable[..., Any]


# A value and its derivative.
_Both = Callable[[Array], tuple[Array, Array]]


def _pointwise(both: _Both) -> Callable[[Array], Array]:
    """A function of each number, from one that gives its value and its derivative.

    The forward pass works out the derivative too, while what it needs is at hand, and the backward
    pass keeps that one array. Both are worked out in fp32 and rounded once, as torch does.
    """
    both = _in_fp32(both)

    @jax.custom_jvp
    def value(x: Array) -> Array:
        return both(x)[0]

    @value.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        y, slope = both(*primals)
        return y, slope * tangents[0]

    return value


def _in_fp32(both: _Both) -> _Both:
    """The same with shorter floats rounded at the end alone, not after every operation."""

    def wide(x: Array) -> tuple[Array, Array]:
        y, slope = both(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        return y.astype(x.dtype), slope.astype(x.dtype)

    return wide


def _gelu(x: Array) -> tuple[Array, Array]:
    # jax.nn.gelu goes through erfc, which costs more on a CPU and agrees to the last few bits.
    below = 0.5 * (1 + jax.lax.erf(x * (1 / math.sqrt(2))))
    # The same again: where both are wanted a CPU's program else keeps this one for the other.
    again = 0.5 * (1 - jax.lax.erf(x * (-1 / math.sqrt(2))))
    return x * below, again + x * jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


def _gelu_tanh(x: Array) -> tuple[Array, Array]:
    c = math.sqrt(2 / math.pi)
    curve = jnp.tanh(c * (x + 0.044715 * x * x * x))
    slope = 0.5 * x * (1 - curve * curve) * c * (1 + 3 * 0.044715 * x * x)
    below = 0.5 * (1 + curve)
    return x * below, below + slope


def _silu(x: Array) -> tuple[Array, Array]:
    gate = jax.nn.sigmoid(x)
    return x * gate, gate + x * gate * (1 - gate)


gelu = _pointwise(_gelu)
"""`x Phi(x)` with the exact error function, as BERT has it (Hendrycks and Gimpel 2016)."""
gelu_tanh = _pointwise(_gelu_tanh)
"""The same with the curve that GPT-2 has in place of the error function."""
silu = _pointwise(_silu)
"""`x sigmoid(x)`."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": silu,
    "swish": silu,
    "tanh": jnp.tanh,
}


_BOTH = {
    "gelu": _gelu,
    "silu": _silu,
    "swish": _silu,
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), _gelu_tanh),
}


def gated(name: str) -> Callable[[Array, Array], Array]:
    """`act(gate) * up`, by the activation's name (Shazeer 2020).

    The backward pass keeps two arrays of their size, what each of the two is to be multiplied by,
    or makes them again from the two.
    """
    if name not in _BOTH:
        return lambda gate, up: ACTIVATIONS[name](gate) * up
    both = _in_fp32(_BOTH[name])

    @jax.custom_jvp
    def value(gate: Array, up: Array) -> Array:
        return both(gate)[0] * up

    @value.defjvp
    def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
        # Behind a barrier XLA for GPUs makes both gradients in one pass over the two, not in two.
        gate, up = jax.lax.optimization_barrier(primals)
        y, slope = both(gate)
        return y * up, (slope * up) * tangents[0] + y * tangents[1]

    return value


def dropout(x: Float[Array, ...], rate: float, key: PRNGKeyArray | None) -> Float[Array, ...]:
    """Zero with probability `rate` and scale the rest, when a key is given; else `x`."""
    if key is None or rate == 0:
        return x
    keep = checkpoint_name(jax.random.bernoulli(key, 1 - rate, x.shape), KEPT)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def rematerialised(step: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """A layer's step whose activations are computed again in the backward pass, if `remat` says so.

    **Arguments:** `remat`, False, True, or one of `jax.checkpoint_policies` for what is kept.
    """
    if not remat:
        return step
    return jax.checkpoint(step, policy=remat if callable(remat) else None)


def wide_dot_general(
    x: Array,
    y: Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = jnp.float32,
    out_sharding: Any = None,
) -> Array:
    """`jax.lax.dot_general` whose result is wider than its operands, as logits are.

    What goes back through it is rounded to the operands' type first. Without that both would be
    widened, and multiplied at a fraction of a matrix unit's rate (as TF32 on GPUs). Tangents are
    rounded too. Where the operands are as wide already it is the plain product.

    **Arguments:** as `jax.lax.dot_general`'s; `preferred_element_type`, the result's type.
    """
    options: dict[str, Any] = {"precision": precision, "out_sharding": out_sharding}
    wide = jnp.dtype(preferred_element_type)

    def product(x: Array, y: Array, out: Any = None) -> Array:
        return jax.lax.dot_general(x, y, dimension_numbers, preferred_element_type=out, **options)

    if x.dtype != y.dtype or jnp.promote_types(x.dtype, wide) == x.dtype:
        return product(x, y, wide)

    # By its name (`jpeft._control.SAVES_WORK`) it is known where a rewritten weight is read.
    @jax.custom_jvp
    def jpeft_wide_dot_general(x: Array, y: Array) -> Array:
        return product(x, y, wide)

    def derivative(primals: Any, tangents: Any) -> tuple[Array, Any]:
        (x, y), (dx, dy) = primals, tangents
        moves = []
        if not isinstance(dx, SymbolicZero):
            moves.append(product(dx, y))
        if not isinstance(dy, SymbolicZero):
            moves.append(product(x, dy))
        return jpeft_wide_dot_general(x, y), sum(moves[1:], moves[0]).astype(wide)

    jpeft_wide_dot_general.defjvp(derivative, symbolic_zeros=True)
    return jpeft_wide_dot_general(x, y)


def _summed(x: Any, _: Any, *, dimension_numbers: Any, **__: Any) -> int:
    return math.prod(x.shape[i] for i in dimension_numbers[0][0])


def keep_products(prim: Any, *args: Any, **params: Any) -> Any:
    """A policy for `remat`: of a layer keep its products, and make what is element-wise again.

    Attention counts as a product, with its softmax where that is whole; what dropout keeps is kept.
    The rest is made again from these, in place of writing it down and reading it back; so is a
    product that sums so little, such as an adapter's way up, that it costs about as much as that.
    """
    policies = jax.checkpoint_policies
    if prim is jax.lax.dot_general_p and _summed(*args, **params) <= CHEAP:
        return False
    named = policies.save_only_these_names(KEPT)
    return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, named)(
        prim, *args, **params
    )


def last_tokens(x: Float[Array, "b t d"], mask: Int[Array, "#b t"]) -> Float[Array, "b 1 d"]:
    """What stands at each row's last token that is no padding."""
    at = jnp.max(jnp.where(mask > 0, jnp.arange(mask.shape[1]), 0), axis=1)
    at = jnp.broadcast_to(at, x.shape[:1])
    return jnp.take_along_axis(x, at[:, None, None], axis=1)
