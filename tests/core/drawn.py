"""States of methods filled with drawn numbers, without the programs that their starts are."""

import jax
import numpy as np


def drawn(method, params, seed=0, **options):
    """A state as `method.init` makes, normal numbers in it; a start alone takes long to compile."""
    shapes = jax.eval_shape(
        lambda params: method.init(jax.random.key(0), params, **options), params
    )
    return normal(shapes, seed)


def normal(shapes, seed=0):
    """A tree of normal fp32 numbers, in the shapes of another tree's arrays."""
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda s: draw(s.shape).astype(np.float32), shapes)
