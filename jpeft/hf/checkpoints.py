"""Hugging Face checkpoints of BERT and RoBERTa, read into our parameters and written back.

One table says which tensor goes where. Layers are stacked one tensor at a time, so that the host
holds one parameter beside the model.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from jpeft.functional import functional
from jpeft.hf.files import CheckpointError, Tensors, read_config, write
from jpeft.models.bert import Bert, BertConfig, BertForSequenceClassification, Pooling
from jpeft.paths import flatten, replace

_LAYER = r"encoder\.layer\.\d+\."
_DENSE = r"attention\.self\.(?:query|key|value)|(?:attention\.output|intermediate|output)\.dense"
# Hugging Face's name, without the model's prefix, and our path. The layer's number becomes an
# index into axis 0; a path that ends in `kernel` holds the transposed matrix.
TABLE: tuple[tuple[str, str], ...] = (
    (r"embeddings\.(\w+_embeddings)\.weight", r"embeddings/\1/embedding"),
    (r"embeddings\.LayerNorm\.(?:weight|gamma)", r"embeddings/LayerNorm/scale"),
    (r"embeddings\.LayerNorm\.(?:bias|beta)", r"embeddings/LayerNorm/bias"),
    (_LAYER + r"(.*LayerNorm)\.(?:weight|gamma)", r"encoder/layer/\1/scale"),
    (_LAYER + r"(.*LayerNorm)\.(?:bias|beta)", r"encoder/layer/\1/bias"),
    (_LAYER + rf"({_DENSE})\.weight", r"encoder/layer/\1/kernel"),
    (_LAYER + rf"({_DENSE})\.bias", r"encoder/layer/\1/bias"),
    (r"pooler\.dense\.weight", r"pooler/dense/kernel"),
    (r"pooler\.dense\.bias", r"pooler/dense/bias"),
    (r"(classifier(?:\.dense|\.out_proj)?)\.weight", r"\1/kernel"),
    (r"(classifier(?:\.dense|\.out_proj)?)\.bias", r"\1/bias"),
)
# What a checkpoint may hold that these models do not read: buffers, and pre-training's heads.
IGNORED = r"(.*\.)?position_ids$|(.*\.)?token_type_ids$|cls\.|lm_head\.|qa_outputs\."
# What may be absent, and is then new.
NEW = r"^classifier/|(^|/)pooler/"


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave: paths that are `new` (initialised), tensors that were `ignored`."""

    new: tuple[str, ...]
    ignored: tuple[str, ...]


