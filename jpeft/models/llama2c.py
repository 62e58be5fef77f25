"""Llamas in llama2.c's binary format, version 0, and their tokenizer.

A header of seven int32 (width, hidden width, layers, heads, key-value heads, vocabulary, longest
sequence; a negative vocabulary means a head of its own), then fp32 tensors.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpeft._disk import CheckpointError
from jpeft.models.llama import Llama
from jpeft.models.llama_config import LlamaConfig

_HEADER = struct.Struct("<7i")


def load_llama2c(path: str | pathlib.Path, *, dtype: Any = jnp.float32, **options: Any) -> Llama:
    """The model in a file.

    **Arguments:** `dtype` and `options`, as `Llama` has them.

    **Raises:** `CheckpointError` for a header that no model has, or a file of another size than its
    header tells; nothing is allocated before that is known.
    """
    path = pathlib.Path(path)
    config, own_head, size = _read_header(path)
    data = np.fromfile(path, np.float32, offset=_HEADER.size)
    if data.size != size:
        raise CheckpointError(
            f"{path} holds {data.size:,} numbers, its header tells of {size:,}: fetch it again"
        )
    tensors = _Cursor(data)
    c, head = config, config.hidden_size // config.num_attention_heads
    n, d, h, kv = c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.kv_heads
    table = tensors.take(c.vocab_size, d)
    layers: dict[str, Any] = {"input_layernorm": {"scale": tensors.take(n, d)}}
    q, k, v = tensors.take(n, d, d), tensors.take(n, kv * head, d), tensors.take(n, kv * head, d)
    o = tensors.take(n, d, d)
    layers["self_attn"] = {
        "q_proj": {"kernel": _kernel(_halves(q, c.num_attention_heads))},
        "k_proj": {"kernel": _kernel(_halves(k, kv))},
        "v_proj": {"kernel": _kernel(v)},
        "o_proj": {"kernel": _kernel(o)},
    }
    layers["post_attention_layernorm"] = {"scale": tensors.take(n, d)}
    gate, down, up = tensors.take(n, h, d), tensors.take(n, d, h), tensors.take(n, h, d)
    names = ("gate_proj", "up_proj", "down_proj")
    layers["mlp"] = {
        name: {"kernel": _kernel(x)} for name, x in zip(names, (gate, up, down), strict=True)
    }
    norm = tensors.take(d)
    params: dict[str, Any] = {
        "model": {"embed_tokens": {"embedding": table}, "layers": layers, "norm": {"scale": norm}}
    }
    if own_head:
        tensors.take(2, c.max_position_embeddings, head // 2)  # the rotary table, made anew
        params["lm_head"] = {"kernel": _kernel(tensors.take(c.vocab_size, d))}
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype, **options))
    graphdef, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, _as_jax(params))
    return nnx.merge(graphdef, state)


def _read_header(path: pathlib.Path) -> tuple[LlamaConfig, bool, int]:
    """The shape, whether it has a head of its own, and the count of numbers after the header."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    with path.open("rb") as file:
        raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size:
        raise CheckpointError(f"{path} is no llama2.c model: it has {len(raw)} bytes")
    d, hidden, n, heads, kv, vocabulary, longest = _HEADER.unpack(raw)
    v = abs(vocabulary)
    sizes = (d, hidden, n, heads, kv, v, longest)
    if min(sizes) < 1 or d % heads or heads % kv or (d // heads) % 2:
        raise CheckpointError(f"{path} is no llama2.c model: its header has {sizes}")
    head = d // heads
    layer = 2 * d + 2 * d * d + 2 * d * kv * head + 3 * d * hidden
    size = v * d * (2 if vocabulary < 0 else 1) + n * layer + d + longest * head
    stands = path.stat().st_size - _HEADER.size
    if stands != 4 * size:
        raise CheckpointError(
            f"{path} has {stands:,} bytes of weights, its header tells of {4 * size:,}: it is "
            "truncated, or no llama2.c model"
        )
    config = LlamaConfig(
        vocab_size=v,
        hidden_size=d,
        intermediate_size=hidden,
        num_hidden_layers=n,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=longest,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocabulary > 0,
    )
    return config, vocabulary < 0, size


@dataclasses.dataclass
class _Cursor:
    """The file's numbers, taken in order."""

    data: np.ndarray
    at: int = 0

    def take(self, *shape: int) -> np.ndarray:
        size = math.prod(shape)
        self.at += size
        return self.data[self.at - size : self.at].reshape(shape)


def _kernel(stacked: np.ndarray) -> np.ndarray:
    """(out, in) matrices as (in, out)."""
    return stacked.swapaxes(-1, -2)


def _halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows `(layers, heads * width, in)` whose rotary pairs are neighbours, as two halves."""
    n, rows, d = w.shape
    width = rows // heads
    return w.reshape(n, heads, width // 2, 2, d).swapaxes(2, 3).reshape(n, rows, d)


def _as_jax(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _as_jax(v) for k, v in tree.items()}
    return jnp.asarray(np.ascontiguousarray(tree))


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """llama2.c's tokenizer: pieces with scores; 1 begins a text.

    Encoding starts from characters (or bytes, which are tokens 3 to 258) and joins, again and
    again, the neighbours whose joint piece has the best score.
    """

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]

    @classmethod
    def read(cls, path: str | pathlib.Path, size: int) -> Vocabulary:
        """From a `.bin` file. **Raises:** `CheckpointError` where it has not `size` pieces."""
        raw = pathlib.Path(path).read_bytes()
        pieces: list[bytes] = []
        scores: list[float] = []
        at = 4
        try:
            for _ in range(size):
                score, length = struct.unpack_from("<fi", raw, at)
                piece = raw[at + 8 : at + 8 + length]
                if length < 0 or len(piece) < length:
                    raise struct.error
                pieces.append(piece)
                scores.append(score)
                at += 8 + length
        except struct.error as e:
            found = len(pieces)
            raise CheckpointError(f"{path} holds {found} whole pieces, not {size}") from e
        if at != len(raw):
            raise CheckpointError(f"{path} holds more than {size} pieces: it is another model's")
        return cls(tuple(pieces), tuple(scores))

    def encode(self, text: str) -> list[int]:
        """Token ids, the first of them 1."""
        index = {piece: i for i, piece in enumerate(self.pieces)}
        if any(b" " in piece[1:] for piece in self.pieces[3:]):
            parts = [f" {text}"] if text else []
        else:
            # No piece reaches over a space but at its start: words are joined each by itself, since
            # the time for one grows with the square of its length.
            parts = [f" {word}" for word in text.split(" ")] if text else []
        return [1, *(i for part in parts for i in self._joined(part, index))]

    def _joined(self, text: str, index: Mapping[bytes, int]) -> list[int]:
        ids: list[int] = []
        for char in text:
            raw = char.encode()
            ids += [index[raw]] if raw in index else [byte + 3 for byte in raw]
        while True:
            joined = [
                (self.scores[k], -i, k)
                for i in range(len(ids) - 1)
                if (k := index.get(self.pieces[ids[i]] + self.pieces[ids[i + 1]], -1)) >= 0
            ]
            if not joined:
                return ids
            _, at, token = max(joined)
            ids[-at : -at + 2] = [token]

    def decode(self, ids: Any) -> str:
        """The text of ids, which may begin with 1."""
        out = b""
        before = 1
        for i in (int(i) for i in ids):
            piece = self.pieces[i]
            if 3 <= i <= 258:
                piece = bytes([i - 3])
            if i != 1:
                out += piece.removeprefix(b" ") if before == 1 else piece
            before = i
        return out.decode("utf-8", errors="replace")
