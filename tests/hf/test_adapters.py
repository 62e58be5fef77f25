"""Adapter directories of HF PEFT, both ways, and what is refused in them."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.hf import CheckpointError, load_bert, load_model, load_sequence_classifier
from jpeft.hf.adapter_ia3 import IA3WithBias
from jpeft.hf.adapters import load_adapter, save_adapter
from jpeft.hf.loralib import load_loralib
from jpeft.hf.models import GPT2, LLAMA
from jpeft.hf.names import Family
from jpeft.paths import flatten
from tests.tiny import SHAPE, write_model

FAMILY = Family(stacks=("bert/encoder/layer",), prefix="bert.")
IDS = np.array([[2, 5, 9, 3, 6], [2, 7, 3, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
N, D, LAYERS = 3, SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A model none of whose biases is zero."""
    path = write_model(tmp_path_factory.mktemp("base") / "model")
    weights = path / "model.safetensors"
    rng = np.random.default_rng(0)
    noisy = {
        k: v + 0.2 * rng.normal(size=v.shape).astype(np.float32)
        for k, v in load_file(weights).items()
    }
    save_file(noisy, weights, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def ours(folder):
    """Ours as `(apply, params, uses)`."""
    model, _ = load_sequence_classifier(folder, 2, key=KEY)
    apply, params = jpeft.functional(model)
    return apply, params, jpeft.uses(apply, params, jnp.asarray(IDS))


def shaken(state, size=0.3):
    """A state away from its start, each array by its own noise."""
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [
        x + size * jax.random.normal(k, jnp.shape(x)) for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def logits(ours, method, state):
    """Our logits, with room for virtual tokens where the method has some."""
    apply, params, _ = ours
    batch = {"input_ids": jnp.asarray(IDS), "attention_mask": jnp.asarray(MASK)}
    for part in getattr(method, "transforms", (method,)):
        if isinstance(part, jpeft.PromptTuning):
            rows = params["bert"]["embeddings"]["word_embeddings"]["embedding"].shape[0]
            batch = jpeft.virtual_tokens(batch, length=N, first=rows)
    return jpeft.lift(apply)(method.rewrite(params, state), **batch)


def same(one, two):
    """Bit for bit, and the same tree."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


# -- beside HF PEFT ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf():
    """torch, transformers and peft."""
    return (
        pytest.importorskip("torch", reason="needs the interop extra"),
        pytest.importorskip("transformers"),
        pytest.importorskip("peft"),
    )


def base(hf, folder):
    loader = hf[1].AutoModelForSequenceClassification
    return loader.from_pretrained(folder, attn_implementation="eager").eval()


def their_logits(hf, model):
    torch = hf[0]
    with torch.no_grad():
        out = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK))
    return out.logits.numpy()


def shake(hf, model):
    """Move what is trained."""
    torch = hf[0]
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))


def made_by_peft(hf, folder, out, config):
    """A directory of PEFT's with random weights, and its logits."""
    model = hf[2].get_peft_model(base(hf, folder), config).eval()
    shake(hf, model)
    model.save_pretrained(out)
    return their_logits(hf, model)


def loaded_by_peft(hf, folder, out):
    return hf[2].PeftModel.from_pretrained(base(hf, folder), out).eval()


LORA = {
    "lora": {"target_modules": ["query", "value"], "r": 2, "lora_alpha": 5},
    "rslora": {"target_modules": ["query"], "r": 3, "use_rslora": True},
    "dora": {"target_modules": ["query", "output.dense"], "r": 2, "use_dora": True},
    "all-linear": {"target_modules": "all-linear", "r": 2},
    "a regular expression": {"target_modules": r".*layer\.\d\.(intermediate|output)\.dense"},
    "ranks by module": {
        "target_modules": ["query", "key"],
        "rank_pattern": {"query": 4},
        "alpha_pattern": {"key": 3},
    },
    "ranks by layer": {
        "target_modules": ["query", "key"],
        "rank_pattern": {r"layer\.1\.attention\.self\.query": 5},
        "alpha_pattern": {r"layer\.0\.attention\.self\.(query|key)": 3},
    },
    "some layers": {"target_modules": ["query"], "layers_to_transform": [1]},
    "excluded": {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]},
    "the classifier": {"target_modules": ["value"], "task_type": "SEQ_CLS"},
    "modules by layer": {"target_modules": ["value"], "modules_to_save": ["attention.output"]},
    "embeddings": {"target_modules": ["word_embeddings", "position_embeddings", "key"]},
    "embeddings, dora": {"target_modules": ["word_embeddings"], "use_dora": True},
    "biases of targets": {"target_modules": ["query"], "bias": "lora_only"},
    "all biases": {"target_modules": ["query"], "bias": "all"},
    "all biases and a head": {
        "target_modules": ["query"],
        "bias": "all",
        "modules_to_save": ["classifier"],
    },
}


def config_of(hf, what):
    peft = hf[2]
    if what in LORA:
        return peft.LoraConfig(**LORA[what])
    cls = {"task_type": "SEQ_CLS"}
    forward = ["output.dense"]
    return {
        "ia3": lambda: peft.IA3Config(
            target_modules=["key", "value", *forward], feedforward_modules=forward
        ),
        "ia3, classifier": lambda: peft.IA3Config(
            target_modules=["value"], feedforward_modules=[], **cls
        ),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=N, **cls),
    }[what]()


