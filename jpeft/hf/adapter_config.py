"""`adapter_config.json`: which of Hugging Face PEFT's options are read, and which are refused.

An option that is dropped in silence would give another model, so every one has a line here: it is
read, or it has no bearing on a trained adapter, or only the values in which it does nothing pass.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jpeft._disk import listed
from jpeft._near import did_you_mean
from jpeft.hf.files import CheckpointError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OWN = "JPEFT"
# What says where an adapter comes from, not what it is. `task_type` is read where it matters.
_METADATA = {
    "peft_type": None,
    "peft_version": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": None,
    "task_type": None,
}
# Modules that PEFT saves for a task without being told, where the model has them.
HEADS: Mapping[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
ANY_HEAD = frozenset(head for heads in HEADS.values() for head in heads)


@dataclasses.dataclass(frozen=True)
class Known:
    """The options of one `peft_type`.

    **Attributes:** `read`, option to default; `only`, option to the values that change nothing
    here (the first is the default); `ignored`, options that bear on training's start alone.
    """

    read: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()


_OFF = (None, False, {}, [])
_PROMPT = {"num_virtual_tokens": None, "modules_to_save": None, "token_dim": None}
_PROMPT_ONLY = {"num_transformer_submodules": (None, 1)}
KNOWN: Mapping[str, Known] = {
    "LORA": Known(
        read={
            "r": 8,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "target_modules": None,
            "exclude_modules": None,
            "modules_to_save": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": False,
            "use_dora": False,
            "bias": "none",
        },
        only={
            # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base weights too.
            "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
            **dict.fromkeys(
                (
                    "loftq_config",
                    "corda_config",
                    "lora_ga_config",
                    "megatron_config",
                    "trainable_token_indices",
                    "velora_config",
                    "alora_invocation_tokens",
                    "use_qalora",
                    "monteclora_config",
                    "layer_replication",
                    "lora_bias",
                    "target_parameters",
                    "use_bdlora",
                    "arrow_config",
                    "kasa_config",
                    "ensure_weight_tying",
                ),
                _OFF,
            ),
        },
        # On file A is (r, in) and B (out, r) whichever way the base has its kernel.
        ignored=frozenset(
            {"fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "runtime_config"}
        ),
    ),
    "IA3": Known(
        read={
            "target_modules": None,
            "feedforward_modules": None,
            "exclude_modules": None,
            "modules_to_save": None,
        },
        ignored=frozenset({"fan_in_fan_out", "init_ia3_weights"}),
    ),
    "PROMPT_TUNING": Known(
        read=_PROMPT,
        only=_PROMPT_ONLY,
        ignored=frozenset(
            {
                "num_attention_heads",
                "num_layers",
                "prompt_tuning_init",
                "prompt_tuning_init_text",
                "tokenizer_name_or_path",
                "tokenizer_kwargs",
            }
        ),
    ),
    "PREFIX_TUNING": Known(
        read={**_PROMPT, "num_layers": None},
        only=_PROMPT_ONLY,
        # A file holds the prefixes themselves, also those that a network computed in training.
        ignored=frozenset(
            {"num_attention_heads", "prefix_projection", "encoder_hidden_size", "init_weights"}
        ),
    ),
}
_NUMBERS = {"r", "lora_alpha", "lora_dropout", "num_virtual_tokens"}
_TABLES = {"rank_pattern", "alpha_pattern"}
_NAMES = {"target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"}


def read_options(config: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """The options of a file of PEFT's, defaults filled in, with `task_type`.

    **Raises:** `CheckpointError` for a type of adapter, an option or a value of one that is not
    known here; all of them are listed.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KNOWN:
        raise CheckpointError(
            f"{path} describes an adapter of type '{kind}': this reads {', '.join(KNOWN)} and {OWN}"
        )
    known = KNOWN[kind]
    every = {*known.read, *known.only, *known.ignored, *_METADATA}
    problems: list[str] = []
    for key, value in config.items():
        if key not in every:
            problems.append(f"unknown option: {key} = {value!r}{did_you_mean(key, every)}")
        elif key in known.only and not _among(value, known.only[key]):
            problems.append(f"not supported: {key} = {value!r}")
    options = {**known.read, **{k: v for k, v in config.items() if k in known.read}}
    for key, value in options.items():
        wrong = _wrong(key, value)
        if wrong:
            problems.append(f"{key} = {value!r} is no {wrong}")
    if options.get("bias") not in (None, "none", "all", "lora_only"):
        problems.append(f"not supported: bias = {options['bias']!r}")
    if problems:
        raise CheckpointError(listed(f"{path} asks for what is not read", problems))
    return {**options, "task_type": config.get("task_type")}


def _among(value: Any, allowed: tuple[Any, ...]) -> bool:
    # By type as well: 1 is not True here, nor 0 False.
    return any(type(value) is type(a) and value == a for a in allowed)


def _wrong(key: str, value: Any) -> str:
    """What a value should have been; the empty string where it is."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key in ("r", "num_virtual_tokens"):
        return "" if isinstance(value, int) and number and value > 0 else "positive whole number"
    if key in _NUMBERS:
        return "" if number else "number"
    if key in _TABLES:
        numbers = isinstance(value, dict) and all(
            isinstance(v, (int, float)) and v > 0 for v in value.values()
        )
        return "" if numbers else "table of positive numbers"
    if key in _NAMES:
        names = isinstance(value, list) and all(isinstance(v, str) for v in value)
        pattern = isinstance(value, str) and key != "modules_to_save"
        return "" if value is None or names or pattern else "list of names"
    return ""
