"""What every language model's call does alike: positions, the last token's logits, the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.models.cache import positions_of
from jpeft.models.causal import causal_attention, may_read
from jpeft.models.gpt2 import Gpt2, Gpt2Config
from jpeft.models.llama import Llama, LlamaConfig
from jpeft.models.loss import next_token_loss
from jpeft.models.t5 import T5, T5Config
from tests.models.theirs import large

KEY = jax.random.key(0)
IDS = jnp.asarray(np.random.default_rng(0).integers(3, 60, (2, 9)), jnp.int32)
MASK = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0]])
LABELS = jnp.where(MASK > 0, IDS, -100)
CONFIGS = {
    "gpt2": (
        Gpt2,
        Gpt2Config(
            vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, attn_pdrop=0.0,
            resid_pdrop=0.0, embd_pdrop=0.0,
        ),
    ),
    "llama": (
        Llama,
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1,
        ),
    ),
    "t5": (
        T5,
        T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0
        ),
    ),
}  # fmt: skip


@functools.cache
def made(kind, remat=False):
    build, config = CONFIGS[kind]
    model = build(config, rngs=nnx.Rngs(0), remat=remat)
    apply, params = jpeft.functional(model)
    return apply, large(params), model


def called(kind, params, **options):
    apply = made(kind)[0]
    if kind != "t5":
        return apply(params, IDS, MASK, **options)
    if "labels" in options:
        return apply(params, IDS, MASK, **options)
    return apply(params, IDS, None, IDS[:, ::-1], MASK, **options)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_last_tokens_logits(kind):
    whole = called(kind, made(kind)[1])
    last = called(kind, made(kind)[1], last=True)
    want = jnp.stack([whole[0, 8], whole[1, 5]])[:, None]
    np.testing.assert_allclose(last, want, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_labels_give_the_loss_of_the_logits(kind):
    apply, params, model = made(kind)
    got, count = called(kind, params, labels=LABELS, chunk=4)
    if kind == "t5":
        hidden = apply(params, IDS, MASK, model.shift_right(LABELS), hidden=True)
    else:
        hidden = called(kind, params, hidden=True)
    graphdef, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    head = nnx.merge(graphdef, state).head
    want, n = next_token_loss(hidden, head, LABELS, chunk=100, shift=kind != "t5")
    assert count == n
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_reads_a_rewritten_head(kind):
    params = made(kind)[1]
    table = {"gpt2": "wte/embedding$", "llama": "lm_head/kernel$", "t5": "shared/embedding$"}[kind]
    method = jpeft.LoRA(2, 4.0, table)
    state = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), method.init(KEY, params))
    tree = method.rewrite(params, state)

    def loss(params):
        return called(kind, params, labels=LABELS, chunk=4)[0]

    got = jpeft.lift(loss)(tree)
    np.testing.assert_allclose(got, loss(jpeft.merge(tree)), rtol=1e-4)
    assert not np.allclose(got, loss(params), rtol=1e-2)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_policy_keeps_more_and_gives_the_same_gradients(kind):
    def gradients(remat):
        apply, params, _ = made(kind, remat)
        step = jax.jit(jax.grad(lambda p: apply(p, IDS, MASK, labels=LABELS)[0]))
        return step(params), step.lower(params).as_text()

    plain, _ = gradients(False)
    whole, whole_text = gradients(True)
    kept, kept_text = gradients(jax.checkpoint_policies.everything_saveable)
    for a, b, c in zip(*(jax.tree.leaves(x) for x in (plain, whole, kept)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(a, c, atol=1e-4, rtol=1e-4)
    assert whole_text.count("dot_general") > kept_text.count("dot_general")


def test_positions_start_again_with_each_segment_and_skip_padding():
    mask = jnp.array([[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1]])
    segments = jnp.array([[0, 1, 1, 2, 2, 0], [1, 1, 0, 2, 2, 3]])
    want = [[-1, 0, 1, 0, 1, -1], [0, 1, -1, -1, 0, 0]]
    np.testing.assert_array_equal(positions_of(mask, segment_ids=segments), want)
    given = jnp.arange(6)[None].repeat(2, 0)
    want = [[-1, 1, 2, 3, 4, -1], [0, 1, -1, -1, 4, 5]]
    np.testing.assert_array_equal(positions_of(mask, position_ids=given), want)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_rows_need_no_positions(kind):
    apply, params, _ = made(kind)
    packed = jnp.concatenate([IDS[:1, :4], IDS[1:, :5]], axis=1)
    segments = jnp.array([[1] * 4 + [2] * 5])
    got = apply(params, packed, segment_ids=segments)
    np.testing.assert_allclose(got[:, :4], apply(params, IDS[:1, :4]), atol=1e-5)
    np.testing.assert_allclose(got[:, 4:], apply(params, IDS[1:, :5]), atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_cache_that_does_not_fit_is_told(kind):
    apply, params, model = made(kind)
    with pytest.raises(ValueError, match="the input has 9 tokens, the cache room for 8"):
        apply(params, IDS, cache=model.empty_cache(2, 8))
    with pytest.raises(ValueError, match="a cache has no segments"):
        apply(params, IDS, segment_ids=MASK, cache=model.empty_cache(2, 9))


def test_attention_with_a_bias_dropout_and_caps():
    q, k, v = (jax.random.normal(key, (2, 5, h, 8)) for key, h in zip(
        jax.random.split(KEY, 3), (4, 2, 2), strict=True
    ))  # fmt: skip
    keep = jnp.tril(jnp.ones((1, 5, 5), bool))
    bias = jax.random.normal(KEY, (2, 4, 5, 5))
    fast = causal_attention(q, k, v, keep, scale=0.3, bias=bias)
    # A cap so wide that it does nothing takes the written-out way.
    slow = causal_attention(q, k, v, keep, scale=0.3, bias=bias, softcap=1e6)
    np.testing.assert_allclose(fast, slow, atol=1e-5)
    options = {"scale": 0.3, "bias": bias, "rate": 0.5}
    drawn = [causal_attention(q, k, v, keep, rng=key, **options) for key in jax.random.split(KEY)]
    assert not np.allclose(*drawn, atol=1e-2)
    np.testing.assert_allclose(causal_attention(q, k, v, keep, **options), fast, atol=1e-6)
    many = jax.vmap(lambda key: causal_attention(q, k, v, keep, rng=key, **options))(
        jax.random.split(KEY, 4000)
    )
    np.testing.assert_allclose(many.mean(0), fast, atol=0.12)
    with pytest.raises(ValueError, match="neither soft caps nor dropout"):
        causal_attention(q, k, v, keep, scale=1.0, softcap=3.0, implementation="cudnn")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_mask_that_is_left_out_is_all_ones(kind):
    apply, params, _ = made(kind)

    def run(mask):
        return jax.jit(jax.value_and_grad(lambda p: jnp.mean(apply(p, IDS, mask) ** 2)))(params)

    for got, want in zip(*(jax.tree.leaves(run(m)) for m in (None, MASK | 1)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_without_a_mask_reads_up_to_its_own(softcap):
    q, k, v = jax.random.normal(KEY, (3, 2, 7, 4, 8))
    k, v = k[:, :, :2], v[:, :, :2]
    tri = jnp.tri(7, dtype=bool)[None]
    got, want = (causal_attention(q, k, v, m, scale=0.3, softcap=softcap) for m in (None, tri))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's attention needs an NVIDIA GPU")
@pytest.mark.parametrize("keep", ["none", "right", "left"])
def test_cudnns_attention_is_xlas(keep):
    keys = jax.random.split(KEY, 3)
    q = jax.random.normal(keys[0], (2, 128, 4, 64), jnp.bfloat16)
    k, v = (jax.random.normal(x, (2, 128, 2, 64), jnp.bfloat16) for x in keys[1:])
    mask = {
        "none": None,
        "right": jnp.broadcast_to(jnp.arange(128) < 100, (2, 128)),
        "left": jnp.broadcast_to(jnp.arange(128) >= 28, (2, 128)),
    }[keep]
    reads = None
    if mask is not None:
        at = positions_of(mask.astype(jnp.int32))
        reads = may_read(at, at)
    real = jnp.ones((2, 128), bool) if mask is None else mask

    def run(implementation):
        def total(q, k, v):
            out = causal_attention(q, k, v, reads, scale=0.125, implementation=implementation)
            return jnp.sum(jnp.where(real[..., None, None], out.astype(jnp.float32), 0) ** 2)

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)

    for got, want in zip(*(jax.tree.leaves(run(i)) for i in ("cudnn", "xla")), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (got, want))
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)
