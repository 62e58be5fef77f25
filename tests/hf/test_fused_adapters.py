"""Adapters of fused kernels and of tied tables, and files of loralib."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jpeft
from jpeft.hf import CheckpointError, load_model
from jpeft.hf.adapters import load_adapter, save_adapter
from jpeft.hf.loralib import load_loralib
from jpeft.hf.models import GPT2, LLAMA
from jpeft.paths import flatten
from tests.hf.beside import FUSED, IDS, KEY, MASK, fused, shake, shaken, their_logits


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
