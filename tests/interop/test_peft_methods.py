"""IA3, prompts and prefixes beside HF PEFT, on one small BERT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.hf import load_bert
from tests.tiny import SHAPE, write_model

torch = pytest.importorskip("torch", reason="needs the interop extra")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.interop

IDS = np.array([[2, 5, 9, 3], [2, 7, 3, 6]])
N, D, LAYERS = 3, SHAPE["hidden_size"], SHAPE["num_hidden_layers"]


@pytest.fixture
def pair(tmp_path):
    """Ours as `(apply, params, uses)`, and theirs."""
    folder = write_model(tmp_path / "model")
    model, _ = load_bert(folder, key=jax.random.key(0))
    apply, params = jpeft.functional(model)
    ids = jnp.asarray(IDS)
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    return (apply, params, jpeft.uses(apply, params, ids)), theirs


def hidden(model, **inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state.numpy()


def noise(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_ia3(pair):
    (apply, params, uses), theirs = pair
    config = peft.IA3Config(
        target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
    )
    theirs = peft.get_peft_model(theirs, config)
    method = jpeft.IA3(r"(key|value)/kernel$", r"output/dense/kernel$")
    state = method.init(jax.random.key(0), params, uses=uses)
    state = jax.tree.map(lambda x: x + 0.3 * noise(x.shape, x.size), state)
    names = dict(theirs.named_parameters())
    set_ = 0
    for path, scales in state.items():
        inside = path.removeprefix("encoder/layer/").removesuffix("/kernel").replace("/", ".")
        for i in range(LAYERS):
            name = f"base_model.model.encoder.layer.{i}.{inside}.ia3_l.default"
            with torch.no_grad():
                names[name].copy_(torch.tensor(scales.scale[i]).reshape(names[name].shape))
            set_ += 1
    assert set_ == 4 * LAYERS == sum("ia3_l" in n for n in names)
    out = jpeft.lift(apply)(method.rewrite(params, state), jnp.asarray(IDS))
    plain = apply(params, jnp.asarray(IDS))
    assert float(jnp.abs(out - plain).max()) > 0.005
    np.testing.assert_allclose(out, hidden(theirs, input_ids=torch.tensor(IDS)), atol=1e-5)


def test_prompt_tuning(pair):
    (apply, params, _), theirs = pair
    rows = params["embeddings"]["word_embeddings"]["embedding"].shape[0]
    config = peft.PromptTuningConfig(
        task_type=peft.TaskType.FEATURE_EXTRACTION, num_virtual_tokens=N
    )
    theirs = peft.get_peft_model(theirs, config)
    prompt = noise((N, D), 1)
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(torch.tensor(prompt))
    method = jpeft.PromptTuning(N)
    state = {"embeddings/word_embeddings/embedding": {"prompt": jnp.asarray(prompt)}}
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    batch = {"input_ids": jnp.asarray(IDS), "attention_mask": jnp.asarray(mask)}
    batch = jpeft.virtual_tokens(batch, length=N, first=rows)
    out = jpeft.lift(apply)(
        method.rewrite(params, state), batch["input_ids"], batch["attention_mask"]
    )
    want = hidden(theirs, input_ids=torch.tensor(IDS), attention_mask=torch.tensor(mask))
    np.testing.assert_allclose(out, want, atol=1e-4)


@pytest.mark.parametrize("network", [False, True])
def test_prefix_tuning(pair, network):
    (apply, params, uses), theirs = pair
    config = peft.PrefixTuningConfig(
        task_type=peft.TaskType.FEATURE_EXTRACTION,
        num_virtual_tokens=N,
        prefix_projection=network,
        encoder_hidden_size=7,
    )
    theirs = peft.get_peft_model(theirs, config).eval()
    encoder = theirs.prompt_encoder["default"]
    method = jpeft.PrefixTuning(N, r"(key|value)/bias$", mlp=7 if network else None)
    state = method.init(jax.random.key(0), params, uses=uses)
    if network:
        # Ours has one width for the embedding and the sites in tree order; theirs 2L blocks.
        mlp = state["mlp"]
        with torch.no_grad():
            for p in encoder.parameters():
                p.copy_(torch.tensor(noise(tuple(p.shape), p.numel())))
        down, _, up = encoder.transform
        order = up_order([path for path, *_ in mlp.shapes])
        state = {
            "mlp": type(mlp)(
                jnp.asarray(encoder.embedding.weight.detach().numpy()),
                jnp.asarray(down.weight.detach().numpy().T),
                jnp.asarray(down.bias.detach().numpy()),
                jnp.asarray(up.weight.detach().numpy().T[:, order]),
                jnp.asarray(up.bias.detach().numpy()[order]),
                mlp.shapes,
            )
        }
    else:
        flat = noise((N, 2 * LAYERS * D), 2)
        with torch.no_grad():
            encoder.embedding.weight.copy_(torch.tensor(flat))
        pieces = flat.reshape(N, LAYERS, 2, D)
        state = {
            path: jpeft.Prefix(jnp.asarray(pieces[:, :, kind(path)].swapaxes(0, 1)), f.axes)
            for path, f in state.items()
        }
    batch = jpeft.virtual_tokens({"input_ids": jnp.asarray(IDS)}, length=N)
    out = jpeft.lift(apply)(method.rewrite(params, state), batch["input_ids"])
    mask = torch.ones(IDS.shape, dtype=torch.long)
    want = hidden(theirs, input_ids=torch.tensor(IDS), attention_mask=mask)
    assert want.shape == (2, 4, D)
    np.testing.assert_allclose(out[:, N:], want, atol=1e-4)


def kind(path):
    """0 for keys, 1 for values."""
    return int("value" in path)


def up_order(paths):
    """Where theirs has each of our columns: they alternate key and value, layer by layer."""
    blocks = np.arange(2 * LAYERS * D).reshape(LAYERS, 2, D)
    return np.concatenate([blocks[:, kind(p)].reshape(-1) for p in paths])
