"""GPT-2: parity with transformers, cache, packed rows, dropout, remat, LoRA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.hf.names import Family
from jpeft.models.gpt2 import AXES, Gpt2, Gpt2Config
from tests.models.theirs import check_axes, enlarge, large, relative, with_weights_of

FAMILY = Family(
    stacks=("transformer/h",),
    prefix="transformer.",
    conv1d=r"/(c_attn|c_proj|c_fc)/kernel$",
    ignored=r"(^|\.)h\.\d+\.attn\.(masked_)?bias$|^lm_head\.weight$",
)
CONFIG = Gpt2Config(vocab_size=50, n_positions=24, n_embd=32, n_layer=3, n_head=4)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (3, 9)), jnp.int32)
RIGHT = jnp.asarray(np.arange(9)[None] < np.array([[9], [5], [2]]), jnp.int32)
LEFT = RIGHT[:, ::-1]


@functools.cache
def model_of(seed=0, config=CONFIG, **options):
    """A model whose weights are all large enough to matter, as `(apply, params)`."""
    apply, params = jpeft.functional(Gpt2(config, rngs=nnx.Rngs(seed), **options))
    return jax.jit(apply), large(params, seed)


@pytest.mark.interop
@pytest.mark.parametrize("inner", [None, 40])
def test_logits_equal_transformers(inner):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(CONFIG, n_inner=inner, scale_attn_weights=inner is None)
    values = {**config.to_hf(), "bos_token_id": 1, "eos_token_id": 1}
    theirs = transformers.GPT2LMHeadModel._from_config(
        transformers.GPT2Config(**values), attn_implementation="eager"
    ).eval()
    enlarge(theirs, 0.2)
    assert Gpt2Config.from_hf(theirs.config.to_dict()) == Gpt2Config.from_hf(values)
    apply, params, unread = with_weights_of(theirs, Gpt2(config, rngs=nnx.Rngs(0)), FAMILY)
    assert unread == {"lm_head.weight"}
    for mask in (None, RIGHT, LEFT):
        real = np.ones(IDS.shape, bool) if mask is None else np.asarray(mask, bool)
        inputs = {"input_ids": torch.tensor(np.asarray(IDS, np.int64))}
        if mask is not None:
            positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
            inputs["attention_mask"] = torch.tensor(np.asarray(mask, np.int64))
            inputs["position_ids"] = torch.tensor(positions)
        with torch.no_grad():
            want = theirs(**inputs).logits.numpy()
        assert np.abs(want).max() > 2
        assert np.std(want, axis=-1).mean() > 0.5
        got = np.asarray(apply(params, IDS, mask))
        print(f"largest difference {np.abs(got - want)[real].max():.1e}")
        np.testing.assert_allclose(got[real], want[real], atol=1e-4)


def test_bfloat16_is_near():
    apply, params = model_of()
    half, _ = model_of(dtype=jnp.bfloat16)
    got, want = half(params, IDS), apply(params, IDS)
    assert got.dtype == jnp.float32
    assert relative(got, want) < 2e-2


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_steps_from_a_cache_equal_the_full_pass(mask):
    apply, params = model_of()
    model = Gpt2(CONFIG, rngs=nnx.Rngs(0))
    more = jax.random.randint(jax.random.key(1), (3, 4), 0, 50)
    cache = model.empty_cache(3, 15)
    run = jax.jit(lambda ids, mask, cache: apply(params, ids, mask, cache=cache))
    logits, cache = run(IDS, mask, cache)
    ones = jnp.ones((3, 1), jnp.int32)
    steps = []
    for i in range(4):
        step, cache = run(more[:, i : i + 1], ones, cache)
        steps.append(step)
    assert int(cache.length) == 13
    assert cache.room == 15
    got = jnp.concatenate([logits, *steps], axis=1)
    whole = jnp.concatenate([mask, jnp.ones_like(more)], axis=1)
    want = apply(params, jnp.concatenate([IDS, more], axis=1), whole)
    real = np.asarray(whole, bool)
    np.testing.assert_allclose(got[real], want[real], atol=2e-5)


def test_a_cache_in_half_precision():
    apply, params = model_of()
    cache = Gpt2(CONFIG, rngs=nnx.Rngs(0)).empty_cache(3, 9, jnp.bfloat16)
    got, cache = apply(params, IDS, cache=cache)
    assert cache.keys.dtype == jnp.bfloat16
    assert relative(got, apply(params, IDS)) < 2e-2


def test_packed_texts_equal_rows_of_their_own():
    apply, params = model_of()
    ids = IDS[:1]
    lengths = (4, 3)
    segments = jnp.asarray([[1] * 4 + [2] * 3 + [0] * 2])
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 0, 0]])
    mask = (segments > 0).astype(jnp.int32)
    got = apply(params, ids, mask, position_ids=positions, segment_ids=segments)
    start = 0
    for n in lengths:
        want = apply(params, ids[:, start : start + n])
        np.testing.assert_allclose(got[:, start : start + n], want, atol=2e-5)
        start += n


def test_unrolled_layers_change_no_result():
    apply, params = model_of()
    got = model_of(unroll=2)[0](params, IDS, LEFT)
    np.testing.assert_allclose(got, apply(params, IDS, LEFT), atol=2e-5)


def test_remat_changes_no_gradient():
    key, params = jax.random.key(0), model_of()[1]

    def gradient(apply):
        def loss(params):
            return jnp.mean(apply(params, IDS, LEFT, key=key) ** 2)

        return jax.jit(jax.value_and_grad(loss))(params)

    got, want = gradient(model_of(remat=True)[0]), gradient(model_of()[0])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert float(jnp.abs(b).max()) > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_dropout_needs_a_key_and_follows_it(where):
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = dataclasses.replace(CONFIG, **{**rates, where: 0.2})
    apply, params = model_of(config=config)
    one, two = (apply(params, IDS, LEFT, key=jax.random.key(k)) for k in (1, 2))
    np.testing.assert_array_equal(one, apply(params, IDS, LEFT, key=jax.random.key(1)))
    assert float(jnp.abs(one - two).max()) > 0.1


def test_dropout_of_attention_at_no_rate_changes_nothing():
    apply, params = model_of()
    tiny = dataclasses.replace(CONFIG, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=1e-9)
    real = np.asarray(LEFT, bool)
    got = model_of(config=tiny)[0](params, IDS, LEFT, key=jax.random.key(1))
    np.testing.assert_allclose(got[real], apply(params, IDS, LEFT)[real], atol=2e-5)


def test_hidden_states_through_the_head_are_the_logits():
    model = Gpt2(CONFIG, rngs=nnx.Rngs(0))
    hidden = model(IDS, LEFT, hidden=True)
    assert hidden.shape == (3, 9, 32)
    np.testing.assert_allclose(model.head(hidden), model(IDS, LEFT), atol=1e-6)
    cached, cache = model(IDS, LEFT, hidden=True, cache=model.empty_cache(3, 12))
    assert int(cache.length) == 9
    real = np.asarray(LEFT, bool)
    np.testing.assert_allclose(cached[real], hidden[real], atol=2e-5)


def test_lora_beside_the_weights_equals_merged_weights():
    apply, params = model_of()
    method = jpeft.LoRA(
        4,
        8.0,
        r"(c_attn|attn/c_proj|c_fc|mlp/c_proj)/kernel$|wte/embedding$",
        parts={r"c_attn": (3, (0, 2))},
    )
    uses = jpeft.uses(apply, params, IDS)
    state = method.init(jax.random.key(1), params, uses=uses)
    lifted = jax.jit(jpeft.lift(apply))
    plain = apply(params, IDS, LEFT)
    real = np.asarray(LEFT, bool)
    start = lifted(method.rewrite(params, state), IDS, LEFT)
    np.testing.assert_allclose(start[real], plain[real], atol=2e-5)
    state = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), state
    )
    tree = method.rewrite(params, state)
    out = lifted(tree, IDS, LEFT)
    assert float(jnp.abs(out - plain).max()) > 0.5
    merged = apply(jpeft.merge(tree), IDS, LEFT)
    np.testing.assert_allclose(out[real], merged[real], atol=2e-4)
    cache = Gpt2(CONFIG, rngs=nnx.Rngs(0)).empty_cache(3, 12)
    cached, _ = lifted(tree, IDS, LEFT, cache=cache)
    np.testing.assert_allclose(cached[real], merged[real], atol=2e-4)
    loss = jax.grad(lambda s: jnp.mean(lifted(method.rewrite(params, s), IDS, LEFT) ** 2))
    grads = jax.jit(loss)(state)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_every_parameter_has_logical_axes():
    check_axes(AXES, model_of()[1])


def test_config_round_trip():
    config = Gpt2Config(n_inner=7, eos_token_id=(3, 4), pad_token_id=2)
    assert Gpt2Config.from_hf(config.to_hf()) == config
    assert config.to_hf()["eos_token_id"] == [3, 4]
    assert hash(config) == hash(Gpt2Config.from_hf(config.to_hf()))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("is_causal", False),
        ("tie_word_embeddings", False),
        ("model_type", "gpt_neo"),
        ("activation_function", "unheard"),
        ("n_head", 5),
    ],
)
def test_configs_that_are_refused(option, value):
    name = "5 heads" if option == "n_head" else option
    with pytest.raises(ValueError, match=name):
        Gpt2Config.from_hf({option: value})


def test_errors():
    model = Gpt2(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the input has 30 tokens, the model reads 24"):
        model(jnp.ones((1, 30), jnp.int32))
    with pytest.raises(ValueError, match="room for 30 tokens, the model reads 24"):
        model.empty_cache(1, 30)
    with pytest.raises(ValueError, match="the input has 9 tokens, the cache room for 4"):
        model(IDS, cache=model.empty_cache(3, 4))
    with pytest.raises(ValueError, match="segment_ids"):
        model(IDS, cache=model.empty_cache(3, 12), segment_ids=jnp.ones_like(IDS))


def test_types():
    model = Gpt2(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    assert jax.eval_shape(lambda: model(IDS)).dtype == jnp.float32
    assert jax.eval_shape(lambda: model(IDS, hidden=True)).dtype == jnp.bfloat16
    assert model.empty_cache(1, 2).keys.dtype == jnp.bfloat16
