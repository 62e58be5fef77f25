"""Every type of PEFT's adapters on GPT-2, a Llama with grouped heads and T5, both ways."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.hf import CheckpointError, load_adapter, load_model, save_adapter
from jpeft.hf.models import KINDS, LLAMA
from jpeft.models.rope import Rope
from tests.hf.test_models import theirs

pytestmark = pytest.mark.interop
KEY = jax.random.key(0)
IDS = jnp.asarray(np.random.default_rng(0).integers(3, 60, (2, 9)), jnp.int32)
N = 3
LIKE_LLAMA = ("llama", "gemma2", "gemma3_text")
KIND = {"gpt2": "gpt2", "llama": "llama-llama3", "t5": "t5"}
KIND |= {"gemma2": "gemma2", "gemma3_text": "gemma3"}
TARGETS = {
    "gpt2": (["c_attn", "mlp.c_proj"], r"(c_attn|mlp/c_proj)/kernel$"),
    "t5": (["q", "v", "wo"], r"/(q|v|wo)/kernel$"),
    **dict.fromkeys(LIKE_LLAMA, (["q_proj", "v_proj", "down_proj"], r"(q|v|down)_proj/kernel$")),
}
LAST = {"gpt2": ["mlp.c_proj"], "t5": ["wo"], "llama": ["down_proj"]}
WORDS = {"gpt2": r"wte/embedding$", "t5": r"shared/"}
WORDS |= dict.fromkeys(LIKE_LLAMA, r"embed_tokens/embedding$")
TASK = {"t5": "SEQ_2_SEQ_LM", **dict.fromkeys(("gpt2", *LIKE_LLAMA), "CAUSAL_LM")}


def config_of(name, kind):
    import peft

    lora = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind][0], "task_type": TASK[kind]}
    if kind == "gpt2":
        lora["fan_in_fan_out"] = True
    return {
        "rslora": lambda: peft.LoraConfig(**lora, use_rslora=True),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "ia3": lambda: peft.IA3Config(
            target_modules=TARGETS[kind][0], feedforward_modules=LAST[kind], task_type=TASK[kind],
            fan_in_fan_out=kind == "gpt2",
        ),
        "prompt": lambda: peft.PromptTuningConfig(
            num_virtual_tokens=N, task_type=TASK[kind], num_transformer_submodules=1
        ),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=N, task_type=TASK[kind]),
    }[name]()  # fmt: skip


def ours_of(name, kind):
    keys = r"c_attn/bias$" if kind == "gpt2" else r"[kv]_proj/kernel$"
    return {
        "rslora": lambda: jpeft.LoRA(4, 8.0, TARGETS[kind][1], rslora=True),
        "dora": lambda: jpeft.LoRA(4, 8.0, TARGETS[kind][1], dora=True),
        "ia3": lambda: jpeft.IA3(r"(q|v)(_proj)?/kernel$", r"(down_proj|wo)/kernel$"),
        "prompt": lambda: jpeft.PromptTuning(N, WORDS[kind], "uniform"),
        "prefix": lambda: jpeft.PrefixTuning(N, keys),
    }[name]()


@functools.cache
def loaded(kind, root):
    folder = root / kind
    theirs(KIND[kind]).save_pretrained(folder)
    model, _ = load_model(folder)
    apply, params = jpeft.functional(model)
    more = {"decoder_input_ids": IDS} if kind == "t5" else {}
    return model, apply, params, jpeft.uses(apply, params, IDS, **more)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def their_logits(model):
    import torch

    ids = torch.tensor(np.asarray(IDS, np.int64))
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
    # PEFT's prompts have logits of their own; ours are left out here too.
    return out.float().numpy()[:, -IDS.shape[1] :]


def our_logits(model, apply, params, transform, tree):
    batch = {"input_ids": IDS, "attention_mask": jnp.ones_like(IDS)}
    length = jpeft.room(transform)
    if length:
        first = jpeft.first_virtual_id(transform, model.config.vocab_size)
        batch = jpeft.virtual_tokens(batch, length=length, first=first)
    more = {"decoder_input_ids": IDS[:, ::-1]} if "decoder" in params else {}
    run = jax.jit(jpeft.lift(lambda p, i, m: apply(p, i, m, **more)))
    return np.asarray(run(tree, batch["input_ids"], batch["attention_mask"]))[:, -IDS.shape[1] :]


def fresh(kind, root):
    return type(theirs(KIND[kind])).from_pretrained(root / kind, attn_implementation="eager").eval()


CASES = [
    (name, kind)
    for kind in ("gpt2", "llama", "t5")
    for name in ("rslora", "dora", "ia3", "prompt", "prefix")
    # PEFT's prefixes of T5 are the decoder's, in self-attention and cross-attention at once.
    if (name, kind) != ("prefix", "t5")
]
CASES += [("prompt", "gemma2"), ("prompt", "gemma3_text")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_made_by_peft(name, kind, root, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    model, apply, params, uses = loaded(kind, root)
    made = peft.get_peft_model(fresh(kind, root), config_of(name, kind)).eval()
    with torch.no_grad():
        for path, p in made.named_parameters():
            if p.requires_grad:
                size = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
                p.copy_(p * (1 + size) if "magnitude" in path or "ia3" in path else size)
    made.save_pretrained(tmp_path)
    want = their_logits(made)
    family = KINDS[kind].family
    transform, state = load_adapter(tmp_path, params, family, uses=uses, config=model.config)
    tree = transform.rewrite(params, state)
    got = our_logits(model, apply, params, transform, tree)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)
    plain = our_logits(model, apply, params, jpeft.Train(r".*"), params)
    assert np.abs(want - plain).max() > 0.05
    if name not in ("prompt", "prefix"):
        merged = our_logits(model, apply, params, transform, jpeft.merge(tree))
        np.testing.assert_allclose(merged, want, atol=1e-4, rtol=1e-4)
    # Written again it is the same file, and read again the same state.
    options = {"uses": uses, "config": model.config, "task_type": TASK[kind]}
    kinds = {"rslora": "LORA", "dora": "LORA", "ia3": "IA3"}
    again = save_adapter(tmp_path / "again", transform, state, params, family, **options)
    assert again == kinds.get(name, f"{name.upper()}_TUNING")
    _, back = load_adapter(tmp_path / "again", params, family, uses=uses, config=model.config)
    # Keys are turned and turned back, Gemma's rows divided and multiplied, in fp32.
    exact = name != "prefix" and not kind.startswith("gemma")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=0 if exact else 1e-6), back, state
    )


@pytest.mark.parametrize(("name", "kind"), [c for c in CASES if c != ("ia3", "gpt2")])
def test_made_here(name, kind, root, tmp_path):
    peft = pytest.importorskip("peft")
    model, apply, params, uses = loaded(kind, root)
    transform = ours_of(name, kind)
    state = transform.init(KEY, params, uses=uses)
    state = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), state)
    options = {"uses": uses, "config": model.config, "task_type": TASK[kind]}
    written = save_adapter(tmp_path, transform, state, params, KINDS[kind].family, **options)
    assert written != "JPEFT"
    read = peft.PeftModel.from_pretrained(fresh(kind, root), tmp_path).eval()
    got = our_logits(model, apply, params, transform, transform.rewrite(params, state))
    np.testing.assert_allclose(got, their_logits(read), atol=1e-4, rtol=1e-4)


def test_prompts_of_gemma_need_its_configuration(root, tmp_path):
    model, _, params, uses = loaded("gemma2", root)
    transform = ours_of("prompt", "gemma2")
    state = transform.init(KEY, params, uses=uses)
    options = {"uses": uses, "task_type": "CAUSAL_LM"}
    assert save_adapter(tmp_path / "own", transform, state, params, LLAMA, **options) == "JPEFT"
    save_adapter(tmp_path, transform, state, params, LLAMA, config=model.config, **options)
    with pytest.raises(CheckpointError, match="pass config=model.config"):
        load_adapter(tmp_path, params, LLAMA, uses=uses)


def test_prefixes_that_cannot_be_turned_back_are_refused(root, tmp_path):
    model, _, params, uses = loaded("llama", root)
    transform = ours_of("prefix", "llama")
    state = transform.init(KEY, params, uses=uses)
    options = {"uses": uses, "task_type": "CAUSAL_LM"}
    save_adapter(tmp_path, transform, state, params, LLAMA, config=model.config, **options)
    with pytest.raises(CheckpointError, match="pass config=model.config"):
        load_adapter(tmp_path, params, LLAMA, uses=uses)
    changes = (
        {"model_type": "qwen3"},
        {"rope": Rope(rope_type="dynamic", factor=2.0, original_max_position_embeddings=32)},
    )
    for change in changes:
        config = dataclasses.replace(model.config, **change)
        with pytest.raises(CheckpointError, match="which have no inverse"):
            load_adapter(tmp_path, params, LLAMA, uses=uses, config=config)
        own = save_adapter(tmp_path / "own", transform, state, params, LLAMA, config=config)
        assert own == "JPEFT"
