"""Language models from Hugging Face's directories and back, and PEFT's adapters on them."""

import functools
import json
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.hf import CheckpointError, load_adapter, load_model, save_adapter, save_model
from jpeft.hf.models import KINDS, read_kind
from jpeft.models.bert import BertConfig
from jpeft.models.llama import Llama, LlamaConfig
from jpeft.paths import flatten
from tests.models import test_llama
from tests.models.theirs import enlarge

KEY = jax.random.key(0)
IDS = jnp.asarray(np.random.default_rng(0).integers(3, 60, (2, 9)), jnp.int32)
LLAMAS = ("llama-llama3", "mistral", "qwen2", "qwen2-tied", "qwen3", "gemma2", "gemma3")
OTHERS = ("gpt2", "t5", "t5-v1.1")


@functools.cache
def theirs(kind):
    """A random model of transformers."""
    if kind in LLAMAS:
        return test_llama.theirs(kind)
    pytest.importorskip("torch", reason="needs the interop extra")
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=32
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        new = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        config = transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            decoder_start_token_id=0, **(new if kind == "t5-v1.1" else {}),
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    enlarge(model, 0.2)
    return model.eval()


def their_logits(model):
    import torch

    ids = torch.tensor(np.asarray(IDS, np.int64))
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits.float().numpy()


def our_logits(apply, params, ids=IDS):
    more = {"decoder_input_ids": ids[:, ::-1]} if "decoder" in params else {}
    return jax.jit(lambda p: jpeft.lift(apply)(p, ids, **more))(params)


@pytest.mark.interop
@pytest.mark.parametrize("kind", [*OTHERS, *LLAMAS])
def test_there_and_back(kind, tmp_path):
    model = theirs(kind)
    model.save_pretrained(tmp_path / "theirs")
    ours, report = load_model(tmp_path / "theirs")
    assert report.new == ()
    apply, params = jpeft.functional(ours)
    want = their_logits(model)
    np.testing.assert_allclose(our_logits(apply, params), want, atol=1e-4)
    save_model(ours, tmp_path / "ours")
    one = load_file(tmp_path / "theirs" / "model.safetensors")
    two = load_file(tmp_path / "ours" / "model.safetensors")
    for name, value in two.items():
        # transformers 5 ties v1.1's head, and does not write it.
        source = "shared.weight" if kind == "t5-v1.1" and name == "lm_head.weight" else name
        np.testing.assert_array_equal(value, one[source])
    again = type(model).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    np.testing.assert_allclose(their_logits(again), want, atol=1e-5)


TARGETS = {
    "gpt2": (["c_attn", "c_fc"], r"(c_attn|c_fc)/kernel$"),
    "llama-llama3": (["q_proj", "v_proj", "down_proj"], r"(q|v|down)_proj/kernel$"),
    "t5": (["q", "v", "wo"], r"/(q|v|wo)/kernel$"),
}


@pytest.mark.interop
@pytest.mark.parametrize("kind", TARGETS)
def test_a_lora_of_theirs_and_one_of_ours(kind, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    theirs(kind).save_pretrained(tmp_path / "base")
    base = type(theirs(kind)).from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    family = read_kind(tmp_path / "base")[0].family
    ours, _ = load_model(tmp_path / "base")
    apply, params = jpeft.functional(ours)
    plain = np.asarray(our_logits(apply, params))
    more = {"decoder_input_ids": IDS} if "decoder" in params else {}
    uses = jpeft.uses(apply, params, IDS, **more)
    names, pattern = TARGETS[kind]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, fan_in_fan_out=kind == "gpt2")
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    want = their_logits(model.eval())
    transform, state = load_adapter(tmp_path / "adapter", params, family, uses=uses)
    tree = transform.rewrite(params, state)
    np.testing.assert_allclose(our_logits(apply, tree), want, atol=1e-4)
    np.testing.assert_allclose(our_logits(apply, jpeft.merge(tree)), want, atol=1e-4)
    assert np.abs(want - plain).max() > 0.1

    method = jpeft.LoRA(2, 4.0, pattern)
    state = method.init(KEY, params, uses=uses)
    state = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(KEY, x.shape), state)
    assert save_adapter(tmp_path / "mine", method, state, params, family) == "LORA"
    fresh = type(theirs(kind)).from_pretrained(tmp_path / "base", attn_implementation="eager")
    read = peft.PeftModel.from_pretrained(fresh, tmp_path / "mine").eval()
    got = np.asarray(our_logits(apply, method.rewrite(params, state)))
    np.testing.assert_allclose(got, their_logits(read), atol=1e-4)
    assert np.abs(got - plain).max() > 0.1


@pytest.mark.interop
def test_t5_generates_what_theirs_does(tmp_path):
    torch = pytest.importorskip("torch")
    model = theirs("t5")
    model.save_pretrained(tmp_path)
    ours, _ = load_model(tmp_path)
    apply, params = jpeft.functional(ours)
    encoded = apply(params, IDS)

    def step(params, ids, mask, *, cache, last, encoded):
        return apply(params, None, None, ids, mask, encoded=encoded, cache=cache, last=last)

    first = jnp.zeros((2, 1), jnp.int32)
    options = {"new_tokens": 8, "stop": (1,), "extra": {"encoded": encoded}}
    got = jpeft.generate(step, params, first, cache=ours.empty_cache(2, 9), **options)
    ids = torch.tensor(np.asarray(IDS, np.int64))
    want = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)[:, 1:].numpy()
    np.testing.assert_array_equal(got.tokens[:, : want.shape[1]], want)
    best = jpeft.beam_search(step, params, first, cache=ours.empty_cache(2, 9), beams=3, **options)
    want = model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=False)
    want = want[:, 1:].numpy()
    np.testing.assert_array_equal(best.tokens[:, : want.shape[1]], want)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama's directory."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("tiny")
    save_model(Llama(config, rngs=nnx.Rngs(0)), out)
    return out