ALL = [*LORA, "ia3", "ia3, classifier", "prompt"]


@pytest.mark.interop
@pytest.mark.parametrize("what", ALL)
def test_made_by_peft_and_back(what, hf, folder, ours, tmp_path):
    want = made_by_peft(hf, folder, tmp_path / "theirs", config_of(hf, what))
    apply, params, _ = ours
    method, state = load_adapter(tmp_path / "theirs", params, FAMILY)
    got = logits(ours, method, state)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(got - apply(params, jnp.asarray(IDS), jnp.asarray(MASK))).max() > 1e-3
    if what != "prompt":
        merged = apply(
            jpeft.merge(method.rewrite(params, state)), jnp.asarray(IDS), jnp.asarray(MASK)
        )
        np.testing.assert_allclose(merged, want, atol=1e-4)
    # Ours again, as PEFT reads it.
    task = config_of(hf, what).task_type
    kind = save_adapter(tmp_path / "ours", method, state, params, FAMILY, task_type=task)
    assert kind == json.loads((tmp_path / "theirs/adapter_config.json").read_text())["peft_type"]
    theirs = loaded_by_peft(hf, folder, tmp_path / "ours")
    np.testing.assert_allclose(their_logits(hf, theirs), want, atol=1e-4)
    same(load_adapter(tmp_path / "ours", params, FAMILY)[1], state)
    if what not in ("ranks by layer", "some layers"):  # filled up with zeros
        one, two = (
            load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs")
        )
        two = {k: v for k, v in two.items() if "original_module" not in k}
        assert one.keys() == {k for k in two if "modules_to_save" not in k}
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


METHODS = {
    "lora": (jpeft.LoRA(2, 3.0, r"(query|value)/kernel$", 0.1), "LORA"),
    "one dense": (jpeft.LoRA(2, 4.0, r"layer/output/dense/kernel$"), "LORA"),
    "ranks": (
        jpeft.LoRA(
            2,
            4.0,
            r"dense/kernel$",
            rslora=True,
            rank_pattern={"pooler": 5, "layer/output": 1},
            alpha_pattern={"attention": 7.0},
        ),
        "LORA",
    ),
    "dora": (
        jpeft.LoRA(3, 4.0, [r"key/kernel$", r"(word|position)_embeddings"], dora=True),
        "LORA",
    ),
    "parts": (jpeft.LoRA(2, 3.0, r"query/kernel$", parts={"query": (4, (0, 3))}), "LORA"),
    "parts, rslora": (
        jpeft.LoRA(2, 3.0, r"query/kernel$", rslora=True, parts={"query": (2, (1,))}),
        "LORA",
    ),
    "a head": (
        jpeft.chain(jpeft.LoRA(2, 4.0, r"query/kernel$"), jpeft.Train("^classifier/")),
        "LORA",
    ),
    "norms and biases": (
        jpeft.chain(jpeft.LoRA(2, 4.0, r"query/kernel$"), jpeft.Train("LayerNorm"), jpeft.bitfit()),
        None,  # a norm's bias twice
    ),
    "biases": (jpeft.chain(jpeft.bitfit(), jpeft.LoRA(2, 4.0, r"query/kernel$")), "LORA"),
    "norms": (jpeft.chain(jpeft.Train("LayerNorm"), jpeft.LoRA(2, 4.0, r"query/kernel$")), "LORA"),
    "half a norm": (
        jpeft.chain(jpeft.Train("LayerNorm/scale"), jpeft.LoRA(2, 4.0, r"query/kernel$")),
        None,
    ),
    "ia3, inputs": (jpeft.IA3(feedforward=r"layer/output/dense/kernel$"), "IA3"),
    "ia3": (IA3WithBias(r"(key|value)/kernel$", r"layer/output/dense/kernel$"), "IA3"),
    "ia3 of no bias": (jpeft.IA3(r"(key|value)/kernel$"), None),
    "prompt": (jpeft.PromptTuning(N), "PROMPT_TUNING"),
    "dylora": (jpeft.DyLoRA(4, 4.0, r"query/kernel$"), None),
    "adapter": (jpeft.Adapter(4, r"layer/output/dense/bias$"), None),
    "subspace": (jpeft.Subspace(5, r"query/kernel$"), None),
    "two": (
        jpeft.chain(jpeft.LoRA(2, 4.0, r"query/kernel$"), jpeft.LoRA(2, 4.0, r"key/kernel$")),
        None,
    ),
}


