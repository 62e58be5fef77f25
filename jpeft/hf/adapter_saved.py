"""What an adapter of Hugging Face PEFT trains as it is: `modules_to_save`, and biases."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.hf.adapter_config import ANY_HEAD, HEADS
from jpeft.hf.adapter_names import Contents, Names, above, exact
from jpeft.hf.files import CheckpointError
from jpeft.transform import Train, Trainable


@dataclasses.dataclass(frozen=True)
class Saved:
    """How PEFT writes trained parameters: its options, and the tensors by name."""

    modules: tuple[str, ...]
    bias: str
    tensors: Mapping[str, np.ndarray]


def read_saved(
    names: Names,
    options: Mapping[str, Any],
    contents: Contents,
    prefix: str,
    targets: Collection[str] = (),
) -> tuple[Train, Trainable] | None:
    """The parameters that a file has beside its method's own.

    **Arguments:** `prefix`, what the file has before names; `targets`, the adapted modules, inside
    which the base's tensors are called `base_layer`.
    """
    wanted: dict[str, str] = {}  # our tensor's name to the file's
    for end in dict.fromkeys(options["modules_to_save"] or ()):
        # PEFT compares plain ends of names here, not whole parts.
        found = [n for n in names.tensors if any(m.endswith(end) for m in above(n))]
        if not found and end not in ANY_HEAD:
            raise CheckpointError(f"modules_to_save has '{end}', which is no module of this model")
        wanted |= {n: n for n in found}
    bias = options.get("bias") or "none"
    if bias != "none":
        # Heads that are saved are there twice more, as they were and under another name.
        contents.skip(r"\.(original_module|modules_to_save)\.")
        wanted = {**_biases(names, targets, bias == "all"), **wanted}
    wanted |= _changed_bases(names, contents, prefix, targets)
    for name in wanted:
        names.refuse_tied(names.tensors[name][0])
    return read_whole(names, contents, {n: prefix + called for n, called in wanted.items()})


def read_whole(
    names: Names, contents: Contents, wanted: Mapping[str, str]
) -> tuple[Train, Trainable] | None:
    """Parameters as they are in a file; None for none.

    **Arguments:** `wanted`, our tensors' names to the file's.
    """
    layers: dict[str, dict[int, str]] = {}
    for name, called in wanted.items():
        path, layer = names.tensors[name]
        layers.setdefault(path, {})[layer] = called
    state = {path: _stacked(names, contents, path, of) for path, of in layers.items()}
    return (Train(tuple(exact(p) for p in state)), state) if state else None


def _biases(names: Names, targets: Collection[str], everywhere: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names.tensors:
        module, _, last = name.rpartition(".")
        if last == "bias" and (everywhere or module in targets):
            found[name] = f"{module}.base_layer.bias" if module in targets else name
    return found


def _changed_bases(
    names: Names, contents: Contents, prefix: str, targets: Collection[str]
) -> dict[str, str]:
    """Weights of adapted modules that a file has too: PEFT writes tables of embeddings out whole,
    and puts them in place when it loads. Those that are the model's own are left.
    """
    found: dict[str, str] = {}
    for module in targets:
        called = f"{module}.base_layer.weight"
        if prefix + called in contents:
            path, layer = names.kernels[module]
            base = names.leaves[path][layer] if names.places[path].stacked else names.leaves[path]
            base = np.asarray(base, np.float32)
            base = base.T if names.places[path].transposed else base
            if not np.array_equal(contents.take(prefix + called, base.shape), base):
                found[f"{module}.weight"] = called
    return found


def _stacked(names: Names, contents: Contents, path: str, of: Mapping[int, str]) -> Any:
    lacking = [i for i in names.layers(path) if i not in of]
    if lacking:
        raise CheckpointError(
            f"the adapter trains '{path}' in layers {sorted(of)} only: parameters that are stacked "
            "over layers are trained in all of them"
        )
    shape, transposed = names.shape(path), names.places[path].transposed
    arrays = [
        contents.take(of[i], shape[::-1] if transposed else shape) for i in names.layers(path)
    ]
    arrays = [a.T if transposed else a for a in arrays]
    return jnp.asarray(np.stack(arrays) if names.places[path].stacked else arrays[0])


def write_saved(
    names: Names,
    trained: Mapping[str, Any],
    targets: Collection[str],
    prefix: str,
    task_type: str | None,
    biases: bool,
) -> Saved | None:
    """How PEFT writes trained parameters; None where it cannot say which they are.

    **Arguments:** `trained`, path to array; `targets`, the adapted modules; `task_type`, whose
    heads PEFT expects in the file whether they were trained or not; `biases`, whether the method
    has the option `bias`.
    """
    trained = {**_heads(names, task_type), **trained}
    if any(path not in names.leaves or names.tied(path) for path in trained):
        return None
    whole = _whole(names, trained)
    # The outermost, which are how PEFT calls a head of several layers.
    modules = [m for m in whole if not any(a in whole for a in above(f"{m}.x")[1:])]
    inside = {n for n in names.tensors if any(m in whole for m in above(n))}
    for m in modules:
        extra = [x for x in names.modules if x.endswith(m) and x not in whole]
        if extra or any(re.match(rf"(^|.*\.){m}($|\..*)", t) for t in targets):
            return None
    rest = {n for n, (path, _) in names.tensors.items() if path in trained and n not in inside}
    called = {n: n for n in inside}
    bias = "none"
    if rest:
        for kind in ("lora_only", "all"):
            of = _biases(names, targets, kind == "all")
            if biases and rest == {n for n in of if n not in inside}:
                bias = kind
                called |= {n: of[n] for n in rest}
                break
        else:
            return None
    tensors: dict[str, np.ndarray] = {}
    for name, new in called.items():
        path, layer = names.tensors[name]
        value = np.asarray(trained[path])
        value = value[layer] if names.places[path].stacked else value
        tensors[prefix + new] = value.T if names.places[path].transposed else value
    return Saved(tuple(modules), bias, tensors)


def _heads(names: Names, task_type: str | None) -> dict[str, Any]:
    ends = HEADS.get(task_type, ())
    return {
        path: names.leaves[path]
        for name, (path, _) in names.tensors.items()
        if any(m.endswith(end) for m in above(name) for end in ends)
    }


def _whole(names: Names, paths: Iterable[str]) -> set[str]:
    """The modules all of whose parameters are among the paths."""
    paths = set(paths)
    lacking = {m for n, (path, _) in names.tensors.items() if path not in paths for m in above(n)}
    return {m for m in names.modules if m not in lacking}
