"""One vocabulary for models of all kinds, trained on the texts, and the texts as one stream."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import UInt16
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from jpeft._disk import atomically

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SENTINELS = 100
# Of rarer characters, which are unknown words then: a novel's last Greek letter needs no piece.
_CHARACTERS = 256


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Ids of a vocabulary: special tokens, then the ordinary ones from 5 on, then the sentinels,
    the first of which, as T5 has it, is the last id of all.

    **Attributes:** `size`, how many ids there are in all.
    """

    size: int
    pad: int = 0
    unknown: int = 1
    first: int = 2
    end: int = 3
    mask: int = 4

    @property
    def ordinary(self) -> tuple[int, int]:
        """The first ordinary id, and the one after the last."""
        return len(SPECIAL), self.size - SENTINELS

    def sentinel(self, number: int) -> int:
        """The id of a sentinel, `<extra_id_{number}>`."""
        return self.size - 1 - number


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """BERT's WordPiece in lower case, of at most `size` tokens, 105 special ones among them.

    **Raises:** `ValueError` for a size that has no room for words.
    """
    room = size - SENTINELS
    if room < 2 * len(SPECIAL) or size > 2**16:
        raise ValueError(
            f"--vocabulary {size}: at least {2 * len(SPECIAL) + SENTINELS}, at most 65536"
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=room,
        special_tokens=list(SPECIAL),
        limit_alphabet=min(_CHARACTERS, room // 4),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(texts), trainer)
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(SENTINELS))])
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(t, SPECIAL.index(t)) for t in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path, length: int) -> None:
    """`tokenizer.json` and `tokenizer_config.json`, as transformers has them.

    **Arguments:** `length`, the most tokens that a text is to have.
    """
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "do_lower_case": True,
        "clean_up_tokenization_spaces": False,
        **{f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")},
        "bos_token": "[CLS]",
        "eos_token": "[SEP]",
    }
    text = json.dumps(about, indent=2) + "\n"
    atomically(
        {
            folder / "tokenizer.json": lambda p: tokenizer.save(str(p)),
            folder / "tokenizer_config.json": lambda p: p.write_text(text, encoding="utf-8"),
        }
    )


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Its ids. **Raises:** `ValueError` for a tokenizer of another make."""
    found = Vocabulary(tokenizer.get_vocab_size(with_added_tokens=True))
    ids = [tokenizer.token_to_id(t) for t in SPECIAL]
    last = [tokenizer.token_to_id(f"<extra_id_{i}>") for i in (0, SENTINELS - 1)]
    if ids != list(range(len(SPECIAL))) or last != [found.sentinel(0), found.ordinary[1]]:
        raise ValueError("the tokenizer is not one that this experiment made")
    return found


def stream(tokenizer: Tokenizer, texts: Iterable[str], end: int) -> UInt16[np.ndarray, " n"]:
    """All texts one after another, each followed by `end`; nothing is left out."""
    parts: list[np.ndarray] = []
    for text in texts:
        lines = tokenizer.encode_batch(list(_lines([text])), add_special_tokens=False)
        parts += [np.asarray(line.ids, np.uint16) for line in lines]
        parts.append(np.asarray([end], np.uint16))
    return np.concatenate(parts)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines that are not empty: white space is no token."""
    for text in texts:
        yield from (line for line in text.splitlines() if line.strip())
