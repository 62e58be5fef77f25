"""Tiny models and a tiny task, for tests that run a whole command."""

import json
import pathlib

from flax import nnx

from jpeft.hf import save_sequence_classifier
from jpeft.models.bert import BertConfig, BertForSequenceClassification
from jpeft.models.llama import LlamaConfig

WORDS = ["good", "fine", "great", "bad", "poor", "sad"]
WORDS += ["the", "film", "was", "not", "very", "a", "plot"]
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}

LLAMA = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def tiny_config(kind: str = "bert", **shape: int) -> BertConfig:
    """Two layers of width 16, where `shape` does not say otherwise."""
    padding = {"pad_token_id": 1, "type_vocab_size": 1} if kind == "roberta" else {}
    return BertConfig(vocab_size=5 + len(WORDS), model_type=kind, **SHAPE | shape, **padding)


def write_model(
    folder: pathlib.Path, kind: str = "bert", num_labels: int = 2, **shape: int
) -> pathlib.Path:
    """`config.json`, `model.safetensors` and `vocab.txt`."""
    model = BertForSequenceClassification(tiny_config(kind, **shape), num_labels, rngs=nnx.Rngs(3))
    save_sequence_classifier(model, folder)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return folder


def write_task(folder: pathlib.Path, rows: int = 40) -> pathlib.Path:
    """A `train.tsv` and a `dev.tsv` of SST-2's layout: the adjective decides."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", rows), ("dev", rows // 2)):
        lines = ["sentence\tlabel"]
        for i in range(count):
            words = "the film was " + "very " * (i % 3) + WORDS[i % 3 + 3 * (i % 2)]
            lines.append(f"{words}\t{1 - i % 2}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def edit_config(folder: pathlib.Path, **changes: object) -> None:
    """Change `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
