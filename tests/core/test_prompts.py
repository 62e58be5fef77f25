"""Prompts and prefixes: what is read where, starts, batches with room, generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.core import zoo

TABLE = r"embed/embedding$"
KEYS_AND_VALUES = r"(key|value)/bias$"
make = functools.cache(zoo.make)


def with_room(length, first=zoo.VOCABULARY, after=0):
    batch = {"input_ids": zoo.IDS}
    return jpeft.virtual_tokens(batch, length=length, first=first, after=after)["input_ids"]


@pytest.mark.parametrize("name", ["plain", "scanned", "linen", "nnx"])
def test_a_prompt_of_words_is_those_words(name):
    model = make(name)
    words = (3, 7)
    method = jpeft.PromptTuning(3, TABLE, init_from="text", tokens=(words,))
    state = method.init(jax.random.key(0), model.params)
    out = jpeft.lift(model.apply)(method.rewrite(model.params, state), with_room(3))
    text = jnp.broadcast_to(jnp.array([3, 7, 3]), (3, 3))
    want = model.apply(model.params, jnp.concatenate([text, zoo.IDS], axis=1))
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_starts():
    table = jax.random.normal(jax.random.key(0), (50, 4))
    params = {"embed": {"embedding": table}}

    def start(**options):
        state = jpeft.PromptTuning(6, TABLE, **options).init(jax.random.key(1), params)
        return state["embed/embedding"]["prompt"]

    drawn = start(vocabulary=(10, 30))
    rows = [int(jnp.argmin(jnp.sum((table - p) ** 2, axis=1))) for p in drawn]
    np.testing.assert_array_equal(drawn, table[jnp.array(rows)])
    assert len(set(rows)) == 6  # without replacement
    assert all(10 <= r < 30 for r in rows)
    uniform = start(init_from="uniform")
    assert float(jnp.abs(uniform).max()) <= 0.5
    labels = start(init_from="labels", tokens=((1, 2), (3,)))
    np.testing.assert_allclose(labels[0], (table[1] + table[2]) / 2, atol=1e-6)
    np.testing.assert_array_equal(labels[1], table[3])
    assert labels.shape == (6, 4)
    text = start(init_from="text", tokens=((4, 5),))
    np.testing.assert_array_equal(text, table[jnp.array([4, 5, 4, 5, 4, 5])])


def test_tied_output_embeddings_are_those_of_real_tokens():
    params = {"embed": {"embedding": jax.random.normal(jax.random.key(0), (7, 4))}}

    def apply(params, ids):
        x = params["embed"]["embedding"][ids]
        table = params["embed"]["embedding"]
        return x @ table.T, jnp.einsum("btd,vd->btv", x, table), x

    method = jpeft.PromptTuning(2, TABLE)
    state = method.init(jax.random.key(0), params)
    one, two, x = jpeft.lift(apply)(method.rewrite(params, state), jnp.array([[7, 8, 1]]))
    np.testing.assert_array_equal(x[0, :2], state["embed/embedding"]["prompt"])
    np.testing.assert_allclose(one, x @ params["embed"]["embedding"].T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)
    assert one.shape == (1, 3, 7)


def test_one_hot_look_ups_are_refused():
    params = {"embed": {"embedding": jnp.ones((7, 4))}}
    method = jpeft.PromptTuning(2, TABLE)
    rewritten = method.rewrite(params, method.init(jax.random.key(0), params))
    with pytest.raises(jpeft.LeafError, match="PromptTable at 'embed/embedding'"):
        jpeft.lift(lambda p, ids: jax.nn.one_hot(ids, 7) @ p["embed"]["embedding"])(
            rewritten, jnp.array([[7, 1]])
        )


def test_virtual_tokens():
    batch = {
        "input_ids": jnp.array([[5, 6, 7], [8, 9, 0]]),
        "attention_mask": jnp.array([[1, 1, 1], [1, 1, 0]]),
        "token_type_ids": jnp.array([[0, 0, 1], [0, 1, 0]]),
        "position_ids": jnp.array([[0, 1, 2], [0, 1, 2]]),
        "labels": jnp.array([[5, 6, 7], [8, 9, -100]]),
        "weight": jnp.array([1.0, 2.0]),
    }
    out = jpeft.virtual_tokens(batch, length=2, first=100, after=1)
    want = {
        "input_ids": [[5, 100, 101, 6, 7], [8, 100, 101, 9, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
        "token_type_ids": [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]],
        "position_ids": [[0, 1, 2, 3, 4]] * 2,
        "labels": [[5, -100, -100, 6, 7], [8, -100, -100, 9, -100]],
        "weight": [1.0, 2.0],
    }
    assert out.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(out[name], value)
    out = jpeft.virtual_tokens(batch, length=2, first=100, task=jnp.array([0, -1]))
    np.testing.assert_array_equal(out["input_ids"], [[100, 101, 5, 6, 7], [8, 9, 0, 0, 0]])
    np.testing.assert_array_equal(out["attention_mask"], [[1] * 5, [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(out["position_ids"], [[0, 1, 2, 3, 4]] * 2)
    bare = jpeft.virtual_tokens(
        {"input_ids": batch["input_ids"]}, length=2, task=jnp.array([0, -1])
    )
    np.testing.assert_array_equal(bare["attention_mask"], [[1] * 5, [1, 1, 1, 0, 0]])
    with pytest.raises(ValueError, match="what stands at virtual positions of 'extra'"):
        jpeft.virtual_tokens(batch | {"extra": jnp.ones((2, 3))}, length=2)


def written_out(params, ids, prefixes, length, after=0):
    """The plain model with its keys and values replaced by hand."""
    layers = params["layers"]

    def dense(name, x):
        y = x @ layers[name]["kernel"] + layers[name]["bias"]
        if f"layers/{name}/bias" in prefixes:
            value = prefixes[f"layers/{name}/bias"].values
            y = y.at[:, after : after + length].set(value)
        return y

    x = zoo.block(dense, params["embed"]["embedding"][ids])
    return x[:, -1] @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("after", [0, 1])
def test_a_prefix_is_keys_and_values(after):
    model = make("plain")
    method = jpeft.PrefixTuning(2, KEYS_AND_VALUES, after=after, std=1.0)
    state = method.init(jax.random.key(0), model.params, uses=model.uses)
    ids = with_room(2, 0, after)
    out = jpeft.lift(model.apply)(method.rewrite(model.params, state), ids)
    want = written_out(model.params, ids, state, 2, after)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    # What stands at the virtual positions of the input is not read.
    other = with_room(2, 3, after)
    again = jpeft.lift(model.apply)(method.rewrite(model.params, state), other)
    np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "scanned"])
def test_the_network_folds_into_plain_prefixes(name):
    model = make(name)
    method = jpeft.PrefixTuning(2, KEYS_AND_VALUES, mlp=7, std=1.0)
    state = method.init(jax.random.key(0), model.params, uses=model.uses)
    plain, folded = method.folded(state)
    ids = with_room(2, 0)
    one = jpeft.lift(model.apply)(method.rewrite(model.params, state), ids)
    two = jpeft.lift(model.apply)(plain.rewrite(model.params, folded), ids)
    np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)
    shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), model.params, uses=model.uses))
    assert jax.tree.structure(shapes) == jax.tree.structure(folded)


def test_layer_prompts_replace_hidden_states():
    model = make("scanned")
    method = jpeft.PrefixTuning(2, r"down/bias$", std=1.0)
    state = method.init(jax.random.key(0), model.params, uses=model.uses)
    one, two = (
        jpeft.lift(model.apply)(method.rewrite(model.params, s), with_room(2, 0))
        for s in (state, jax.tree.map(lambda x: 2 * x, state))
    )
    assert float(jnp.abs(one - two).max()) > 0.01
    last = jax.tree.map(lambda x: x.at[1].mul(2), state)  # nothing reads the last layer's
    three = jpeft.lift(model.apply)(method.rewrite(model.params, last), with_room(2, 0))
    np.testing.assert_allclose(three, one, rtol=1e-5, atol=1e-5)


# A decoder with rotary positions, fewer key and value heads than heads, and a cache.
D, H, KV, HD, STEPS = 8, 4, 2, 2, 4


def rotate(x, positions):
    angle = positions[..., None, None] * jnp.array([1.0])
    a, b = x[..., :1], x[..., 1:]
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * c - b * s, a * s + b * c], axis=-1)


def decoder_params():
    keys = jax.random.split(jax.random.key(0), 6)
    shape = {"q": (D, H * HD), "k": (D, KV * HD), "v": (D, KV * HD), "o": (H * HD, D)}
    params = {
        n: {"kernel": jax.random.normal(k, s) * 0.5}
        for (n, s), k in zip(shape.items(), keys, strict=False)
    }
    return params | {"embed": {"embedding": jax.random.normal(keys[5], (9, D))}}


def decoder(params, ids, start, cache):
    """Logits and the new cache; `start` is the first token's position."""
    b, t = ids.shape
    x = params["embed"]["embedding"][ids]
    positions = start + jnp.arange(t)
    q, k, v = (x @ params[n]["kernel"] for n in "qkv")
    q = rotate(q.reshape(b, t, H, HD), positions)
    k = rotate(k.reshape(b, t, KV, HD), positions)
    v = v.reshape(b, t, KV, HD)
    if cache is not None:
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(cache, (k, v), strict=True))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, H // KV, axis=2))
    seen = jnp.arange(k.shape[1])[None] <= positions[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.repeat(v, H // KV, axis=2))
    x = x + mixed.reshape(b, t, -1) @ params["o"]["kernel"]
    return x @ params["embed"]["embedding"].T, (k, v)


def generate(method, params, state, ids, cached):
    """Greedy tokens, from a cache or by reading everything again at every step."""
    forward = jpeft.lift(decoder)
    prefill = method.rewrite(params, state)
    decode = method.decoding().rewrite(params, state)
    logits, cache = forward(prefill, ids, 0, None)
    for _ in range(STEPS):
        new = jnp.argmax(logits[:, -1:], axis=-1)
        ids = jnp.concatenate([ids, new], axis=1)
        if cached:
            logits, cache = forward(decode, new, ids.shape[1] - 1, cache)
        else:
            logits, _ = forward(prefill, ids, 0, None)
    return ids, logits[:, -1]


DECODED = {
    "prompt": jpeft.PromptTuning(2, TABLE),
    "prefix": jpeft.PrefixTuning(2, r"^[kv]/kernel$", std=1.0),
    "prefix by a network": jpeft.PrefixTuning(2, r"^[kv]/kernel$", mlp=3, std=1.0),
    "prefix and lora": jpeft.chain(
        jpeft.LoRA(2, 4.0, r"^[qv]/kernel$"), jpeft.PrefixTuning(2, r"^[kv]/kernel$", std=1.0)
    ),
}


@pytest.mark.parametrize("name", DECODED)
def test_generation_sees_the_prompt_once(name):
    method, params = DECODED[name], decoder_params()
    state = method.init(jax.random.key(3), params)
    state = jax.tree.map(lambda x: x + 0.3, state)
    room = jpeft.virtual_tokens({"input_ids": jnp.array([[1, 2, 3]])}, length=2, first=9)
    run = jax.jit(functools.partial(generate, method), static_argnames="cached")
    ids, logits = run(params, state, room["input_ids"], cached=True)
    again, want = run(params, state, room["input_ids"], cached=False)
    np.testing.assert_array_equal(ids, again)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
    without, _ = decoder(params, ids[:, 2:], 0, None)
    assert float(jnp.abs(without[:, -1] - logits).max()) > 0.01


def test_a_prefix_has_the_width_of_the_key_heads():
    state = DECODED["prefix"].init(jax.random.key(0), decoder_params())
    assert state["k/kernel"].values.shape == (2, KV * HD)


def test_errors(unchecked):
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        jpeft.PromptTuning(0)
    with pytest.raises(ValueError, match="needs tokens="):
        jpeft.PromptTuning(2, init_from="text")
    with pytest.raises(ValueError, match="init_from is vocabulary, .* got 'words'"):
        jpeft.PromptTuning(2, init_from="words")
    model = make("plain")
    with pytest.raises(jpeft.TargetError, match="match 2 tables"):
        jpeft.PromptTuning(2, (TABLE, "head/kernel")).init(jax.random.key(0), model.params)
    with pytest.raises(jpeft.TargetError, match="ids outside the table's 11 rows"):
        jpeft.PromptTuning(2, TABLE, init_from="text", tokens=((11,),)).init(
            jax.random.key(0), model.params
        )
    with pytest.raises(jpeft.TargetError, match=r"vocabulary=\(20, 30\) is empty"):
        jpeft.PromptTuning(2, TABLE, vocabulary=(20, 30)).init(jax.random.key(0), model.params)
    with pytest.raises(ValueError, match="at least 1 position"):
        jpeft.PrefixTuning(0)
    with pytest.raises(ValueError, match="counts from the end"):
        jpeft.PrefixTuning(2, position=1)
    method = jpeft.PrefixTuning(2, KEYS_AND_VALUES)
    state = method.init(jax.random.key(0), model.params)
    with pytest.raises(jpeft.LeafError, match=r"positions 0 to 2, but there are 1 positions: put"):
        jpeft.lift(model.apply)(method.rewrite(model.params, state), zoo.IDS[:, :1])
    with pytest.raises(jpeft.TargetError, match=r"values is \(2, .*, not \(3, "):
        jpeft.PrefixTuning(3, KEYS_AND_VALUES).rewrite(model.params, state)


def test_a_prefixs_ids_are_in_any_vocabulary():
    out = jpeft.virtual_tokens({"input_ids": jnp.array([[5, 6]])}, length=3)
    np.testing.assert_array_equal(out["input_ids"], [[0, 0, 0, 5, 6]])
