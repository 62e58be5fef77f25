"""What is refused in directories of adapters, and what a failed save leaves."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.hf import CheckpointError
from jpeft.hf.adapter_ia3 import IA3WithBias
from jpeft.hf.adapters import load_adapter, save_adapter
from jpeft.hf.models import GPT2
from tests.hf.beside import (
    FAMILY,
    IDS,
    KEY,
    N,
    fused,
    same,
    shaken,
)


@pytest.fixture
def written(ours, tmp_path):
    """A LoRA of the queries, and a head."""
    method = jpeft.chain(jpeft.LoRA(2, 3.0, r"query/kernel$"), jpeft.Train("^classifier/"))
    state = method.init(KEY, ours[1], uses=ours[2])
    assert save_adapter(tmp_path, method, state, ours[1], FAMILY) == "LORA"
    return tmp_path


def option(**changes):
    def edit(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def tensors(edit):
    def run(folder):
        path = folder / "adapter_model.safetensors"
        held = load_file(path)
        edit(held)
        save_file(held, path)

    return run


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncated(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


A_0 = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
REFUSED = {
    "an unknown option": (
        option(use_drora=True),
        r"unknown option: use_drora = True: did you mean 'use_",
    ),
    "an unsupported option": (
        option(layer_replication=[[0, 2]]),
        r"not supported: layer_replic.*0, 2",
    ),
    "a start that changes the base": (
        option(init_lora_weights="pissa"),
        "init_lora_weights = 'pissa'",
    ),
    "another bias": (option(bias="some"), "not supported: bias = 'some'"),
    "another type": (option(peft_type="LOHA"), "type 'LOHA': this reads LORA, IA3"),
    "no type": (option(peft_type=None), "type 'None'"),
    "a rank of text": (option(r="8"), "r = '8' is no positive whole number"),
    "targets of numbers": (option(target_modules=[1]), "is no list of names"),
    "no targets": (option(target_modules=None), "target_modules = None"),
    "targets of another model": (option(target_modules=["q_proj"]), "'q_proj'.* is no module"),
    "a bad pattern": (option(target_modules="("), "is not a regular expression"),
    "a module that is not there": (option(modules_to_save=["lm_head"]), "has 'lm_head'"),
    "a dropout of 2": (option(lora_dropout=2.0), "dropout must be in"),
    "some layers of DoRA": (
        option(use_dora=True, target_modules=r".*layer\.1\.attention\.self\.query"),
        "use_dora = True with",
    ),
    "some layers of a norm": (
        option(modules_to_save=["layer.0.output.LayerNorm"]),
        r"LayerNorm/.*' in layers \[0\] only",
    ),
    "a tensor missing": (tensors(lambda t: t.pop(A_0)), rf"missing: {A_0}"),
    "a tensor too many": (tensors(lambda t: t.update(x=t[A_0].copy())), "unexpected: x"),
    "another rank": (option(r=3), r"misshapen: .*lora_A.weight is \(2, 16\), not \(3, 16\)"),
    "another base": (option(target_modules=["query", "key"]), r"missing: .*key\.lora_A"),
    "truncated": (truncated, "is no complete safetensors file"),
    "pickled": (pickled, "loading a pickle runs code.*save_pretrained"),
    "no tensors": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "has no adapter_model.saf",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "no object": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds no JSON object"),
    "no directory": (shutil.rmtree, "is not a directory"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_few_lines(what, ours, written):
    damage, message = REFUSED[what]
    damage(written)
    with pytest.raises(CheckpointError, match=message) as e:
        load_adapter(written, ours[1], FAMILY)
    assert len(str(e.value).splitlines()) <= 10


def test_bfloat16_and_an_integer_alpha(ours, written):
    def halve(held):
        for name, value in held.items():
            held[name] = value.astype(jnp.bfloat16)

    before = load_adapter(written, ours[1], FAMILY)[1]
    tensors(halve)(written)
    option(lora_alpha=3)(written)
    method, after = load_adapter(written, ours[1], FAMILY)
    assert method.transforms[1].alpha == 3.0
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(x.astype(jnp.bfloat16), y)


def test_scaled_biases_of_several_tasks_in_one_batch(ours):
    apply, params, uses = ours
    method = IA3WithBias(r"value/kernel$")
    states = [shaken(method.init(KEY, params, uses=uses), s) for s in (0.2, 0.5)]
    ids = jnp.asarray(IDS)
    both = method.rewrite(params, jpeft.stack(states), task=jnp.array([1, 0]))
    got = jpeft.lift(apply)(both, ids)
    for row, state in ((0, states[1]), (1, states[0])):
        want = jpeft.lift(apply)(method.rewrite(params, state), ids)[row]
        np.testing.assert_allclose(got[row], want, atol=1e-5)


@pytest.mark.parametrize("kind", ["a newer format", "no transform", "an unknown one"])
def test_our_own_form_is_checked_too(kind, ours, tmp_path):
    method = jpeft.DyLoRA(2, 2.0, "query/kernel$")
    state = method.init(KEY, ours[1], uses=ours[2])
    assert save_adapter(tmp_path, method, state, ours[1], FAMILY) == "JPEFT"
    found = jpeft.restore(tmp_path / "adapter_model.safetensors", ours[1], uses=ours[2])
    same(found[1], state)
    change = {
        "a newer format": {"version": 99},
        "an unknown one": {"transform": {"type": "DyLaRA"}},
    }
    option(**change.get(kind, {}))(tmp_path)
    if kind == "no transform":
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "JPEFT"}')
    with pytest.raises(CheckpointError, match="update jpeft|did you mean 'DyLoRA'"):
        load_adapter(tmp_path, ours[1], FAMILY, uses=ours[2])


def test_prefixes_and_prompts_want_their_places(tmp_path):
    save_file({"prompt_embeddings": np.zeros((N, 16))}, tmp_path / "adapter_model.safetensors")
    about = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": N}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="these parameters have no such places"):
        load_adapter(tmp_path, {"h": {"mlp": {"kernel": jnp.ones((2, 4, 4))}}}, GPT2)
    option(peft_type="PROMPT_TUNING")(tmp_path)
    with pytest.raises(CheckpointError, match="0 parameters are called as one"):
        load_adapter(tmp_path, fused(), GPT2)


def test_a_prompt_is_written_for_a_task(ours, tmp_path):
    method = jpeft.PromptTuning(N)
    state = method.init(KEY, ours[1])
    with pytest.raises(ValueError, match="pass task_type"):
        save_adapter(tmp_path, method, state, ours[1], FAMILY)


def test_a_failed_save_leaves_what_was_there(ours, written, monkeypatch):
    before = {p.name: p.read_bytes() for p in written.iterdir()}

    def full(arrays, path, metadata=None):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jpeft.hf.adapters.save_file", full)
    method = jpeft.LoRA(1, 1.0, r"key/kernel$")
    state = method.init(KEY, ours[1], uses=ours[2])
    with pytest.raises(OSError, match="No space left"):
        save_adapter(written, method, state, ours[1], FAMILY)
    assert {p.name: p.read_bytes() for p in written.iterdir()} == before
