"""The memory of training: by a rule of thumb, from shapes alone, and as a compiled program says.

Bytes of one device, by kind. `account` allocates and compiles nothing: it traces a step and walks
its equations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jpeft._buffers import COMPILERS, Operand
from jpeft._flat import bytes_of
from jpeft._near import did_you_mean
from jpeft._split import Split, whole
from jpeft._temporaries import TEMPORARIES, Shared, temporaries
from jpeft._traced_step import part_of, step_of, update_of
from jpeft.precision import MasterState

ARGUMENTS = ("frozen", "trained", "masters", "optimiser", "batch")
DIVIDED = ("frozen", "trained", "optimiser", "gradients")


@dataclasses.dataclass(frozen=True)
class Account:
    """Bytes on one device, at the moment of a training step when most are in use.

    **Attributes:**

    - `frozen`, parameters that are read and not trained; `trained`, those that are.
    - `masters`, their fp32 copies; `optimiser`, the rest of its state; `batch`, its inputs.
    - `gradients`.
    - `activations`, what the forward pass keeps for the backward pass.
    - `gathered`, parameters that are whole for a while, of which the device keeps a part.
    - `working`, everything else, such as what a layer computes with.
    """

    frozen: int = 0
    trained: int = 0
    masters: int = 0
    optimiser: int = 0
    batch: int = 0
    gradients: int = 0
    activations: int = 0
    gathered: int = 0
    working: int = 0

    @property
    def arguments(self) -> int:
        """What is there before and after a step."""
        return sum(getattr(self, kind) for kind in ARGUMENTS)

    @property
    def temporaries(self) -> int:
        """What is there during a step."""
        return sum(getattr(self, kind) for kind in TEMPORARIES)

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.temporaries

    def kinds(self) -> dict[str, int]:
        """Bytes by kind, in order."""
        return {kind: getattr(self, kind) for kind in (*ARGUMENTS, *TEMPORARIES)}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes on one device that a compiled program says it takes.

    **Attributes:** `arguments`; `outputs`, of which `aliased` take the place of arguments that are
    donated; `temporaries`, with the gaps between them, and on TPUs what stands in the chip's own
    fast memory; `peak`, the most in use at once, None where the compiler does not tell.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int | None

    @property
    def total(self) -> int:
        """Arguments, outputs that are not arguments' places, and temporaries."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


def measured(compiled: jax.stages.Compiled) -> Measured:
    """What `memory_analysis` of a compiled program says.

    **Raises:** `ValueError` for a backend that says nothing.
    """
    found = compiled.memory_analysis()
    if found is None:
        raise ValueError("the compiled program has no memory analysis: its backend gives none")
    arguments, temporaries = int(found.argument_size_in_bytes), int(found.temp_size_in_bytes)
    peak = int(getattr(found, "peak_memory_in_bytes", 0) or 0)
    return Measured(
        arguments,
        int(found.output_size_in_bytes),
        int(found.alias_size_in_bytes),
        temporaries,
        # The CPU's counts no temporaries.
        peak if peak - arguments > temporaries / 100 else None,
    )


def rule_of_thumb(
    params: float,
    *,
    trained: float | None = None,
    precision: Literal["float32", "mixed"] = "float32",
    stage: int = 0,
    devices: int = 1,
) -> Account:
    """The memory of training with Adam, counted by the parameter.

    In fp32: 4 bytes of weights, 4 of gradients, 8 of Adam's moments and about 8 of activations are
    24, which is 24 GB for 1B parameters. Mixed: 2 and 2 in bf16, 4 of fp32 masters, 8 of moments,
    and about 4 of activations, which are half as wide.

    **Arguments:** `params`, how many there are; `trained`, of them, all when left out; `stage`,
    ZeRO's, over so many `devices`: 1 shards moments and masters, 2 also gradients, 3 also weights.

    **Raises:** `ValueError` for numbers or words that make no sense.

    Source: Rajbhandari et al. 2020, section 3, for all but the activations.
    """
    params, trained = float(params), float(params if trained is None else trained)
    if not 0 <= trained <= params or not math.isfinite(params) or params <= 0:
        raise ValueError(f"{trained:g} parameters of {params:g} cannot be trained")
    if precision not in ("float32", "mixed"):
        near = did_you_mean(precision, ("float32", "mixed"))
        raise ValueError(f"there is no precision '{precision}'{near or ': float32 or mixed'}")
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO has the stages 0, 1, 2 and 3; got {stage}")
    if devices < 1:
        raise ValueError(f"there is at least 1 device; got {devices}")
    width = 4 if precision == "float32" else 2

    def part(size: float, at: int) -> int:
        return round(size / (devices if stage >= at else 1))

    return Account(
        frozen=part(width * (params - trained), 3),
        trained=part(width * trained, 3),
        masters=part((0.0 if precision == "float32" else 4.0) * trained, 1),
        optimiser=part(8 * trained, 1),
        gradients=part(width * trained, 2),
        activations=round(2 * width * params),
    )


