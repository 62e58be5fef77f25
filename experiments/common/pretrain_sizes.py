"""The named sizes of three families of models, about as many parameters in each family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from jpeft._near import did_you_mean

Family = Literal["encoder", "decoder", "encoder_decoder"]
FAMILIES: tuple[Family, ...] = ("encoder", "decoder", "encoder_decoder")
# What of an encoder can start from something better than drawn numbers.
Start = Literal["words", "positions", "queries"]
STARTS: tuple[Start, ...] = ("words", "positions", "queries")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's size.

    **Attributes:** `width`, of the residual stream; `layers`, the encoder's where there are both;
    `inner`, the MLPs' width; `decoder_layers`, of a model that has both.
    """

    width: int
    layers: int
    inner: int
    decoder_layers: int = 0

    @property
    def heads(self) -> int:
        """Of 32 numbers each, and 64 in wide models."""
        return self.width // (64 if self.width > 512 else 32)

    @property
    def rate(self) -> float:
        """The peak learning rate: narrow models learn faster."""
        return min(3e-3, 1e-3 * (384 / self.width) ** 0.5)


# Names count all parameters with a vocabulary of 8192, embeddings among them.
SIZES: Mapping[str, Mapping[Family, Shape]] = {
    "0.3m": {
        "encoder": Shape(32, 2, 128),
        "decoder": Shape(32, 2, 96),
        "encoder_decoder": Shape(32, 2, 128, 1),
    },
    "1m": {
        "encoder": Shape(96, 2, 384),
        "decoder": Shape(96, 2, 256),
        "encoder_decoder": Shape(96, 1, 384, 1),
    },
    "4m": {
        "encoder": Shape(256, 3, 768),
        "decoder": Shape(192, 6, 512),
        "encoder_decoder": Shape(192, 3, 768, 2),
    },
    "16m": {
        "encoder": Shape(384, 7, 1536),
        "decoder": Shape(384, 7, 1024),
        "encoder_decoder": Shape(384, 3, 1536, 3),
    },
    "64m": {
        "encoder": Shape(768, 8, 3072),
        "decoder": Shape(768, 8, 2048),
        "encoder_decoder": Shape(768, 4, 3072, 3),
    },
}


def shape_of(family: Family, size: str) -> Shape:
    """A size by its name. **Raises:** `ValueError` for one that there is not."""
    if size not in SIZES:
        near = did_you_mean(size.lower(), SIZES)
        raise ValueError(f"--sizes {size}: there are {', '.join(SIZES)}{near}")
    return SIZES[size][family]
