"""A model on its way as an ordinary directory, with its tokenizer."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from experiments.common.pretrain_head import MaskedBert, save_masked_bert
from jpeft.hf.models import copy_tokenizer, save_model


def exporter(model: Any, tokenizer: pathlib.Path) -> Callable[[pathlib.Path, Any], None]:
    """`export(directory, params)`, which writes what transformers loads.

    **Arguments:** `tokenizer`, the folder with its files.
    """

    def export(directory: pathlib.Path, params: Any) -> None:
        if isinstance(model, MaskedBert):
            save_masked_bert(model, directory, params)
        else:
            save_model(model, directory, params)
        copy_tokenizer(tokenizer, directory)

    return export
