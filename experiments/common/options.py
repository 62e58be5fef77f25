"""What a command's options can be, told before anything is read."""

from __future__ import annotations

from typing import Any


def at_least(config: Any, **least: int) -> None:
    """**Raises:** `ValueError` for an option below its least number, or that has one below it.

    **Arguments:** `least`, by the option's name; one that is None was left out.
    """
    for name, number in least.items():
        found = getattr(config, name)
        for value in found if isinstance(found, tuple) else (found,):
            if value is not None and value < number:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least {number}")


def one_or_more(config: Any, *names: str) -> None:
    """**Raises:** `ValueError` for an option without values, or with one of them twice."""
    for name in names:
        values = getattr(config, name)
        if not values or len({*values}) < len(values):
            told = " ".join((f"--{name.replace('_', '-')}", *map(str, values)))
            raise ValueError(f"{told}: one or more, each once")
