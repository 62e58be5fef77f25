"""The memory of training: by a rule of thumb, from shapes alone, and as a compiled program says.

Bytes of one device, by kind. `account` allocates and compiles nothing: it traces a step and walks
its equations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jpeft._buffers import COMPILERS, Operand
from jpeft._flat import FUSED, Equation, Flat, bytes_of
from jpeft._liveness import Walk
from jpeft._near import did_you_mean
from jpeft.precision import MasterState

ARGUMENTS = ("frozen", "trained", "masters", "optimiser", "batch")
TEMPORARIES = ("gradients", "activations", "gathered", "working")
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
    divide: Mapping[str, Any] | None = None,
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
    - `divide`, by how many devices arrays of a kind are shared: `frozen`, `trained`, `optimiser`,
      `gradients`; each a number, or a tree of them. What is frozen or trained and shared is
      gathered where the loss reads it: a layer at a time in a scan.
    - `compiler`, whose habits to assume: `tpu`, `cpu` or `gpu`. The last is a guess: it was not
      compared with programs.

    **Raises:** `ValueError` for another compiler or kind.
    """
    if compiler not in COMPILERS:
        near = did_you_mean(compiler, COMPILERS)
        raise ValueError(f"there is no compiler '{compiler}'{near or ': tpu, cpu or gpu'}")
    divide = dict(divide or {})
    for kind in divide:
        if kind not in DIVIDED:
            near = did_you_mean(kind, DIVIDED)
            raise ValueError(f"'{kind}' cannot be divided{near or ': ' + ', '.join(DIVIDED)}")

    def over(kind: str, tree: Any) -> list[int]:
        by = divide.get(kind, 1)
        return [by] * len(jax.tree.leaves(tree)) if isinstance(by, int) else jax.tree.leaves(by)

    state = jax.eval_shape(optimiser.init, trainable)
    # The loss and the update read what is trained apart: only the first gathers it.
    given = (trainable, trainable, state, frozen, batch, key)
    flat = Flat(jax.make_jaxpr(_step(loss, optimiser))(*given))
    middle = flat.put_last(flat.outs[-1])
    trained_by, frozen_by = over("trained", trainable), over("frozen", frozen)
    gradients_by = dict(
        zip(
            (x.shape for x in jax.tree.leaves(trainable)), over("gradients", trainable), strict=True
        )
    )

    def size(made_by: Equation | None, aval: Any) -> int:
        # What has a trained array's shape is its gradient, or on the way to its update.
        whole = made_by is not None and made_by.name not in FUSED and made_by.name != "scan"
        return bytes_of(aval) // (1 if whole else gradients_by.get(aval.shape, 1))

    operands = [
        *(Operand(sharded=n > 1, parameter=True) for n in trained_by),
        *(Operand() for _ in jax.tree.leaves((trainable, state))),
        *(Operand(sharded=n > 1, parameter=True) for n in frozen_by),
        *(Operand() for _ in jax.tree.leaves((batch, key))),
    ]
    walk = Walk(flat, operands, size, COMPILERS[compiler])
    peak = walk.peak()
    found: dict[str, int] = dict.fromkeys(TEMPORARIES, 0)
    for v, buffer in peak.buffers.items():
        # A narrow copy of a parameter is no activation.
        kept = middle if v in walk.maker else len(flat.equations)
        found[_kind(flat.avals[v].shape, buffer, kept, gradients_by)] += buffer.size
    found["gathered"] += peak.gathered
    # Less where results take over what they are made of.
    found["working"] = peak.total - sum(found[k] for k in TEMPORARIES[:-1])
    masters, rest = _masters(state, over("optimiser", state))
    return Account(
        frozen=_shared(frozen, frozen_by),
        trained=_shared(trainable, trained_by),
        masters=masters,
        optimiser=rest,
        batch=sum(map(bytes_of, jax.tree.leaves((batch, key)))),
        **found,
    )


def _kind(shape: Any, buffer: Any, middle: int, gradients: Mapping[Any, int]) -> str:
    if buffer.gathered:
        return "gathered"
    if buffer.made > middle and shape in gradients:
        return "gradients"
    return "activations" if buffer.made <= middle < buffer.last else "working"


def _step(loss: Any, optimiser: Any) -> Callable[..., Any]:
    def step(read: Any, trainable: Any, state: Any, frozen: Any, batch: Any, key: Any) -> Any:
        def mean(trainable: Any) -> Any:
            out = loss(trainable, frozen, batch, key)
            total, count = out if isinstance(out, tuple) else (out, 1)
            return jnp.asarray(total, jnp.float32) / jnp.maximum(count, 1)

        value, grads = jax.value_and_grad(mean)(read)
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        grads = jax.tree.map(lambda g: (g / jnp.maximum(norm, 1)).astype(g.dtype), grads)
        updates, state = optimiser.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return step


def _shared(tree: Any, by: list[int]) -> int:
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
