"""A real trained Llama in llama2.c's format: its story, a cache that pays, damage, fine-tuning."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.models.llama2c import Vocabulary, load_llama2c
from jpeft.models.loss import next_token_loss


@pytest.fixture(scope="module")
def folder(data):
    return data / "weights" / "stories260K"


@pytest.fixture(scope="module")
def story(folder):
    """The model, its function and parameters, and its vocabulary."""
    model = load_llama2c(folder / "stories260K.bin")
    vocabulary = Vocabulary.read(folder / "tok512_stories.bin", model.config.vocab_size)
    return model, *jpeft.functional(model), vocabulary


def told(story, params, n, **options):
    model, apply, _, vocabulary = story
    ids = jnp.array([vocabulary.encode("")], jnp.int32)
    cache = model.empty_cache(1, 1 + n)
    out = jpeft.generate(apply, params, ids, cache=cache, new_tokens=n, stop=(1,), **options)
    return out.tokens[0]


def test_greedy_is_the_published_story(story, folder):
    page = (folder / "stories260K.md").read_text()
    want = page.split("-t 0.0\n")[1].split("```")[0].strip()
    text = story[3].decode(np.asarray(told(story, story[2], 256)))
    assert text.startswith("Once upon a time, there was a little girl named Lily.")
    assert text.strip() == want


def test_text_and_ids_are_each_others(story):
    for text in ("Once upon a time", "Ünïcode — 日本\nand lines"):
        ids = story[3].encode(text)
        assert ids[0] == 1
        assert story[3].decode(ids) == text


def test_lora_on_another_style_lowers_its_loss_and_changes_the_story(story):
    model, apply, params, vocabulary = story
    text = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer "
    text += "the slings and arrows of outrageous fortune, or to take arms against a sea of troubles"
    ids = jnp.array([vocabulary.encode(text)], jnp.int32)
    method = jpeft.LoRA(8, 16.0, r"(q|v|up|down)_proj/kernel$")
    uses = jpeft.uses(apply, params, ids)
    state = method.init(jax.random.key(0), params, uses=uses)
    forward = jpeft.lift(apply)

    def loss(state):
        hidden = forward(method.rewrite(params, state), ids, hidden=True)
        total, n = next_token_loss(hidden, model.head, ids)
        return total / n

    optimiser = optax.adam(1e-2)
    moments = optimiser.init(state)

    @jax.jit
    def step(state, moments):
        value, grads = jax.value_and_grad(loss)(state)
        updates, moments = optimiser.update(grads, moments)
        return optax.apply_updates(state, updates), moments, value

    losses = []
    for _ in range(60):
        state, moments, value = step(state, moments)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    before = told(story, params, 40)
    after = told(story, method.rewrite(params, state), 40)
    assert not np.array_equal(before, after)
    merged = told(story, jpeft.merge(method.rewrite(params, state)), 40)
    np.testing.assert_array_equal(after, merged)


HEADER = (8, 12, 1, 2, 1, 10, 16)
SIZE = 10 * 8 + (2 * 8 + 2 * 64 + 2 * 8 * 4 + 3 * 8 * 12) + 8 + 16 * 4


def write(path, header=HEADER, size=SIZE):
    path.write_bytes(struct.pack("<7i", *header) + np.ones(size, np.float32).tobytes())
    return path


def test_a_small_file_is_read(tmp_path):
    model = load_llama2c(write(tmp_path / "m.bin"), remat=True)
    assert model.model.remat
    assert model(jnp.array([[1, 2, 3]])).shape == (1, 3, 10)
    own = load_llama2c(write(tmp_path / "n.bin", (8, 12, 1, 2, 1, -10, 16), SIZE + 80))
    assert not own.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": SIZE - 1}, "it is truncated"),
        ({"header": (8, 12, 1, 3, 1, 10, 16)}, "its header has"),
        ({"header": (0, 12, 1, 2, 1, 10, 16)}, "its header has"),
        ({"header": (2**30, 2**30, 2**30, 2, 1, 10, 16)}, "its header tells of"),
    ],
)
def test_damage(change, message, tmp_path):
    with pytest.raises(jpeft.CheckpointError, match=message):
        load_llama2c(write(tmp_path / "m.bin", **change))


def test_no_model_at_all(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"short")
    with pytest.raises(jpeft.CheckpointError, match="it has 5 bytes"):
        load_llama2c(tmp_path / "m.bin")
    with pytest.raises(jpeft.CheckpointError, match="no such file"):
        load_llama2c(tmp_path / "none.bin")
    with pytest.raises(jpeft.CheckpointError, match="holds 0 whole pieces, not 5"):
        Vocabulary.read(tmp_path / "m.bin", 5)