@pytest.fixture(params=METHODS, scope="module")
def made(request, ours, tmp_path_factory):
    """A method made here, its state, its logits, and its directory."""
    method, kind = METHODS[request.param]
    state = shaken(method.init(KEY, ours[1], uses=ours[2]))
    want = logits(ours, method, state)
    tmp_path = tmp_path_factory.mktemp("made")
    task = "SEQ_CLS" if kind == "PROMPT_TUNING" else None
    found = save_adapter(tmp_path, method, state, ours[1], FAMILY, task_type=task)
    assert found == (kind or "JPEFT")
    return method, state, want, tmp_path


def test_made_here_and_back(made, ours):
    method, state, want, out = made
    again, found = load_adapter(out, ours[1], FAMILY, uses=ours[2])
    np.testing.assert_allclose(logits(ours, again, found), want, atol=1e-5)
    # A loaded transform makes a state of the same shape: it can be trained on, saved, restored.
    like = jax.eval_shape(lambda: again.init(KEY, ours[1], uses=ours[2]))
    assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, found)
    if json.loads((out / "adapter_config.json").read_text())["peft_type"] == "JPEFT":
        assert again == method
        same(found, state)
    elif isinstance(method, jpeft.LoRA) and not method.parts:
        same(found, state)


@pytest.mark.interop
def test_made_here_and_loaded_by_peft(made, hf, folder):
    _, _, want, out = made
    if json.loads((out / "adapter_config.json").read_text())["peft_type"] == "JPEFT":
        pytest.skip("not PEFT's")
    got = their_logits(hf, loaded_by_peft(hf, folder, out))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.interop
