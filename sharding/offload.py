"""An optimiser's state in the host's memory between steps, and on the device where it is used.

The counterpart of paged optimisers (Dettmers et al. 2023, section 3): a GPU driver moves pages when
memory runs out; here the compiled step moves each array, ahead of its use, every step.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core as jex

from sharding._program import bind, named_like, traced, typed
from sharding.layerwise import by_layers, flat

HOST = "pinned_host"


class Offloaded(optax.GradientTransformationExtraArgs):
    """What `offloaded` gives: `update` also takes `finite`, False for a step that is skipped."""

    inner: optax.GradientTransformation
    smallest: int

    def apply(
        self, grads: Any, state: Any, params: Any, finite: Any, stacked: str
    ) -> tuple[Any, Any]:
        """The new parameters and state: a layer at a time where that can be (`by_layers`).

        **Arguments:** `stacked`, a pattern of paths whose first axis is the layers'.
        """
        moved = {p: x.size >= self.smallest for p, x in flat(state).items()}
        made = by_layers(self.inner, grads, state, params, finite, moved, stacked)
        if made is not None:
            return made
        updates, state = self.update(grads, state, params, finite=finite)
        new = optax.apply_updates(params, updates)
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, params), state


def offloaded(
    optimiser: optax.GradientTransformation, *, smallest: int = 2**14, ahead: int = 2
) -> Offloaded:
    """An optimiser whose state is in the host's memory (`pinned_host`) between steps.

    In a step the arrays that the update of a parameter needs are copied to the device, updated, and
    copied back, parameter after parameter: only the arrays of a few parameters are on the device at
    a time. Numbers are those of the optimiser alone. What every update depends on (an optimiser
    that scales by a norm over all moments) is copied at once.

    It must be the outermost transformation, `offloaded(jpeft.master_weights(adamw))`, since what
    surrounds it would compute with arrays that are not on the device. Where the state is kept:
    `step.init` and `step(...)` of `make_step`, or any jitted function of `init` and `update`.

    **Arguments:** `smallest`, arrays of fewer elements stay on the device; `ahead`, how many
    parameters' arrays are copied to the device before they are needed.

    **Raises:** `ValueError` for numbers below 1; JAX's own, where devices have no such memory.
    """
    if smallest < 1 or ahead < 1:
        raise ValueError(f"smallest and ahead are 1 or more: {smallest}, {ahead}")
    device, host = jax.memory.Space.Device, jax.memory.Space.Host

    def there(x: Any, space: Any) -> Any:
        return jax.device_put(x, space) if x.size >= smallest else x

    def init(params: Any) -> Any:
        return jax.tree.map(lambda x: there(jnp.asarray(x), host), optimiser.init(params))

    def update(
        grads: Any, state: Any, params: Any = None, *, finite: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        inner = optax.with_extra_args_support(optimiser)

        def alone(state: Any, grads: Any, params: Any, extra: Any) -> tuple[Any, Any]:
            updates, state = inner.update(grads, state, params, **extra)
            return state, updates

        old = jax.tree.leaves(state)
        others = (grads, params, extra)
        program, consts, out = traced(alone, jax.tree.map(typed, state), *others)
        stages = _stages(program, [x.size >= smallest for x in old])
        values = dict(zip(program.constvars, consts, strict=True))
        values |= dict(zip(program.invars, [*old, *jax.tree.leaves(others)], strict=True))
        results: list[Any] = [None] * len(program.outvars)
        done: list[list[Any]] = []

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else values[atom]

        for i, stage in enumerate(stages):
            # Not before the last gradient, nor before the arrays of a stage further back are free.
            free = jax.tree.leaves(grads) if i <= ahead else done[i - ahead]
            here = [program.invars[j] for j in stage.loads]
            if here:
                waited, _ = jax.lax.optimization_barrier(([values[v] for v in here], free))
                values |= {v: there(x, device) for v, x in zip(here, waited, strict=True)}
            for eqn in stage.equations:
                with named_like(eqn):
                    outs = bind(eqn, [read(a) for a in eqn.invars])
                values |= dict(zip(eqn.outvars, outs, strict=True))
            made = [read(program.outvars[j]) for j in stage.results]
            for j, x in zip(stage.results, made, strict=True):
                results[j] = x
                if j < len(old):
                    x = x if finite is None else jnp.where(finite, x, read(program.invars[j]))
                    results[j] = there(x, host)
            done.append(made)
        new, updates = jax.tree.unflatten(out, results)
        return updates, new

    made = Offloaded(init, update)  # type: ignore[arg-type]
    made.inner, made.smallest = optimiser, smallest
    return made


class _Stage(NamedTuple):
    """A part of an update: the arguments it is first to need, its equations, what is then ready."""

    loads: list[int]
    equations: list[jex.JaxprEqn]
    results: list[int]


def _stages(program: jex.Jaxpr, moves: Sequence[bool]) -> list[_Stage]:
    """A program's equations by the moved arguments that they need: what needs none comes first.

    Each further stage adds those of one more result, from the last group of results to the first:
    the updates of parameters, and then the state. Every argument is loaded as late as that order
    lets it be, and all that is ready is in the stage that makes it so.

    **Arguments:** `moves`, which of the first arguments, the state, are moved.
    """
    n = len(moves)
    needs: dict[Any, int] = {v: 1 << i for i, v in enumerate(program.invars[:n]) if moves[i]}

    def of(atoms: Sequence[Any]) -> int:
        bits = 0
        for atom in atoms:
            bits |= 0 if isinstance(atom, jex.Literal) else needs.get(atom, 0)
        return bits

    for eqn in program.eqns:
        bits = of(eqn.invars)
        needs |= dict.fromkeys(eqn.outvars, bits)
    stages, loaded = [_Stage([], [], [])], [0]
    # A skipped step gives back the state that it was given: a result of the state needs its own.
    own = [needs.get(v, 0) for v in program.invars[:n]] + [0] * len(program.outvars[n:])
    every = [of([out]) | bits for out, bits in zip(program.outvars, own, strict=True)]
    for bits in [*every[n:], *every[:n]]:
        new = bits & ~loaded[-1]
        if new:
            stages.append(_Stage([i for i in range(n) if new >> i & 1], [], []))
            loaded.append(loaded[-1] | new)

    def first(bits: int) -> _Stage:
        return stages[bisect.bisect_left(loaded, True, key=lambda have: not bits & ~have)]

    for eqn in program.eqns:
        first(of(eqn.invars)).equations.append(eqn)
    for i, bits in enumerate(every):
        first(bits).results.append(i)
    return stages


def on_host(optimiser: optax.GradientTransformation, params: Any) -> Any:
    """Which arrays of an optimiser's state are in the host's memory, from parameters or shapes."""
    program, _, out = traced(optimiser.init, params)
    host = jax.memory.Space.Host
    return jax.tree.unflatten(out, [v.aval.memory_space == host for v in program.outvars])