def load_sequence_classifier(
    directory: str | pathlib.Path,
    num_labels: int,
    *,
    key: PRNGKeyArray,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
    unroll: int = 1,
    attention_rows: int | None = None,
    pooling: Pooling = "cls",
) -> tuple[BertForSequenceClassification, LoadReport]:
    """A BERT or RoBERTa with a head, from a Hugging Face directory.

    **Arguments:** `key` initialises what the checkpoint has not (a head, a pooler); the others as
    `BertForSequenceClassification`'s.

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

    return _load(directory, build, key, prefix=f"{config.model_type}/")


def load_bert(
    directory: str | pathlib.Path,
    *,
    key: PRNGKeyArray,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
    unroll: int = 1,
    attention_rows: int | None = None,
    pooler: bool = True,
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

    return _load(directory, build, key, prefix="")


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
    if model.pooling != "cls":
        raise ValueError("transformers' classifier reads the first token: save with pooling='cls'")
    c = model.config
    if params is None:
        params = functional(model).params
    tensors: dict[str, np.ndarray] = {}
    for path, array in flatten(params).items():
        kernel = path.endswith("/kernel")
        name = re.sub(r"/(scale|kernel|embedding)$", "/weight", path).replace("/", ".")
        if "/layer/" in path:
            for i, value in enumerate(np.asarray(array)):
                at = name.replace(".layer.", f".layer.{i}.")
                tensors[at] = value.T if kernel else value
        else:
            tensors[name] = np.asarray(array).T if kernel else np.asarray(array)
    names = id2label or {i: f"LABEL_{i}" for i in range(model.num_labels)}
    head = "ForSequenceClassification"
    config = {
        **dataclasses.asdict(c),
        "architectures": [("Roberta" if c.model_type == "roberta" else "Bert") + head],
        "id2label": {str(i): n for i, n in names.items()},
        "label2id": {n: i for i, n in names.items()},
        "torch_dtype": str(next(iter(tensors.values())).dtype),
    }
    if c.model_type == "roberta":
        config |= {"bos_token_id": 0, "eos_token_id": 2}
    write(pathlib.Path(directory), config, tensors)


def read_bert_config(directory: pathlib.Path) -> BertConfig:
    """The shape of a BERT or RoBERTa. **Raises:** `CheckpointError` for another architecture."""
    raw = read_config(directory)
    kind = raw.get("model_type")
    if kind not in ("bert", "roberta"):
        raise CheckpointError(
            f"{directory} holds a model of type '{kind}': this reads 'bert' and 'roberta'"
        )
    try:
        return BertConfig.from_hf(raw)
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{directory / 'config.json'}: {e}") from e


def _load(directory: pathlib.Path, build: Any, key: PRNGKeyArray, prefix: str) -> Any:
    tensors = Tensors(directory)
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    want = flatten(nnx.to_pure_dict(state))
    sources, ignored = _sources(tensors, prefix)
    unexpected = [n for path, of in sources.items() if path not in want for n in of.values()]
    # A head or pooler that this model does not have is left in the file.
    ignored += [n for n in unexpected if re.search(r"pooler|classifier", n)]
    problems = [f"unexpected: {n}" for n in unexpected if n not in ignored]
    new: list[str] = []
    for path, leaf in want.items():
        stacked = "/layer/" in path
        layers = range(leaf.shape[0]) if stacked else [0]
        found = sources.get(path, {})
        if not found and re.search(NEW, path):
            new.append(path)
            continue
        problems += [
            f"missing: the tensor of {path}" + (f", layer {i}" if stacked else "")
            for i in layers
            if i not in found
        ]
        problems += [f"unexpected: {n}" for i, n in found.items() if i not in layers]
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = tuple(reversed(shape)) if path.endswith("/kernel") else tuple(shape)
        for name in found.values():
            if tensors.shape(name) != shape:
                if re.search(r"^classifier/", path):
                    new.append(path)  # a head for another number of labels
                    ignored.append(name)
                    continue
                problems.append(f"misshapen: {name} is {tensors.shape(name)}, not {shape}")
    if problems:
        raise CheckpointError(_listed(directory, problems))
    fresh = functional(build(nnx.Rngs(key))).params if new else {}
    initial = flatten(fresh)
    values = {
        path: initial[path] if path in new else _stack(tensors, sources[path], path, leaf)
        for path, leaf in want.items()
    }
    nnx.replace_by_pure_dict(state, replace(nnx.to_pure_dict(state), values))
    return nnx.merge(graphdef, state), LoadReport(tuple(sorted(set(new))), tuple(ignored))


def _sources(tensors: Tensors, prefix: str) -> tuple[dict[str, dict[int, str]], list[str]]:
    """Our path -> layer -> tensor name, and the names that are not read."""
    sources: dict[str, dict[int, str]] = {}
    ignored: list[str] = []
    for name in tensors.names():
        if re.match(IGNORED, name):
            ignored.append(name)
            continue
        bare = re.sub(r"^(bert|roberta)\.", "", name)
        for pattern, path in TABLE:
            if re.fullmatch(pattern, bare):
                path = re.sub(pattern, path, bare).replace(".", "/")
                path = path if path.startswith("classifier/") else prefix + path
                break
        else:
            path = name
        layer = re.search(r"\.layer\.(\d+)\.", name)
        sources.setdefault(path, {})[int(layer[1]) if layer else 0] = name
    return sources, ignored


def _stack(tensors: Tensors, of: Mapping[int, str], path: str, leaf: Any) -> jax.Array:
    def one(name: str) -> np.ndarray:
        value = tensors.read(name)
        return (value.T if path.endswith("/kernel") else value).astype(leaf.dtype)

    if "/layer/" not in path:
        return jnp.asarray(one(of[0]))
    stacked = np.empty(leaf.shape, leaf.dtype)
    for i, name in of.items():
        stacked[i] = one(name)
    return jnp.asarray(stacked)


def _listed(directory: pathlib.Path, problems: list[str], most: int = 8) -> str:
    lines = "\n".join(f"  {p}" for p in problems[:most])
    more = f"\n  and {len(problems) - most} more" if len(problems) > most else ""
    return f"{directory} does not hold this model:\n{lines}{more}"
