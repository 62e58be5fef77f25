"""Generation: transformers' tokens, one program, every method, sampling's rules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft import left_padded
from jpeft.hf import load_model
from jpeft.models.llama import Llama, LlamaConfig
from tests.models.theirs import large

KEY = jax.random.key(0)
PROMPTS = [[5, 9, 11, 3, 8], [7, 2], [30, 31, 32]]
STOP, PAD = 13, 63


def theirs(kind, **options):
    """A random model of transformers, loud enough that its choices are no ties."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": STOP, "pad_token_id": PAD}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **small)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, **{"max_position_embeddings": 64, **small, **options},
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request, tmp_path_factory):
    """The same model, theirs and ours."""
    model = theirs(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    ours, report = load_model(folder)
    assert report.new == ()
    return model, ours, jpeft.functional(ours)


def their_tokens(model, **options):
    import torch

    ids, mask = left_padded(PROMPTS, PAD)
    with torch.no_grad():
        out = model.generate(
            torch.tensor(ids.astype(np.int64)),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            **options,
        )
    return out[:, ids.shape[1] :].numpy()


def our_tokens(model, apply, params, how=jpeft.generate, **options):
    ids, mask = left_padded(PROMPTS, PAD)
    n = options["new_tokens"]
    cache = model.empty_cache(len(PROMPTS), ids.shape[1] + n)
    return how(apply, params, ids, mask, cache=cache, pad=PAD, **options)


def same(got, want):
    np.testing.assert_array_equal(np.asarray(got)[:, : want.shape[1]], want)
    assert (np.asarray(got)[:, want.shape[1] :] == PAD).all()


@pytest.mark.interop
def test_greedy_is_theirs_token_for_token(pair):
    model, ours, (apply, params) = pair
    want = their_tokens(model, max_new_tokens=20, do_sample=False)
    got = our_tokens(ours, apply, params, new_tokens=20, stop=(STOP,))
    same(got.tokens, want)
    assert len({tuple(row) for row in want}) > 1
    ends = [int(np.argmax(row == STOP)) + 1 if STOP in row else len(row) for row in want]
    np.testing.assert_array_equal(got.lengths, ends)


@pytest.mark.interop
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("penalty", [0.8, 1.0, 2.0])
def test_beam_search_is_theirs_token_for_token(pair, penalty, early):
    model, ours, (apply, params) = pair
    options = {"num_beams": 4, "length_penalty": penalty, "early_stopping": early}
    want = their_tokens(model, max_new_tokens=12, do_sample=False, **options)
    got = our_tokens(
        *(ours, apply, params, jpeft.beam_search),
        new_tokens=12, beams=4, length_penalty=penalty, early=early, stop=(STOP,),
    )  # fmt: skip
    same(got.tokens, want)
    greedy = our_tokens(ours, apply, params, new_tokens=12, stop=(STOP,))
    assert not np.array_equal(greedy.tokens, got.tokens)


@pytest.mark.interop
def test_a_stream_is_the_same_tokens(pair):
    _, ours, (apply, params) = pair
    sampling = jpeft.Sampling(0.9, top_k=20, top_p=0.9)
    options = {"new_tokens": 9, "sampling": sampling, "key": KEY, "stop": (STOP,)}
    whole = our_tokens(ours, apply, params, **options).tokens
    pieces = np.stack(list(our_tokens(ours, apply, params, jpeft.stream, **options)), axis=1)
    np.testing.assert_array_equal(whole[:, : pieces.shape[1]], pieces)


@pytest.mark.interop
def test_rows_that_have_ended_count_where_frequencies_depend_on_the_length(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    model = theirs("llama", max_position_embeddings=8, rope_parameters=rope)
    model.save_pretrained(tmp_path)
    ours, _ = load_model(tmp_path)
    stop = tuple(range(40, 50))
    want = their_tokens(model, max_new_tokens=12, do_sample=False, eos_token_id=list(stop))
    options = {"new_tokens": 12, "stop": stop}
    got = our_tokens(ours, *jpeft.functional(ours), **options)
    same(got.tokens, want)
    pieces = list(our_tokens(ours, *jpeft.functional(ours), jpeft.stream, **options))
    same(np.stack(pieces, axis=1), want)


@pytest.mark.interop
def test_one_compilation_for_prompts_of_many_lengths(pair):
    _, ours, (apply, params) = pair
    traced = []

    def counted(*args, **kwargs):
        traced.append(1)
        return apply(*args, **kwargs)

    for prompts in (PROMPTS, [[4], [5, 6], [7, 8, 9, 10]]):
        ids, mask = left_padded(prompts, PAD, 8)
        cache = ours.empty_cache(3, 12)
        jpeft.generate(counted, params, ids, mask, cache=cache, new_tokens=4)
    assert len(traced) == 2  # the prompt, and a step


@pytest.mark.interop
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_a_rewritten_tree_generates_what_no_cache_would(pair, method):
    _, ours, (apply, params) = pair
    gpt2 = type(ours).__name__ == "Gpt2"
    table = "wte/embedding$" if gpt2 else "embed_tokens/embedding$"
    keys = "c_attn/bias$" if gpt2 else "(k|v)_proj/kernel$"
    kernels = r"(c_attn|c_fc)/kernel$" if gpt2 else r"(q_proj|up_proj)/kernel$"
    transform = {
        "lora": jpeft.LoRA(2, 8.0, kernels),
        "prompt": jpeft.PromptTuning(3, table, "uniform"),
        "prefix": jpeft.PrefixTuning(3, keys, std=2.0),
    }[method]
    uses = jpeft.uses(apply, params, jnp.zeros((1, 4), jnp.int32))
    state = transform.init(KEY, params, uses=uses)
    state = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), state)
    tree = transform.rewrite(params, state)
    steps = transform.decoding().rewrite(params, state)
    room = {"lora": 0}.get(method, 3)
    ids, mask = left_padded(PROMPTS, PAD)
    ids, mask = jnp.asarray(ids), jnp.asarray(mask)
    if room:
        first = ours.config.vocab_size if method == "prompt" else 1
        batch = {"input_ids": ids, "attention_mask": mask}
        batch = jpeft.virtual_tokens(batch, length=room, first=first)
        ids, mask = batch["input_ids"], batch["attention_mask"]
    n = 6
    cache = ours.empty_cache(3, ids.shape[1] + n)
    got = jpeft.generate(
        apply, tree, ids, mask, cache=cache, new_tokens=n, decode_params=steps
    ).tokens
    plain = our_tokens(ours, apply, params, new_tokens=n).tokens
    assert not np.array_equal(got, plain)
    np.testing.assert_array_equal(got, greedy_without_cache(apply, tree, ids, mask, n))


