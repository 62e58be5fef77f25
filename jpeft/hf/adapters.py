"""Adapters in Hugging Face PEFT's directories: `adapter_config.json`, `adapter_model.safetensors`.

LoRA (rsLoRA, DoRA), IA3, prompt tuning and prefix tuning are PEFT's own files, both ways. What PEFT
has no form for is written in the same two files as `"peft_type": "JPEFT"`, which only this package
reads.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jpeft import files
from jpeft._disk import CheckpointError, atomically
from jpeft.config import VERSION, ConfigError, from_json, to_json
from jpeft.hf import adapter_lora, adapter_prompt
from jpeft.hf.adapter_config import CONFIG, OWN, TENSORS, read_options
from jpeft.hf.adapter_ia3 import IA3WithBias, read_ia3, write_ia3
from jpeft.hf.adapter_lora import read_lora, write_lora
from jpeft.hf.adapter_names import Contents, Names
from jpeft.hf.adapter_prompt import read_prefix, read_prompt, write_prefix, write_prompt
from jpeft.hf.adapter_saved import Saved, read_saved, write_saved
from jpeft.hf.names import Family
from jpeft.ia3 import IA3
from jpeft.lora import LoRA
from jpeft.paths import TargetError
from jpeft.prefix import PrefixTuning
from jpeft.prompt import PromptTuning
from jpeft.transform import Chain, Params, Train, Trainable, Transform, chain
from jpeft.uses import Uses

_READERS: Mapping[str, tuple[Callable[..., Any], str]] = {
    "LORA": (read_lora, adapter_lora.PREFIX),
    "IA3": (read_ia3, adapter_lora.PREFIX),
    "PROMPT_TUNING": (read_prompt, adapter_prompt.PREFIX),
    "PREFIX_TUNING": (read_prefix, adapter_prompt.PREFIX),
}
# By exact type: what derives from one of these acts otherwise.
_WRITERS: Mapping[type, tuple[Callable[..., Any], str]] = {
    LoRA: (write_lora, adapter_lora.PREFIX),
    IA3: (write_ia3, adapter_lora.PREFIX),
    IA3WithBias: (write_ia3, adapter_lora.PREFIX),
    PromptTuning: (write_prompt, adapter_prompt.PREFIX),
    PrefixTuning: (write_prefix, adapter_prompt.PREFIX),
}


def load_adapter(
    directory: str | pathlib.Path,
    params: Params,
    family: Family,
    *,
    uses: Uses | None = None,
    config: Any = None,
) -> tuple[Transform, Trainable]:
    """A transform and its trained state from an adapter's directory.

    Modules that are saved whole, and trained biases, become a `jpeft.Train` before the method in a
    chain. A prefix is set at the first positions (`after=0`); see `PrefixTuning`.

    **Arguments:** `params`, the model's parameters; `family`, how its files call them; `uses`, as
    for the transform's `init`, needed by some methods that PEFT does not have, and to tell whether
    an adapted table of embeddings is the output head too, which PEFT's adapters leave as it was;
    `config`, the model's configuration, needed for prefixes of models with a rotary embedding, and
    for prompts of Gemma.

    **Raises:** `CheckpointError` for files that are absent, damaged or pickled, for an option or a
    value that is not known here, and with every missing, unexpected and misshapen tensor.
    """
    directory = pathlib.Path(directory)
    about = _read_config(directory)
    if about.get("peft_type") == OWN:
        return _load_own(directory, about, params, uses)
    options = read_options(about, directory / CONFIG)
    read, prefix = _READERS[about["peft_type"]]
    names, contents = Names(family, params, uses, config), Contents(directory / TENSORS, family)
    try:
        method, state, targets = read(names, options, contents)
        saved = read_saved(names, options, contents, prefix, targets)
    except CheckpointError as e:
        raise CheckpointError(f"{directory}: {e}") from e
    except ValueError as e:  # a number that the transform refuses, such as a dropout of 2
        raise CheckpointError(f"{directory / CONFIG}: {e}") from e
    contents.skip(family.ignored)
    contents.finish()
    if saved is None:
        return method, state
    return chain(saved[0], method), (saved[1], state)


def save_adapter(
    directory: str | pathlib.Path,
    transform: Transform,
    trainable: Trainable,
    params: Params,
    family: Family,
    *,
    base_model_name: str | None = None,
    task_type: str | None = None,
    uses: Uses | None = None,
    config: Any = None,
) -> str:
    """Write a trained state so that PEFT loads it, or in this package's form where PEFT cannot.

    PEFT has a form for `LoRA`, `IA3`, `PromptTuning` and `PrefixTuning` of matrices, one of them,
    alone or chained with `Train` of whole modules or of biases. Separate updates of a fused
    kernel's parts come back as one of the whole kernel, the network of a prefix as its result, and
    a `Train(last=...)`, or `IA3` on a layer with a bias (which PEFT scales too, see `IA3WithBias`),
    is not PEFT's.

    **Arguments:** `base_model_name`, the base's name or directory, by which PEFT finds it;
    `task_type`, such as `SEQ_CLS` or `CAUSAL_LM`: PEFT wants the heads of some in the file, which
    are then written as they are in `params` if they were not trained. Prompts and prefixes need
    it: without one PEFT loads them, and runs the model as if they were not there; `uses`, what
    `jpeft.uses` found: a table that is the output head too cannot be adapted in PEFT's form, and
    without `uses` that of a model with no other head is taken for one; `config`, the model's
    configuration: without it prefixes of models with a rotary embedding, and prompts of Gemma, are
    not in PEFT's form.

    **Returns:** the `peft_type` that was written: `JPEFT` for this package's own.

    **Raises:** `OSError` when the files cannot be written, and then neither is touched;
    `jpeft.ConfigError` for a transform that JSON has no form for; `ValueError` for a prompt or a
    prefix without `task_type`.
    """
    directory = pathlib.Path(directory)
    names = Names(family, params, uses, config)
    written = _as_peft(transform, trainable, names, task_type)
    about = {"base_model_name_or_path": base_model_name, "task_type": task_type}
    header = {"format": "pt"}
    if written is None:
        options = {"peft_type": OWN, "version": VERSION, "transform": to_json(transform)}
        tensors = {k: np.asarray(v) for k, v in files.names(trainable).items()}
        described = {"version": VERSION, "metadata": {}, "transform": options["transform"]}
        header = {"jpeft": json.dumps(described, sort_keys=True)}
    else:
        options, tensors = written
        if options["peft_type"] in ("PROMPT_TUNING", "PREFIX_TUNING") and task_type is None:
            raise ValueError(
                "PEFT puts prompts and prefixes before the input of a task only: pass task_type, "
                "such as 'CAUSAL_LM', 'SEQ_CLS' or 'FEATURE_EXTRACTION'"
            )
        options = {**options, "inference_mode": True}
    text = json.dumps({**options, **about}, indent=2, sort_keys=True) + "\n"
    arrays = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    atomically(
        {
            directory / TENSORS: lambda p: save_file(arrays, p, metadata=header),
            directory / CONFIG: lambda p: p.write_text(text, encoding="utf-8"),
        }
    )
    return str(options["peft_type"])


def whole(transform: Transform, trainable: Trainable) -> set[str]:
    """The paths of the parameters that an adapter has whole: a base's own do not count there."""
    parts = _flat(transform, trainable)
    return {path for t, s in parts if isinstance(t, Train) and t.last is None for path in s}


