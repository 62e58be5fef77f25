"""Fine-tuning of language models: whole runs, every method, packing, adapters, wrong input."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import jpeft
from experiments import finetune
from experiments.common.decoders import TINY, load, recipes
from experiments.common.language import LanguageTrainer, batches, encode, packed
from experiments.common.loop import InterruptedRunError
from experiments.common.methods import Sizes
from experiments.common.models import ModelError
from experiments.common.pairs import Pair
from experiments.common.readers import DataError
from experiments.common.texts import byte_codec, chat_template
from experiments.common.training import Schedule
from jpeft.hf import load_adapter, load_model, save_model
from jpeft.hf.models import KINDS
from jpeft.models.gpt2 import Gpt2, Gpt2Config
from jpeft.models.llama import Llama, LlamaConfig
from jpeft.models.t5 import T5, T5Config

SMALL = {
    "limit": 24, "batch": 4, "held_out": 8, "generate": 0, "new_tokens": 4, "bottleneck": 4,
    "prompt": 3, "dimensions": 30, "rank": 2, "max_steps": 3, "buckets": 1,
}  # fmt: skip
SHAPES = {
    "llama": (Llama, LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, eos_token_id=1,
    )),
    "gpt2": (Gpt2, Gpt2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=256, eos_token_id=1,
        pad_token_id=0,
    )),
    "t5": (T5, T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)),
}  # fmt: skip


LETTERS = "\x00\x01?\n abcdefghijklmnopqrstuvwxyzTI.,-'0123456789"


@pytest.fixture
def folder(tmp_path):
    """Makes a small model's directory, with a tokenizer of letters."""

    def make(kind):
        build, config = SHAPES[kind]
        out = tmp_path / kind
        save_model(build(config, rngs=nnx.Rngs(0)), out)
        letters = {c: i for i, c in enumerate(LETTERS)}
        tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.save(str(out / "tokenizer.json"))
        return out

    return make


def run(**options):
    out = io.StringIO()
    config = finetune.Config(**{**SMALL, **options})
    return finetune.main(config, Console(file=out, width=200)), out.getvalue()


def test_a_run_from_nothing_learns_and_writes(tmp_path):
    options = {"max_steps": 40, "limit": None, "batch": 16, "generate": 4, "buckets": 3}
    result, said = run(out=tmp_path / "out", **options)
    held = result["held_out"]
    assert held["loss"] < 0.5 * held["loss_before"]
    assert "loss before" in said
    assert 0 <= result["scores"]["exact"] <= 100
    files = {p.name for p in (tmp_path / "out" / "seed0").iterdir()}
    assert {"adapter.safetensors", "metrics.jsonl"} <= files
    on_disk = json.loads((tmp_path / "out" / "result.json").read_text())
    assert on_disk["held_out"] == held
    assert on_disk["answers"][0].keys() == {"prompt", "answer", "wanted"}


def test_straight_line_layers_have_the_same_losses():
    looped, straight = (run(generate=0, straight=s, remat=True)[0] for s in (False, True))
    np.testing.assert_allclose(straight["losses"], looped["losses"], rtol=1e-4)


