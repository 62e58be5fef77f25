"""A model of any kind as the commands take it, language model or classifier, and its adapters."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpeft.hf.adapter_config import CONFIG, HEADS
from jpeft.hf.adapters import load_adapter
from jpeft.hf.checkpoints import bert_family, load_sequence_classifier, save_sequence_classifier
from jpeft.hf.files import CheckpointError, read_config, read_json
from jpeft.hf.models import load_model, read_kind, save_model
from jpeft.hf.names import Family
from jpeft.models.bert import BertForSequenceClassification
from jpeft.quantize import Quantize
from jpeft.transform import Trainable, Transform
from jpeft.uses import Uses

# How the names of architectures end that are a sequence classifier, or what one is made of.
_ENCODERS = ("ForSequenceClassification", "Model", "ForPreTraining", "ForMaskedLM")


class Opened(NamedTuple):
    """A model of any kind: the module, its names in files, what writes a directory of it with
    other parameters, and the paths of parameters that it has not, which are drawn at random.
    """

    model: Any
    family: Family
    save: Callable[[pathlib.Path, Any], None]
    new: tuple[str, ...] = ()


def open_model(
    directory: str | pathlib.Path, dtype: Any = jnp.float32, quantize: Quantize | None = None
) -> Opened:
    """A language model as `load_model`'s, or a BERT or RoBERTa with a classifier for the labels
    that its `config.json` names.

    **Raises:** as `load_model`; `CheckpointError` for a BERT or RoBERTa with another head than a
    sequence classifier's or pre-training's, or with another number of classes than of labels.
    """
    directory = pathlib.Path(directory)
    raw = read_config(directory)
    kind = raw.get("model_type")
    if kind not in ("bert", "roberta"):
        model, _ = load_model(directory, dtype=dtype, quantize=quantize)
        return Opened(model, read_kind(directory)[0].family, lambda to, p: save_model(model, to, p))
    for name in raw.get("architectures") or ():
        if not name.endswith(_ENCODERS):
            raise CheckpointError(
                f"{directory} holds a {name}: of BERT and RoBERTa this opens sequence classifiers, "
                "and pre-trained encoders for one"
            )
    names = label_names(raw)
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "key": jax.random.key(0)}
    options["quantize"] = quantize
    classifier, report = load_sequence_classifier(directory, len(names), **options)
    other = [name for name in report.ignored if name.startswith("classifier")]
    if other:
        raise CheckpointError(
            f"{directory}: {other[0]} has not the {len(names)} classes of config.json: correct "
            "num_labels or id2label there"
        )
    return Opened(
        classifier,
        bert_family(kind),
        lambda to, p: save_sequence_classifier(classifier, to, p, names),
        report.new,
    )


def label_names(config: Mapping[str, Any]) -> dict[int, str]:
    """A classifier's labels, as transformers reads them: `num_labels` goes before `id2label`."""
    given = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
    count = config.get("num_labels") or len(given) or 2
    return given if len(given) == count else {i: f"LABEL_{i}" for i in range(count)}


def adapter_of(
    opened: Opened, directory: pathlib.Path, params: Any, uses: Uses
) -> tuple[Transform, Trainable]:
    """An adapter's transform and state. **Raises:** as `load_adapter`; `CheckpointError` for a
    classifier of tokens or spans.
    """
    found = load_adapter(directory, params, opened.family, uses=uses, config=opened.model.config)
    task = read_json(directory / CONFIG).get("task_type")
    classifier = isinstance(opened.model, BertForSequenceClassification)
    if classifier and task in HEADS and task != "SEQ_CLS":
        raise CheckpointError(
            f"{directory} was trained for {task}: of BERT and RoBERTa there are sequence "
            "classifiers (SEQ_CLS) alone"
        )
    return found
