"""DyLoRA: one training run whose every smaller rank works too."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jpeft._states import put
from jpeft.kernels import fold
from jpeft.leaf import Leaf
from jpeft.lora import Factors, LoRA
from jpeft.transform import Params, Trainable

Ranks = Literal["uniform", "geometric"]


@dataclasses.dataclass(frozen=True)
class DyLoRA(LoRA):
    """LoRA whose rank is drawn anew at every training step.

    With a key, `rewrite` draws one `b` in 1 .. `rank` for all matched parameters and uses the
    first `b` columns of A and rows of B, scaled by `alpha / b`. Without one it uses `rank_used`.

    **Arguments:** LoRA's (`rank` is the largest), and

    - `ranks`: `uniform`, or `geometric` with `p`.
    - `p`: of the geometric distribution, cut off at `rank`.
    - `frozen`: train only the b-th column and row at each step.
    - `rank_used`: the rank without a key; None is the largest.

    Source: Valipour et al. 2023, section 4 and algorithm 1; the scale is that of their code.
    """

    ranks: Ranks = "uniform"
    p: float = 0.15
    frozen: bool = False
    rank_used: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dora or self.rslora or self.parts or self.rank_pattern:
            raise ValueError("DyLoRA has no dora, rslora, parts or rank_pattern")
        if self.ranks not in ("uniform", "geometric"):
            raise ValueError(f"ranks is 'uniform' or 'geometric', got '{self.ranks}'")
        if self.rank_used is not None and not 1 <= self.rank_used <= self.rank:
            raise ValueError(f"rank_used is 1 to {self.rank}, got {self.rank_used}")
        if not 0 < self.p < 1:
            raise ValueError(f"p must be between 0 and 1, got {self.p}")

    def __hash__(self) -> int:
        return hash(repr(self))

    def place(
        self, params: Params, trainable: Trainable, key: PRNGKeyArray | None = None
    ) -> Params:
        """The parameters with a `LowRank` leaf at every matched path."""
        if key is None:
            lora, small = self.at(trainable, self.rank_used or self.rank)
            return lora.place(params, small)
        b = self.draw(jax.random.fold_in(key, 0))

        def rewritten(path: str, leaf: Any, f: Any) -> Leaf:
            return self._leaf(path, leaf, self._first(f, b), fold(key, path))

        return put(params, trainable, rewritten)

    def unmerge(self, merged: Params, trainable: Trainable) -> Params:
        """As LoRA's, of the update of rank `rank_used`."""
        lora, small = self.at(trainable, self.rank_used or self.rank)
        return lora.unmerge(merged, small)

    def draw(self, key: PRNGKeyArray) -> jax.Array:
        """A rank, int32, 1 to `rank`."""
        n = jnp.arange(1, self.rank + 1)
        if self.ranks == "uniform":
            return jax.random.choice(key, n)
        chances = self.p * (1 - self.p) ** (n - 1)
        return jax.random.choice(key, n, p=chances / chances.sum())

    def at(self, trainable: Trainable, rank: int) -> tuple[LoRA, Trainable]:
        """The LoRA of a smaller rank that this training run holds, with its trained state.

        **Raises:** `ValueError` for a rank that is not in 1 .. `rank`.
        """
        if not 1 <= rank <= self.rank:
            raise ValueError(f"this DyLoRA has ranks 1 to {self.rank}, not {rank}")
        lora = LoRA(
            rank,
            self.alpha,
            self.targets,
            dropout=self.dropout,
            alpha_pattern=self.alpha_pattern,
            axes=self.axes,
        )
        return lora, {path: f.first(rank) for path, f in trainable.items()}

    def _first(self, f: Factors, b: jax.Array) -> Factors:
        """The factors with what is above rank `b` at zero, and B by `rank / b`."""
        place = jnp.arange(1, self.rank + 1)
        axis = f.axes.count("b")
        rows = [-1 if i == axis else 1 for i in range(f.b.ndim)]
        keep_a, keep_b = place <= b, (place <= b).reshape(rows)
        a, low = f.a, f.b
        if self.frozen:
            a = jnp.where(place == b, a, jax.lax.stop_gradient(a))
            low = jnp.where((place == b).reshape(rows), low, jax.lax.stop_gradient(low))
        scale = self.rank / b.astype(jnp.float32)
        return dataclasses.replace(
            f, a=jnp.where(keep_a, a, 0), b=jnp.where(keep_b, low, 0) * scale
        )
