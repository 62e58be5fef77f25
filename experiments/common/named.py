"""Configurations of published decoders by name, for what needs shapes alone.

The numbers are those of the models' `config.json` files.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.common.models import ModelError
from jpeft._near import did_you_mean
from jpeft.hf.files import CheckpointError, read_json
from jpeft.models.llama_config import LlamaConfig

Raw = dict[str, Any]


def _llama(
    hidden: int, mlp: int, layers: int, heads: int, kv: int, *, eps: float = 1e-5, **more: Any
) -> Raw:
    shape = _shape("llama", hidden, mlp, layers, heads, kv)
    return {**shape, "vocab_size": 32000, "rms_norm_eps": eps, **more}


def _llama3(*shape: int, scale: float | None = None, **more: Any) -> Raw:
    """Llama 3; with `scale`, 3.1 and later, their positions stretched so many times."""
    own: Raw = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192}
    own |= {"bos_token_id": 128000, "eos_token_id": 128001}
    if scale is not None:
        own["max_position_embeddings"] = 131072
        own["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scale,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return _llama(*shape, **own, **more)  # type: ignore[arg-type]


def _qwen3(*shape: int, tied: bool = False) -> Raw:
    own = {"head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied}
    return {**_shape("qwen3", *shape), **own, "max_position_embeddings": 40960}


def _gemma2(*shape: int, width: int = 256, query: int = 256) -> Raw:
    own = {"head_dim": width, "query_pre_attn_scalar": query}
    return {**_shape("gemma2", *shape), **own}


def _gemma3(
    *shape: int, window: int = 1024, width: int = 256, query: int = 256, small: bool = False
) -> Raw:
    own: Raw = {"head_dim": width, "query_pre_attn_scalar": query, "sliding_window": window}
    if small:  # texts alone, and short ones
        own |= {"vocab_size": 262144, "max_position_embeddings": 32768}
    else:
        own["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    return {**_shape("gemma3_text", *shape), **own}


def _shape(kind: str, hidden: int, mlp: int, layers: int, heads: int, kv: int) -> Raw:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


# Hidden size, MLP's, layers, heads, key-value heads.
NAMED: Mapping[str, Raw] = {
    "llama-7b": _llama(4096, 11008, 32, 32, 32, eps=1e-6),
    "llama-65b": _llama(8192, 22016, 80, 64, 64),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, max_position_embeddings=4096),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, max_position_embeddings=4096),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, max_position_embeddings=4096),
    "llama-3-8b": _llama3(4096, 14336, 32, 32, 8),
    "llama-3-70b": _llama3(8192, 28672, 80, 64, 8),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 8, scale=8.0),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, 8, scale=8.0),
    "llama-3.1-405b": _llama3(16384, 53248, 126, 128, 8, scale=8.0),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 8, scale=32.0, tie_word_embeddings=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 8, scale=32.0, tie_word_embeddings=True),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8),
    "gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4),
    "gemma-2-9b": _gemma2(3584, 14336, 42, 16, 8),
    "gemma-2-27b": _gemma2(4608, 36864, 46, 32, 16, width=128, query=144),
    "gemma-3-270m": _gemma3(640, 2048, 18, 4, 1, window=512, small=True),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, window=512, small=True),
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4),
    "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8),
    "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, width=128, query=168),
}


def named_config(name: str) -> LlamaConfig:
    """A published model's configuration. **Raises:** `ModelError` with the nearest name."""
    if name not in NAMED:
        raise ModelError(
            f"there is no model '{name}'{did_you_mean(name, NAMED) or '.'} By name there are "
            f"{', '.join(NAMED)}; or give a model's directory"
        )
    return LlamaConfig.from_hf(NAMED[name])


def config_of(name: str) -> LlamaConfig:
    """The configuration of a Llama-like decoder.

    **Arguments:** `name`, one of `NAMED`, a model's directory, or a `config.json`.

    **Raises:** `ModelError` for what is neither, or a model of another kind.
    """
    path = pathlib.Path(name)
    if name in NAMED or not path.exists():
        return named_config(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        return LlamaConfig.from_hf(read_json(path))
    except (ValueError, TypeError, KeyError, CheckpointError) as e:
        raise ModelError(f"{path}: {e}") from e
