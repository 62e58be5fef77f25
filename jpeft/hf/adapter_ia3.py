"""IA3 in Hugging Face PEFT's files: `ia3_l`, (out, 1), or (1, in) for feed-forward modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jpeft.hf.adapter_names import Contents, Names, by_path, exact, matches, targeted
from jpeft.hf.files import CheckpointError
from jpeft.ia3 import IA3, Scales
from jpeft.leaf import dense
from jpeft.paths import flatten, replace
from jpeft.transform import Params, Trainable

PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class IA3WithBias(IA3):
    """IA3 that scales what a layer gives with its bias, as PEFT does; the paper's model has none.

    Arguments and trained state are `IA3`'s.
    """

    def __hash__(self) -> int:
        return hash(repr(self))

    def place(
        self, params: Params, trainable: Trainable, key: PRNGKeyArray | None = None
    ) -> Params:
        """The parameters with a `Scaled` leaf for every matched kernel, and its bias scaled."""
        placed = super().place(params, trainable, key)
        leaves = flatten(params)
        new: dict[str, Any] = {}
        for path, s in trainable.items():
            bias = _bias(path)
            if s.side == "o" and bias in leaves:
                base = dense(leaves[bias])
                new[bias] = (base.astype(s.scale.dtype) * s.scale).astype(base.dtype)
        return replace(placed, new)


def _bias(path: str) -> str:
    return path.removesuffix("kernel") + "bias"


def _is_inner(given: str | Sequence[str] | None, module: str) -> bool:
    # Here PEFT compares plain ends of names, not whole parts.
    if given is None or isinstance(given, str):
        return matches(given, module)
    return any(module.endswith(end) for end in given)


def read_ia3(
    names: Names, options: Mapping[str, Any], contents: Contents
) -> tuple[IA3, Trainable, list[str]]:
    """The transform, its state, and the adapted modules."""
    modules = targeted(names, options, ())
    state: dict[str, Scales] = {}
    for path, of in by_path(names, modules).items():
        fans = names.fans(path)
        if names.is_table(path):
            raise CheckpointError(f"IA3 of the table '{path}' is not read")
        sides = {_is_inner(options["feedforward_modules"], m) for m in of.values()}
        if len(of) < len(names.layers(path)) or len(sides) > 1:
            raise CheckpointError(
                f"IA3 of '{path}' in layers {sorted(of)} only, or not the same in all of them: "
                "scales would be trained in the others too"
            )
        inner = sides.pop()
        shape = (1, fans[0]) if inner else (fans[1], 1)
        scale = np.stack(
            [contents.take(f"{PREFIX}{of[i]}.ia3_l", shape).reshape(-1) for i in sorted(of)]
        )
        scale = scale if names.places[path].stacked else scale[0]
        state[path] = Scales(jnp.asarray(scale), names.axes(path), "i" if inner else "o")
    outer = tuple(exact(p) for p, s in state.items() if s.side == "o")
    inner = tuple(exact(p) for p, s in state.items() if s.side == "i")
    axes = {exact(p): "bio" for p in state if names.places[p].stacked}
    biased = any(s.side == "o" and _bias(p) in names.leaves for p, s in state.items())
    return (IA3WithBias if biased else IA3)(outer, inner, axes), state, modules


def write_ia3(
    method: IA3, state: Trainable, names: Names
) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str]] | None:
    """PEFT's options, its tensors, and the adapted modules; None where PEFT has no form for it:
    it scales biases too, unless there are none or they are zero.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, s in state.items():
        if path not in names.leaves or s.axes != names.axes(path) or not path.endswith("kernel"):
            return None
        bias = names.leaves.get(_bias(path)) if s.side == "o" else None
        if bias is not None and not isinstance(method, IA3WithBias) and np.any(np.asarray(bias)):
            return None
        scale = np.asarray(s.scale)
        scale = scale if names.places[path].stacked else scale[None]
        for i in names.layers(path):
            one = scale[i][:, None] if s.side == "o" else scale[i][None]
            tensors[f"{PREFIX}{names.module(path, i)}.ia3_l"] = one
    outer = [p for p, s in state.items() if s.side == "o"]
    inner = [p for p, s in state.items() if s.side == "i"]
    targets = [names.target_modules(of) if of else [] for of in (outer, inner)]
    forward, strange = targets[1], names.modules_of(outer)
    if (
        isinstance(targets[0], list)
        and isinstance(forward, list)
        and not any(m.endswith(end) for m in strange for end in forward)
    ):
        # PEFT wants the feed-forward names among the others, letter by letter.
        targets = sorted({*targets[0], *forward})
    else:
        targets = "|".join(names.pattern(p) for p in state)
        forward = "|".join(names.pattern(p) for p in inner) if inner else []
    config = {"peft_type": "IA3", "target_modules": targets, "feedforward_modules": forward}
    return config, tensors, names.modules_of(state)
