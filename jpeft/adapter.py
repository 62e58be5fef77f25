"""Bottleneck adapters: Houlsby's, Pfeiffer's and the parallel one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jpeft._states import check_kind, check_shapes, put
from jpeft.kernels import at, fold, placed_axes
from jpeft.leaf import LeafError, register, static
from jpeft.paths import TargetError, by_pattern, flatten, match
from jpeft.site import Placed
from jpeft.transform import Chain, Params, Train, Trainable, Transform
from jpeft.uses import Uses

Activation = Literal["gelu", "relu", "silu", "tanh"]
Placement = Literal["sequential", "parallel"]
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}
_NONE: Mapping[str, Any] = {}


@register
@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """What an adapter trains for one parameter, all fp32.

    **Attributes:** `down`, `(*batch, width, size)`; `down_bias`, `(*batch, size)`; `up`, `(*batch,
    size, outputs)`; `up_bias`, `(*batch, outputs)`; `axes`, one letter for each axis of the
    parameter, `b` stacked, `i` input, `o` output. `width` is the outputs', in a parallel adapter
    the inputs'.
    """

    down: Any
    down_bias: Any
    up: Any
    up_bias: Any
    axes: str = static("o")


@register
@dataclasses.dataclass(frozen=True)
class Adapted(Placed):
    """What the parameter produces as `h + s up(f(down(h)))`, or `h + s up(f(down(x)))`.

    **Attributes:** `times`, how rows are multiplied by a matrix.
    """

    base: Any
    down: Any
    down_bias: Any
    up: Any
    up_bias: Any
    outputs: tuple[int, ...] = static()
    batch: tuple[int, ...] = static(())
    activation: str = static("gelu")
    scale: float = static(1.0)
    parallel: bool = static(False)
    path: str = static("")
    times: Callable[[Array, Array], Array] = static(jnp.matmul)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Weights and biases."""
        return ("down", "down_bias", "up", "up_bias")

    def act(self, y: Array, x: Array | None, free: int) -> Array:
        """The bottleneck's output added to `y`. **Raises:** `LeafError`."""
        into = x if self.parallel else y
        if into is None:
            raise LeafError(
                f"the parallel adapter at '{self.path}' reads what goes into a matrix product, but "
                f"the parameter, of shape {self.shape}, is used otherwise here (by a convolution, "
                "or as a bias): use placement='sequential', which reads what comes out"
            )
        down, up = self.down.astype(y.dtype), self.up.astype(y.dtype)
        low = _plus(self._through(into.astype(y.dtype), down, free), self.down_bias, free)
        low = ACTIVATIONS[self.activation](low)
        out = _plus(self._through(low, up, free), self.up_bias, free)
        return y + out * jnp.asarray(self.scale, y.dtype)

    def switched(self, on: Array) -> Adapted:
        """This leaf, doing nothing where `on` is false."""
        up, up_bias = (jnp.where(on, x, 0) for x in (self.up, self.up_bias))
        return dataclasses.replace(self, up=up, up_bias=up_bias)

    def _through(self, x: Array, w: Array, free: int) -> Array:
        """`x w` over the last axis: `(*e, *free, n)` and `(*e, n, m)` to `(*e, *free, m)`."""
        if w.ndim == 2:
            return self.times(x, w)
        n = x.ndim - 1 - free
        rows = x.reshape(*x.shape[:n], math.prod(x.shape[n:-1]), x.shape[-1])
        return (rows @ w).reshape(*x.shape[:-1], w.shape[-1])


