"""Hugging Face checkpoints of BERT and RoBERTa, read into our parameters and written back."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from jpeft.functional import functional
from jpeft.hf.files import CheckpointError, read_config, write
from jpeft.hf.names import Family
from jpeft.hf.params import LoadReport, lazy_tensors, load_params
from jpeft.hf.quantized_files import without_quantization
from jpeft.models.bert import Bert, BertConfig, BertForSequenceClassification, Pooling
from jpeft.models.layers import Remat
from jpeft.paths import flatten
from jpeft.quantize import Quantize

# Buffers, and pre-training's heads.
_UNREAD = r"position_ids$|token_type_ids$|^cls\.|^lm_head\.|^qa_outputs\."
_OLD = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def bert_family(kind: str, head: bool = True) -> Family:
    """BERT's and RoBERTa's names in files.

    **Arguments:** `kind`, `bert` or `roberta`; `head`, whether the model has a classifier: our
    encoder alone has no prefix in its paths.
    """
    return Family(
        stacks=(f"{kind}/encoder/layer" if head else "encoder/layer",),
        prefix=f"{kind}.",
        ignored=_UNREAD + r"|pooler\." + ("" if head else r"|^classifier\."),
        new=r"^classifier/|(^|/)pooler/",
        replaced=r"^classifier/",
        renames=_OLD,
    )


def load_sequence_classifier(
    directory: str | pathlib.Path,
    num_labels: int,
    *,
    key: PRNGKeyArray,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: Remat = False,
    unroll: int = 1,
    attention_rows: int | None = None,
    pooling: Pooling = "cls",
    quantize: Quantize | None = None,
) -> tuple[BertForSequenceClassification, LoadReport]:
    """A BERT or RoBERTa with a head, from a Hugging Face directory.

    **Arguments:** `key` initialises what the checkpoint has not (a head, a pooler); `quantize`, as
    `load_model`'s; the others as `BertForSequenceClassification`'s.

    **Raises:** `CheckpointError` with every missing, unexpected and misshapen tensor.
    """
    directory = pathlib.Path(directory)
    config = read_bert_config(directory)

    def build(rngs: nnx.Rngs) -> BertForSequenceClassification:
        return BertForSequenceClassification(
            config,
            num_labels,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            unroll=unroll,
            attention_rows=attention_rows,
            pooling=pooling,
        )

    return load_module(directory, build, key, bert_family(config.model_type), quantize=quantize)


def load_bert(
    directory: str | pathlib.Path,
    *,
    key: PRNGKeyArray,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: Remat = False,
    unroll: int = 1,
    attention_rows: int | None = None,
    pooler: bool = True,
    quantize: Quantize | None = None,
) -> tuple[Bert, LoadReport]:
    """The encoder alone; arguments and errors as `load_sequence_classifier`'s."""
    directory = pathlib.Path(directory)
    config = read_bert_config(directory)

    def build(rngs: nnx.Rngs) -> Bert:
        return Bert(
            config,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            unroll=unroll,
            attention_rows=attention_rows,
            pooler=pooler,
        )

    family = bert_family(config.model_type, head=False)
    return load_module(directory, build, key, family, quantize=quantize)


def save_sequence_classifier(
    model: BertForSequenceClassification,
    directory: str | pathlib.Path,
    params: Any = None,
    id2label: Mapping[int, str] | None = None,
) -> None:
    """A directory that transformers loads: `config.json` and `model.safetensors`.

    **Arguments:** `params`, ordinary parameters to write in place of the model's own, such as
    merged ones; `id2label`, the labels' names.

    **Raises:** `ValueError` for a model that Hugging Face has no name for (`pooling="mean"`);
    `OSError` when it cannot be written, and then nothing is.
    """
    if params is None:
        params = functional(model).params
    config = classifier_config(model, params, id2label)
    family = bert_family(model.config.model_type)
    write(pathlib.Path(directory), config, lazy_tensors(params, family))


def classifier_config(
    model: BertForSequenceClassification, params: Any, id2label: Mapping[int, str] | None
) -> dict[str, Any]:
    """A classifier's `config.json`. **Raises:** `ValueError`, as `save_sequence_classifier`."""
    if model.pooling != "cls":
        raise ValueError("transformers' classifier reads the first token: save with pooling='cls'")
    c = model.config
    names = id2label or {i: f"LABEL_{i}" for i in range(model.num_labels)}
    head = "ForSequenceClassification"
    config = {
        **dataclasses.asdict(c),
        "architectures": [("Roberta" if c.model_type == "roberta" else "Bert") + head],
        "id2label": {str(i): n for i, n in names.items()},
        "label2id": {n: i for i, n in names.items()},
        "torch_dtype": str(next(iter(flatten(params).values())).dtype),
    }
    if c.model_type == "roberta":
        config |= {"bos_token_id": 0, "eos_token_id": 2}
    return config


def read_bert_config(directory: pathlib.Path) -> BertConfig:
    """The shape of a BERT or RoBERTa. **Raises:** `CheckpointError` for another architecture."""
    raw = without_quantization(directory, read_config(directory))
    kind = raw.get("model_type")
    if kind not in ("bert", "roberta"):
        raise CheckpointError(
            f"{directory} holds a model of type '{kind}': this reads 'bert' and 'roberta'"
        )
    try:
        return BertConfig.from_hf(raw)
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{directory / 'config.json'}: {e}") from e


def load_module(
    directory: pathlib.Path,
    build: Any,
    key: PRNGKeyArray,
    family: Family,
    sharding: Any = None,
    quantize: Quantize | None = None,
) -> Any:
    """An NNX module that `build(rngs)` makes, with a directory's tensors, and the report.

    **Arguments:** as `load_params`'; `key`, for what is new.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    params, report = load_params(
        directory,
        nnx.to_pure_dict(state),
        family,
        fresh=lambda: functional(build(nnx.Rngs(key))).params,
        sharding=sharding,
        quantize=quantize,
    )
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state), report
