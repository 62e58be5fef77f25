"""What an encoder starts from, where it is not drawn: counts of its texts, and where tokens stand.

From drawn numbers alone a masked model spends millions of tokens on how often words are, before it
finds out that the words around a gap tell something. What it lacks can be worked out beforehand.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.common.pretrain_data import Data
from experiments.common.pretrain_sizes import Start
from jpeft.paths import flatten, replace

WORDS = "bert/embeddings/word_embeddings/embedding"
POSITIONS = "bert/embeddings/position_embeddings/embedding"
QUERY, KEY = (f"bert/encoder/layer/attention/self/{x}/kernel" for x in ("query", "key"))
BIAS = "cls/predictions/bias"
# The table of pairs of words is dense.
_LARGEST = 16384
# Of the longest and the shortest wave; rows are not much longer than a hundred tokens.
_WAVES = 1000.0
# Of queries and keys: in a sum of products of drawn numbers likeness is to stand out.
_GAIN = 1.5


def started(params: Any, starts: Sequence[Start], data: Data) -> Any:
    """An encoder's parameters with a start other than drawn numbers.

    **Arguments:** `starts`:

    - `words`: a word's embedding is made of the words beside it in the texts (positive pointwise
      mutual information, its largest singular vectors: Levy and Goldberg 2014), and the output's
      bias is the logarithm of how often it comes;
    - `positions`: sines and cosines (Vaswani et al. 2017, section 3.5), which are alike where
      places are near;
    - `queries`: queries are made as keys are, so that a token attends at first to those like it:
      itself, its neighbours and words like its own (Trockman and Kolter 2023).

    **Raises:** `ValueError` for `words` with a vocabulary of more than 16,384.
    """
    flat = dict(flatten(params))
    changed: dict[str, Any] = {}
    if "words" in starts:
        size = data.vocabulary.size
        if size > _LARGEST:
            raise ValueError(
                f"--starts words is for a --vocabulary of at most {_LARGEST}, and this is {size}: "
                "pass --starts positions queries"
            )
        first, last = data.vocabulary.ordinary
        old = flat[WORDS]
        new = vectors(data.pairs, old.shape[1])[first:last]
        changed[WORDS] = old.at[first:last].set(as_wide(new, old[first:last]))
        often = np.bincount(data.train, minlength=size) + 1.0
        changed[BIAS] = jnp.asarray(np.log(often / often.sum()), flat[BIAS].dtype)
    if "positions" in starts:
        old = flat[POSITIONS]
        changed[POSITIONS] = as_wide(sinusoids(*old.shape), old)
    if "queries" in starts:
        changed[QUERY] = changed[KEY] = _GAIN * flat[QUERY]
    return replace(params, changed)


def as_wide(new: Float[Array, "n d"], old: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """New numbers, with the deviation of the old."""
    return (new * (jnp.std(old) / jnp.std(new))).astype(old.dtype)


def sinusoids(length: int, width: int) -> Float[Array, "t d"]:
    """Sines and cosines of positions, of waves from one token to a thousand and more."""
    rates = _WAVES ** (-jnp.arange(-(-width // 2)) / (width / 2))
    angles = jnp.arange(length)[:, None] * rates
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)[:, :width]
    return waves - waves.mean(0)


@functools.partial(jax.jit, static_argnums=1)
def vectors(table: Float[Array, "v v"], width: int) -> Float[Array, "v d"]:
    """A vector for each word, from how often words stand together: the singular vectors of their
    positive pointwise mutual information, each as long as the square root of its singular value.

    Found by six steps of subspace iteration from a random start (Halko et al. 2011).
    """
    total = table.sum(1)
    # Rare words have too high a part of it: Levy et al. 2015, section 3.1.
    beside = total**0.75
    shares = total[:, None] * (beside / beside.sum())
    known = jnp.where(table > 0, table / jnp.where(shares > 0, shares, 1), 1)
    mutual = jnp.maximum(jnp.log(known), 0)

    def step(_: Int[Array, ""], basis: Float[Array, "v k"]) -> Float[Array, "v k"]:
        return jnp.linalg.qr(mutual @ (mutual.T @ basis))[0]

    drawn = jax.random.normal(jax.random.key(0), (table.shape[0], min(width + 30, len(table))))
    basis = jax.lax.fori_loop(0, 6, step, drawn)
    left, values, _ = jnp.linalg.svd(basis.T @ mutual, full_matrices=False)
    found = ((basis @ left) * jnp.sqrt(values))[:, :width]
    return jnp.pad(found, ((0, 0), (0, width - found.shape[1])))
