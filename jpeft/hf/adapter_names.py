"""The modules that an adapter of Hugging Face PEFT names, and our parameters behind them."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError

from jpeft._disk import listed, open_tensors
from jpeft.hf.adapter_config import ANY_HEAD
from jpeft.hf.files import CheckpointError
from jpeft.hf.names import Family, Place, normal_name, places
from jpeft.paths import flatten
from jpeft.uses import Uses

WORDS = r"(^|/)(word_embeddings|embed_tokens|wte|embed_in|tok_embeddings|shared)/embedding$"
_HEADS = {*ANY_HEAD, "lm_head", "embed_out", "pooler", "cls"}
Where = tuple[str, int]  # a path, and a layer of it (0 where it is not stacked)


class Names:
    """A model's parameters by the names of Hugging Face.

    **Arguments:** `uses`, what `jpeft.uses` found, and `config`, the model's configuration, if they
    are known.

    **Attributes:** `leaves`, path to array; `places`, path to `Place`; `tensors`, the name of
    every parameter to where it is; `kernels`, the name of every module with a kernel or a table to
    where that is; `modules`, every module's name.
    """

    def __init__(
        self, family: Family, params: Any, uses: Uses | None = None, config: Any = None
    ) -> None:
        self._uses, self.config = uses, config
        self.leaves: dict[str, Any] = flatten(params)
        self.places: dict[str, Place] = places(family, self.leaves)
        self.tensors: dict[str, Where] = {}
        self.kernels: dict[str, Where] = {}
        found: dict[str, None] = {}
        for path in self.leaves:
            for layer in self.layers(path):
                name = self.places[path].of_layer(layer)
                self.tensors[name] = (path, layer)
                found |= dict.fromkeys(above(name))
                if re.search(r"(^|/)(kernel|embedding)$", path):
                    self.kernels[name.rpartition(".")[0]] = (path, layer)
        self.modules = list(found)

    def layers(self, path: str) -> range:
        """The layers that are stacked in a parameter; one where none are."""
        return range(self.leaves[path].shape[0] if self.places[path].stacked else 1)

    def shape(self, path: str) -> tuple[int, ...]:
        """The shape of one layer's parameter, as we have it."""
        return tuple(self.leaves[path].shape[1 if self.places[path].stacked else 0 :])

    def axes(self, path: str) -> str:
        """The letters of a kernel's or a table's axes."""
        return "bio" if self.places[path].stacked else "io"

    def fans(self, path: str) -> tuple[int, int]:
        """Inputs and outputs of a kernel; rows and width of a table."""
        shape = self.shape(path)
        if len(shape) != 2:
            raise CheckpointError(f"'{path}' is {shape} in each layer: PEFT's kernels are matrices")
        return shape[0], shape[1]

    def is_table(self, path: str) -> bool:
        """Whether a parameter is looked up."""
        return bool(re.search(r"(^|/)embedding$", path))

    def tied(self, path: str) -> bool:
        """Whether a table is the output head too: PEFT adapts and saves the look-up alone.

        Without `uses` a table of words is taken for one where there is no other head.
        """
        if not self.is_table(path):
            return False
        if self._uses is not None:
            return {"gather", "dot_general"} <= {u.primitive for u in self._uses.get(path, ())}
        heads = any(part in _HEADS for m in self.modules for part in m.split("."))
        return bool(re.search(WORDS, path)) and not heads

    def refuse_tied(self, path: str) -> None:
        """**Raises:** `CheckpointError` for a table that is tied, or may be."""
        if self.tied(path):
            more = "" if self._uses else "; if it is not, pass uses=jpeft.uses(apply, params, ids)"
            raise CheckpointError(
                f"the adapter changes '{path}' where it is looked up, but not where the same table "
                f"is the output head: here both would change{more}"
            )

    def module(self, path: str, layer: int) -> str:
        """The module's name in one layer."""
        return self.places[path].of_layer(layer).rpartition(".")[0]

    def modules_of(self, paths: Iterable[str]) -> list[str]:
        """The modules of some parameters, in every layer."""
        return [self.module(p, i) for p in paths for i in self.layers(p)]

    def pattern(self, path: str) -> str:
        """A regular expression of the full names of a parameter's modules."""
        parts = self.places[path].module.split("{}")
        return r"\d+".join(re.escape(p) for p in parts)

    def target_modules(self, paths: Sequence[str]) -> list[str] | str:
        """What makes PEFT choose the modules of these parameters and no others: ends of names
        where there are such, else one regular expression.
        """
        wanted = set(self.modules_of(paths))
        ends: list[str] = []
        for path in paths:
            parts = self.places[path].module.rpartition("{}.")[2].split(".")
            for n in range(1, len(parts) + 1):
                end = ".".join(parts[-n:])
                if all(m in wanted for m in self.modules if ends_in(m, end)):
                    ends.append(end)
                    break
            else:
                return "|".join(self.pattern(p) for p in paths)
        return sorted(set(ends))


