"""A quantised base over devices: the same losses, every device its part, codes on the wires."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jpeft
from jpeft.models.llama import AXES, Llama, LlamaConfig
from sharding import Zero, axes_by_pattern, make_mesh, make_step

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LORA = jpeft.LoRA(rank=8, alpha=16.0, targets=r"_proj/kernel$")


@functools.cache
def base(form):
    apply, params = jpeft.functional(Llama(CONFIG, rngs=nnx.Rngs(0), remat=True))
    uses = jpeft.uses(apply, params, jnp.zeros((1, 8), jnp.int32))
    quantised = jpeft.Quantize(r"_proj/kernel$", form, block=8)(params, uses=uses)
    trainable = LORA.init(jax.random.key(1), quantised, uses=uses)
    return apply, quantised, trainable


def names(params, trainable):
    """The axes of every array, quantised or trained too."""
    plain = axes_by_pattern(AXES)
    own = {
        **jpeft.leaf_axes(params, plain),
        **jpeft.trainable_axes(LORA, params, trainable, plain),
    }
    return lambda path, shape: own[path] if path in own else plain(path, shape)


def run(form, zero, steps=6):
    apply, params, trainable = base(form)
    axes = names(params, trainable)

    def loss(trainable, frozen, batch, key):
        rewritten = LORA.rewrite(frozen, trainable)
        return jpeft.lift(apply)(rewritten, batch, labels=batch, chunk=64)

    step = make_step(loss, optax.adam(1e-2), zero=zero, axes=axes, clip=1.0)
    state = step.init(trainable)
    if zero is not None:
        params = jax.device_put(params, zero.parameters(params, axes))
    losses = []
    for i in range(steps):
        first = np.random.default_rng(i).integers(0, 64, (16, 1))
        ids = jnp.asarray((first + np.arange(12)) % 64, jnp.int32)
        state, metrics = step(state, params, ids, jax.random.key(i))
        losses.append(float(metrics["loss"]))
    return np.array(losses), params


alone = functools.cache(lambda form: run(form, None)[0])


@pytest.mark.parametrize("shape", [None, "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_eight_devices_are_as_one(form, shape):
    zero = Zero(make_mesh(shape), 3, smallest=1)
    losses, params = run(form, zero)
    np.testing.assert_allclose(losses, alone(form), rtol=1e-5)
    assert losses[-1] < losses[0] - 0.05
    parts = math.prod(zero.mesh.shape[a] for a in ("fsdp", "tensor"))
    leaf = params["model"]["layers"]["mlp"]["gate_proj"]["kernel"]
    assert isinstance(leaf, jpeft.Quantized)
    codes = leaf.codes
    assert codes.size == parts * math.prod(codes.sharding.shard_shape(codes.shape))


def test_names_of_codes_and_scales_are_those_of_the_weight():
    _, params, trainable = base("nf4")
    axes = names(params, trainable)
    at = "model/layers/mlp/gate_proj/kernel"
    wide = axes_by_pattern(AXES)(at, (2, 64, 128))
    assert wide is not None
    assert axes(f"{at}/codes", (2, 32, 128)) == wide
    assert axes(f"{at}/scales/codes", (2, 8, 128)) == wide
    assert axes(f"{at}/scales/absmax", (2, 4)) == (wide[0], None)
