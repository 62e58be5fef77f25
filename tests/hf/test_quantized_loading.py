"""Weights quantised while they are read, and directories of quantised weights."""

import dataclasses
import json
import pathlib
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.hf import (
    CheckpointError,
    load_bert,
    load_model,
    load_sequence_classifier,
    save_model,
    save_quantized,
)
from jpeft.hf.stacking import filled
from jpeft.models.gpt2 import Gpt2
from jpeft.models.gpt2_config import Gpt2Config
from jpeft.models.llama import Llama, LlamaConfig
from jpeft.paths import flatten
from tests.hf.beside import same
from tests.tiny import edit_config, write_model

KEY = jax.random.key(0)
IDS = jnp.asarray(np.random.default_rng(0).integers(3, 15, (2, 7)), jnp.int32)
LLAMA = LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
KERNELS = {
    "llama": r"_proj/kernel$",
    "gpt2": r"/(c_attn|c_proj|c_fc)/kernel$",
    "bert": r"layer/.*/kernel$",
    "encoder": r"layer/.*/kernel$",
}
WAYS = {
    "nf4": {"block": 8},
    "fp4": {"format": "fp4", "block": 16, "double": False},
    "padded": {"block": 20},
    "int8": {"format": "int8"},
}


def write(kind: str, folder: pathlib.Path) -> pathlib.Path:
    """A tiny model's directory."""
    if kind in ("bert", "encoder"):
        return write_model(folder)
    if kind == "llama":
        save_model(Llama(LLAMA, rngs=nnx.Rngs(0)), folder)
    else:
        config = Gpt2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_positions=32)
        save_model(Gpt2(config, rngs=nnx.Rngs(0)), folder)
    return folder


