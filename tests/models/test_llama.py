"""Llama and its relatives: parity with transformers, caches, packing, remat, rewritten leaves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.hf.names import Family, place
from jpeft.models.cache import token_positions
from jpeft.models.causal import causal_attention, may_read
from jpeft.models.llama import AXES, Llama, LlamaConfig
from jpeft.models.rope import Rope, inverse_frequencies
from jpeft.models.shifted import shifted_attention
from jpeft.paths import flatten, replace
from tests.models.theirs import check_axes

FAMILY = Family(stacks=("model/layers",))
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 1.5, 3.0, 6.0]}
# Bases and lengths are such that pairs of a head fall on all sides of the kinds' limits.
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 100.0},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 100.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 100.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "rope_theta": 100.0,
        **FACTORS,
    },
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 24, "sliding_window": 4}
CASES = {
    **{f"llama-{name}": ("Llama", {"rope_parameters": rope}) for name, rope in ROPES.items()},
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "gemma2": (
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **GEMMA,
            "attn_logit_softcapping": 1.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            },
        },
    ),
}
CASES["llama-dynamic"][1]["max_position_embeddings"] = 8
T = 12
IDS = jnp.asarray(np.random.default_rng(0).integers(3, 64, (3, T)), jnp.int32)
LENGTHS = np.array([T, 7, 3])[:, None]
RIGHT = (np.arange(T)[None] < LENGTHS).astype(np.int32)
RIGHT = jnp.asarray(RIGHT)
MASKS = {"right": RIGHT, "left": RIGHT[:, ::-1]}


@functools.cache
def theirs(case):
    """A random model of transformers, large enough that every part of it matters."""
    torch = pytest.importorskip("torch", reason="needs the interop extra")
    transformers = pytest.importorskip("transformers")
    name, options = CASES[case]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **options})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            noise = 0.2 * torch.randn(p.shape)
            p.copy_(p + noise if "norm" in path else noise)
    return model


def theirs_logits(model, ids, mask):
    import torch

    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        out = model(**{k: torch.tensor(np.asarray(v, np.int64)) for k, v in inputs.items()})
    return out.logits.float().numpy()


def copied(params, tensors):
    """Our tree with the tensors of theirs."""
    values = {}
    for path, leaf in flatten(params).items():
        spot = place(FAMILY, path)
        names = [spot.of_layer(i) for i in range(leaf.shape[0] if spot.stacked else 1)]
        found = [tensors[n].numpy() for n in names]
        found = [x.T if spot.transposed else x for x in found]
        values[path] = jnp.asarray(np.stack(found) if spot.stacked else found[0])
        assert values[path].shape == leaf.shape
    return replace(params, values)


@functools.cache
def pair(case, dtype=jnp.float32):
    """Ours, jitted, with theirs' weights."""
    model = theirs(case)
    config = LlamaConfig.from_hf(model.config.to_dict())
    apply, params = jpeft.functional(Llama(config, rngs=nnx.Rngs(0), dtype=dtype))
    return jax.jit(apply), copied(params, model.state_dict())


@pytest.mark.interop
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, side):
    mask = MASKS[side]
    want = theirs_logits(theirs(case), IDS, mask)
    apply, params = pair(case)
    got = apply(params, IDS, mask)
    assert got.dtype == jnp.float32
    assert np.std(want) > 0.3
    np.testing.assert_allclose(got[mask > 0], want[mask > 0], atol=1e-4)


@pytest.mark.interop
@pytest.mark.parametrize("case", ["llama-dynamic", "llama-longrope"])
def test_short_texts_have_the_short_texts_frequencies(case):
    # Another one: theirs remembers the longest text that it has seen.
    short, mask = IDS[:, :6], jnp.ones((3, 6), jnp.int32)
    want = theirs_logits(theirs.__wrapped__(case), short, mask)
    apply, params = pair(case)
    np.testing.assert_allclose(apply(params, short, mask), want, atol=1e-4)


@pytest.mark.interop
@pytest.mark.parametrize("case", ["llama-default", "gemma3"])
def test_bfloat16_is_near(case):
    want = theirs_logits(theirs(case), IDS, RIGHT)[RIGHT > 0]
    apply, params = pair(case, jnp.bfloat16)
    got = apply(params, IDS, RIGHT)
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got[RIGHT > 0] - want) / np.linalg.norm(want)
    assert error < 2e-2


@pytest.mark.interop
@pytest.mark.parametrize("case", CASES)
def test_config_survives_the_round_trip(case):
    transformers = pytest.importorskip("transformers")
    config = LlamaConfig.from_hf(theirs(case).config.to_dict())
    assert LlamaConfig.from_hf(config.to_hf()) == config
    name, _ = CASES[case]
    read = getattr(transformers, f"{name}Config")(**config.to_hf())
    assert LlamaConfig.from_hf(read.to_dict()) == config
    assert read.rope_parameters == theirs(case).config.rope_parameters


