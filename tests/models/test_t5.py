"""T5: parity with transformers, buckets, cache, dropout, remat, LoRA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.hf.names import Family
from jpeft.models.t5 import AXES, T5, T5Config
from jpeft.models.t5_layers import buckets
from tests.models.theirs import check_axes, enlarge, large, relative, with_weights_of

FAMILY = Family(
    stacks=("encoder/block", "decoder/block"),
    ignored=(
        r"^(encoder|decoder)\.embed_tokens\.weight$|^lm_head\.weight$"
        r"|EncDecAttention\.relative_attention_bias\.weight$"
    ),
    special={
        f"{stack}/relative_attention_bias/embedding": (
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        )
        for stack in ("encoder", "decoder")
    },
)
# Buckets so few that these short texts reach the last one.
CONFIG = T5Config(
    vocab_size=50,
    d_model=32,
    d_kv=6,
    d_ff=40,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=7,
)
V11 = dataclasses.replace(CONFIG, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
BOTH = pytest.mark.parametrize("config", [CONFIG, V11], ids=["t5", "v1.1"])
RNG = np.random.default_rng(0)
IDS, OUT = (jnp.asarray(RNG.integers(2, 50, (3, n)), jnp.int32) for n in (11, 9))


def masked(length, rows):
    return jnp.asarray(np.arange(length)[None] < np.array(rows)[:, None], jnp.int32)


RIGHT, OUT_RIGHT = masked(11, [11, 6, 2]), masked(9, [5, 9, 1])
LEFT, OUT_LEFT = RIGHT[:, ::-1], OUT_RIGHT[:, ::-1]
SIDES = pytest.mark.parametrize(
    ("mask", "out_mask"), [(LEFT, OUT_LEFT), (RIGHT, OUT_RIGHT)], ids=["left", "right"]
)


@functools.cache
def model_of(config=CONFIG, scale=0.2, **options):
    """A model whose weights are all large enough to matter, as `(apply, params)`."""
    apply, params = jpeft.functional(T5(config, rngs=nnx.Rngs(0), **options))
    return jax.jit(apply), large(params, scale=scale)


@pytest.mark.interop
@BOTH
def test_logits_equal_transformers(config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5ForConditionalGeneration._from_config(
        transformers.T5Config(**config.to_hf()), attn_implementation="eager"
    ).eval()
    if not config.tie_word_embeddings:
        # transformers 5 ties the words of a new model whatever its configuration says.
        theirs.lm_head.weight = torch.nn.Parameter(torch.zeros(50, 32))
    enlarge(theirs, 0.25 if config == CONFIG else 0.2)
    assert T5Config.from_hf(theirs.config.to_dict()) == config
    apply, params, unread = with_weights_of(theirs, T5(config, rngs=nnx.Rngs(0)), FAMILY)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert unread == tied | {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    for mask, out_mask in ((None, None), (RIGHT, OUT_RIGHT), (LEFT, OUT_LEFT)):
        real = np.ones(OUT.shape, bool) if mask is None else np.asarray(out_mask, bool)
        arrays = {"input_ids": IDS, "decoder_input_ids": OUT}
        if mask is not None:
            arrays |= {"attention_mask": mask, "decoder_attention_mask": out_mask}
        with torch.no_grad():
            want = theirs(
                **{k: torch.tensor(np.asarray(v, np.int64)) for k, v in arrays.items()}
            ).logits.numpy()
        assert np.abs(want).max() > 0.5
        assert np.std(want, axis=-1).mean() > 0.2
        got = np.asarray(apply(params, IDS, mask, OUT, out_mask))
        print(f"largest difference {np.abs(got - want)[real].max():.1e}")
        np.testing.assert_allclose(got[real], want[real], atol=1e-4)


@pytest.mark.interop
@pytest.mark.parametrize(("count", "far"), [(32, 128), (8, 7), (64, 256), (32, 20)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_equal_transformers(count, far, both_ways):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    distance = np.arange(-300, 301)
    want = theirs._relative_position_bucket(torch.tensor(distance), both_ways, count, far)
    got = buckets(jnp.asarray(distance), both_ways=both_ways, count=count, far=far)
    np.testing.assert_array_equal(got, want.numpy())


@BOTH
def test_bfloat16_is_near(config):
    # Larger weights of v1.1 make sharp attention of few bits: transformers is as far off there.
    scale = 0.2 if config == CONFIG else 0.1
    apply, params = model_of(config, scale)
    half, _ = model_of(config, scale, dtype=jnp.bfloat16)
    got, want = half(params, IDS, None, OUT), apply(params, IDS, None, OUT)
    assert got.dtype == jnp.float32
    assert relative(got, want) < 2e-2


@SIDES
def test_steps_from_a_cache_equal_the_full_pass(mask, out_mask):
    apply, params = model_of()
    more = jax.random.randint(jax.random.key(1), (3, 4), 0, 50)
    encoded = apply(params, IDS, mask)
    assert encoded.shape == (3, 11, 32)
    cache = T5(CONFIG, rngs=nnx.Rngs(0)).empty_cache(3, 15)

    def run(ids, own_mask, cache):
        return apply(params, None, mask, ids, own_mask, encoded=encoded, cache=cache)

    logits, cache = run(OUT, out_mask, cache)
    steps = []
    for i in range(4):
        # A step's mask may be left out.
        own = None if i % 2 else jnp.ones((3, 1), jnp.int32)
        step, cache = run(more[:, i : i + 1], own, cache)
        steps.append(step)
    assert int(cache.length) == 13
    got = jnp.concatenate([logits, *steps], axis=1)
    whole = jnp.concatenate([out_mask, jnp.ones_like(more)], axis=1)
    want = apply(params, IDS, mask, jnp.concatenate([OUT, more], axis=1), whole)
    # Right-padded rows have padding between their tokens now: it takes up no position.
    real = np.asarray(whole, bool)
    np.testing.assert_allclose(got[real], want[real], atol=2e-5)


def test_padding_changes_nothing():
    apply, params = model_of()
    got = apply(params, IDS, RIGHT, OUT, OUT_RIGHT)
    for row in (1, 2):
        s, t = int(RIGHT[row].sum()), int(OUT_RIGHT[row].sum())
        want = apply(params, IDS[row : row + 1, :s], None, OUT[row : row + 1, :t])
        np.testing.assert_allclose(got[row : row + 1, :t], want, atol=2e-5)


def test_unrolled_layers_change_no_result():
    apply, params = model_of()
    got = model_of(unroll=2)[0](params, IDS, LEFT, OUT, OUT_LEFT)
    np.testing.assert_allclose(got, apply(params, IDS, LEFT, OUT, OUT_LEFT), atol=2e-5)


def test_remat_runs_and_changes_no_result():
    key = jax.random.key(0)
    apply, params = model_of()
    forgetful, _ = model_of(remat=True)

    def loss(params):
        out = forgetful(params, IDS, None, OUT, key=key)
        return jnp.mean(out**2), out

    grads, got = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(got, apply(params, IDS, None, OUT, key=key), atol=2e-5)
    assert all(0 < float(jnp.abs(g).max()) < jnp.inf for g in jax.tree.leaves(grads))


def test_dropout_needs_a_key_and_follows_it():
    apply, params = model_of()
    one, two = (apply(params, IDS, None, OUT, key=jax.random.key(k)) for k in (1, 2))
    again = apply(params, IDS, None, OUT, key=jax.random.key(1))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - two).max()) > 0.1


@BOTH
def test_hidden_states_through_the_head_are_the_logits(config):
    model = T5(config, rngs=nnx.Rngs(0))

    @jax.jit
    def both():
        encoded = model.encode(IDS, LEFT)
        hidden = model(None, LEFT, OUT, encoded=encoded, hidden=True)
        assert hidden.shape == (3, 9, 32)
        return model.head(hidden), model(IDS, LEFT, OUT)

    np.testing.assert_allclose(*both(), atol=1e-4)


def test_shift_right():
    model = T5(dataclasses.replace(CONFIG, decoder_start_token_id=3), rngs=nnx.Rngs(0))
    labels = jnp.array([[7, 8, 1], [9, -100, -100]])
    np.testing.assert_array_equal(model.shift_right(labels), [[3, 7, 8], [3, 9, 0]])


@BOTH
def test_lora_beside_the_weights_equals_merged_weights(config):
    apply, params = model_of(config)
    targets = r"Attention/[qo]/kernel$|^shared" if config == CONFIG else r"/w(i_.|o)/k|^lm_head"
    method = jpeft.LoRA(4, 8.0, targets)
    inputs = (IDS, LEFT, OUT, OUT_LEFT)
    state = method.init(jax.random.key(1), params, uses=jpeft.uses(apply, params, *inputs))
    lifted, plain = jax.jit(jpeft.lift(apply)), apply(params, *inputs)
    real = np.asarray(OUT_LEFT, bool)
    start = lifted(method.rewrite(params, state), *inputs)
    np.testing.assert_allclose(start[real], plain[real], atol=2e-5)
    state = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), state
    )
    tree = method.rewrite(params, state)
    out = lifted(tree, *inputs)
    assert float(jnp.abs(out - plain).max()) > 0.2
    merged = apply(jpeft.merge(tree), *inputs)
    np.testing.assert_allclose(out[real], merged[real], atol=2e-4)
    if config == V11:
        return
    loss = jax.grad(lambda s: jnp.mean(lifted(method.rewrite(params, s), *inputs) ** 2))
    grads = jax.jit(loss)(state)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_every_parameter_has_logical_axes():
    check_axes(AXES, model_of()[1], model_of(V11)[1])


@BOTH
def test_config_round_trip(config):
    assert T5Config.from_hf(config.to_hf()) == config


def test_what_a_config_says_in_other_words():
    # transformers 5 writes v1.1 like this.
    config = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert not T5Config.from_hf(config).tie_word_embeddings
    start = T5Config.from_hf({"pad_token_id": 4, "decoder_start_token_id": None})
    assert start.decoder_start_token_id == 4
    assert T5Config(num_layers=5).decoder_layers == 5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_type", "umt5"),
        ("is_encoder_decoder", False),
        ("is_decoder", True),
        ("feed_forward_proj", "gated-unheard"),
        ("relative_attention_num_buckets", 7),
        ("dense_act_fn", "gelu_new"),
        ("is_gated_act", True),
        ("is_causal", False),
    ],
)
def test_configs_that_are_refused(option, value):
    with pytest.raises(ValueError, match=option):
        T5Config.from_hf({option: value})


def test_errors():
    model = T5(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="input_ids"):
        model(None, None, OUT)
    with pytest.raises(ValueError, match="the input has 9 tokens, the cache room for 4"):
        model(IDS, None, OUT, cache=model.empty_cache(3, 4))


def test_types():
    model = T5(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    assert jax.eval_shape(lambda: model(IDS, None, OUT)).dtype == jnp.float32
    hidden = jax.eval_shape(lambda: model(IDS, None, OUT, hidden=True))
    assert hidden.dtype == jnp.bfloat16
    assert model.empty_cache(1, 2).keys.dtype == jnp.bfloat16