OWN = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
QV = r"[qv]_proj/kernel$"
METHODS = {
    "rslora": jpeft.LoRA(2, 8.0, QV, rslora=True),
    "dora": jpeft.LoRA(2, 8.0, QV, dora=True),
    "dylora": jpeft.DyLoRA(2, 8.0, QV),
    "tied": jpeft.LoRA(2, 8.0, "embed_tokens/embedding$"),
    "adapter": jpeft.pfeiffer(4, r"down_proj/kernel$"),
    "parallel": jpeft.parallel_adapter(4, r"down_proj/kernel$"),
    "ia3": jpeft.IA3(r"[kv]_proj/kernel$", r"down_proj/kernel$"),
    "norms": jpeft.Train(r"norm/scale$"),
    "subspace": jpeft.Subspace(20),
    "chain": jpeft.chain(
        jpeft.LoRA(2, 8.0, QV), jpeft.PromptTuning(3, "embed_tokens/embedding$", "uniform")
    ),
}


def trained(transform, apply, params, seed=0):
    """A state that is far from its start."""
    uses = jpeft.uses(apply, params, jnp.zeros((1, 4), jnp.int32))
    state = transform.init(KEY, params, uses=uses)
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(state))))
    return jax.tree.map(lambda x: x + 0.4 * jax.random.normal(next(keys), x.shape), state)


@functools.cache
def own(tied=False):
    model = Llama(dataclasses.replace(OWN, tie_word_embeddings=tied), rngs=nnx.Rngs(0))
    apply, params = jpeft.functional(model)
    return model, apply, large(params, scale=0.3)