def config_of(kind="llama", **options):
    shape = {**SHAPE, "initializer_range": 0.2, "model_type": kind, "sliding_window": 4}
    return LlamaConfig.from_hf({**shape, "head_dim": 8, "sliding_window_pattern": 2, **options})


KINDS = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"attn_logit_softcapping": 3.0},
    "gemma3_text": {"rope_local_base_freq": 10.0},
}


@functools.cache
def module_of(kind, **options):
    return Llama(config_of(kind, **KINDS[kind]), rngs=nnx.Rngs(0), **options)


@functools.cache
def model_of(kind, **options):
    apply, params = jpeft.functional(module_of(kind, **options))
    return jax.jit(apply), params


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_with_a_cache_equal_one_pass(kind, side):
    apply, params = model_of(kind)
    prompt = MASKS[side]
    mask = jnp.concatenate([prompt, jnp.ones((3, 4), jnp.int32)], axis=1)
    ids = jnp.concatenate([IDS, IDS[:, :4]], axis=1)
    want = apply(params, ids, mask)
    cache = module_of(kind).empty_cache(3, T + 6)
    got, cache = apply(params, ids[:, :T], prompt, cache=cache)
    np.testing.assert_allclose(got[prompt > 0], want[:, :T][prompt > 0], atol=2e-5)
    for i in range(T, T + 4):
        got, cache = apply(params, ids[:, i : i + 1], mask[:, i : i + 1], cache=cache)
        np.testing.assert_allclose(got[:, 0], want[:, i], atol=2e-5)
    assert int(cache.length) == T + 4
    np.testing.assert_array_equal(np.max(cache.positions, axis=1), mask.sum(1) - 1)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_packed_texts_equal_rows_of_their_own(kind):
    apply, params = model_of(kind)
    a, b = IDS[:1, :7], IDS[1:2, :5]
    packed = jnp.concatenate([a, b], axis=1)
    segments = jnp.array([[1] * 7 + [2] * 5])
    positions = jnp.array([[*range(7), *range(5)]])
    want = np.concatenate([apply(params, a), apply(params, b)], axis=1)
    got = apply(params, packed, segment_ids=segments)
    np.testing.assert_allclose(got, want, atol=2e-5)
    same = apply(params, packed, segment_ids=segments, position_ids=positions)
    np.testing.assert_array_equal(got, same)
    assert not np.allclose(apply(params, packed), want, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"remat": jax.checkpoint_policies.dots_saveable, "unroll": 2}),
        ("gemma3_text", {"remat": True}),
    ],
)
def test_how_it_runs_changes_no_result(kind, options):
    def run(apply, params):
        def loss(params):
            return jnp.mean(apply(params, IDS, RIGHT) ** 2)

        return jax.jit(jax.value_and_grad(loss))(params)

    got, want = run(*model_of(kind, **options)), run(*model_of(kind))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert float(jnp.abs(b).max()) > 0
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_hidden_states_and_head_make_the_logits(kind):
    model = module_of(kind)
    hidden = model(IDS, RIGHT, hidden=True)
    assert hidden.shape == (3, T, 32)
    np.testing.assert_allclose(model.head(hidden), model(IDS, RIGHT), atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_adapters_of_every_kernel_and_of_the_tied_table(kind):
    apply, params = model_of(kind)
    method = jpeft.LoRA(rank=3, targets=r"kernel$|embedding$")
    state = method.init(jax.random.key(0), params, uses=jpeft.uses(apply, params, IDS))
    assert len(state) == (9 if kind == "llama" else 8)
    state = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), state)
    rewritten = method.rewrite(params, state)
    got = jpeft.lift(apply)(rewritten, IDS, RIGHT)
    assert not np.allclose(got, apply(params, IDS, RIGHT), atol=1e-2)
    want = apply(jpeft.merge(rewritten), IDS, RIGHT)
    np.testing.assert_allclose(got, want, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "method",
    [jpeft.PrefixTuning(3, r"(k|v)_proj/kernel$"), jpeft.PromptTuning(3, targets=r"embedding$")],
    ids=["prefix", "prompt"],
)
def test_virtual_tokens_with_and_without_a_cache(kind, method):
    apply, params = model_of(kind)
    uses = jpeft.uses(apply, params, IDS)
    state = method.init(jax.random.key(0), params, uses=uses)
    state = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape), state)
    batch = {"input_ids": IDS, "attention_mask": MASKS["left"]}
    first = 64 if isinstance(method, jpeft.PromptTuning) else 0
    batch = jpeft.virtual_tokens(batch, length=3, first=first)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    run = jpeft.lift(apply)
    want = run(method.rewrite(params, state), ids, mask)
    plain = apply(params, IDS, MASKS["left"])
    assert not np.allclose(want[:, -1], plain[:, -1], atol=1e-2)
    cache = module_of(kind).empty_cache(3, T + 3)
    _, cache = run(method.rewrite(params, state), ids[:, :-1], mask[:, :-1], cache=cache)
    later = method.decoding().rewrite(params, state)
    got, cache = run(later, ids[:, -1:], mask[:, -1:], cache=cache)
    np.testing.assert_allclose(got[:, 0], want[:, -1], atol=2e-5)


