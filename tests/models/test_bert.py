"""BERT and RoBERTa: parity with transformers, attention in pieces, padding, dropout, remat."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.hf import load_sequence_classifier
from jpeft.models.attention import attention
from jpeft.models.bert import AXES, BertConfig, BertForSequenceClassification
from jpeft.models.layers import keep_products
from tests.models.theirs import check_axes
from tests.tiny import tiny_config

KINDS = ("bert", "roberta")


def batch(config, rows=3, length=9):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, config.vocab_size, (rows, length)).astype(np.int32)
    mask = (np.arange(length)[None] < np.array([[length], [5], [2]])).astype(np.int32)
    ids = np.where(mask == 1, ids, config.pad_token_id)
    types = (np.arange(length)[None] >= 4) * mask * (config.type_vocab_size > 1)
    return tuple(jnp.asarray(x, jnp.int32) for x in (ids, mask, types))


@pytest.mark.interop
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [1, 3])
def test_logits_equal_transformers(kind, labels, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = tiny_config(kind)
    names = ("Bert", "Roberta")[kind == "roberta"]
    theirs_config = getattr(transformers, f"{names}Config")(
        **{
            k: getattr(config, k)
            for k in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "max_position_embeddings",
                "type_vocab_size",
                "pad_token_id",
            )
        },
        num_labels=labels,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{names}ForSequenceClassification")(theirs_config).eval()
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    ours, report = load_sequence_classifier(tmp_path, labels, key=jax.random.key(0))
    assert report.new == ()
    ids, mask, types = batch(config)
    with torch.no_grad():
        want = theirs(
            torch.tensor(np.asarray(ids, np.int64)),
            attention_mask=torch.tensor(np.asarray(mask, np.int64)),
            token_type_ids=torch.tensor(np.asarray(types, np.int64)),
        ).logits
    assert float(want.abs().max()) > 0.05
    np.testing.assert_allclose(ours(ids, mask, types), want.numpy(), atol=1e-4)


@pytest.mark.interop
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_leaves_out_is_what_transformers_takes(kind):
    transformers = pytest.importorskip("transformers")
    want = transformers.AutoConfig.for_model(kind).to_dict()
    assert BertConfig.from_hf({"model_type": kind}) == BertConfig.from_hf(want)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_attention_in_pieces_equals_attention_at_once(rows):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(x, (6, 10, 12)) for x in keys)
    keep = jnp.arange(10)[None] < jnp.array([10, 3, 1, 0, 7, 10])[:, None]

    def run(rows):
        out, pull = jax.vjp(lambda *a: attention(*a, keep, heads=3, rows=rows), q, k, v)
        return (out, *pull(g))

    for a, b in zip(run(rows), run(None), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_attention_in_pieces_rounds_bf16_at_the_end_alone():
    keys = jax.random.split(jax.random.key(1), 4)
    given = [jax.random.normal(x, (6, 40, 12), jnp.bfloat16) for x in keys]
    keep = jnp.arange(40)[None] < jnp.array([40, 3, 1, 20, 7, 33])[:, None]

    def run(rows, q, k, v, g):
        out, pull = jax.vjp(lambda *a: attention(*a, keep, heads=3, rows=rows), q, k, v)
        return (out, *pull(g))

    exact = run(None, *(x.astype(jnp.float32) for x in given))
    for pieces, whole, want in zip(run(4, *given), run(None, *given), exact, strict=True):
        assert pieces.dtype == jnp.bfloat16
        # bf16 has eight bits: rounding moves a number by 1/256 of itself at most.
        near = {"rtol": 2**-8, "atol": 1e-5}
        np.testing.assert_allclose(pieces.astype(jnp.float32), want, **near)
        assert not np.allclose(whole.astype(jnp.float32), want, **near)


def model_of(config=None, **options):
    config = config or tiny_config()
    return BertForSequenceClassification(config, 2, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"remat": True},
        {"unroll": 2},
        {"attention_rows": 2},
        {"unroll": 64, "remat": keep_products},
        {"remat": keep_products, "attention_rows": 2},
    ],
)
def test_how_it_runs_changes_no_result(options):
    ids, mask, types = batch(tiny_config())

    def run(model):
        apply, params = jpeft.functional(model)

        def loss(params):
            return jnp.sum(apply(params, ids, mask, types) ** 2)

        return jax.jit(jax.value_and_grad(loss))(params)

    got, want = run(model_of(**options)), run(model_of())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_keeping_products_alone_keeps_less():
    # Of two layers it would be less than what a version of XLA keeps beside them.
    config = dataclasses.replace(tiny_config(), num_hidden_layers=8, intermediate_size=64)
    ids = jnp.ones((16, 16), jnp.int32)

    def temporaries(**options):
        apply, params = jpeft.functional(model_of(config, attention_rows=4, **options))
        graded = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, ids, ids, ids) ** 2)))
        return graded.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(remat=keep_products) < 0.9 * temporaries()


def test_a_straight_line_layer_is_made_again_in_two_halves():
    apply, params = jpeft.functional(model_of(unroll=64, remat=True))
    ids = jnp.ones((2, 4), jnp.int32)
    program = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(apply(p, ids, ids, ids) ** 2)))(params)
    pieces = [eqn for eqn in program.eqns if eqn.primitive.name in ("checkpoint", "remat2")]
    # What goes back through the MLP is at hand before the attention is made again for its own.
    assert len(pieces) == 2 * tiny_config().num_hidden_layers


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_changes_nothing(pooling):
    model = model_of(pooling=pooling)
    ids, mask, _ = batch(tiny_config())
    wide = jnp.pad(ids, ((0, 0), (0, 6)), constant_values=7)
    np.testing.assert_allclose(
        model(wide, jnp.pad(mask, ((0, 0), (0, 6)))), model(ids, mask), atol=1e-5
    )


def test_dropout_needs_a_key_and_follows_it():
    model = model_of()
    ids, mask, types = batch(tiny_config())
    one, two = (model(ids, mask, types, key=jax.random.key(k)) for k in (1, 2))
    np.testing.assert_array_equal(one, model(ids, mask, types, key=jax.random.key(1)))
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(model(ids, mask, types), model(ids, mask, types))


def test_bfloat16_is_near():
    ids, mask, types = batch(tiny_config())
    half = model_of(dtype=jnp.bfloat16)(ids, mask, types)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, model_of()(ids, mask, types), atol=0.05)


def test_errors():
    model = model_of()
    with pytest.raises(ValueError, match="the input has 30 tokens, the model reads 24"):
        model(jnp.ones((1, 30), jnp.int32))
    with pytest.raises((ValueError, TypeError), match="max"):
        model_of(pooling="max")
    with pytest.raises(ValueError, match=r"unheard"):
        BertConfig.from_hf({"model_type": "bert", "hidden_act": "unheard"})


def test_every_parameter_has_its_logical_axes():
    models = [
        BertForSequenceClassification(tiny_config(kind), 3, rngs=nnx.Rngs(0), pooling="cls")
        for kind in ("bert", "roberta")
    ]
    check_axes(AXES, *(jpeft.functional(m).params for m in models))


@pytest.mark.parametrize("unroll", [1, 64])
@pytest.mark.parametrize(("kind", "layers"), [("bert", 1), ("bert", 3), ("roberta", 2)])
def test_one_position_is_that_of_all_and_so_are_its_gradients(kind, layers, unroll):
    config = dataclasses.replace(tiny_config(kind), num_hidden_layers=layers)
    ids, mask, types = batch(config)
    apply, params = jpeft.functional(model_of(config, unroll=unroll).encoder)

    def run(place, **one):
        def loss(params):
            out = apply(params, ids, mask, types, **one)[:, 0 if one else place]
            return jnp.sum(jnp.tanh(out)), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    assert apply(params, ids, mask, types, at=3).shape == (3, 1, config.hidden_size)
    for at in (0, 3):
        got, want = run(at, at=at), run(at)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_prefix_beside_the_tokens_is_one_among_them(kind, pooling):
    config = tiny_config(kind)
    apply, params = jpeft.functional(model_of(config, pooling=pooling))
    # As they start all logits are nearly the same.
    params = jax.tree.map(lambda x: 10 * x, params)
    ids, mask, types = batch(config)
    transform = jpeft.PrefixTuning(4, r"attention/self/(key|value)/bias$", after=1, std=0.5)
    names = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    wide = jpeft.virtual_tokens(names, length=4, first=0, after=1)
    inputs = [wide[k] for k in names]
    pooled = mask[:, :1], jnp.zeros((3, 4), mask.dtype), mask[:, 1:]
    kept = {"pooling_mask": jnp.concatenate(pooled, axis=1)} if pooling == "mean" else {}
    state = transform.init(jax.random.key(1), params, uses=jpeft.uses(apply, params, *inputs))

    def run(**idle):
        def loss(state):
            logits = jpeft.lift(apply)(transform.rewrite(params, state), *inputs, **kept, **idle)
            return jnp.sum(jnp.tanh(logits)), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(state)

    got, want = run(idle=(1, 5)), run()
    assert float(jnp.max(jnp.abs(want[0][1] - apply(params, ids, mask, types)))) > 1e-2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert float(jnp.max(jnp.abs(b))) > 1e-3
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_places_that_are_not_there():
    encoder = model_of().encoder
    ids = jnp.ones((1, 6), jnp.int32)
    for idle in ((2, 7), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=r"idle=.*positions 0 to 6"):
            encoder(ids, idle=idle)
    for at in (-1, 4):
        with pytest.raises(ValueError, match=f"at={at}: there are 4"):
            encoder(ids, at=at, idle=(0, 2))
