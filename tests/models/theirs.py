"""Weights of small random transformers models as our parameters, and what models' tests share."""

import re

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft.hf.names import place
from jpeft.paths import flatten, replace


def enlarge(model, scale: float) -> None:
    """Draw every parameter of a torch model anew, biases and scales too: all of it counts."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = scale * torch.randn(p.shape, generator=generator)
            p.copy_(1 + noise if p.ndim == 1 and name.endswith("weight") else noise)


def large(params, seed: int = 0, scale: float = 0.2):
    """Parameters drawn anew, biases and scales too, large enough that all of them count."""
    values = {}
    for i, (path, leaf) in enumerate(flatten(params).items()):
        noise = scale * jax.random.normal(jax.random.key(1000 * seed + i), leaf.shape)
        values[path] = (noise + path.endswith("scale")).astype(leaf.dtype)
    return replace(params, values)


def with_weights_of(theirs, ours, family):
    """Our model as `(apply, params)`, compiled and with a torch model's weights, and the names of
    the tensors that it did not read.
    """
    apply, params = jpeft.functional(ours)
    tensors = {k: v.detach().float().numpy() for k, v in theirs.state_dict().items()}
    values, read = {}, set()
    for path, leaf in flatten(params).items():
        spot = place(family, path)
        names = [spot.of_layer(i) for i in range(leaf.shape[0])] if spot.stacked else [spot.name]
        read.update(names)
        layers = [tensors[n].T if spot.transposed else tensors[n] for n in names]
        value = np.stack(layers) if spot.stacked else layers[0]
        assert value.shape == leaf.shape, path
        values[path] = jnp.asarray(value, leaf.dtype)
    return jax.jit(apply), replace(params, values), set(tensors) - read


def check_axes(table, *trees) -> None:
    """Every parameter is in a table of logical axes once, with as many axes as it has."""
    leaves = {path: leaf for params in trees for path, leaf in flatten(params).items()}
    for path, leaf in leaves.items():
        found = [axes for pattern, axes in table if re.search(pattern, path)]
        assert len(found) == 1, path
        assert len(found[0]) == leaf.ndim, path
    for pattern, _ in table:
        assert any(re.search(pattern, path) for path in leaves), pattern


def relative(got: jax.Array, want: jax.Array) -> float:
    """The difference's norm by the norm of what is wanted."""
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