def read(kind, folder, **options):
    """The model, from its directory."""
    if kind == "bert":
        return load_sequence_classifier(folder, 2, key=KEY, **options)[0]
    return (load_bert if kind == "encoder" else load_model)(folder, key=KEY, **options)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind to its directory."""
    return {k: write(k, tmp_path_factory.mktemp(k) / "model") for k in KERNELS}


@pytest.mark.parametrize(
    ("kind", "way"), [*((k, "nf4") for k in KERNELS), *(("llama", w) for w in WAYS if w != "nf4")]
)
def test_as_the_dense_tree_quantised(kind, way, folders):
    quantize = jpeft.Quantize(KERNELS[kind], **WAYS[way])
    dense = jpeft.functional(read(kind, folders[kind]))
    uses = jpeft.uses(dense.apply, dense.params, IDS)
    want = quantize(dense.params, uses=uses)
    apply, params = jpeft.functional(read(kind, folders[kind], quantize=quantize))
    assert sum(isinstance(x, jpeft.Quantized) for x in flatten(params).values()) >= 4
    same(params, want)
    got = jax.jit(jpeft.lift(apply))(params, IDS)
    plain = dense.apply(jpeft.dequantize(want), IDS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, plain)


def test_types_are_those_of_the_dense_weights(folders):
    quantize = jpeft.Quantize(KERNELS["llama"], block=8)
    params = jpeft.functional(
        read("llama", folders["llama"], dtype=jnp.bfloat16, quantize=quantize)
    ).params
    dense = read("llama", folders["llama"], dtype=jnp.bfloat16)
    apply, plain = jpeft.functional(dense)
    same(params, quantize(plain, uses=jpeft.uses(apply, plain, IDS)))
    assert {x.dtype for x in flatten(params).values()} == {jnp.dtype(jnp.bfloat16)}


def test_a_new_head_is_quantised_as_others(folders):
    quantize = jpeft.Quantize([KERNELS["bert"], "classifier/kernel$"], block=4)
    dense, _ = load_sequence_classifier(folders["bert"], 5, key=KEY)
    model, report = load_sequence_classifier(folders["bert"], 5, key=KEY, quantize=quantize)
    assert report.new == ("classifier/bias", "classifier/kernel")
    apply, plain = jpeft.functional(dense)
    want = quantize(plain, uses=jpeft.uses(apply, plain, IDS))
    same(jpeft.functional(model).params, want)


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        (jpeft.Quantize(r"q_projection/kernel$"), "q_projection.* matches no parameter; the near"),
        (jpeft.Quantize(r"embed_tokens"), "is a table of embeddings"),
        (jpeft.Quantize(r"input_layernorm"), "Quantize needs a matrix"),
        (jpeft.Quantize(r"q_proj/kernel$", axes={"q_proj": "boi"}), "leave axes out"),
        (jpeft.Quantize(r"q_proj/kernel$", axes={"c_attn": "bio"}), "matches no parameter"),
    ],
)
def test_what_is_not_to_be_quantised(quantize, message, folders):
    with pytest.raises(jpeft.TargetError, match=message):
        load_model(folders["llama"], quantize=quantize)


# -- on devices --------------------------------------------------------------------------------


def over(axis, letters=2):
    """A sharding of kernels' axis, counted from the end, over four devices of 2 by 4."""
    mesh = jax.make_mesh((2, 4), ("y", "x"), axis_types=(letters,) * 2)

    def sharding(path, leaf):
        spec = [None] * len(leaf.shape)
        if path.endswith("_proj/kernel"):
            spec[axis] = "x"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return sharding


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
@pytest.mark.parametrize("axis", [-1, -2])
def test_codes_and_scales_go_to_their_devices(kind, axis, folders, tmp_path):
    quantize = jpeft.Quantize(KERNELS["llama"], block=4)
    sharding = over(axis, kind)
    model = read("llama", folders["llama"], quantize=quantize, sharding=sharding)
    want = jpeft.functional(read("llama", folders["llama"], quantize=quantize)).params
    save_quantized(model, tmp_path)
    again = read("llama", tmp_path, sharding=sharding)
    for params in (jpeft.functional(m).params for m in (model, again)):
        same(params, want)
        for path, leaf in flatten(params).items():
            if not isinstance(leaf, jpeft.Quantized):
                continue
            specs = leaf.specs(sharding(path, leaf).spec)
            for array, spec in zip(jax.tree.leaves(leaf), jax.tree.leaves(specs), strict=True):
                whole = NamedSharding(sharding(path, leaf).mesh, spec)
                assert array.sharding.is_equivalent_to(whole, array.ndim), path
            parts = leaf.codes.addressable_shards[0].data.size
            assert parts * 4 == leaf.codes.size


@pytest.mark.parametrize(
    ("axis", "block", "message"),
    [
        (0, 4, "puts its layers on different devices"),
        (-2, 16, r"in blocks of 16 inputs, cannot have the sharding .*no whole blocks"),
    ],
)
def test_shardings_that_cannot_be(axis, block, message, folders, tmp_path):
    quantize = jpeft.Quantize(r"q_proj/kernel$", block=block)
    sharding = over(axis, jax.sharding.AxisType.Auto)
    with pytest.raises(ValueError, match=message):
        load_model(folders["llama"], quantize=quantize, sharding=sharding)


def test_on_one_device(folders):
    quantize = jpeft.Quantize(KERNELS["llama"], block=4)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    model = read("llama", folders["llama"], quantize=quantize, sharding=lambda *_: where)
    assert all(x.devices() == {jax.devices()[3]} for x in jax.tree.leaves(nnx.state(model)))