def account(
    loss: Callable[[Any, Any, Any, Any], Any],
    optimiser: optax.GradientTransformation,
    trainable: Any,
    frozen: Any,
    batch: Any,
    key: Any = None,
    *,
    accumulate: int = 1,
    divide: Mapping[str, Any] | None = None,
    split: Mapping[str, Any] | None = None,
    compiler: str = "tpu",
) -> Account:
    """The memory of a training step, from the shapes of its arguments.

    The step is a loss and its gradient, clipped by global norm, and an update whose state is
    donated. Its equations are walked as compilers work through them; between a prediction and a
    program that XLA compiled lie some percent (`experiments.memory --check` compares them).

    **Arguments:**

    - `loss(trainable, frozen, batch, key)`, a scalar, or a pair: a sum, and the number that it is
      over.
    - `trainable`, `frozen`, `batch`, `key`, arrays or their shapes; parameters whole, of the batch
      the rows of one device.
    - `accumulate`, in how many parts the batch is taken, whose gradients are summed in fp32.
    - `divide`, by how many devices arrays of a kind are shared: `frozen`, `trained`, `optimiser`,
      `gradients`; each a number, or a tree of them. What is frozen or trained and shared is
      gathered where the loss reads it: a layer at a time in a scan.
    - `split`, by how many devices each axis of `frozen` or `trained` is split where the loss reads
      it, which is not gathered (tensor parallelism): trees of tuples, a number an axis. What is
      computed of them is split as a partitioner would. `divide` counts these devices too.
    - `compiler`, whose habits to assume: `tpu`, `cpu` or `gpu`. The last is a guess: it was not
      compared with programs.

    **Raises:** `ValueError` for another compiler or kind, less than one part, or rows that do not
    make equal parts.
    """
    if compiler not in COMPILERS:
        near = did_you_mean(compiler, COMPILERS)
        raise ValueError(f"there is no compiler '{compiler}'{near or ': tpu, cpu or gpu'}")
    if accumulate < 1:
        raise ValueError(f"accumulate counts parts of a batch, at least 1: {accumulate}")
    divide, split = dict(divide or {}), dict(split or {})
    for given, known, what in ((divide, DIVIDED, "divided"), (split, DIVIDED[:2], "split")):
        for kind in given:
            if kind not in known:
                near = did_you_mean(kind, known)
                raise ValueError(f"'{kind}' cannot be {what}{near or ': ' + ', '.join(known)}")

    def over(kind: str, tree: Any) -> list[int]:
        by = divide.get(kind, 1)
        return [by] * len(jax.tree.leaves(tree)) if isinstance(by, int) else jax.tree.leaves(by)

    def axes(kind: str, tree: Any) -> list[Split]:
        if kind not in split:
            return [whole(x.shape) for x in jax.tree.leaves(tree)]
        return jax.tree.leaves(split[kind], is_leaf=lambda x: isinstance(x, tuple))

    state = jax.eval_shape(optimiser.init, trainable)
    trained = Shared.of(trainable, over("trained", trainable), axes("trained", trainable))
    gradients = Shared.of(trainable, over("gradients", trainable), axes("trained", trainable))
    base = Shared.of(frozen, over("frozen", frozen), axes("frozen", frozen))
    habits = COMPILERS[compiler]
    whole_state = [Operand()] * len(jax.tree.leaves(state))
    if accumulate == 1:
        # The loss and the update read what is trained apart: only the first gathers it.
        given = (trainable, trainable, state, frozen, batch, key)
        operands = [*trained.operands(), *gradients.updated(), *whole_state, *base.operands()]
        found = temporaries(step_of(loss, optimiser), given, operands, gradients, habits)
    else:
        sums = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable)
        part = jax.tree.map(lambda x: _rows(x, accumulate), batch)
        given = (trainable, sums, frozen, part, key)
        operands = [*trained.operands(), *gradients.updated(), *base.operands()]
        found = temporaries(part_of(loss), given, operands, gradients, habits)
        last = [*gradients.updated(), *gradients.updated(), *whole_state]
        update = temporaries(
            update_of(optimiser), (sums, trainable, state), last, gradients, habits
        )
        found = max(found, update, key=lambda kinds: sum(kinds.values()))
        found["gradients"] += _bytes(sums, gradients.by)
    masters, rest = _masters(state, over("optimiser", state))
    return Account(
        frozen=_bytes(frozen, base.by),
        trained=_bytes(trainable, trained.by),
        masters=masters,
        optimiser=rest,
        batch=sum(map(bytes_of, jax.tree.leaves((batch, key)))),
        **found,
    )


def _rows(x: Any, parts: int) -> Any:
    if not x.shape:
        return x
    if x.shape[0] % parts:
        raise ValueError(f"a batch of {x.shape[0]} rows cannot be taken in {parts} equal parts")
    return jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype)


def _bytes(tree: Any, by: Sequence[int]) -> int:
    return sum(bytes_of(x) // n for x, n in zip(jax.tree.leaves(tree), by, strict=True))


def _masters(state: Any, by: list[int]) -> tuple[int, int]:
    """Bytes of the masters in an optimiser's state, and of the rest."""
    parts = jax.tree.unflatten(
        jax.tree.structure(state),
        [bytes_of(x) // n for x, n in zip(jax.tree.leaves(state), by, strict=True)],
    )
    nodes = jax.tree.leaves(parts, is_leaf=lambda x: isinstance(x, MasterState))
    masters = sum(sum(jax.tree.leaves(x.masters)) for x in nodes if isinstance(x, MasterState))
    return masters, sum(jax.tree.leaves(parts)) - masters
