"""Flops that a training step of a transformer needs, by method, from its `config.json`.

Two for each multiplication and sum of a matrix product; nothing is counted that is computed a
second time, nor what is not a product. Attention is counted whole, the masked half too.
"""

from __future__ import annotations

import dataclasses
import pathlib

from experiments.common.peer_cases import BOTTLENECK, ENCODERS, PREFIX, RANK, Method

# A product that a GPU makes at its rate.
LARGE = (8192, 8192, 8192)


@dataclasses.dataclass(frozen=True)
class Products:
    """A model's products.

    **Attributes:** `layers`, how many; `linear`, inputs and outputs of each linear layer of one;
    `read`, how many of them, the first ones, read the layer's input: what makes query, key and
    value; `some`, those of query and value (GPT-2: of the fused one); `out`, widths that adapters
    stand after; `heads`, the width of all query heads; `head`, inputs and outputs for every token,
    or None for a classifier's, which reads one token a row.
    """

    layers: int
    linear: tuple[tuple[int, int], ...]
    read: int
    some: tuple[tuple[int, int], ...]
    out: tuple[int, int]
    heads: int
    head: tuple[int, int] | None


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
        return Products(c.num_hidden_layers, linear, 3, ((d, d),) * 2, (d, d), d, None)
    if raw["model_type"] == "gpt2":
        g = Gpt2Config.from_hf(raw)
        d, f = g.n_embd, g.inner
        fused = (d, 3 * d)
        linear = (fused, (d, d), (d, f), (f, d))
        return Products(g.n_layer, linear, 1, (fused,), (d, d), d, (d, g.vocab_size))
    m = LlamaConfig.from_hf(raw)
    d, f = m.hidden_size, m.intermediate_size
    q, kv = m.num_attention_heads * m.width, m.kv_heads * m.width
    linear = ((d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d))
    some = ((d, q), (d, kv))
    return Products(m.num_hidden_layers, linear, 3, some, (d, d), q, (d, m.vocab_size))


def rate_sizes(p: Products, tokens: int, device: str) -> tuple[int, int, int]:
    """The sizes of the product whose rate is the device's: large on a GPU, on a CPU the widest of
    the model's own layers.
    """
    if device == "gpu":
        return LARGE
    return tokens, *max(p.linear, key=lambda shape: shape[1])


def forward_flops(p: Products, length: int) -> float:
    """Of one token's forward pass in a row of so many, without a method."""
    layer = sum(2.0 * a * b for a, b in p.linear) + 4.0 * length * p.heads
    head = 2.0 * p.head[0] * p.head[1] if p.head else 0.0
    return p.layers * layer + head


def step_flops(
    p: Products, method: Method, length: int, rank: int = RANK, alike: bool = False
) -> float:
    """Of one token's part of a training step: forward, and the gradients that the method needs.

    A product with a trained matrix is made three times, with a frozen one twice: its own gradient
    is not taken. Attention has no matrix of its own: both of what it multiplies need theirs. Nor is
    a gradient taken that reaches nothing trained: in the first layer, of what is before the first
    array of the method.

    **Arguments:** `alike`, count the first layer as the others, as a loop over layers computes it.
    """
    attention = 4.0 * (length + (PREFIX if method == "prefix" else 0)) * p.heads * p.layers
    matrices = forward_flops(p, length) - 4.0 * length * p.heads * p.layers
    added = 0.0
    if method in ("lora", "lora_all", "qlora"):
        chosen = p.some if method == "lora" else p.linear
        added = p.layers * sum(2.0 * rank * (a + b) for a, b in chosen)
    elif method == "adapter":
        added = p.layers * sum(4.0 * BOTTLENECK * width for width in p.out)
    if method == "full":
        return 3.0 * (matrices + attention)
    unused = 0.0 if alike else sum(2.0 * a * b for a, b in p.linear[: p.read])
    if method == "adapter" and not alike:  # the first stands after attention and its product
        a, b = p.linear[p.read]
        unused += 2.0 * a * b + 2.0 * attention / p.layers
    return 2.0 * matrices - unused + 3.0 * (attention + added)
