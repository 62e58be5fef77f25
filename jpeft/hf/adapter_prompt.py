"""Prompts and prefixes in Hugging Face PEFT's files: one tensor, `prompt_embeddings`.

A prompt is (n, width), and stands behind the factor by which Gemma's embeddings multiply what they
look up, as transformers 5 has it; ours is looked up. Prefixes are (n, 2 * layers * width), keys and
values alternating layer by layer, of the width of the key and value heads; what a network computed
in training is stored as its result.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.hf.adapter_names import WORDS, Contents, Names, exact
from jpeft.hf.files import CheckpointError
from jpeft.models.rope import rotate, rotation
from jpeft.prefix import Prefix, PrefixTuning
from jpeft.prompt import PromptTuning
from jpeft.transform import Trainable

PREFIX, TENSOR = "base_model.", "prompt_embeddings"
Written = tuple[dict[str, Any], dict[str, np.ndarray], list[str]]


def read_prompt(
    names: Names, options: Mapping[str, Any], contents: Contents
) -> tuple[PromptTuning, Trainable, list[str]]:
    """The transform and its state.

    **Raises:** `CheckpointError` for a Gemma without its configuration.
    """
    length, path, factor = options["num_virtual_tokens"], _table(names), _factor(names)
    if factor is None:
        raise CheckpointError(
            "PEFT's prompts stand behind the factor of Gemma's embeddings: pass "
            "config=model.config, by which they are divided"
        )
    width = names.leaves[path].shape[1]
    prompt = jnp.asarray(contents.take(TENSOR, (length, width)) / factor)
    return PromptTuning(length, exact(path)), {path: {"prompt": prompt}}, []


def write_prompt(method: PromptTuning, state: Trainable, names: Names) -> Written | None:
    """PEFT's options and its tensor."""
    ((path, at),) = state.items()
    factor = _factor(names)
    if factor is None or not re.search(WORDS, path):
        return None
    prompt = at["prompt"] * factor
    return _config("PROMPT_TUNING", method.length, prompt.shape[1]), _one(prompt), []


def read_prefix(
    names: Names, options: Mapping[str, Any], contents: Contents
) -> tuple[PrefixTuning, Trainable, list[str]]:
    """The transform and its state.

    **Raises:** `CheckpointError` for models without one place for keys and values in every layer,
    or whose keys are changed between our prefixes' place and PEFT's in a way that has no inverse.
    """
    sites = _sites(names)
    if sites is None:
        raise CheckpointError(
            "PEFT's prefixes are read for models whose layers project to key and value (or k_proj "
            "and v_proj) or by c_attn; these parameters have no such places"
        )
    why_not = sites.rotary and _no_inverse(names.config)
    if why_not:
        raise CheckpointError(why_not)
    length, layers = options["num_virtual_tokens"], len(names.layers(sites.paths[0]))
    width = names.shape(sites.paths[0])[-1] // sites.parts
    if options["num_layers"] not in (None, layers):
        raise CheckpointError(f"num_layers = {options['num_layers']}: this model has {layers}")
    flat = contents.take(TENSOR, (length, 2 * layers * width))
    keys, values = flat.reshape(length, layers, 2, width).transpose(2, 1, 0, 3)
    if sites.rotary:
        keys = _turned(keys, names.config, back=True)
    # In a fused kernel's result the virtual tokens' queries stand first: nobody reads their answer.
    pieces = [keys, values] if sites.parts == 1 else [np.concatenate([0 * keys, keys, values], -1)]
    state = {
        path: Prefix(jnp.asarray(piece), _axes(path))
        for path, piece in zip(sites.paths, pieces, strict=True)
    }
    axes = {exact(p): _axes(p) for p in sites.paths}
    return PrefixTuning(length, tuple(exact(p) for p in sites.paths), axes=axes), state, []


