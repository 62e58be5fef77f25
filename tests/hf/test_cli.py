"""The command: look into, merge, convert and generate, and what it says of wrong input."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import jpeft
from jpeft.cli import main
from jpeft.hf import load_adapter, load_model, save_adapter, save_model
from jpeft.hf.models import LLAMA, copy_tokenizer, stop_tokens
from jpeft.hf.opened import open_model
from jpeft.models.llama import Llama, LlamaConfig
from jpeft.models.t5 import T5, T5Config
from tests.tiny import write_model

IDS = jnp.array([[1, 5, 9, 3]])


@pytest.fixture
def base(tmp_path):
    """A tiny Llama's directory with a tokenizer of single letters."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = Llama(dataclasses.replace(config, initializer_range=0.4), rngs=nnx.Rngs(0))
    save_model(model, tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    return tmp_path / "base"


def write_tokenizer(folder):
    letters = {c: i for i, c in enumerate("?abcdefghijklmnopqrstuvwxyz .,!ABCDEFGHI")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def adapter(base, tmp_path):
    """A trained LoRA's directory, and what it is made of."""
    model, _ = load_model(base)
    apply, params = jpeft.functional(model)
    method = jpeft.LoRA(2, 8.0, r"(q|v)_proj/kernel$")
    state = method.init(jax.random.key(0), params, uses=jpeft.uses(apply, params, IDS))
    state = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape), state)
    save_adapter(tmp_path / "adapter", method, state, params, LLAMA)
    jpeft.save(tmp_path / "state.safetensors", state, method)
    return tmp_path / "adapter", apply, params, method.rewrite(params, state)


def test_inspect(base, adapter, tmp_path, capsys):
    assert main(["inspect", str(base)]) == 0
    said = capsys.readouterr().out
    assert "model_type llama" in said
    assert "model.layers.*.mlp.down_proj.weight " in said
    assert main(["inspect", str(adapter[0])]) == 0
    assert '"peft_type": "LORA"' in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "state.safetensors")]) == 0
    assert '"type": "LoRA"' in capsys.readouterr().out


def test_merge(base, adapter, tmp_path):
    folder, apply, params, rewritten = adapter
    out = tmp_path / "merged"
    arguments = ["merge", "--model", str(base), "--adapter", str(folder), "--out", str(out)]
    assert main(arguments) == 0
    merged = load_model(out)[0](IDS)
    np.testing.assert_allclose(merged, jpeft.lift(apply)(rewritten, IDS), atol=1e-4)
    assert not np.allclose(merged, apply(params, IDS), atol=1e-2)
    assert (out / "tokenizer.json").is_file()
    assert main(arguments) == 2
    assert main([*arguments, "--overwrite"]) == 0