def greedy_without_cache(apply, tree, ids, mask, n):
    forward = jax.jit(jpeft.lift(lambda p, i, m: apply(p, i, m)))
    out = []
    for _ in range(n):
        out.append(jnp.argmax(forward(tree, ids, mask)[:, -1], -1).astype(jnp.int32))
        ids = jnp.concatenate([ids, out[-1][:, None]], axis=1)
        mask = jnp.concatenate([mask, jnp.ones_like(mask[:, :1])], axis=1)
    return jnp.stack(out, axis=1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_generates_what_no_cache_would(name):
    transform = METHODS[name]
    model, apply, params = own(name == "tied")
    state = trained(transform, apply, params)
    tree, steps = (t.rewrite(params, state) for t in (transform, transform.decoding()))
    batch = dict(
        zip(("input_ids", "attention_mask"), map(jnp.asarray, left_padded(PROMPTS)), strict=True)
    )
    room = jpeft.room(transform)
    if room:
        batch = jpeft.virtual_tokens(batch, length=room, first=OWN.vocab_size)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    options = {"cache": model.empty_cache(3, ids.shape[1] + 5), "new_tokens": 5}
    got = jpeft.generate(apply, tree, ids, mask, decode_params=steps, **options).tokens
    np.testing.assert_array_equal(got, greedy_without_cache(apply, tree, ids, mask, 5))
    assert not np.array_equal(got, jpeft.generate(apply, params, ids, mask, **options).tokens)


@pytest.mark.parametrize("name", ["rslora", "ia3"])
def test_each_row_of_a_batch_by_its_own_task(name):
    transform = METHODS[name]
    model, apply, params = own()
    states = [trained(transform, apply, params, seed) for seed in (1, 2)]
    ids, mask = map(jnp.asarray, left_padded(PROMPTS))
    tree = transform.rewrite(params, jpeft.stack(states), task=jnp.array([1, -1, 0]))
    options = {"cache": model.empty_cache(3, ids.shape[1] + 6), "new_tokens": 6}
    got = jpeft.generate(apply, tree, ids, mask, **options).tokens
    trees = [transform.rewrite(params, states[1]), params, transform.rewrite(params, states[0])]
    for row, alone in enumerate(trees):
        want = jpeft.generate(apply, alone, ids, mask, **options).tokens
        np.testing.assert_array_equal(got[row], want[row])
    assert len({tuple(np.asarray(r)) for r in got}) == 3


def test_half_precision():
    _, apply, params = own()
    half = Llama(OWN, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    run = jpeft.functional(half).apply
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ids, mask = map(jnp.asarray, left_padded(PROMPTS))
    cache = half.empty_cache(3, ids.shape[1] + 6)
    assert cache.keys.dtype == jnp.bfloat16
    got = jpeft.generate(run, low, ids, mask, cache=cache, new_tokens=6).tokens
    assert len({tuple(np.asarray(r)) for r in got}) == 3
    # Every choice is, in fp32, one whose logit is within rounding of the best.
    ids, mask = (
        jnp.concatenate([ids, got], axis=1),
        jnp.pad(mask, ((0, 0), (0, 6)), constant_values=1),
    )
    logits = apply(params, ids, mask)[:, -7:-1]
    chosen = jnp.take_along_axis(logits, got[..., None], axis=2)[..., 0]
    assert (logits.max(-1) - chosen).max() < 0.15 * float(logits.std())


@pytest.mark.interop
@pytest.mark.parametrize(("k", "p"), [(5, None), (None, 0.6), (8, 0.5), (1, None), (None, 1e-6)])
def test_what_top_k_and_top_p_allow_is_what_theirs_do(k, p):
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    want = torch.tensor(logits)
    if k is not None:
        want = warpers.TopKLogitsWarper(k)(None, want)
    if p is not None:
        want = warpers.TopPLogitsWarper(p)(None, want)
    got = jpeft.Sampling(1.0, k, p).allowed(jnp.asarray(logits))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want.numpy()))


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    drawn = jpeft.Sampling(1.0, top_k=3)(jnp.repeat(logits, 20_000, 0), KEY)
    share = np.bincount(drawn, minlength=4) / 20_000
    np.testing.assert_allclose(share, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.015)


def nothing(params, ids, mask, *, cache, last):
    raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new_tokens": 0}, "new_tokens is at least 1"),
        ({"new_tokens": 9}, "the cache has room for 12 tokens, the prompt .* are 5 \\+ 9"),
        ({"sampling": jpeft.Sampling(0.7)}, "give a key"),
    ],
)
def test_what_cannot_be_generated_is_told(change, message):
    from jpeft.models.cache import empty_cache

    ids, mask = left_padded(PROMPTS, PAD)
    options = {"cache": empty_cache(1, 3, 12, 1, 2), "new_tokens": 4} | change
    with pytest.raises(ValueError, match=message):
        jpeft.generate(nothing, {}, ids, mask, **options)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}])
def test_sampling_that_makes_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        jpeft.Sampling(**wrong)


def test_prompts_that_do_not_fit():
    with pytest.raises(ValueError, match="1 to 3 tokens"):
        left_padded([[1, 2, 3, 4]], length=3)
    with pytest.raises(ValueError, match="1 to 2 tokens"):
        left_padded([[1, 2], []])