def write_prefix(method: PrefixTuning, state: Trainable, names: Names) -> Written | None:
    """PEFT's options and its tensor, the network of training folded."""
    method, state = method.folded(state)
    sites = _sites(names)
    if sites is None or method.position != -1 or (sites.rotary and _no_inverse(names.config)):
        return None
    kinds = {path.rsplit("/", 1)[0]: values for path, values in state.items()}
    places = [path.rsplit("/", 1)[0] for path in sites.paths]
    if {*kinds} != {*places} or any("b" not in x.axes for x in state.values()):
        return None
    found = [np.asarray(kinds[p].values) for p in places]  # (layers, n, width) each
    keys, values = found if sites.parts == 1 else np.split(found[0], sites.parts, axis=-1)[1:]
    if sites.rotary:
        keys = _turned(keys, names.config, back=False)
    both = np.stack([keys, values])  # to (n, layers, 2, width)
    _, layers, n, width = both.shape
    config = {**_config("PREFIX_TUNING", n, width), "num_layers": layers}
    config |= {"prefix_projection": False, "encoder_hidden_size": width}
    return config, _one(both.transpose(2, 1, 0, 3).reshape(n, -1)), []


def _no_inverse(config: Any) -> str:
    """Why PEFT's keys, which stand behind the rotary embedding, cannot be turned back to where ours
    stand, before it; the empty string where they can.
    """
    if config is None:
        return (
            "PEFT's prefixes stand behind the rotary embedding: pass config=model.config, by which "
            "they are turned back"
        )
    if config.qk_norm or config.local_rope is not None or config.rope.by_length:
        return (
            f"PEFT's prefixes stand behind the norms and the rotary embedding of this model's keys "
            f"({config.model_type}, rope_type '{config.rope.rope_type}'), which have no inverse"
        )
    return ""


def _turned(keys: np.ndarray, config: Any, *, back: bool) -> np.ndarray:
    """Keys `(layers, n, width)` at positions 0 to n, turned by the rotary embedding, or back."""
    layers, n, _ = keys.shape
    cos, sin = rotation(config.rope, jnp.arange(n)[None], config.width)
    if back:
        # The embedding also scales by its amplitude, in some kinds.
        square = config.rope.amplitude**2
        cos, sin = cos / square, -sin / square
    cos, sin = (jnp.broadcast_to(x, (layers, *x.shape[1:])) for x in (cos, sin))
    heads = jnp.asarray(keys).reshape(layers, n, -1, config.width)
    return np.asarray(rotate(heads, cos, sin)).reshape(keys.shape)


def _factor(names: Names) -> float | None:
    """What a model multiplies the rows with that it looks up; None for a Gemma without its
    configuration, which its norms give away.
    """
    if names.config is None:
        gemma = any("/pre_feedforward_layernorm/" in path for path in names.leaves)
        return None if gemma else 1.0
    return names.config.hidden_size**0.5 if getattr(names.config, "gemma", False) else 1.0


def _table(names: Names) -> str:
    found = [p for p in names.leaves if re.search(WORDS, p) and not names.places[p].stacked]
    if len(found) != 1:
        raise CheckpointError(
            f"a prompt needs the table of word embeddings; {len(found)} parameters are called as "
            f"one{': ' + ', '.join(found) if found else ''}"
        )
    return found[0]


@dataclasses.dataclass(frozen=True)
class _Sites:
    """Where prefixes are set: the paths of keys and values, or one of a kernel that makes query,
    key and value (`parts` 3); `rotary`, whether keys are turned behind it.
    """

    paths: tuple[str, ...]
    parts: int = 1
    rotary: bool = False


def _sites(names: Names) -> _Sites | None:
    """None where there is no one place in every layer."""

    def of(kind: str) -> str | None:
        kernels = [
            p
            for p in names.leaves
            if re.search(rf"(^|/){kind}/kernel$", p) and names.places[p].stacked
        ]
        if len(kernels) != 1 or len(names.shape(kernels[0])) != 2:
            return None
        bias = kernels[0].removesuffix("kernel") + "bias"
        return bias if bias in names.leaves else kernels[0]

    fused = of("c_attn")
    if fused is not None:
        return _Sites((fused,), parts=3)
    for pair, rotary in ((("key", "value"), False), (("k_proj", "v_proj"), True)):
        paths = tuple(p for p in map(of, pair) if p is not None)
        if len(paths) == 2:
            return _Sites(paths, rotary=rotary)
    return None


def _axes(path: str) -> str:
    return "bo" if path.endswith("bias") else "bio"


def _config(kind: str, length: int, width: int) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": 1,
    }


def _one(value: Any) -> dict[str, np.ndarray]:
    return {TENSOR: np.asarray(value)}
