"""BERT's masks, drawn within a compiled program."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from experiments.common.pretrain_tokens import Vocabulary
from jpeft.models.loss import IGNORED

SHARE = 0.15


class Masked(NamedTuple):
    """`ids`, what the model reads; `positions` and `labels`, what it is to foretell, and where."""

    ids: Int[Array, "b t"]
    positions: Int[Array, "b n"]
    labels: Int[Array, "b n"]


def masked(ids: Int[Array, "b t"], vocabulary: Vocabulary, key: PRNGKeyArray) -> Masked:
    """15% of each row's places chosen: of the tokens there 80% become the mask, 10% a random
    ordinary token, and 10% stay.

    Every row has the same number of places, so that only they go through the head. Special tokens
    are not chosen, unless a row has too few others: then their labels are -100.

    Source: Devlin et al. 2019, section 3.1.
    """
    where, how, which = jax.random.split(key, 3)
    count = max(1, round(SHARE * ids.shape[1]))
    low, high = vocabulary.ordinary
    # An unknown word is not chosen either: nothing is learned from foretelling that it is one.
    plain = (ids >= low) & (ids < high)
    order = jnp.where(plain, jax.random.uniform(where, ids.shape), -1.0)
    _, positions = jax.lax.top_k(order, count)
    old = jnp.take_along_axis(ids, positions, axis=1)
    chosen = jnp.take_along_axis(plain, positions, axis=1)
    u = jax.random.uniform(how, old.shape)
    random = jax.random.randint(which, old.shape, low, high, ids.dtype)
    new = jnp.where(u < 0.8, vocabulary.mask, jnp.where(u < 0.9, random, old))
    rows = jnp.arange(ids.shape[0])[:, None]
    read = ids.at[rows, positions].set(jnp.where(chosen, new, old))
    return Masked(read, positions, jnp.where(chosen, old, IGNORED))
