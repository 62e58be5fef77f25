"""How our parameters are called in Hugging Face's files: one table, read in both directions.

Our models have Hugging Face's names in their paths, with three differences that hold everywhere:
`/` for `.`; layers are stacked along axis 0, so their numbers are left out; a `weight` is called by
what it is, `kernel` (in, out), `scale` or `embedding`. `bert/encoder/layer/output/dense/kernel`
is `bert.encoder.layer.{}.output.dense.weight`, transposed. What else a family has is its `Family`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

_NONE: Mapping[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Family:
    """What the files of one family of models have of their own.

    **Attributes:**

    - `stacks`: paths below which every parameter is stacked over layers, such as `model/layers`.
    - `prefix`: the first part of the names that a file of the model without its head leaves out,
      such as `bert.`.
    - `conv1d`: a pattern of paths whose kernels are (in, out) in the file too (GPT-2's Conv1D).
    - `ignored`: a pattern of names that a file may have and these models do not read.
    - `copies`: name to the name whose copy it is, where a file has both: it is not read either.
    - `untied`: what a reader of such a file can do where it is no copy.
    - `new`: a pattern of paths that a file may lack, and that are then initialised.
    - `replaced`: a pattern of paths that are new too where the file's tensor has another shape: a
      head for other classes.
    - `renames`: pairs of a pattern and its replacement, for other spellings of names in files.
    - `shared`: name to the name that is read in its place where a file lacks it.
    - `special`: path to name, with `{}` for the layer, where the rule above does not hold.
    """

    stacks: tuple[str, ...] = ()
    prefix: str = ""
    conv1d: str = r"$^"
    ignored: str = r"$^"
    copies: Mapping[str, str] = dataclasses.field(default_factory=lambda: _NONE)
    untied: str = ""
    new: str = r"$^"
    replaced: str = r"$^"
    renames: tuple[tuple[str, str], ...] = ()
    shared: Mapping[str, str] = dataclasses.field(default_factory=lambda: _NONE)
    special: Mapping[str, str] = dataclasses.field(default_factory=lambda: _NONE)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a parameter is in a file.

    **Attributes:** `name`, the tensor's, with `{}` for the layer where it is `stacked`;
    `transposed`, whether the file has (out, in).
    """

    name: str
    stacked: bool
    transposed: bool

    def of_layer(self, layer: int) -> str:
        """The tensor's name for one layer."""
        return self.name.format(layer) if self.stacked else self.name

    @property
    def module(self) -> str:
        """The name of the module that has it: without its last part."""
        return self.name.rsplit(".", 1)[0]


def place(family: Family, path: str) -> Place:
    """Where the parameter at one of our paths is."""
    stack = next((s for s in family.stacks if path.startswith(s + "/")), None)
    name = family.special.get(path)
    if name is None:
        name = re.sub(r"(^|/)(scale|kernel|embedding)$", r"\1weight", path)
        if stack is not None:
            name = f"{stack}/{{}}{name.removeprefix(stack)}"
        name = name.replace("/", ".")
    kernel = path.endswith("/kernel") and not re.search(family.conv1d, path)
    return Place(name, stack is not None, kernel)


def places(family: Family, paths: Iterable[str]) -> dict[str, Place]:
    """Path to place, for every parameter of a model."""
    return {path: place(family, path) for path in paths}


def normal_name(family: Family, name: str) -> str:
    """A file's name as the table has it: other spellings undone."""
    for pattern, replacement in family.renames:
        name = re.sub(pattern, replacement, name)
    return name
