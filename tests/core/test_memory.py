"""The account of memory: by hand where that can be counted, and against compiled programs."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jpeft
from jpeft.memory import Account, account, measured, rule_of_thumb
from jpeft.models.gpt2 import Gpt2, Gpt2Config
from jpeft.models.llama import Llama, LlamaConfig

LAYERS, WIDTH, ROWS = 6, 64, 512


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# -- the rule of thumb -----------------------------------------------------------------------------


def test_the_lectures_24_gb():
    got = rule_of_thumb(1e9)
    assert (got.trained, got.gradients, got.optimiser, got.activations) == (4e9, 4e9, 8e9, 8e9)
    assert got.total == 24e9


def test_mixed_is_16_bytes_and_activations():
    got = rule_of_thumb(1e9, precision="mixed")
    assert (got.trained, got.gradients, got.masters, got.optimiser) == (2e9, 2e9, 4e9, 8e9)
    assert got.total - got.activations == 16e9


@pytest.mark.parametrize(("stage", "states"), [(0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 2)])
def test_stages_share_what_they_shard(stage, states):
    got = rule_of_thumb(8e9, precision="mixed", stage=stage, devices=8)
    assert got.total - got.activations == states * 8e9
    assert got.activations == 4 * 8e9  # of each device's own rows


def test_what_is_not_trained_costs_its_weights_alone():
    got = rule_of_thumb(1e9, trained=1e6)
    assert (got.frozen, got.trained) == (4e9 - 4e6, 4e6)
    assert got.gradients + got.optimiser == 12e6


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"trained": 2e9}, "2e\\+09 parameters of 1e\\+09 cannot be trained"),
        ({"precision": "mixd"}, "did you mean 'mixed'"),
        ({"stage": 4}, "stages 0, 1, 2 and 3; got 4"),
        ({"devices": 0}, "at least 1 device"),
    ],
)
def test_the_rule_refuses(unchecked, options, told):
    with pytest.raises(ValueError, match=told):
        rule_of_thumb(1e9, **options)


# -- a step that can be counted by hand ------------------------------------------------------------


def scanned(remat):
    """The loss of layers in a scan. The backward pass reads, of each, what it read and a cosine."""

    def layer(x, w):
        return jnp.sin(x @ w), None

    body = jax.checkpoint(layer) if remat else layer

    def loss(trainable, frozen, batch, key):
        return jnp.mean(jax.lax.scan(body, batch, trainable["w"])[0] ** 2)

    return loss


def of_layers(layers=LAYERS, remat=False, optimiser=None, dtype=jnp.float32, **options):
    trainable = {"w": jax.ShapeDtypeStruct((layers, WIDTH, WIDTH), dtype)}
    batch = jax.ShapeDtypeStruct((ROWS, WIDTH), dtype)
    options = {"compiler": "cpu"} | options
    return account(scanned(remat), optimiser or optax.adam(1e-3), trainable, {}, batch, **options)


def test_kinds_of_a_simple_step():
    weights, rows = LAYERS * WIDTH**2 * 4, ROWS * WIDTH * 4
    got = of_layers()
    assert got.trained == weights
    assert got.optimiser == 2 * weights + 4  # and a count
    assert got.batch == rows
    assert (got.frozen, got.masters, got.gathered) == (0, 0, 0)
    assert 2 * LAYERS * rows <= got.activations <= (2 * LAYERS + 2) * rows  # and the loss's own
    assert got.total == sum(got.kinds().values()) == got.arguments + got.temporaries


def test_activations_grow_with_layers_and_remat_halves_them():
    rows = ROWS * WIDTH * 4
    a, b = of_layers(6), of_layers(12)
    assert b.activations - a.activations == 6 * 2 * rows
    c, d = of_layers(6, remat=True), of_layers(12, remat=True)
    assert d.activations - c.activations == 6 * rows


def test_masters_are_told_from_the_rest_of_the_state():
    weights = LAYERS * WIDTH**2
    got = of_layers(optimiser=jpeft.master_weights(optax.adam(1e-3)), dtype=jnp.bfloat16)
    assert (got.trained, got.masters, got.optimiser) == (2 * weights, 4 * weights, 8 * weights + 4)


def test_shares_of_devices():
    whole = of_layers(remat=True, compiler="tpu")
    divide = {"trained": 8, "gradients": {"w": 8}, "optimiser": 8}
    got = of_layers(remat=True, compiler="tpu", divide=divide)
    assert got.trained == whole.trained // 8
    assert got.gradients == whole.gradients // 8 > 0
    assert got.optimiser == whole.optimiser // 8
    # One layer at a time is whole, in the type that a TPU multiplies.
    assert got.gathered == WIDTH**2 * 2
    assert got.activations == whole.activations


def wide(trainable, frozen, batch, key):
    """Two products, and a cosine of what is between: an axis that devices may share."""
    return jnp.mean((jnp.sin(batch @ trainable["up"]) @ trainable["down"]) ** 2)


def of_wide(split, optimiser=None, **options):
    shape = {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    trainable = {k: jax.ShapeDtypeStruct(x, jnp.float32) for k, x in shape.items()}
    batch = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    axes = {"up": (1, split), "down": (split, 1)}
    options |= {"split": {"trained": axes}, "compiler": "cpu"}
    options |= {"divide": dict.fromkeys(("trained", "gradients", "optimiser"), split)}
    return account(wide, optimiser or optax.sgd(1e-3), trainable, {}, batch, **options)


def test_axes_that_devices_share_share_what_is_computed_of_them():
    rows = ROWS * WIDTH * 4
    one, four = of_wide(1), of_wide(4)
    # The sine and the cosine are 4 rows' width each, and a fourth of that; the rest is whole.
    assert one.activations - four.activations == 2 * 3 * rows
    assert four.gathered == 0
    assert (four.trained, four.gradients) == (one.trained // 4, one.gradients // 4)


def test_parts_of_a_batch():
    weights, rows = LAYERS * WIDTH**2 * 4, ROWS * WIDTH * 4
    whole, parts = of_layers(), of_layers(accumulate=4)
    assert 2 * LAYERS * rows // 4 <= parts.activations <= (2 * LAYERS + 2) * rows // 4
    assert whole.activations > 3 * parts.activations
    # The sums, and a part's own gradients beside them.
    assert parts.gradients == whole.gradients + weights == 2 * weights
    assert parts.arguments == whole.arguments
    narrow = of_layers(dtype=jnp.bfloat16, accumulate=4)
    assert narrow.gradients == weights + weights // 2  # sums are in fp32


def test_an_update_that_needs_more_than_a_part():
    """Adafactor's squares of a large matrix, beside a batch of nothing."""
    tall = {"w": jax.ShapeDtypeStruct((4096, 2048), jnp.float32)}
    row = jax.ShapeDtypeStruct((2, 4096), jnp.float32)

    def loss(trainable, frozen, batch, key):
        return jnp.mean((batch @ trainable["w"]) ** 2)

    parts = account(loss, optax.adafactor(1e-3), tall, {}, row, accumulate=2, compiler="cpu")
    assert parts.gradients >= size_of(tall)


