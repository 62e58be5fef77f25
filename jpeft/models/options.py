"""The options of a `config.json`: one that a model does not know is refused, not passed over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jpeft._near import did_you_mean

# What transformers writes for every model, and what has no bearing on what a model computes.
GENERAL = frozenset(
    [
        "architectures",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cache_implementation",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "label_names",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "output_scores",
        "pad_token_id",
        "prefix",
        "problem_type",
        "pretraining_tp",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)


def check_options(config: Mapping[str, Any], known: Iterable[str], only: Mapping[str, Any]) -> None:
    """Refuse what a model would compute otherwise with.

    **Arguments:** `known`, the options that are read; `only`, options that the model has in one
    way alone, and that way. An option that is null, false or empty is off, and known or not it
    passes; so do those that begin with `_`.

    **Raises:** `ValueError` that names the option and its value.
    """
    for name, value in only.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(f"{name}={config[name]!r} is not supported: only {value!r}")
    names = {*known, *only, *GENERAL}
    for name, value in config.items():
        if name in names or name.startswith("_") or value in (None, False, {}, []):
            continue
        raise ValueError(
            f"unknown option {name}={value!r}{did_you_mean(name, names)}. The model may compute "
            "something else with it: take it out of config.json if it does not"
        )