def _as_peft(
    transform: Transform, trainable: Trainable, names: Names, task_type: str | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    parts = _flat(transform, trainable)
    methods = [(t, s) for t, s in parts if not isinstance(t, Train)]
    if len(methods) != 1 or type(methods[0][0]) not in _WRITERS:
        return None
    method, state = methods[0]
    write, prefix = _WRITERS[type(method)]
    trained: dict[str, Any] = {}
    for t, s in parts:
        if isinstance(t, Train):
            # The same parameter twice: the later would hide the earlier.
            if t.last is not None or {*s} & {*trained, *state}:
                return None
            trained |= s
    written = write(method, state, names)
    if written is None:
        return None
    config, tensors, targets = written
    saved: Saved | None = write_saved(
        names, trained, targets, prefix, task_type, biases=config["peft_type"] == "LORA"
    )
    if saved is None:
        return None
    config = {**config, "modules_to_save": list(saved.modules) or None}
    if config["peft_type"] == "LORA":
        config["bias"] = saved.bias
    return config, {**tensors, **saved.tensors}


def _flat(transform: Transform, trainable: Trainable) -> list[tuple[Transform, Trainable]]:
    if not isinstance(transform, Chain):
        return [(transform, trainable)]
    pairs = zip(transform.transforms, trainable, strict=True)
    return [part for t, s in pairs for part in _flat(t, s)]


def _load_own(
    directory: pathlib.Path, config: Mapping[str, Any], params: Params, uses: Uses | None
) -> tuple[Transform, Trainable]:
    version = config.get("version", VERSION)
    if not isinstance(version, int) or version > VERSION or "transform" not in config:
        raise CheckpointError(
            f"{directory / CONFIG} has format {version!r} and {sorted(config)}; this version reads "
            f"{VERSION}, with a transform: update jpeft"
        )
    try:
        transform = from_json(config["transform"])
    except ConfigError as e:
        raise CheckpointError(f"{directory / CONFIG}: {e}") from e
    try:
        like = jax.eval_shape(lambda: transform.init(jax.random.key(0), params, uses=uses))
    except TargetError as e:
        raise CheckpointError(f"{directory} is of another model: {e}") from e
    return transform, files.load(directory / TENSORS, like)


def _read_config(directory: pathlib.Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    for name in (CONFIG, TENSORS):
        if (directory / name).is_file():
            continue
        if name == TENSORS and (directory / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{directory} has its weights in adapter_model.bin, which is not read (loading a "
                "pickle runs code): convert it with peft, "
                "PeftModel.from_pretrained(base, directory).save_pretrained(directory)"
            )
        raise CheckpointError(f"{directory} has no {name}: it is not an adapter's directory")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{directory / CONFIG} cannot be read as JSON: {e}") from e
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / CONFIG} holds no JSON object")
    return config  # pyright: ignore[reportUnknownVariableType]
