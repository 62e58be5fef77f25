"""Transforms as JSON: their type's name and their fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jpeft._near import did_you_mean
from jpeft.transform import Transform

# 2: Fastfood's projection of a seed is another than in 1.
VERSION = 2


class ConfigError(ValueError):
    """A description of a transform that cannot be read; says what was found and what to do."""


def to_json(transform: Transform) -> dict[str, Any]:
    """A transform as values that `json` writes: `{"type": "LoRA", "rank": 8, ...}`.

    **Raises:** `ConfigError` for a field that JSON has no form for.
    """
    fields = dataclasses.fields(transform)  # type: ignore[arg-type]
    name = type(transform).__name__
    return {"type": name} | {
        f.name: _out(getattr(transform, f.name), f"{name}.{f.name}") for f in fields
    }


def from_json(value: Mapping[str, Any]) -> Transform:
    """The transform that `to_json` described: one of this package's, or any subclass of
    `jpeft.Transform` that the program has imported.

    **Raises:** `ConfigError` for an unknown type or field, with the nearest known one, and for
    values that the transform refuses.
    """
    if not isinstance(value, Mapping) or "type" not in value:
        raise ConfigError(f"a transform has a 'type', but here is {value!r}")
    types: dict[str, type] = {t.__name__: t for t in _subclasses(Transform)}
    name = str(value["type"])
    if name not in types:
        raise ConfigError(f"there is no transform '{name}'{_suggest(name, types)}")
    known = {f.name for f in dataclasses.fields(types[name])}
    given = {k: v for k, v in value.items() if k != "type"}
    for key in given:
        if key not in known:
            raise ConfigError(f"{name} has no option '{key}'{_suggest(key, known)}")
    options = {k: _in(v) for k, v in given.items()}
    try:
        return types[name](**options)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{name} cannot be made: {e}") from e


def _out(value: Any, where: str) -> Any:
    if isinstance(value, Transform):
        return to_json(value)
    if isinstance(value, Mapping):
        found = {str(k): _out(v, where) for k, v in value.items()}
        # A pattern may be the word that marks a transform: such a mapping stands one level lower.
        return {"type": found} if "type" in found else found
    if isinstance(value, (tuple, list)):
        return [_out(v, where) for v in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ConfigError(f"{where} is a {type(value).__name__}: JSON has no form for it")


def _in(value: Any) -> Any:
    if isinstance(value, Mapping):
        mark = value.get("type", value)
        if not isinstance(mark, Mapping):
            return from_json(value)
        return {k: _in(v) for k, v in mark.items()}
    return tuple(_in(v) for v in value) if isinstance(value, list) else value


def _subclasses(cls: type) -> list[type]:
    found = cls.__subclasses__()
    return found + [c for s in found for c in _subclasses(s)]


def _suggest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    return did_you_mean(name, known) or f"; there are {', '.join(known)}"
