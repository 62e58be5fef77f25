"""What tests of adapters share: inputs, states away from their start, and the peer's outputs."""

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.hf.names import Family

FAMILY = Family(stacks=("bert/encoder/layer",), prefix="bert.")
IDS = np.array([[2, 5, 9, 3, 6], [2, 7, 3, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
N = 3
KEY = jax.random.key(0)
FUSED = "transformer/h/attn/c_attn/kernel"


def shaken(state, size=0.3):
    """A state away from its start, each array by its own noise."""
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [
        x + size * jax.random.normal(k, jnp.shape(x)) for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def same(one, two):
    """Bit for bit, of the same types, and the same tree."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True
    ):
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None), path  # or a transform
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def fused(seed=0):
    """Two layers' fused projections, of width 8."""
    kernel = np.random.default_rng(seed).normal(size=(2, 8, 24)).astype(np.float32)
    return {"transformer": {"h": {"attn": {"c_attn": {"kernel": jnp.asarray(kernel)}}}}}


def their_logits(hf, model):
    torch = hf[0]
    with torch.no_grad():
        out = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK))
    return out.logits.numpy()


def shake(hf, model):
    """Move what is trained."""
    torch = hf[0]
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))
