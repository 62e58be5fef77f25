"""Prompts and prefixes in Hugging Face PEFT's files: one tensor, `prompt_embeddings`.

A prompt is (n, width). Prefixes are (n, 2 * layers * width), keys and values alternating layer by
layer, of the width of the key and value heads; what a network computed in training is stored as
its result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.hf.adapter_names import WORDS, Contents, Names, exact
from jpeft.hf.files import CheckpointError
from jpeft.prefix import Prefix, PrefixTuning
from jpeft.prompt import PromptTuning
from jpeft.transform import Trainable

PREFIX, TENSOR = "base_model.", "prompt_embeddings"
Written = tuple[dict[str, Any], dict[str, np.ndarray], list[str]]


def read_prompt(
    names: Names, options: Mapping[str, Any], contents: Contents
) -> tuple[PromptTuning, Trainable, list[str]]:
    """The transform and its state."""
    length, path = options["num_virtual_tokens"], _table(names)
    width = names.leaves[path].shape[1]
    prompt = jnp.asarray(contents.take(TENSOR, (length, width)))
    return PromptTuning(length, exact(path)), {path: {"prompt": prompt}}, []


def write_prompt(method: PromptTuning, state: Trainable, names: Names) -> Written | None:
    """PEFT's options and its tensor."""
    ((path, at),) = state.items()
    if not re.search(WORDS, path):
        return None
    return _config("PROMPT_TUNING", method.length, at["prompt"].shape[1]), _one(at["prompt"]), []


def read_prefix(
    names: Names, options: Mapping[str, Any], contents: Contents
) -> tuple[PrefixTuning, Trainable, list[str]]:
    """The transform and its state.

    **Raises:** `CheckpointError` for models without separate projections named `key` and `value`.
    PEFT's keys stand in the cache, behind a rotary embedding, ours before it; in the families with
    these names there is none.
    """
    found = _sites(names)
    if found is None:
        raise CheckpointError(
            "PEFT's prefixes are read for models whose layers project to 'key' and 'value' and "
            "have no rotary embedding, such as BERT; these parameters have no such pair"
        )
    length, layers = options["num_virtual_tokens"], len(names.layers(found[0]))
    width = names.shape(found[0])[-1]
    if options["num_layers"] not in (None, layers):
        raise CheckpointError(f"num_layers = {options['num_layers']}: this model has {layers}")
    flat = contents.take(TENSOR, (length, 2 * layers * width))
    pieces = flat.reshape(length, layers, 2, width)
    state = {
        path: Prefix(jnp.asarray(pieces[:, :, kind].swapaxes(0, 1)), _axes(path))
        for kind, path in enumerate(found)
    }
    axes = {exact(p): _axes(p) for p in found}
    return PrefixTuning(length, tuple(exact(p) for p in found), axes=axes), state, []


def write_prefix(method: PrefixTuning, state: Trainable, names: Names) -> Written | None:
    """PEFT's options and its tensor, the network of training folded."""
    method, state = method.folded(state)
    found = _sites(names)
    if found is None or method.position != -1:
        return None
    kinds = {path.rsplit("/", 1)[0]: values for path, values in state.items()}
    sites = [path.rsplit("/", 1)[0] for path in found]
    if {*kinds} != {*sites} or any("b" not in x.axes for x in state.values()):
        return None
    # (layers, n, width) each, to (n, layers, 2, width).
    both = np.stack([np.asarray(kinds[s].values) for s in sites], axis=2)
    layers, n, _, width = both.shape
    config = {**_config("PREFIX_TUNING", n, width), "num_layers": layers}
    config |= {"prefix_projection": False, "encoder_hidden_size": width}
    return config, _one(both.swapaxes(0, 1).reshape(n, -1)), []


def _table(names: Names) -> str:
    found = [p for p in names.leaves if re.search(WORDS, p) and not names.places[p].stacked]
    if len(found) != 1:
        raise CheckpointError(
            f"a prompt needs the table of word embeddings; {len(found)} parameters are called as "
            f"one{': ' + ', '.join(found) if found else ''}"
        )
    return found[0]


def _sites(names: Names) -> tuple[str, str] | None:
    """The paths that keys' and values' prefixes are set at; None where there is no one pair."""
    pair: list[str] = []
    for kind in ("key", "value"):
        kernels = [
            p
            for p in names.leaves
            if re.search(rf"(^|/){kind}/kernel$", p) and names.places[p].stacked
        ]
        if len(kernels) != 1 or len(names.shape(kernels[0])) != 2:
            return None
        bias = kernels[0].removesuffix("kernel") + "bias"
        pair.append(bias if bias in names.leaves else kernels[0])
    return pair[0], pair[1]


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
