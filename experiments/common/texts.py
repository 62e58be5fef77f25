"""Texts to token ids and back, for language models."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

from experiments.common.models import ModelError
from experiments.common.tokens import load_tokenizer
from jpeft.hf.models import stop_tokens
from jpeft.models.llama2c import Vocabulary

BYTES = 259  # padding, beginning, end, then the 256 bytes


@dataclasses.dataclass(frozen=True)
class Codec:
    """A model's tokenizer.

    **Attributes:** `encode` and `decode`, of plain text without special tokens; `first`, ids that
    begin a text; `end`, the id that ends one; `pad`.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    first: tuple[int, ...]
    end: int
    pad: int


def byte_codec() -> Codec:
    """Every byte of UTF-8 is a token."""

    def decode(ids: Sequence[int]) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < BYTES).decode("utf-8", errors="replace")

    return Codec(lambda text: [b + 3 for b in text.encode()], decode, (1,), 2, 0)


def llama2c_codec(path: pathlib.Path, size: int) -> Codec:
    """llama2.c's vocabulary file, where 1 both begins and ends a text."""
    vocabulary = Vocabulary.read(path, size)
    return Codec(lambda text: vocabulary.encode(text)[1:], vocabulary.decode, (1,), 1, 0)


def hugging_face_codec(directory: pathlib.Path) -> Codec:
    """The `tokenizer.json` of a directory, with what its model's configuration says of ends.

    **Raises:** `ModelError` for none, or for a configuration that names no end.
    """
    tokenizer = load_tokenizer(directory)
    ends = stop_tokens(directory)
    if not ends:
        raise ModelError(f"{directory}: its config.json names no eos_token_id")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    pad = config.get("pad_token_id")
    # What the tokenizer itself puts before a text, such as Llama's <s>.
    with_special = tokenizer.encode("a").ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    before = with_special[: with_special.index(plain[0])] if plain else []
    return Codec(
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        lambda ids: tokenizer.decode(list(ids)),
        tuple(before),
        ends[0],
        ends[0] if pad is None else pad,
    )


def chat_template(directory: pathlib.Path) -> Callable[[str], str]:
    """A prompt as the user's turn of the model's own chat template, the answer's turn begun.

    **Raises:** `ModelError` for a directory without a template; `ValueError` where jinja2 is not
    installed.
    """
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as e:
        raise ValueError("--chat needs jinja2: install the extra, jpeft[text]") from e
    path = directory / "tokenizer_config.json"
    about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    source = about.get("chat_template")
    separate = directory / "chat_template.jinja"
    if separate.is_file():
        source = separate.read_text(encoding="utf-8")
    if not isinstance(source, str):
        raise ModelError(f"{directory} has no chat template: leave --chat out")
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )
    # The codec puts the first token there itself.
    special = {
        k: v["content"] if isinstance(v, dict) else v
        for k, v in about.items()
        if k.endswith("_token") and k != "bos_token"
    }

    def render(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return template.render(
            messages=messages, add_generation_prompt=True, bos_token="", **special
        )

    return render