def test_every_parameter_has_axes():
    options = {"attention_bias": True, "mlp_bias": True}
    models = [
        Llama(config_of(kind, **{**options, **more}), rngs=nnx.Rngs(0))
        for kind, more in KINDS.items()
    ]
    check_axes(AXES, *(jpeft.functional(m).params for m in models))


@pytest.mark.parametrize("window", [None, 3])
def test_shifted_attention_is_attention_within_its_groups(window):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(x, (3, T, h, 8)) for x, h in zip(keys, (8, 4, 4), strict=True))
    positions = token_positions(MASKS["left"])
    segments = (jnp.arange(T)[None] >= jnp.array([[5], [12], [0]])).astype(jnp.int32)
    options = {"scale": 0.3, "softcap": 4.0}
    got = shifted_attention(q, k, v, positions, segments, group=4, window=window, **options)
    for half, shift in enumerate((0, 2)):
        own = 100 * segments + (jnp.arange(T) + shift)[None] // 4
        keep = may_read(positions, positions, window=window, query_segments=own, key_segments=own)
        heads = [jnp.split(x, 2, axis=2)[half] for x in (q, k, v)]
        want = causal_attention(*heads, keep, **options)
        found = jnp.split(got, 2, axis=2)[half]
        real = np.asarray(positions) >= 0
        np.testing.assert_allclose(found[real], want[real], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_model_with_shifted_attention(kind):
    apply, params = model_of(kind, shifted=4)
    whole, _ = model_of(kind)
    got = apply(params, IDS)
    assert not np.allclose(got, whole(params, IDS), atol=1e-2)
    # No token reads a later one, though the last groups come round to the start.
    later = IDS.at[:, -2:].set(5)
    np.testing.assert_allclose(apply(params, later)[:, :-2], got[:, :-2], atol=1e-6)
    cached, _ = apply(params, IDS, cache=module_of(kind).empty_cache(3, T))
    np.testing.assert_allclose(cached, whole(params, IDS), atol=2e-5)
    with pytest.raises(ValueError, match="rows of 11 tokens"):
        apply(params, IDS[:, :11])


def test_the_text_model_of_a_gemma_3_with_images():
    scaling = {"factor": 8.0, "rope_type": "linear"}
    text = {"hidden_size": 2560, "num_hidden_layers": 7, "rope_scaling": scaling}
    text |= {"model_type": "gemma3_text", "sliding_window": 1024}
    config = LlamaConfig.from_hf({"model_type": "gemma3", "text_config": text})
    assert config.rope == Rope(1e6, "linear", 8.0)
    assert config.local_rope == Rope(1e4)
    assert config.kinds == ("sliding_attention",) * 5 + ("full_attention", "sliding_attention")
    assert (config.vocab_size, config.width, config.kv_heads) == (262208, 256, 4)
    assert config.tie_word_embeddings


def test_older_files_options():
    plain = {"model_type": "llama", "rope_theta": 5e5, "max_position_embeddings": 64}
    config = LlamaConfig.from_hf({**plain, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert config.rope == Rope(5e5, "dynamic", 2.0, 64)
    # A Qwen 2 without use_sliding_window has no window, whatever sliding_window is.
    assert LlamaConfig.from_hf({"model_type": "qwen2", "sliding_window": 4}).sliding_window is None
    assert LlamaConfig.from_hf({"model_type": "gemma2"}).final_logit_softcapping == 30
    list_of_stops = LlamaConfig.from_hf({**plain, "eos_token_id": [3, 4]})
    assert hash(list_of_stops) == hash(dataclasses.replace(list_of_stops))
    assert list_of_stops.to_hf()["eos_token_id"] == [3, 4]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hidden_act": "unheard"}, "hidden_act 'unheard'"),
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 26}, "chunked_attention"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"is_causal": False}, "is_causal=False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "unheard"}}, "rope_type 'unheard'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 heads do not share 3"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "does not split into 4 heads"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 32}, "layer_types"),
    ],
)
def test_what_is_not_supported_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        LlamaConfig.from_hf(options)


def test_errors_of_calls():
    model = Llama(config_of(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="segment_ids or cache"):
        model(IDS, segment_ids=jnp.ones_like(IDS), cache=model.empty_cache(3, T))
    rope = Rope.from_hf({"rope_type": "longrope", **FACTORS}, theta=1e4, longest=64)
    with pytest.raises(ValueError, match="have 5 numbers"):
        inverse_frequencies(rope, 10)