def above(name: str) -> list[str]:
    """The modules that hold a tensor, innermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def ends_in(module: str, end: str) -> bool:
    """Whether a module's name is `end` or ends in `.end`: how PEFT reads a list of names."""
    return module == end or module.endswith(f".{end}")


def exact(path: str) -> str:
    """A pattern of one path."""
    return f"^{re.escape(path)}$"


def matches(given: str | Sequence[str] | None, module: str) -> bool:
    """Whether PEFT's list of names, or its regular expression of the whole name, has a module."""
    if given is None:
        return False
    if isinstance(given, str):
        return bool(_compiled(given).fullmatch(module))
    return any(ends_in(module, end) for end in given)


def targeted(names: Names, options: Mapping[str, Any], held: Collection[str]) -> list[str]:
    """The modules that `target_modules` and its companions choose, as PEFT does.

    **Arguments:** `held`, the modules that the file has tensors of; they decide which heads
    "all-linear" has taken in.
    """
    given, saved = options["target_modules"], options["modules_to_save"] or ()
    everything = isinstance(given, str) and given.lower() == "all-linear"
    if given is None:
        raise CheckpointError("target_modules = None: the file does not say what it adapts")

    def chosen(module: str, path: str) -> bool:
        if matches(options["exclude_modules"], module):
            return False
        if any(_compiled(rf"(^|.*\.){m}($|\..*)").match(module) for m in saved):
            return False
        if everything:
            head = module.split(".")[0] in _HEADS - {"pooler"}
            return not names.is_table(path) and (module in held or not head)
        return matches(given, module) and _in_layers(options, given, module)

    found = [m for m, (path, _) in names.kernels.items() if chosen(m, path)]
    if not found:
        raise CheckpointError(
            f"target_modules = {given!r} is no module of these parameters; they have "
            + ", ".join(list(names.kernels)[:4])
            + ", ..."
        )
    return found


def by_path(names: Names, modules: Iterable[str]) -> dict[str, dict[int, str]]:
    """Path to layer to module."""
    found: dict[str, dict[int, str]] = {}
    for module in modules:
        path, layer = names.kernels[module]
        found.setdefault(path, {})[layer] = module
    return found


def _in_layers(options: Mapping[str, Any], given: Any, module: str) -> bool:
    layers = options.get("layers_to_transform")
    # PEFT does not look at the layers where the targets are a regular expression or full names.
    if layers is None or layers == [] or isinstance(given, str) or module in given:
        return True
    patterns = options.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = _compiled(rf"(?:^|.*?\.){pattern}\.(\d+)\.").match(module)
        if found:
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise CheckpointError(f"'{pattern}' is not a regular expression: {e}") from e


class Contents:
    """The tensors of an adapter's file; each is taken once, and what is wrong is collected."""

    def __init__(self, path: pathlib.Path, family: Family) -> None:
        self.path = path
        self._file = open_tensors(path)
        self._names = {normal_name(family, n): n for n in self._file.keys()}  # noqa: SIM118
        self._taken: set[str] = set()
        self.problems: list[str] = []

    def __iter__(self) -> Any:
        return iter(self._names)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as fp32; zeros where it is missing or misshapen."""
        self._taken.add(name)
        if name not in self._names:
            self.problems.append(f"missing: {name}")
            return np.zeros(shape, np.float32)
        found = self.shape(name)
        if found != shape:
            self.problems.append(f"misshapen: {name} is {found}, not {shape}")
            return np.zeros(shape, np.float32)
        try:
            return np.asarray(self._file.get_tensor(self._names[name])).astype(np.float32)
        except (SafetensorError, OSError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{self.path}: cannot read '{name}': {e}") from e

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is there."""
        return tuple(self._file.get_slice(self._names[name]).get_shape())

    def skip(self, pattern: str) -> None:
        """Leave tensors unread whose name the pattern is found in."""
        self._taken |= {n for n in self._names if re.search(pattern, n)}

    def finish(self) -> None:
        """**Raises:** `CheckpointError` with all that is missing, unexpected or misshapen."""
        self.problems += [f"unexpected: {n}" for n in sorted({*self._names} - self._taken)]
        if self.problems:
            raise CheckpointError(listed(f"{self.path} is of another model", self.problems))