def size_of(shapes):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"split": {"trainable": {}}}, "did you mean 'trained'"),
        ({"split": {"optimiser": {}}}, "'optimiser' cannot be split: frozen, trained"),
        ({"accumulate": 0}, "at least 1: 0"),
        ({"accumulate": 3}, "512 rows cannot be taken in 3 equal parts"),
        ({"compiler": "tpv"}, "did you mean 'tpu'"),
        ({"divide": {"gradient": 8}}, "did you mean 'gradients'"),
    ],
)
def test_the_account_refuses(options, told):
    with pytest.raises(ValueError, match=told):
        of_layers(**options)


def test_kinds_that_nobody_names_are_zero():
    assert Account(trained=3, working=4).total == 7


# -- against programs ------------------------------------------------------------------------------

LLAMA = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = Gpt2Config(n_embd=128, n_layer=12, n_head=4, vocab_size=512, n_positions=256)
METHODS = {
    "full": jpeft.Train(r".*"),
    "lora": jpeft.LoRA(rank=8, alpha=16.0, targets=r"(q_proj|v_proj|c_attn)/kernel$"),
}


@functools.cache
def step_of(model, method, remat):
    """Loss, optimiser and the shapes of a step of 8 rows of 256 tokens."""
    build, config = (Llama, LLAMA) if model == "llama" else (Gpt2, GPT2)
    shapes = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0), remat=remat))
    apply, params = jpeft.functional(shapes)
    transform = METHODS[method]
    uses = jpeft.uses(apply, params, jnp.zeros((1, 8), jnp.int32))
    trainable = jax.eval_shape(lambda p: transform.init(jax.random.key(0), p, uses=uses), params)
    base = jpeft.frozen(transform, params, trainable)

    def loss(trainable, frozen, batch, key):
        rewritten = transform.rewrite(base.params(frozen), trainable)
        return jpeft.lift(apply)(rewritten, batch, labels=batch, chunk=256)

    batch = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    return loss, optax.adamw(1e-3), trainable, base.arrays, batch


def compiled(loss, optimiser, trainable, frozen, batch):
    def step(trainable, state, frozen, batch):
        def mean(trainable):
            total, count = loss(trainable, frozen, batch, None)
            return total / count

        value, grads = jax.value_and_grad(mean)(trainable)
        updates, state = optimiser.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state = jax.eval_shape(optimiser.init, trainable)
    options = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    jitted = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
    return measured(jitted.lower(trainable, state, frozen, batch).compile())


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_predictions_are_near_programs(model, method):
    parts = step_of(model, method, remat=False)
    found = compiled(*parts)
    got = account(*parts, compiler="cpu")
    # The batch and the weights are what they are.
    assert abs(got.arguments - found.arguments) <= 2048
    assert abs(got.total / found.total - 1) <= 0.1
    # The forward pass keeps most of it: with remat a small part is left.
    assert got.activations > 0.7 * got.total
    assert account(*step_of(model, method, remat=True), compiler="cpu").total < got.total / 4


def test_what_a_program_says():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    jitted = jax.jit(lambda x: (x @ x) @ x + x, donate_argnums=0)
    found = measured(jitted.lower(x).compile())
    n = math.prod(x.shape) * 4
    assert (found.arguments, found.outputs, found.aliased) == (n, n, n)
    assert found.total == n + found.temporaries
    assert found.temporaries >= n