# -- memory ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama's directory, nearly all of it in layers, and its largest tensor's bytes."""
    config = LlamaConfig(
        vocab_size=100, hidden_size=128, intermediate_size=10_000, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    save_model(Llama(config, rngs=nnx.Rngs(0)), folder)
    return folder, 10_000 * 128 * 4


def test_neither_host_nor_device_holds_the_dense_model(wide, tmp_path, monkeypatch):
    folder, largest = wide
    quantize = jpeft.Quantize(KERNELS["llama"])
    model, _ = load_model(folder, quantize=quantize)  # compiles
    size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    dense = (folder / "model.safetensors").stat().st_size
    assert size < dense / 6
    save_quantized(model, tmp_path)
    del model
    alive: list[int] = []

    def watched(make, count, where=None):
        def one(i):
            out = make(i)
            alive.append(sum(x.nbytes for x in jax.live_arrays()) - before)
            return out

        return filled(one, count, where)

    monkeypatch.setattr("jpeft.hf.stacking.filled", watched)
    monkeypatch.setattr("jpeft.hf.params.filled", watched)
    # Of our own layout stacked codes are read whole, and may be the device's array on a processor.
    stacked = 6 * 10_000 * 128 // 2
    for place, most in ((folder, 2 * largest), (tmp_path, size + 2 * stacked)):
        before = sum(x.nbytes for x in jax.live_arrays())
        alive.clear()
        tracemalloc.start()
        try:
            model, _ = load_model(place, quantize=quantize if place == folder else None)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < most
        # What is made of one layer, beside what there is of the whole.
        assert not alive or len(alive) > 6
        assert max([*alive, 0]) <= size + 2 * largest < dense / 2
        del model


# -- directories of our own --------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_there_and_back(kind, way, folders, tmp_path):
    quantize = jpeft.Quantize(KERNELS[kind], **WAYS[way])
    model = read(kind, folders[kind], dtype=jnp.bfloat16, quantize=quantize)
    params = jpeft.functional(model).params
    save_quantized(model, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "jpeft"
    assert about["format"] == quantize.format
    assert len(about["targets"]) == sum(
        isinstance(x, jpeft.Quantized) for x in flatten(params).values()
    )
    again = read(kind, tmp_path / "out", dtype=jnp.bfloat16)
    same(
        jpeft.functional(again).params,
        jax.tree.map(lambda x: x, params),
    )
    wider = jpeft.functional(read(kind, tmp_path / "out")).params
    for path, leaf in flatten(wider).items():
        assert leaf.dtype == jnp.float32, path


def test_a_file_of_jpeft_save(folders, tmp_path):
    quantize = jpeft.Quantize(KERNELS["llama"], block=8)
    apply, plain = jpeft.functional(read("llama", folders["llama"]))
    uses = jpeft.uses(apply, plain, IDS)
    params = quantize(plain, uses=uses)
    jpeft.save(tmp_path / "base.safetensors", params)
    like = jax.eval_shape(lambda p: quantize(p, uses=uses), plain)
    same(jpeft.load(tmp_path / "base.safetensors", like), params)
    with pytest.raises(CheckpointError, match="belongs to another"):
        jpeft.load(
            tmp_path / "base.safetensors",
            jax.eval_shape(lambda p: jpeft.Quantize(KERNELS["llama"], "int8")(p, uses=uses), plain),
        )


def test_shards_and_a_new_head(folders, tmp_path):
    quantize = jpeft.Quantize(KERNELS["bert"], block=4)
    model = read("bert", folders["bert"], quantize=quantize)
    save_quantized(model, tmp_path, shard_bytes=2000, id2label={0: "no", 1: "yes"})
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}
    same(jpeft.functional(read("bert", tmp_path)).params, jpeft.functional(model).params)
    other, report = load_sequence_classifier(tmp_path, 5, key=KEY)
    assert report.new == ("classifier/bias", "classifier/kernel")
    apply, params = jpeft.functional(other)
    assert jpeft.lift(apply)(params, IDS).shape == (2, 5)


def test_written_dense_it_is_what_it_stands_for(folders, tmp_path):
    model = read("gpt2", folders["gpt2"], quantize=jpeft.Quantize(KERNELS["gpt2"], block=8))
    save_model(model, tmp_path)
    want = jpeft.dequantize(jpeft.functional(model).params)
    same(jpeft.functional(read("gpt2", tmp_path)).params, want)


CODES = "model/layers/mlp/up_proj/kernel/codes"


def edited(change):
    def edit(folder):
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path)

    return edit


