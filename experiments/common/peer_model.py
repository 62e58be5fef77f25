"""The model and the batch that both sides of a comparison are given.

`python -m experiments.common.peer_model NAME NUMBERS FOLDER` writes a model: in a process of its
own, so that what it takes of a device's memory is free again before anything is measured.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from experiments.common.peer_cases import ENCODERS, PREFIX, Numbers, check_model, is_stored

if TYPE_CHECKING:
    import numpy as np

LABELS = 2


def write(name: str, numbers: Numbers, out: pathlib.Path, environment: dict[str, str]) -> None:
    """`write_model` in another process. **Raises:** `ValueError` with its message."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, name, numbers, str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"the model {name} could not be written: {said[-1]}")


def write_model(name: str, numbers: Numbers, out: pathlib.Path) -> None:
    """A directory in Hugging Face's layout, in the numbers of the comparison.

    An encoder gets a head for two classes; a name of a shape gets random weights.

    **Raises:** `ModelError`, `CheckpointError`, `OSError`.
    """
    import jax
    import jax.numpy as jnp

    import jpeft
    from experiments.common.models import fetch_model
    from jpeft.hf import load_model, load_sequence_classifier, save_model, save_sequence_classifier

    dtype = jnp.dtype("float32" if numbers == "fp32" else "bfloat16")
    if check_model(name) in ENCODERS:
        model = _encoder() if name == "shape" else None
        if model is None:
            key = jax.random.key(0)
            model, _ = load_sequence_classifier(fetch_model(name), num_labels=LABELS, key=key)
        save_sequence_classifier(model, out, jpeft.cast(jpeft.functional(model).params, dtype))
        return
    if not is_stored(name):
        save_model(_decoder(name, dtype), out)
        return
    folder = fetch_model(name)
    save_model(load_model(folder, dtype=dtype)[0], out)
    settings = folder / "generation_config.json"
    if settings.is_file():
        shutil.copyfile(settings, out / settings.name)


def _encoder() -> Any:
    from flax import nnx

    from jpeft.models.bert import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    return BertForSequenceClassification(config, num_labels=LABELS, rngs=nnx.Rngs(0))


def _decoder(name: str, dtype: Any) -> Any:
    from flax import nnx

    from experiments.common.named import named_config
    from jpeft.models.gpt2 import Gpt2, Gpt2Config
    from jpeft.models.llama import Llama

    options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
    if name == "gpt2":
        return Gpt2(Gpt2Config(), rngs=nnx.Rngs(0), **options)
    # As one program: the layers are made one after another, not all at once in fp32.
    build = nnx.jit(lambda: Llama(named_config(name), rngs=nnx.Rngs(0), **options))
    return build()


def batch_of(kind: str, vocabulary: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """The one batch that both sides train on: random tokens without padding.

    An encoder's `labels` are random classes `(b,)`; a decoder's are its tokens, of which the first
    has no loss: nothing foretells it, also behind a prefix.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    # A vocabulary begins with what is no word.
    low = min(1000, vocabulary // 2)
    shape = (rows, length)
    batch = {
        "input_ids": rng.integers(low, vocabulary, shape).astype(np.int32),
        "attention_mask": np.ones(shape, np.int32),
    }
    if kind == "bert":
        batch["token_type_ids"] = np.zeros(shape, np.int32)
    if kind in ENCODERS:
        batch["labels"] = rng.integers(0, LABELS, rows).astype(np.int32)
    else:
        batch["labels"] = batch["input_ids"].copy()
        batch["labels"][:, 0] = -100
    return batch


def room(method: str) -> int:
    """The virtual positions that a method puts before the tokens."""
    return PREFIX if method == "prefix" else 0


if __name__ == "__main__":
    from experiments.common.models import ModelError
    from jpeft.hf import CheckpointError

    try:
        write_model(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))  # type: ignore[arg-type]
    except (ModelError, CheckpointError, OSError, ValueError) as e:
        sys.exit(str(e))
