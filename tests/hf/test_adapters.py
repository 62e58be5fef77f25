"""Adapter directories of HF PEFT, both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft.hf import load_bert, load_sequence_classifier
from jpeft.hf.adapter_ia3 import IA3WithBias
from jpeft.hf.adapters import load_adapter, save_adapter
from jpeft.hf.names import Family
from tests.hf.beside import (
    FAMILY,
    IDS,
    KEY,
    MASK,
    N,
    same,
    shake,
    shaken,
    their_logits,
)
from tests.tiny import write_model


def logits(ours, method, state):
    """Our logits, with room for virtual tokens where the method has some."""
    apply, params, _ = ours
    batch = {"input_ids": jnp.asarray(IDS), "attention_mask": jnp.asarray(MASK)}
    for part in getattr(method, "transforms", (method,)):
        if isinstance(part, jpeft.PromptTuning):
            rows = params["bert"]["embeddings"]["word_embeddings"]["embedding"].shape[0]
            batch = jpeft.virtual_tokens(batch, length=N, first=rows)
    return jpeft.lift(apply)(method.rewrite(params, state), **batch)


def base(hf, folder):
    loader = hf[1].AutoModelForSequenceClassification
    return loader.from_pretrained(folder, attn_implementation="eager").eval()


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
        jpeft.chain(
            jpeft.LoRA(2, 4.0, r"query/kernel$"),
            jpeft.Train("LayerNorm"),
            jpeft.bitfit(r"(?<!LayerNorm)/bias$"),
        ),
        "LORA",
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
