"""Pre-trained encoders of several sizes: which family, size and step a directory is of."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from experiments.common.models import fetch_model
from jpeft.hf import CheckpointError


@dataclasses.dataclass(frozen=True)
class Member:
    """One model.

    **Attributes:** `name`, as given; `step`, of its pre-training, None where that is not known;
    `parameters`, the encoder's, without a head; `width`, of its residual stream; `longest`, the
    tokens that it reads.
    """

    name: str
    directory: pathlib.Path
    family: str
    size: str
    step: int | None
    parameters: int
    width: int
    longest: int

    @property
    def label(self) -> str:
        """Family, size and step, for a run's folder."""
        parts = (self.family, self.size, None if self.step is None else f"step{self.step}")
        return "_".join(re.sub(r"[^\w.-]", "-", p) for p in parts if p)

    @property
    def title(self) -> str:
        """Family, size and step, for people."""
        step = "" if self.step is None else f", step {self.step:,}"
        return f"{self.family} {self.size}{step}"


def members(models: Sequence[str], console: Console) -> list[Member]:
    """The models, by parameters and step.

    **Raises:** `ModelError` for one that is not there, `CheckpointError` for one that is no
    encoder, `ValueError` for none, or for two of one family, size and step
    that are not of one pre-training: there the last step and the end are the same.
    """
    if not models:
        raise ValueError("--models: at least one")
    found: list[Member] = []
    for name in models:
        one = member(name, fetch_model(name, console))
        twin = next((o for o in found if o.label == one.label), None)
        if twin is None:
            found.append(one)
        elif twin.directory.resolve().parent == one.directory.resolve().parent:
            console.print(f"{twin.name} and {name} are one model: taken once")
        else:
            raise ValueError(f"--models {twin.name} and {one.name} are both {one.title}")
    return sorted(found, key=lambda m: (m.parameters, m.family, m.size, _age(m.step)))


def member(name: str, directory: pathlib.Path) -> Member:
    """What a directory holds. **Raises:** `CheckpointError` for what is no encoder.

    For family, size and step see `named`.
    """
    from jpeft.hf.checkpoints import read_bert_config

    try:
        config = read_bert_config(directory)
    except CheckpointError as e:
        raise CheckpointError(f"--models {name}: {e}; encoders are what is compared here") from e
    family, size, step = named(directory, config.model_type)
    count, width = _parameters(config), config.hidden_size
    return Member(name, directory, family, size, step, count, width, config.longest)


def named(directory: pathlib.Path, kind: str) -> tuple[str, str, int | None]:
    """A directory's family, size and step.

    One that `experiments.pretrain` wrote ends in `family/size/step_N`, or in `family/size/model`
    beside the `result.json` that has the steps. Another one is of the family `kind`, the type of
    its model, and its own name is the size.
    """
    path = directory.resolve()
    step = re.fullmatch(r"step_(\d+)", path.name)
    if (step is None and path.name != "model") or len(path.parts) < 4:
        return kind, path.name, None
    family, size = path.parts[-3:-1]
    about = path.parent / "result.json"
    if step is not None:
        return family, size, int(step[1])
    if not about.is_file():
        return family, size, None
    told: dict[str, Any] = json.loads(about.read_text(encoding="utf-8"))
    return family, size, told.get("steps")


def _parameters(config: Any) -> int:
    import jax
    from flax import nnx

    from jpeft.models.bert import Bert

    shapes = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0), pooler=False))
    leaves = jax.tree.leaves(nnx.state(shapes, nnx.Param))
    return sum(math.prod(x.shape) for x in leaves)


def _age(step: int | None) -> float:
    return math.inf if step is None else step
