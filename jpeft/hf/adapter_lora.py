"""LoRA and its kin in Hugging Face PEFT's files.

A module's file has `lora_A.weight` (r, in) and `lora_B.weight` (out, r), whichever way its base has
the kernel; a table `lora_embedding_A` (r, rows) and `lora_embedding_B` (width, r); DoRA one more,
`lora_magnitude_vector` (out,). Ours are transposed, and stacked over layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.hf.adapter_names import Contents, Names, by_path, exact, targeted
from jpeft.hf.files import CheckpointError
from jpeft.lora import Factors, LoRA, block_rows
from jpeft.paths import by_pattern
from jpeft.transform import Trainable

PREFIX = "base_model.model."
_OWN = re.compile(r"\.lora_(?:A\.weight|B\.weight|embedding_A|embedding_B|magnitude_vector)$")


def _calls(table: bool) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")


def read_lora(
    names: Names, options: Mapping[str, Any], contents: Contents
) -> tuple[LoRA, Trainable, list[str]]:
    """The transform, its state, and the adapted modules.

    Layers of a stack that differ in rank, or some of which are not adapted, are filled up with
    zeros, which stay zeros in training; where their scales differ, B takes up the difference.
    """
    held = {_OWN.sub("", n).removeprefix(PREFIX) for n in contents if _OWN.search(n)}
    modules = targeted(names, options, held)
    rslora = bool(options["use_rslora"])
    state: dict[str, Factors] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, of in by_path(names, modules).items():
        names.refuse_tied(path)
        each = {i: _rank_alpha(options, module) for i, module in of.items()}
        rank, alpha = max(each.values(), key=lambda x: x[0])
        if options["use_dora"] and len(of) < len(names.layers(path)):
            raise CheckpointError(
                f"use_dora = True with '{path}' in layers {sorted(of)} only: a magnitude would be "
                "trained in the others too"
            )
        if rank != options["r"]:
            ranks[exact(path)] = rank
        if alpha != options["lora_alpha"]:
            alphas[exact(path)] = alpha
        gains = {i: _scale(*ra, rslora) / _scale(rank, alpha, rslora) for i, ra in each.items()}
        state[path] = _factors(names, contents, path, of, each, gains, bool(options["use_dora"]))
    method = LoRA(
        options["r"],
        float(options["lora_alpha"]),
        tuple(exact(p) for p in state),
        float(options["lora_dropout"]),
        rslora,
        bool(options["use_dora"]),
        ranks,
        alphas,
        {exact(p): "bio" for p in state if names.places[p].stacked},
    )
    return method, state, modules


def _rank_alpha(options: Mapping[str, Any], module: str) -> tuple[int, float]:
    def of(patterns: Mapping[str, Any], default: Any) -> Any:
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as e:
                raise CheckpointError(f"'{pattern}' is not a regular expression: {e}") from e
        return default

    alpha = of(options["alpha_pattern"], options["lora_alpha"])
    return int(of(options["rank_pattern"], options["r"])), float(alpha)


def _scale(rank: int, alpha: float, rslora: bool) -> float:
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _factors(
    names: Names,
    contents: Contents,
    path: str,
    of: Mapping[int, str],
    each: Mapping[int, tuple[int, float]],
    gains: Mapping[int, float],
    dora: bool,
) -> Factors:
    (n_in, n_out), stacked = names.fans(path), names.places[path].stacked
    layers = len(names.layers(path))
    rank = max(r for r, _ in each.values())
    a = np.zeros((layers, n_in, rank), np.float32)
    b = np.zeros((layers, rank, n_out), np.float32)
    m = np.zeros((layers, n_out), np.float32) if dora else None
    first, second = _calls(names.is_table(path))
    for i, module in of.items():
        r, _ = each[i]
        a[i, :, :r] = contents.take(f"{PREFIX}{module}.{first}", (r, n_in)).T
        b[i, :r] = contents.take(f"{PREFIX}{module}.{second}", (n_out, r)).T
        if gains[i] != 1:
            b[i] *= gains[i]
        if m is not None:
            m[i] = contents.take(f"{PREFIX}{module}.lora_magnitude_vector", (n_out,))
    if not stacked:
        a, b, m = a[0], b[0], None if m is None else m[0]
    magnitude = None if m is None else jnp.asarray(m)
    return Factors(jnp.asarray(a), jnp.asarray(b), magnitude, names.axes(path))


def write_lora(
    method: LoRA, state: Trainable, names: Names
) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str]] | None:
    """PEFT's options, its tensors, and the adapted modules; None where PEFT has no form for it.

    Separate updates of the parts of a fused kernel become one of the sum of their ranks, whose B
    has zeros outside its part.
    """
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, f in state.items():
        if path not in names.leaves or f.axes != names.axes(path) or names.tied(path):
            return None
        if not re.search(r"(^|/)(kernel|embedding)$", path):
            return None
        b = f.b
        parts, trained = by_pattern(method.parts, path, (1, (0,)))
        if parts > 1:
            b = block_rows(b, parts, trained, f.axes.count("b"))
        width = f.a.shape[-1]
        # The scale that PEFT divides out of alpha for the whole width must be the method's.
        n = width / by_pattern(method.rank_pattern, path, method.rank)
        alpha = by_pattern(method.alpha_pattern, path, method.alpha)
        alpha = alpha * (math.sqrt(n) if method.rslora else n)
        key = f"^{names.pattern(path)}"
        if width != method.rank:
            ranks[key] = width
        if alpha != method.alpha:
            alphas[key] = _plain(alpha)
        arrays = dict(zip(_calls(names.is_table(path)), (f.a, b), strict=True))
        if f.magnitude is not None:
            arrays["lora_magnitude_vector"] = f.magnitude
        for call, value in arrays.items():
            value = np.asarray(value)
            value = value if names.places[path].stacked else value[None]
            for i in names.layers(path):
                tensors[f"{PREFIX}{names.module(path, i)}.{call}"] = value[i].T
    paths = list(state)
    config = {
        "peft_type": "LORA",
        "r": method.rank,
        "lora_alpha": _plain(method.alpha),
        "lora_dropout": method.dropout,
        "target_modules": names.target_modules(paths),
        "use_rslora": method.rslora,
        "use_dora": method.dora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": all(
            not names.places[p].transposed for p in paths if not names.is_table(p)
        )
        and not all(names.is_table(p) for p in paths),
    }
    return config, tensors, names.modules_of(paths)


def _plain(number: int | float) -> int | float:
    """A whole number as one: PEFT's own files have `8`, not `8.0`."""
    return int(number) if float(number).is_integer() else number