def config(**changes):
    def edit(folder):
        about = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit_config(folder, quantization_config={**about, **changes})

    return edit


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


DAMAGE = {
    "truncated": (truncated, "is no complete safetensors file"),
    "one missing": (
        edited(lambda t: {k: v for k, v in t.items() if k != CODES}),
        f"missing: {CODES}",
    ),
    "one more": (edited(lambda t: {**t, "x/codes": t[CODES]}), "unexpected: x/codes"),
    "a shape": (
        edited(lambda t: {**t, CODES: t[CODES][:, :8].copy()}),
        rf"misshapen: {CODES} is \(3, 8, 48\), not \(3, 16, 48\)",
    ),
    "a type": (
        edited(lambda t: {**t, CODES: t[CODES].astype(np.int8)}),
        f"mistyped: {CODES} is I8, not U8",
    ),
    "a newer layout": (
        config(version=2),
        "has version 2 of the layout: this jpeft reads version 1",
    ),
    "another format": (config(format="nf3"), "there are the formats nf4, fp4 and int8; got 'nf3'"),
    "another block": (config(block=16), "misshapen: "),
    "another model": (config(targets=["model/h/kernel"]), "this model does not have"),
    "another method": (config(quant_method="gptq"), "were quantised by 'gptq'"),
    "no method": (lambda f: edit_config(f, quantization_config=None), "missing: lm_head.weight"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_told(what, folders, tmp_path):
    damage, message = DAMAGE[what]
    quantize = jpeft.Quantize(KERNELS["llama"], block=8)
    save_quantized(read("llama", folders["llama"], quantize=quantize), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_failed_save_leaves_what_was_there(folders, tmp_path, monkeypatch):
    model = read("llama", folders["llama"], quantize=jpeft.Quantize(KERNELS["llama"], block=8))
    save_quantized(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(arrays, path, metadata=None):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jpeft.hf.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_quantized(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_has_no_form_in_a_directory(folders, tmp_path):
    model = read("llama", folders["llama"])
    apply, params = jpeft.functional(model)
    uses = jpeft.uses(apply, params, IDS)
    with pytest.raises(ValueError, match="no weight of these parameters is quantised"):
        save_quantized(model, tmp_path / "out")
    one = jpeft.Quantize("q_proj/kernel$", block=8)(params, uses=uses)
    two = jpeft.Quantize("k_proj/kernel$", "int8")(one, uses=uses)
    with pytest.raises(ValueError, match="quantised in one way, and 'model/layers/self_attn/q_pro"):
        save_quantized(model, tmp_path / "out", two)
    method = jpeft.LoRA(2, 4.0, "v_proj/kernel$")
    rewritten = method.rewrite(one, method.init(KEY, one, uses=uses))
    with pytest.raises(ValueError, match="v_proj/kernel' is .*: only quantised weights"):
        save_quantized(model, tmp_path / "out", rewritten)
    leaf = flatten(one)["model/layers/self_attn/q_proj/kernel"]
    odd = jax.tree.map(
        lambda x: dataclasses.replace(x, blocked=-1) if x is leaf else x, one, is_leaf=jpeft.is_leaf
    )
    with pytest.raises(ValueError, match=re.escape("has its blocks along axis -1")):
        save_quantized(model, tmp_path / "out", odd)
    assert not (tmp_path / "out").exists()


def test_what_is_quantised_is_not_so_again(folders, tmp_path):
    quantize = jpeft.Quantize(KERNELS["llama"], block=8)
    save_quantized(read("llama", folders["llama"], quantize=quantize), tmp_path)
    with pytest.raises(jpeft.TargetError, match="quantised already: load it without quantize="):
        load_model(tmp_path, quantize=quantize)