@pytest.mark.parametrize("kind", SHAPES)
def test_an_adapter_is_saved_and_gone_on_from(kind, folder, tmp_path):
    path = folder(kind)
    first, _ = run(model=str(path), out=tmp_path / "a", lr=0.05, generate=4)
    assert len(first["answers"]) == 4
    assert first["held_out"]["loss"] < first["held_out"]["loss_before"]
    saved = tmp_path / "a" / "seed0"
    assert (
        json.loads((saved / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    )
    # This library's own file knows no kinds of models: one of them stands for all.
    own = (saved / "adapter.safetensors",) if kind == "gpt2" else ()
    for adapter in (saved / "adapter", *own):
        again, _ = run(model=str(path), adapter=adapter)
        np.testing.assert_allclose(
            again["held_out"]["loss_before"], first["held_out"]["loss"], rtol=1e-5
        )
    model, _ = load_model(path)
    apply, params = jpeft.functional(model)
    ids = jnp.zeros((1, 4), jnp.int32)
    more = {"decoder_input_ids": ids} if kind == "t5" else {}
    uses = jpeft.uses(apply, params, ids, **more)
    family = KINDS[kind].family
    transform, _ = load_adapter(saved / "adapter", params, family, uses=uses)
    assert isinstance(transform, jpeft.LoRA)


METHODS = sorted(recipes(nnx.eval_shape(lambda: Llama(TINY, rngs=nnx.Rngs(0)))))
# What a run does otherwise than with LoRA, which the tests above train; the step of the rest is
# traced below.
OTHERWISE = ("full", "adapter", "prefix", "prompt")


@pytest.mark.parametrize("method", OTHERWISE)
def test_methods_train(method, folder):
    # What every method generates is tested with the models: here those that lengthen the prompt.
    count = 4 if method in ("prompt", "prefix") else 0
    result, _ = run(model=str(folder("llama")), method=method, max_steps=2, generate=count)
    assert np.isfinite(result["held_out"]["loss"])
    assert result["trained"] > 0
    assert len(result["answers"]) == count


@pytest.mark.parametrize("method", ["bitfit", "prompt", "prefix"])
def test_methods_of_gpt2(method, folder):
    result, _ = run(model=str(folder("gpt2")), method=method, max_steps=2)
    assert np.isfinite(result["held_out"]["loss"])


@pytest.mark.parametrize("method", ["prompt", "prefix", "adapter"])
def test_methods_of_t5(method, folder):
    # Generation is compiled for what the prompt is longer by.
    count = 0 if method == "adapter" else 4
    result, _ = run(model=str(folder("t5")), method=method, max_steps=2, generate=count, beams=2)
    assert np.isfinite(result["held_out"]["loss"])


@pytest.mark.parametrize(
    ("kind", "method"),
    [("gpt2", "adapter"), ("gpt2", "ia3"), ("t5", "ia3"), ("t5", "full")]
    + [("llama", m) for m in METHODS if m not in (*OTHERWISE, "bitfit")],  # Llama has no biases
)
def test_other_methods_have_a_step(kind, method, folder):
    """Traced, not compiled: the model has what the method's patterns name."""
    config = finetune.Config(**SMALL, model=str(folder(kind)), method=method)
    loaded = load(
        config.model, None, Console(quiet=True), dtype=jnp.float32, remat=False,
        key=jax.random.key(0),
    )  # fmt: skip
    trainer = finetune.trainer_of(config, loaded, 1)
    start = jax.eval_shape(trainer.first, jpeft.functional(loaded.model).params)
    state = trainer.step.abstract(start)
    rows, _ = encode([Pair("ab?", "c")] * 4, loaded.codec, str, 64, loaded.two_sided)
    batch = next(iter(batches(rows, loaded.codec, 4, 64, 0, loaded.two_sided)))
    after, _ = trainer.step.trace(state, trainer.frozen, batch, trainer.key(0)).out_info
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert sum(x.size for x in jax.tree.leaves(start)) > 0


def test_t5_has_no_biases_to_train(folder):
    with pytest.raises(jpeft.TargetError, match=r"'bias\$' matches no parameter"):
        run(model=str(folder("t5")), method="bitfit")


@pytest.mark.parametrize("method", ["lora", "adapter", "bitfit", "full"])
def test_frozen_parameters_are_held_in_what_is_computed_in(method, folder):
    kind = "gpt2"  # it has biases to train
    config = finetune.Config(
        **SMALL, model=str(folder(kind)), method=method, precision="bfloat16", dropout=False
    )
    exact = jpeft.functional(load_model(folder(kind))[0])[1]
    narrow = jnp.float32 if method != "lora" else jnp.bfloat16
    loaded = load(
        config.model, None, Console(quiet=True), dtype=jnp.bfloat16, remat=False,
        key=jax.random.key(0), param_dtype=narrow,
    )  # fmt: skip
    trainer = finetune.trainer_of(config, loaded, 1)
    assert {x.dtype for x in trainer.frozen.values()} <= {jnp.dtype("bfloat16")}
    assert bool(trainer.frozen) == (method != "full")
    trained = trainer.init().trainable
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    # Copies of the model's own are what its file has, to the last bit.
    leaves, copied = jpeft.paths.flatten(exact), 0
    for path, x in jax.tree_util.tree_flatten_with_path(trained)[0]:
        own = [
            p for p in leaves if jax.tree_util.keystr(path, simple=True, separator="/").endswith(p)
        ]
        copied += len(own)
        assert all(np.array_equal(x, leaves[p]) for p in own)
    assert bool(copied) == (method != "lora")
    plain = finetune.trainer_of(dataclasses.replace(config, precision="float32"), loaded, 1)
    assert {x.dtype for x in plain.frozen.values()} <= {jnp.dtype("float32")}


def test_a_run_in_bf16(folder):
    result, _ = run(model=str(folder("llama")), precision="bfloat16")
    exact, _ = run(model=str(folder("llama")))
    np.testing.assert_allclose(result["losses"], exact["losses"], rtol=0.02)


def totals(rows, model, apply, params):
    none = jpeft.Train(r"model/norm/scale$")
    trainer = LanguageTrainer(apply, params, none, Schedule(1e-3, 1), dropout=False)
    made = batches(rows, byte_codec(), 3, 64, 0, False)
    total = jax.jit(lambda b: trainer.total(params, b))
    sums = [total(b) for b, _ in zip(made, range(made.per_epoch), strict=False)]
    return np.sum([[float(x) for x in s] for s in sums], axis=0)


def test_packed_pairs_have_the_loss_of_pairs_alone():
    pairs = [Pair("x" * n + "?", "y" * (n % 5 + 1)) for n in range(1, 12)]
    examples, longer = encode(pairs, byte_codec(), str, 64, False)
    assert longer == 0
    rows = packed(examples, 64)
    assert len(rows) < len(examples)
    assert max(len(r.ids) for r in rows) <= 64
    assert sorted(n for r in rows for n in r.ids) == sorted(n for e in examples for n in e.ids)
    model = Llama(TINY, rngs=nnx.Rngs(0))
    apply, params = jpeft.functional(model)
    params = jax.tree.map(lambda x: 3 * x, params)
    alone, together = (totals(x, model, apply, params) for x in (examples, rows))
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert alone[1] == sum(len(p.answer) + 1 for p in pairs)


def test_the_loss_is_on_the_answer_and_what_does_not_fit_is_counted():
    pairs = [Pair("ab", "c"), Pair("a" * 30, "b")]
    examples, longer = encode(pairs, byte_codec(), lambda p: f"<{p}>", 12, False)
    assert longer == 1
    ids = [1, *(b + 3 for b in b"<ab>c"), 2]
    assert examples[0].ids == ids
    assert examples[0].labels == [-100] * 5 + ids[5:]
    sided, _ = encode(pairs[:1], byte_codec(), str, 12, True)
    assert sided[0].ids[-1] == 2
    assert sided[0].labels == [ord("c") + 3, 2]


def test_an_interrupted_run_goes_on_to_the_same_losses(tmp_path, monkeypatch):
    import experiments.common.loop as loop

    options = {"max_steps": 6, "save_every": 2}
    whole, _ = run(out=tmp_path / "whole", **options)
    real = loop._record
    seen = []

    def stopping(progress, *rest):
        real(progress, *rest)
        seen.append(progress.step)
        if len(seen) == 4:
            raise InterruptedRunError

    monkeypatch.setattr(loop, "_record", stopping)
    with pytest.raises(InterruptedRunError):
        run(out=tmp_path / "cut", **options)
    result, _ = run(out=tmp_path / "cut", resume=True, **options)
    assert seen[4] == 3  # from the checkpoint of step 2
    assert result["losses"] == whole["losses"]
    assert result["held_out"] == whole["held_out"]


def test_a_chat_template(folder, tmp_path):
    path = folder("llama")
    with pytest.raises(ModelError, match="no chat template"):
        chat_template(path)
    about = {"chat_template": "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
             "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}answer: {% endif %}",
             "bos_token": "<s>", "eos_token": {"content": "|"}}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    assert chat_template(path)("hi") == "user: hi|answer: "
    result, _ = run(model=str(path), chat=True, generate=4)
    assert np.isfinite(result["held_out"]["loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "no place"}, "--template has no {prompt}"),
        ({"chat": True}, "--chat: tiny has no directory"),
        ({"chat": True, "template": "a {prompt}"}, "--chat and --template"),
        ({"method": "head"}, "--method head is a classifier's"),
        ({"method": "prompt", "pack": True}, "--pack has no place"),
        ({"length": 5}, "every pair has more than --length 5 tokens"),
        ({"task": "gsm8k"}, "--task gsm8k needs --data"),
        ({"model": "nowhere/at/all"}, "there is no such directory"),
        ({"adapter": "x", "method": "lora"}, "--adapter brings its method along"),
        ({"attention": "cudnn"}, "--attention cudnn computes in 16 bits"),
        ({"attention": "cudnn", "precision": "mixed"}, "--attention cudnn is for NVIDIA GPUs"),
    ],
)
def test_wrong_options_are_told_before_anything_is_trained(options, message):
    with pytest.raises((ValueError, ModelError, DataError), match=message):
        run(**options)


def test_packing_is_for_decoders(folder):
    with pytest.raises(ValueError, match="--pack is for decoders"):
        run(model=str(folder("t5")), pack=True)


def test_a_llama2c_file_needs_its_vocabulary(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="needs --vocabulary"):
        load(str(tmp_path / "m.bin"), None, Console(), dtype=jnp.float32, remat=False,
             key=jax.random.key(0))  # fmt: skip


def test_stories_are_fine_tuned(data):
    at = data / "weights" / "stories260K"
    result, _ = run(
        model=str(at / "stories260K.bin"), vocabulary=at / "tok512_stories.bin", task="e2e",
        data=data, max_steps=8, limit=64, held_out=16, method="lora", generate=4,
    )  # fmt: skip
    held = result["held_out"]
    assert held["loss"] < held["loss_before"]
    assert "bleu" in result["scores"]


def test_recipes_are_of_sizes_given():
    model = Llama(TINY, rngs=nnx.Rngs(0))
    made = recipes(model)["lora"].transform(Sizes(rank=3, targets=()))
    assert made.rank == 3
    assert "[qv]_proj" in made.targets[0]
