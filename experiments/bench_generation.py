"""Generation with a cache of keys and values beside generation without: the same tokens, in turn.

Both are one compiled program; without a cache every step reads the whole text so far, padded to its
final length.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

import jpeft
from experiments.common import runtime
from experiments.common.command import command, ready
from experiments.common.options import at_least
from experiments.common.report import describe_machine, versions, write_json
from experiments.common.timing import ratio, turns


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    model: pathlib.Path
    """A Llama in llama2.c's binary format, or a directory in Hugging Face's layout."""
    tokens: int = 256
    """New tokens after one first token."""
    rounds: int = 5
    """Turns of each."""
    out: pathlib.Path | None = None
    """Folder for `result.json`."""
    overwrite: bool = False
    """Throw away the result that --out holds."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Measure, print and write. **Raises:** `ValueError` where the tokens differ."""
    import jax.numpy as jnp
    import numpy as np

    from jpeft.hf import load_model
    from jpeft.models.llama2c import load_llama2c

    console = console or Console()
    at_least(config, tokens=1, rounds=1)
    ready(config.out, config.overwrite)
    read: Callable[..., Any] = load_llama2c if config.model.is_file() else load_model
    found = read(config.model)
    model = found[0] if isinstance(found, tuple) else found
    apply, params = jpeft.functional(model)
    n, first = config.tokens, jnp.ones((1, 1), jnp.int32)
    cache = model.empty_cache(1, n + 1)
    plain = functools.partial(_without_cache(apply), n=n)

    def cached() -> Any:
        return jpeft.generate(apply, params, first, cache=cache, new_tokens=n).tokens

    if not np.array_equal(cached(), plain(params, first)):
        raise ValueError("the two ways gave different tokens")
    runs: dict[str, Callable[[], Any]] = {
        "cached": lambda: cached().block_until_ready(),
        "plain": lambda: plain(params, first).block_until_ready(),
    }
    times = turns(runs, config.rounds)
    result = {
        "config": dataclasses.asdict(config) | {"model": config.model.name, "out": None},
        "cached_ms": statistics.median(times["cached"]),
        "plain_ms": statistics.median(times["plain"]),
        "ratio": ratio(times["plain"], times["cached"]),
        "machine": describe_machine(),
        "versions": versions(),
    }
    console.print(
        f"{n} tokens: {result['cached_ms']:.0f} ms with a cache, {result['plain_ms']:.0f} without: "
        f"{result['ratio']:.1f} times as fast"
    )
    if config.out is not None:
        write_json(config.out / "result.json", result)
    return result


def _without_cache(apply: Any) -> Any:
    """Greedy generation that reads all the text at every step."""
    import jax
    import jax.numpy as jnp

    @functools.partial(jax.jit, static_argnames="n")
    def run(params: Any, first: Any, n: int) -> Any:
        text = jnp.zeros((1, n + 1), jnp.int32).at[:, :1].set(first)

        def step(i: Any, text: Any) -> Any:
            mask = (jnp.arange(n + 1) <= i).astype(jnp.int32)[None]
            logits = apply(params, text, mask)
            return text.at[:, i + 1].set(jnp.argmax(logits[:, i], axis=-1).astype(jnp.int32))

        return jax.lax.fori_loop(0, n, step, text)[:, 1:]

    return run


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("bench_generation", Config, main, __doc__))