@pytest.mark.parametrize("network", [False, True])
def test_prefixes_made_by_peft_and_back(network, hf, folder, tmp_path):
    # In transformers 5 the encoder takes prefixes, and its classifier no longer does.
    torch, transformers, peft = hf
    config = peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION",
        num_virtual_tokens=N,
        prefix_projection=network,
        encoder_hidden_size=7,
    )

    def encoder():
        return transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()

    def hidden(model):
        with torch.no_grad():
            out = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK))
        return out.last_hidden_state.numpy()

    theirs = peft.get_peft_model(encoder(), config).eval()
    shake(hf, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    want = hidden(theirs)
    model, _ = load_bert(folder, key=KEY)
    apply, params = jpeft.functional(model)
    family = Family(stacks=("encoder/layer",), prefix="bert.")
    method, state = load_adapter(tmp_path / "theirs", params, family)
    batch = {"input_ids": jnp.asarray(IDS), "attention_mask": jnp.asarray(MASK)}
    batch = jpeft.virtual_tokens(batch, length=N)
    got = jpeft.lift(apply)(method.rewrite(params, state), **batch)[:, N:]
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(want - hidden(encoder())).max() > 0.01
    kind = save_adapter(
        tmp_path / "ours", method, state, params, family, task_type="FEATURE_EXTRACTION"
    )
    assert kind == "PREFIX_TUNING"
    again = peft.PeftModel.from_pretrained(encoder(), tmp_path / "ours").eval()
    np.testing.assert_allclose(hidden(again), want, atol=1e-4)
    same(load_adapter(tmp_path / "ours", params, family), (method, state))


def test_a_head_of_two_layers_is_one_module(tmp_path):
    model, _ = load_sequence_classifier(write_model(tmp_path / "model", "roberta"), 2, key=KEY)
    params = jpeft.functional(model).params
    family = Family(stacks=("roberta/encoder/layer",), prefix="roberta.")
    method = jpeft.LoRA(2, 2.0, r"query/kernel$", axes={"query": "bio"})
    state = method.init(KEY, params)
    # Not trained, but PEFT looks for it in the file.
    save_adapter(tmp_path / "out", method, state, params, family, task_type="SEQ_CLS")
    about = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert about["modules_to_save"] == ["classifier"]
    assert about["target_modules"] == ["query"]
    method, (head, again) = load_adapter(tmp_path / "out", params, family)
    same(again, state)
    np.testing.assert_array_equal(
        head["classifier/dense/kernel"], params["classifier"]["dense"]["kernel"]
    )


# -- a fused kernel, which the file has as (in, out) ----------------------------------------------

FUSED = "transformer/h/attn/c_attn/kernel"


def fused(seed=0):
    """Two layers' fused projections, of width 8."""
    kernel = np.random.default_rng(seed).normal(size=(2, 8, 24)).astype(np.float32)
    return {"transformer": {"h": {"attn": {"c_attn": {"kernel": jnp.asarray(kernel)}}}}}


def merged(params, method, state):
    return flatten(jpeft.merge(method.rewrite(params, state)))[FUSED]


@pytest.mark.interop
@pytest.mark.parametrize("parts", [{}, {"c_attn": (3, (0, 2))}])
def test_a_fused_kernel(parts, hf, tmp_path):
    torch, transformers, peft = hf
    params = fused()
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for i, block in enumerate(model.transformer.h):
            kernel = params["transformer"]["h"]["attn"]["c_attn"]["kernel"][i]
            block.attn.c_attn.weight.copy_(torch.tensor(np.asarray(kernel)))
    method = jpeft.LoRA(2, 3.0, "c_attn", axes={"c_attn": "bio"}, parts=parts)
    state = shaken(method.init(KEY, params))
    assert save_adapter(tmp_path, method, state, params, GPT2, task_type="CAUSAL_LM") == "LORA"
    theirs = peft.PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    got = np.stack([b.attn.c_attn.weight.detach().numpy() for b in theirs.transformer.h])
    np.testing.assert_allclose(merged(params, method, state), got, atol=1e-5)
    again = load_adapter(tmp_path, params, GPT2)
    np.testing.assert_allclose(merged(params, *again), got, atol=1e-5)


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_with_a_tied_table(kind, hf, tmp_path):
    _, transformers, peft = hf
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        family, table = LLAMA, "embed_tokens"
    else:
        config = transformers.GPT2Config(
            vocab_size=20, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        )
        family, table = GPT2, "wte"
    loader = transformers.AutoModelForCausalLM
    loader.from_config(config).save_pretrained(tmp_path / "model")
    base = lambda: loader.from_pretrained(tmp_path / "model").eval()  # noqa: E731
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules="all-linear"))
    shake(hf, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    want = their_logits(hf, theirs.eval())
    model, _ = load_model(tmp_path / "model")
    apply, params = jpeft.functional(model)
    batch = {"input_ids": jnp.asarray(IDS), "attention_mask": jnp.asarray(MASK)}
    method, state = load_adapter(tmp_path / "theirs", params, family)
    got = jpeft.lift(apply)(method.rewrite(params, state), **batch)
    np.testing.assert_allclose(got[MASK == 1], want[MASK == 1], atol=1e-4)
    assert save_adapter(tmp_path / "ours", method, state, params, family) == "LORA"
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    np.testing.assert_array_equal(their_logits(hf, again), want)
    # PEFT adapts the look-up alone, we the table wherever it is read.
    peft.get_peft_model(base(), peft.LoraConfig(target_modules=[table])).save_pretrained(
        tmp_path / "table"
    )
    uses = jpeft.uses(apply, params, **batch)
    for known in (None, uses):
        with pytest.raises(CheckpointError, match="the same table is the output head"):
            load_adapter(tmp_path / "table", params, family, uses=known)
        for other in (jpeft.LoRA(2, 2.0, table), jpeft.chain(jpeft.Train(table), method)):
            new = other.init(KEY, params, uses=uses)
            kind = save_adapter(tmp_path / "own", other, new, params, family, uses=known)
            assert kind == "JPEFT"


@pytest.mark.parametrize("trained", [None, (0, 2), (1,)])
def test_loralib(trained, tmp_path):
    params, rng, rank = fused(), np.random.default_rng(3), 2
    n = len(trained or (0,))
    width = 24 if trained is None else 8 * n
    shapes = {"lora_A": (rank * n, 8), "lora_B": (width, rank)}
    tensors = {
        f"transformer.h.{i}.attn.c_attn.{name}": rng.normal(size=shape).astype(np.float32)
        for i in range(2)
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    parts = {} if trained is None else {"c_attn": (3, trained)}
    found = load_loralib(tmp_path / "x.safetensors", params, GPT2, alpha=6, parts=parts)
    want = np.array(flatten(params)[FUSED])
    for i in range(2):
        a, b = (tensors[f"transformer.h.{i}.attn.c_attn.{x}"] for x in ("lora_A", "lora_B"))
        for k, part in enumerate(trained or (0,)):
            w = width // n
            delta = (b[k * w : (k + 1) * w] @ a[k * rank : (k + 1) * rank]).T
            want[i][:, part * w : (part + 1) * w] += 6 / rank * delta
    np.testing.assert_allclose(merged(params, *found), want, atol=1e-5)
    if trained:
        with pytest.raises(CheckpointError, match=r"misshapen: .*lora_B"):
            load_loralib(tmp_path / "x.safetensors", params, GPT2, alpha=6)


# -- what is refused -----------------------------------------------------------------------------


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
