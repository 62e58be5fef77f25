"""Rotary position embeddings, with every published way of stretching them to longer texts.

Su et al. 2021 (RoFormer); Chen et al. 2023 (linear); NTK-aware and dynamic, by bloc97 and emozilla;
Peng et al. 2023 (YaRN); Dubey et al. 2024 (Llama 3.1); Ding et al. 2024 (LongRoPE). A head's first
half pairs with its second half, as in Hugging Face's files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# Kinds whose `original` is an option; dynamic's is the model's max_position_embeddings.
_ORIGINAL = ("llama3", "yarn", "longrope")
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding, by Hugging Face's names.

    **Attributes:** `rope_type`, one of `KINDS`; `original_max_position_embeddings`, the length that
    the model was first trained for; the others are options of single kinds.
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in KINDS:
            raise ValueError(
                f"rope_type '{self.rope_type}' is not supported: one of {', '.join(KINDS)}"
            )
        reads = self.rope_type in ("dynamic", *_ORIGINAL)
        if reads and self.original_max_position_embeddings < 1:
            raise ValueError(f"rope_type '{self.rope_type}' needs original_max_position_embeddings")

    @classmethod
    def from_hf(
        cls, options: Mapping[str, Any] | None, *, theta: float, longest: int, original: Any = None
    ) -> Rope:
        """From `rope_scaling` or `rope_parameters` of a `config.json`.

        **Arguments:** `theta`, where the options have none; `longest`, the model's
        `max_position_embeddings`; `original`, an `original_max_position_embeddings` beside them.

        **Raises:** `ValueError` that names what is missing or not supported.
        """
        given = {k: v for k, v in (options or {}).items() if v is not None}
        kind = given.get("rope_type", given.get("type", "default"))
        kind = "longrope" if kind == "su" else kind  # its first name
        if given.get("partial_rotary_factor", 1) != 1:
            raise ValueError("partial_rotary_factor is not supported: heads are rotated as a whole")
        if "mrope_section" in given:
            raise ValueError("mrope_section is not supported: positions have one axis")
        lacking = [name for name in _NEEDED.get(kind, ()) if name not in given]
        if lacking:
            raise ValueError(f"rope_type '{kind}' needs {', '.join(lacking)}")
        names = {f.name for f in dataclasses.fields(cls)}
        kept: dict[str, Any] = {k: v for k, v in given.items() if k in names}
        # JSON's numbers may be written as whole ones; True is none.
        kept = {k: float(v) if type(v) is int else v for k, v in kept.items()}
        for name in ("short_factor", "long_factor"):
            if name in kept:
                kept[name] = tuple(float(x) for x in kept[name])
        kept |= {"rope_type": kind, "rope_theta": float(given.get("rope_theta", theta))}
        if kind in _ORIGINAL:
            # One beside the options has the precedence (Phi-3's files).
            length = original or given.get("original_max_position_embeddings", longest)
            kept["original_max_position_embeddings"] = int(length)
            kept.setdefault("factor", longest / length)
        else:
            kept["original_max_position_embeddings"] = longest if kind == "dynamic" else 0
        return cls(**kept)

    def to_hf(self) -> dict[str, Any] | None:
        """`rope_scaling`, the base left out; None where nothing is scaled."""
        if self.rope_type == "default":
            return None
        plain = {f.name: f.default for f in dataclasses.fields(self)}
        out = {k: v for k, v in dataclasses.asdict(self).items() if v != plain[k]}
        out.pop("rope_theta", None)
        if self.rope_type not in _ORIGINAL:
            out.pop("original_max_position_embeddings", None)
        needed = {name: getattr(self, name) for name in _NEEDED.get(self.rope_type, ("factor",))}
        out = {"factor": self.factor, **needed, **out}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()}

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long the text is."""
        return self.rope_type in ("dynamic", "longrope")

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied with (YaRN's and LongRoPE's attention factor)."""
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "longrope":
            if self.factor <= 1:
                return 1.0
            return math.sqrt(
                1 + math.log(self.factor) / math.log(self.original_max_position_embeddings)
            )
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)


def inverse_frequencies(rope: Rope, width: int, length: Any = None) -> Float[Array, " half"]:
    """Radians per position of each pair, `(width / 2,)`.

    **Arguments:** `length`, how long the text is, a number or an int32 scalar: dynamic and LongRoPE
    read it. None is no longer than the original length.
    """
    exponents = np.arange(0, width, 2) / width
    plain = rope.rope_theta**-exponents
    original = rope.original_max_position_embeddings
    match rope.rope_type:
        case "linear":
            out = plain / rope.factor
        case "llama3":
            out = _llama3(rope, plain)
        case "yarn":
            out = _yarn(rope, plain, width)
        case "dynamic":
            longer = jnp.maximum(original if length is None else length, original)
            growth = (rope.factor * longer.astype(jnp.float32) / original) - (rope.factor - 1)
            # theta * growth^(width / (width - 2)), to the power of -exponents.
            return jnp.asarray(plain, jnp.float32) * growth ** (-exponents * width / (width - 2))
        case "longrope":
            half = width // 2
            if {len(rope.short_factor), len(rope.long_factor)} != {half}:
                raise ValueError(f"short_factor and long_factor have {half} numbers for this model")
            short, long = (plain / np.asarray(f) for f in (rope.short_factor, rope.long_factor))
            short, long = jnp.asarray(short, jnp.float32), jnp.asarray(long, jnp.float32)
            return short if length is None else jnp.where(length > original, long, short)
        case _:
            out = plain
    return jnp.asarray(out, jnp.float32)


def rotation(
    rope: Rope, positions: Int[Array, "b t"], width: int
) -> tuple[Float[Array, "b t half"], Float[Array, "b t half"]]:
    """Cosine and sine of every token's angles, fp32.

    Positions below 0, which are padding's, count as 0. Where frequencies depend on the length it is
    the largest position of the batch, as in transformers; keys that a cache holds keep theirs.
    """
    length = jnp.max(positions) + 1 if rope.by_length else None
    frequencies = inverse_frequencies(rope, width, length)
    angles = jnp.maximum(positions, 0)[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.amplitude, jnp.sin(angles) * rope.amplitude


def rotate(
    x: Float[Array, "b t h w"], cos: Float[Array, "b t half"], sin: Float[Array, "b t half"]
) -> Float[Array, "b t h w"]:
    """Every pair of a head turned by its angle; in fp32, returned in the type of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Long waves slowed down by the factor, short ones kept, a smooth passage between them."""
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(rope: Rope, plain: np.ndarray, width: int) -> np.ndarray:
    """Peng et al. 2023, section 3.2: pairs of few turns are interpolated, the others kept."""

    def pair(turns: float) -> float:
        """The pair that turns so often within the original length."""
        length = rope.original_max_position_embeddings
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last += 0.001 if first == last else 0.0  # no division by zero
    slowed = np.clip((np.arange(width // 2) - first) / (last - first), 0, 1)
    return slowed * plain / rope.factor + (1 - slowed) * plain
