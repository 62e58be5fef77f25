"""Flops that a training step of a transformer needs, by method, from its `config.json`.

Two for each multiplication and sum of a matrix product; nothing is counted that is computed a
second time, nor what is not a product. Attention is counted whole, the masked half too.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable

from experiments.common.peer_cases import BOTTLENECK, ENCODERS, PREFIX, RANK, Method

# A product that a GPU makes at its rate.
LARGE = (8192, 8192, 8192)


@dataclasses.dataclass(frozen=True)
class Products:
    """A model's products.

    **Attributes:** `layers`, how many; `linear`, inputs and outputs of each linear layer of one;
    `read`, how many of them, the first ones, read the layer's input: what makes query, key and
    value; `some`, which of them make query and value (GPT-2: the fused one); `out`, which ones
    adapters stand after; `heads`, the width of all query heads; `head`, inputs and outputs for
    every token, or None for a classifier, which reads one token a row; `last`, which ones a
    classifier's last layer needs of every token: those of keys and values.
    """

    layers: int
    linear: tuple[tuple[int, int], ...]
    read: int
    some: tuple[int, ...]
    out: tuple[int, int]
    heads: int
    head: tuple[int, int] | None
    last: tuple[int, ...] = ()


def products(folder: pathlib.Path) -> Products:
    """Those of a model's directory. **Raises:** `CheckpointError`, `ValueError`."""
    from jpeft.hf.files import read_config
    from jpeft.models.bert_config import BertConfig
    from jpeft.models.gpt2_config import Gpt2Config
    from jpeft.models.llama_config import LlamaConfig

    raw = read_config(folder)
    if raw["model_type"] in ENCODERS:
        c = BertConfig.from_hf(raw)
        d, f = c.hidden_size, c.intermediate_size
        linear = (*[(d, d)] * 4, (d, f), (f, d))
        return Products(c.num_hidden_layers, linear, 3, (0, 2), (3, 5), d, None, (1, 2))
    if raw["model_type"] == "gpt2":
        g = Gpt2Config.from_hf(raw)
        d, f = g.n_embd, g.inner
        linear = ((d, 3 * d), (d, d), (d, f), (f, d))
        return Products(g.n_layer, linear, 1, (0,), (1, 3), d, (d, g.vocab_size))
    m = LlamaConfig.from_hf(raw)
    d, f = m.hidden_size, m.intermediate_size
    q, kv = m.num_attention_heads * m.width, m.kv_heads * m.width
    linear = ((d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d))
    return Products(m.num_hidden_layers, linear, 3, (0, 2), (3, 6), q, (d, m.vocab_size))


def rate_sizes(p: Products, tokens: int, device: str) -> tuple[int, int, int]:
    """The sizes of the product whose rate is the device's: large on a GPU, on a CPU the widest of
    the model's own layers.
    """
    if device == "gpu":
        return LARGE
    return tokens, *max(p.linear, key=lambda shape: shape[1])


def forward_flops(p: Products, length: int) -> float:
    """Of one token's part of the forward pass of a row of so many, without a method."""
    head = 2.0 * p.head[0] * p.head[1] if p.head else 0.0
    return _linear(p, length, range(len(p.linear))) + _attention(p, length, length) + head


def _linear(p: Products, length: int, which: Iterable[int]) -> float:
    """Of one token in these linear layers of every layer: of the last one's by its share."""
    of = {i: 2.0 * p.linear[i][0] * p.linear[i][1] for i in which}
    last = {i: x if p.head or i in p.last else x / length for i, x in of.items()}
    return (p.layers - 1) * sum(of.values()) + sum(last.values())


def _attention(p: Products, length: int, keys: int) -> float:
    """Of one token in a row of so many, which has so many keys."""
    return 4.0 * keys * p.heads * (p.layers if p.head else p.layers - 1 + 1 / length)


def step_flops(
    p: Products, method: Method, length: int, rank: int = RANK, alike: bool = False
) -> float:
    """Of one token's part of a training step: forward, and the gradients that the method needs.

    A product with a trained matrix is made three times, with a frozen one twice: its own gradient
    is not taken. Attention has no matrix of its own: both of what it multiplies need theirs. Nor is
    a gradient taken that reaches nothing trained: in the first layer, of what is before the first
    array of the method. In the last layer of a classifier one token a row is worked on.

    **Arguments:** `alike`, count the first layer as the others, as a loop over layers computes it.
    """
    attention = _attention(p, length, length + (PREFIX if method == "prefix" else 0))
    matrices = forward_flops(p, length) - _attention(p, length, length)
    if method == "full":
        return 3.0 * (matrices + attention)
    added = 0.0
    if method in ("lora", "lora_all", "qlora"):
        chosen = p.some if method == "lora" else range(len(p.linear))
        added = sum(
            _linear(p, length, [i]) * rank * (1 / p.linear[i][0] + 1 / p.linear[i][1])
            for i in chosen
        )
    elif method == "adapter":
        added = sum(_linear(p, length, [i]) * 2 * BOTTLENECK / p.linear[i][0] for i in p.out)
    unused = 0.0 if alike else sum(2.0 * a * b for a, b in p.linear[: p.read])
    if method == "adapter" and not alike:  # the first stands after attention and its product
        a, b = p.linear[p.read]
        unused += 2.0 * a * b + 8.0 * length * p.heads
    return 2.0 * matrices - unused + 3.0 * (attention + added)
