"""Answers generated to prompts, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from experiments.common.decoders import Loaded
from experiments.common.language import LanguageTrainer, Render, prompt_ids
from jpeft.models.t5 import decoder_steps


def answer(
    trainer: LanguageTrainer,
    state: Any,
    prompts: Sequence[str],
    loaded: Loaded,
    render: Render,
    rows: int,
    new_tokens: int,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> list[str]:
    """A text for each prompt, `rows` at a time; prompts are padded to few lengths.

    **Arguments:** `beams`, 1 for the likeliest token always.
    """
    codec, model = loaded.codec, loaded.model
    transform, params = trainer.transform, trainer.params
    tree = transform.rewrite(params, state)
    later = transform.decoding().rewrite(params, state)
    ids = [prompt_ids(p, codec, render, loaded.two_sided) for p in prompts]
    order = np.argsort([len(i) for i in ids], kind="stable")
    step = decoder_steps(trainer.apply) if loaded.two_sided else trainer.apply
    options: dict[str, Any] = {"new_tokens": new_tokens, "stop": (codec.end,), "pad": codec.pad}
    if beams > 1:
        options |= {"beams": beams, "length_penalty": length_penalty}
    search = jpeft.beam_search if beams > 1 else jpeft.generate
    encoder = jax.jit(jpeft.lift(trainer.apply)) if loaded.two_sided else None
    found: dict[int, str] = {}
    for start in range(0, len(ids), rows):
        part = order[start : start + rows]
        longest = -(-max(len(ids[i]) for i in part) // 32) * 32
        # The last batch is filled up, so that it is no program of its own.
        filled = [ids[i] for i in part] + [ids[part[0]]] * (rows - len(part))
        prompt, mask = (jnp.asarray(x) for x in jpeft.left_padded(filled, codec.pad, longest))
        batch = {"input_ids": prompt, "attention_mask": mask}
        length, first = trainer.virtual
        if length:
            batch = jpeft.virtual_tokens(batch, length=length, first=first)
        prompt, mask = batch["input_ids"], batch["attention_mask"]
        if encoder is not None:
            encoded = encoder(tree, prompt, mask)
            options["extra"] = {"encoded": encoded, "encoder_mask": mask}
            begin = model.config.decoder_start_token_id
            prompt = jnp.full((rows, 1), begin, jnp.int32)
            mask = jnp.ones_like(prompt)
        cache = model.empty_cache(rows, prompt.shape[1] + new_tokens)
        out = search(step, tree, prompt, mask, cache=cache, decode_params=later, **options)
        for i, tokens, n in zip(
            part, np.asarray(out.tokens), np.asarray(out.lengths), strict=False
        ):
            kept = [int(t) for t in tokens[:n] if t != codec.end]
            found[int(i)] = codec.decode(kept).strip()
    return [found[i] for i in range(len(ids))]