def _plus(x: Array, bias: Array, free: int) -> Array:
    """`x` and a bias `(*e, n)`, of which `x` has so many free axes more; summed in the wider type.

    So the bias's gradient is added up over all positions in fp32, not in `x`'s bf16.
    """
    row = jnp.expand_dims(bias, list(range(bias.ndim - 1, bias.ndim - 1 + free)))
    return (x.astype(jnp.promote_types(x.dtype, row.dtype)) + row).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Adapter(Transform):
    """A small two-layer network on what each matched parameter produces.

    A matched bias adapts `y + bias`, a matched kernel `x W`: for a layer with a bias, match that.

    **Arguments:**

    - `size`: of the bottleneck.
    - `targets`: regular expressions, searched in `/`-joined paths; each must match a parameter.
    - `placement`: `sequential`, `h + s up(f(down(h)))` (Houlsby et al. 2019), or `parallel`, at
      the kernel of a matrix product alone, `x W + s up(f(down(x)))` (He et al. 2022).
    - `activation`, `scale`: `f` and `s`.
    - `std`: both matrices start truncated normal with this deviation, so that the adapter starts
      near the identity; biases at zero.
    - `zero_up`: start `up` at zero instead, exactly the identity.
    - `axes`: pattern to letters, one for each axis of the parameter (`i`, `o`, `b`), where neither
      its shape nor `uses` tells; `{r"bias$": "bo"}` for a bias stacked over layers, or over the
      members of an ensemble under `vmap`, which `uses` takes for outputs.

    Dropout that a module applies after its bias comes after the adapter too.
    """

    size: int = 64
    targets: str | Sequence[str] = ()
    placement: Placement = "sequential"
    activation: Activation = "gelu"
    scale: float = 1.0
    std: float = 1e-3
    zero_up: bool = False
    axes: Mapping[str, str] = dataclasses.field(default_factory=lambda: _NONE)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"an adapter's size must be at least 1, got {self.size}")
        if self.placement not in ("sequential", "parallel"):
            raise ValueError(f"placement is 'sequential' or 'parallel', got '{self.placement}'")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}: {self.activation}")

    def __hash__(self) -> int:
        return hash(repr(self))

    def init(self, key: PRNGKeyArray, params: Params, *, uses: Uses | None = None) -> Trainable:
        """`{path: Bottleneck}` for every matched parameter."""
        leaves = flatten(params)
        return {
            path: self._bottleneck(fold(key, path), path, leaves[path], uses)
            for path in match(self.targets, leaves)
        }

    def place(
        self, params: Params, trainable: Trainable, key: PRNGKeyArray | None = None
    ) -> Params:
        """The parameters with an `Adapted` leaf at every matched path."""
        del key
        return put(params, trainable, self._leaf)

    def _bottleneck(self, key: Any, path: str, leaf: Any, uses: Uses | None) -> Bottleneck:
        axes = placed_axes("Adapter", path, leaf, by_pattern(self.axes, path, ""), uses)
        if self.placement == "parallel" and "i" not in axes:
            raise TargetError(
                f"a parallel adapter stands beside a kernel, but '{path}' is a bias: make the "
                "pattern end in the kernel's name, such as r'kernel$'"
            )
        shapes = self._shapes(leaf, axes)
        keys = jax.random.split(key)

        def normal(key: Any, shape: tuple[int, ...]) -> Array:
            # Truncated at two deviations, as the paper's code has it.
            return self.std * jax.random.truncated_normal(key, -2, 2, shape)

        up = normal(keys[1], shapes["up"])
        return Bottleneck(
            normal(keys[0], shapes["down"]),
            jnp.zeros(shapes["down_bias"]),
            jnp.zeros_like(up) if self.zero_up else up,
            jnp.zeros(shapes["up_bias"]),
            axes,
        )

    def _shapes(self, leaf: Any, axes: str) -> dict[str, tuple[int, ...]]:
        """Of what is trained for a parameter."""
        of = {k: [leaf.shape[i] for i in at(axes, k)] for k in "bio"}
        out = math.prod(of["o"])
        width = math.prod(of["i"]) if self.placement == "parallel" else out
        return {
            "down": (*of["b"], width, self.size),
            "down_bias": (*of["b"], self.size),
            "up": (*of["b"], self.size, out),
            "up_bias": (*of["b"], out),
        }

    def _leaf(self, path: str, base: Any, b: Any) -> Adapted:
        check_kind(path, base, b, Bottleneck)
        check_shapes(path, vars(b), self._shapes(base, b.axes))
        n = len(b.axes)
        return Adapted(
            base,
            b.down,
            b.down_bias,
            b.up,
            b.up_bias,
            tuple(i - n for i in at(b.axes, "o")),
            tuple(i - n for i in at(b.axes, "b")),
            self.activation,
            self.scale,
            self.placement == "parallel",
            path,
        )


def houlsby(size: int, targets: str | Sequence[str], norms: str | Sequence[str]) -> Chain:
    """Adapters after both projections of a layer, with its norms trained.

    **Arguments:** `targets`, the biases (or kernels) of the output projections of attention and
    MLP; `norms`, the LayerNorms' scales and biases. In this package's BERT: `r"output/dense/bias$"`
    and `r"LayerNorm/"`.

    Source: Houlsby et al. 2019, section 2.1.
    """
    # Norms first: where an adapter also sits at a norm, it rewrites what is trained.
    return Chain((Train(norms), Adapter(size, targets)))


def pfeiffer(size: int, targets: str | Sequence[str]) -> Adapter:
    """One adapter a layer, after its MLP, with a ReLU.

    **Arguments:** `targets`, the bias (or kernel) of the MLP's output projection.

    Source: Pfeiffer et al. 2021, section 3.1.
    """
    return Adapter(size, targets, activation="relu")


def parallel_adapter(size: int, targets: str | Sequence[str], scale: float = 4.0) -> Adapter:
    """A scaled adapter beside each matched kernel, with a ReLU.

    Source: He et al. 2022, section 3.3; their scale is 4.
    """
    return Adapter(size, targets, "parallel", "relu", scale)
