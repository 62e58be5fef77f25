"""LoRA at stage 3 as the TPU compiler makes it: what goes over the wires is gathers and sums."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jpeft
from jpeft.models.llama import AXES, Llama, LlamaConfig
from sharding import Zero, axes_by_pattern, make_mesh, make_step
from sharding.aot import PLAIN, compile_for, placed, topology

pytestmark = [
    pytest.mark.xdist_group("tpu"),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
    ),
]
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=4,
)


def test_factors_are_gathered_as_their_bases_and_never_resharded():
    model = nnx.eval_shape(
        lambda: Llama(CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, remat=True)
    )
    apply, params = jpeft.functional(model)
    transform = jpeft.LoRA(rank=8, alpha=16.0, targets=r"(q|v|up|down)_proj/kernel$")
    uses = jpeft.uses(apply, params, jnp.zeros((1, 8), jnp.int32))
    trainable = jax.eval_shape(lambda p: transform.init(jax.random.key(0), p, uses=uses), params)
    names = axes_by_pattern(AXES)
    own = jpeft.trainable_axes(transform, params, trainable, names)

    def axes(path, shape):
        return own.get(path) or names(path, shape)

    def loss(trainable, frozen, batch, key):
        ids = batch["ids"]
        rewritten = transform.rewrite(frozen, trainable)
        return jpeft.lift(apply)(rewritten, ids, labels=ids, chunk=4096)

    zero = Zero(make_mesh(None, topology("v5e:2x4")), 3, smallest=1)
    step = make_step(loss, optax.adam(1e-3), zero=zero, axes=axes)
    batch = {"ids": jax.ShapeDtypeStruct((16, 128), jnp.int32)}
    state = step.abstract(trainable)
    for x in jax.tree.leaves(state.trainable):
        assert math.prod(x.sharding.shard_shape(x.shape)) == x.size // 8
    frozen = placed(params, zero.parameters(params, axes))
    report = compile_for(step, state, frozen, placed(batch, zero.batch(batch)), options=PLAIN)
    assert {c.kind for c in report.collectives} <= {"all-gather", "all-reduce", "reduce-scatter"}
    # Outside of the loops the embedding and the head alone are gathered; in them, layers.
    layer = max(math.prod(x.shape[1:]) for x in jax.tree.leaves(params["model"]["layers"]))
    outside = [c for c in report.collectives if c.kind == "all-gather" and not c.inside_loop]
    whole = {CONFIG.vocab_size * CONFIG.hidden_size}
    large = {math.prod(c.shape) for c in outside if c.elements > CONFIG.hidden_size}
    assert large <= whole
    inside = [c for c in report.collectives if c.kind == "all-gather" and c.inside_loop]
    assert inside
    assert all(math.prod(c.shape) <= layer for c in inside if math.prod(c.shape) not in whole)