def test_all_of_a_tokenizer_is_copied(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    names = ["tokenizer.json", "spiece.model", "added_tokens.json", "chat_template.jinja"]
    names += ["additional_chat_templates/tools.jinja"]
    for name in [*names, "model.safetensors"]:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    there.mkdir()
    for _ in range(2):
        copy_tokenizer(here, there)
        copy_tokenizer(here, here)
    found = {str(p.relative_to(there)): p.read_text() for p in there.rglob("*") if p.is_file()}
    assert found == {name: name for name in names}


def test_a_prompt_has_no_place_in_the_weights(base, adapter, tmp_path, capsys):
    _, apply, params, _ = adapter
    method = jpeft.PromptTuning(3, "embed_tokens/embedding$")
    state = method.init(jax.random.key(0), params, uses=jpeft.uses(apply, params, IDS))
    save_adapter(tmp_path / "prompt", method, state, params, LLAMA, task_type="CAUSAL_LM")
    arguments = ["--model", str(base), "--adapter", str(tmp_path / "prompt")]
    assert main(["merge", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert "use generate --adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_convert_there_and_back(base, adapter, tmp_path):
    folder, apply, params, rewritten = adapter
    file, again = tmp_path / "there.safetensors", tmp_path / "again"
    common = ["convert", "--model", str(base), "--adapter"]
    assert main([*common, str(folder), "--out", str(file)]) == 0
    assert main([*common, str(file), "--out", str(again)]) == 0
    transform, state = load_adapter(again, params, LLAMA, uses=jpeft.uses(apply, params, IDS))
    got = jpeft.lift(apply)(transform.rewrite(params, state), IDS)
    np.testing.assert_allclose(got, jpeft.lift(apply)(rewritten, IDS), atol=1e-5)


@pytest.mark.parametrize(
    ("given", "out", "message"),
    [
        ("adapter", "base", "base is a directory, and .*adapter becomes a file"),
        ("state.safetensors", "base/config.json", "config.json is a file, .* becomes a directory"),
    ],
)
def test_convert_onto_another_kind(given, out, message, base, adapter, tmp_path, capsys):
    arguments = ["convert", "--model", str(base), "--adapter", str(tmp_path / given)]
    assert main([*arguments, "--out", str(tmp_path / out), "--overwrite"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_classifier_is_merged_too(tmp_path):
    folder = write_model(tmp_path / "bert")
    model, family, *_ = open_model(folder)
    apply, params = jpeft.functional(model)
    method = jpeft.chain(jpeft.LoRA(2, 8.0, r"query/kernel$"), jpeft.Train("^classifier/"))
    state = method.init(jax.random.key(0), params, uses=jpeft.uses(apply, params, IDS))
    state = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape), state)
    save_adapter(tmp_path / "adapter", method, state, params, family, task_type="SEQ_CLS")
    out = tmp_path / "merged"
    arguments = ["merge", "--model", str(folder), "--adapter", str(tmp_path / "adapter")]
    assert main([*arguments, "--out", str(out)]) == 0
    merged = open_model(out).model(IDS)
    want = jpeft.lift(apply)(method.rewrite(params, state), IDS)
    np.testing.assert_allclose(merged, want, atol=1e-4)
    assert not np.allclose(merged, apply(params, IDS), atol=1e-2)
    assert (out / "vocab.txt").is_file()


def test_a_t5_adapter_is_converted(tmp_path):
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    save_model(T5(config, rngs=nnx.Rngs(0)), tmp_path / "t5")
    model, family, *_ = open_model(tmp_path / "t5")
    apply, params = jpeft.functional(model)
    method = jpeft.LoRA(2, 8.0, r"/[qv]/kernel$")
    uses = jpeft.uses(apply, params, IDS, decoder_input_ids=IDS)
    state = method.init(jax.random.key(0), params, uses=uses)
    jpeft.save(tmp_path / "state.safetensors", state, method)
    common = ["convert", "--model", str(tmp_path / "t5"), "--adapter"]
    out = tmp_path / "adapter"
    assert main([*common, str(tmp_path / "state.safetensors"), "--out", str(out)]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    _, again = load_adapter(out, params, family, uses=uses)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def damaged_json(folder):
    (folder / "adapter_config.json").write_text("{")


def no_object(folder):
    (folder / "adapter_config.json").write_text("[1]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(damaged_json, "cannot be read as JSON"), (no_object, "holds no JSON object")],
)
def test_inspect_of_a_damaged_adapter(damage, message, adapter, capsys):
    damage(adapter[0])
    assert main(["inspect", str(adapter[0])]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "adapter_config.json" in said


def test_generate(base, adapter, capsys):
    arguments = ["generate", "--model", str(base), "--prompt", "abc", "--tokens", "12"]
    assert main(arguments) == 0
    plain = capsys.readouterr().out
    assert len(plain.strip("\n")) == 12
    assert main([*arguments, "--adapter", str(adapter[0])]) == 0
    assert capsys.readouterr().out != plain
    assert main([*arguments, "--temperature", "0.8", "--top-k", "5", "--seed", "1"]) == 0
    drawn = capsys.readouterr().out
    assert main([*arguments, "--temperature", "0.8", "--top-k", "5", "--seed", "1"]) == 0
    assert capsys.readouterr().out == drawn


def test_a_t5_answers(tmp_path, capsys):
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = T5(dataclasses.replace(config, initializer_factor=3.0), rngs=nnx.Rngs(0))
    save_model(model, tmp_path)
    write_tokenizer(tmp_path)
    said = []
    for prompt in ("abc", "xyz"):
        command = ["generate", "--model", str(tmp_path), "--prompt", prompt, "--tokens", "6"]
        assert main(command) == 0
        said.append(capsys.readouterr().out.strip("\n"))
    apply, params = jpeft.functional(model)
    encoded = apply(params, jnp.array([[1, 2, 3]]))
    ids = [0]
    for _ in range(6):
        logits = apply(params, None, None, jnp.array([ids]), encoded=encoded)
        ids.append(int(jnp.argmax(logits[0, -1])))
    letters = "?abcdefghijklmnopqrstuvwxyz .,!ABCDEFGHI"
    assert said[0] == "".join(letters[i] for i in ids[1:])
    assert said[0] != said[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere is not a directory"),
        (["generate", "--model", "nowhere", "--prompt", "a"], "nowhere has no tokenizer.json"),
        (["merge", "--model", "nowhere", "--adapter", "x", "--out", "y"], "is not a directory"),
    ],
)
def test_what_is_not_there_is_told(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"config.json": {"eos_token_id": 2}}, (2,)),
        (
            {
                "generation_config.json": {"eos_token_id": [3, 4]},
                "config.json": {"eos_token_id": 2},
            },
            (3, 4),
        ),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": None}}, ()),
    ],
)
def test_what_ends_a_text(files, want, tmp_path):
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert stop_tokens(tmp_path) == want


def test_it_is_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "jpeft", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    for name in ("inspect", "merge", "convert", "generate"):
        assert name in done.stdout


def test_quantize(base, adapter, tmp_path, capsys):
    out = tmp_path / "four"
    command = ["quantize", "--model", str(base), "--out", str(out), "--block", "8", "--error"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "MiB in bfloat16" in said
    assert "down_proj" in said
    assert (out / "tokenizer.json").exists()
    model, _ = load_model(out, dtype="bfloat16")
    leaves = jax.tree.leaves(jpeft.functional(model).params, is_leaf=jpeft.is_leaf)
    assert sum(isinstance(x, jpeft.Quantized) for x in leaves) == 7
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert '"format": "nf4"' in said
    assert main(command) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--targets", "nothing"]) == 2
    assert "matches no parameter" in capsys.readouterr().err
    merged = ["merge", "--model", str(out), "--adapter", str(adapter[0]), "--out"]
    assert main([*merged, str(tmp_path / "dense"), "--dtype", "bfloat16"]) == 0
    _, params = jpeft.functional(load_model(tmp_path / "dense", dtype="bfloat16")[0])
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
    quantised = jpeft.functional(model).params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    change = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"] - quantised.materialise()
    wanted = adapter[3]["model"]["layers"]["self_attn"]["q_proj"]["kernel"].delta()
    np.testing.assert_allclose(change, wanted, atol=0.05 * float(jnp.abs(wanted).max()))