def copied(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_shards_are_written_read_and_swept_up(folder, tmp_path):
    model, _ = load_model(folder)
    save_model(model, tmp_path, shard_bytes=4000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    again, _ = load_model(tmp_path)
    np.testing.assert_array_equal(again(IDS), model(IDS))
    save_model(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("over", ["explicit", "auto", "layers"])
def test_tensors_go_to_their_devices(folder, over, monkeypatch):
    if over != "auto":  # layers one by one, as where they are large
        monkeypatch.setattr("jpeft.hf.params.WHOLE", 0)
    kind = jax.sharding.AxisType.Explicit if over == "explicit" else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("layers", "x"), axis_types=(kind, kind))

    def sharding(path, leaf):
        at = next((i for i, n in reversed(list(enumerate(leaf.shape))) if n % 4 == 0), None)
        spec = [None] * len(leaf.shape)
        if over == "layers" and "/layers/" in path:
            spec[0] = "layers"
        if at is not None:
            spec[at] = "x"
        return NamedSharding(mesh, PartitionSpec(*spec))

    model, _ = load_model(folder, sharding=sharding)
    want, _ = load_model(folder)
    leaves = flatten(jpeft.functional(model).params)
    for path, leaf in flatten(jpeft.functional(want).params).items():
        assert leaves[path].sharding.is_equivalent_to(sharding(path, leaf), leaf.ndim), path
        np.testing.assert_array_equal(leaves[path], leaf)
    kernel = leaves["model/layers/self_attn/q_proj/kernel"]
    parts = 8 if over == "layers" else 4
    assert kernel.addressable_shards[0].data.size * parts == kernel.size


def test_types_are_cast_while_reading(folder):
    model, _ = load_model(folder, dtype=jnp.bfloat16)
    params = jpeft.functional(model).params
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    mixed, _ = load_model(folder, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(jpeft.functional(mixed).params)} == {
        jnp.dtype(jnp.float32)
    }


def test_attention_is_chosen_while_loading(folder, tmp_path):
    model, _ = load_model(folder, dtype=jnp.bfloat16, implementation="xla")
    assert model.model.implementation == "xla"
    t5 = KINDS["t5"]
    config = t5.config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    save_model(t5.model(config, rngs=nnx.Rngs(0)), tmp_path)
    with pytest.raises(ValueError, match="T5's attention"):
        load_model(tmp_path, implementation="cudnn")


def test_the_host_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("jpeft.hf.params.WHOLE", 0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=20_000, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    save_model(Llama(config, rngs=nnx.Rngs(0)), tmp_path)
    largest = 20_000 * 64 * 4
    assert (tmp_path / "model.safetensors").stat().st_size > 11 * largest
    load_model(tmp_path)  # compiles: what Python allocates for that is no tensor
    tracemalloc.start()
    try:
        load_model(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest <= peak < 2 * largest


def edited(change):
    def edit(folder):
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path)

    return edit


def option(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def terabytes(folder):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    raw = struct.pack("<Q", len(header)) + header.encode()
    (folder / "model.safetensors").write_bytes(raw + b"\0" * 64)


NORM = "model.norm.weight"
DAMAGE = {
    "another type": (option(model_type="mamba"), "'mamba': there are gpt2, t5, llama"),
    "an option": (option(quantization_config={"bits": 4}), "quantization_config"),
    "an unknown option": (
        option(partial_rotary_factor=0.5),
        "unknown option partial_rotary_factor=0.5",
    ),
    "a misspelt option": (
        option(num_attention_head=2),
        "num_attention_head=2: did you mean 'num_attention_heads'",
    ),
    "integers": (
        edited(lambda t: {**t, NORM: t[NORM].astype(np.int32)}),
        f"mistyped: {NORM} is I32, not one of F64, F32",
    ),
    "a shape": (
        edited(lambda t: {**t, NORM: t[NORM][:8]}),
        rf"misshapen: {NORM} is \(8,\), not \(16,\)",
    ),
    "one missing": (edited(lambda t: {k: v for k, v in t.items() if k != NORM}), "missing: "),
    "one more": (edited(lambda t: {**t, "model.extra": t[NORM]}), "unexpected: model.extra"),
    "terabytes": (terabytes, "is no complete safetensors file"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_told(what, folder, tmp_path):
    damage, message = DAMAGE[what]
    damage(copied(folder, tmp_path))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_flipped_or_cut_header_is_an_error_or_another_model(data, folder, tmp_path):
    path = copied(folder, tmp_path) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        found = load_model(tmp_path)[0]
    except CheckpointError:
        return  # and no other exception
    shapes = [
        {path: leaf.shape for path, leaf in flatten(jpeft.functional(model).params).items()}
        for model in (found, load_model(folder)[0])
    ]
    assert shapes[0] == shapes[1]


def test_options_that_are_off_or_of_no_bearing_pass(folder, tmp_path):
    more = {"use_cache": True, "_commit_hash": "abc", "some_new_option": None, "torch_dtype": "x"}
    option(**more)(copied(folder, tmp_path))
    np.testing.assert_array_equal(load_model(tmp_path)[0](IDS), load_model(folder)[0](IDS))


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["bert", "roberta", *KINDS])
def test_every_option_that_transformers_writes_is_known(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind).to_dict()
    read = BertConfig if kind in ("bert", "roberta") else KINDS[kind].config
    assert read.from_hf(config).vocab_size == config["vocab_size"]


def test_every_family_has_a_model():
    for kind in KINDS.values():
        assert hasattr(kind.config, "from_hf")
        assert kind.family.stacks
