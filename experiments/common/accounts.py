"""Training steps whose memory is accounted for: predicted, and as compiled programs say."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

from experiments.common.methods import Method, Sizes
from experiments.common.numbers import Keep, Precision, Quantised, Stage
from experiments.common.numbers import Optimiser as Name

if TYPE_CHECKING:
    from experiments.common.plan import Planned
    from jpeft.memory import Account, Measured

Optimiser = Literal["adam", "sgd", "adafactor"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A step: what `experiments.common.plan` asks for, and its rows over all devices."""

    model: str
    method: Method
    numbers: Precision
    stage: Stage
    remat: bool
    rows: int
    sequence: int
    sizes: Sizes = Sizes(targets=())
    accumulate: int = 1
    chunk: int = 1024
    keep: Keep = "nothing"
    quantize: Quantised | None = None
    optimiser: Name = "adamw"
    offload: bool = False
    mesh: str | None = None

    @property
    def title(self) -> str:
        """In a few words."""
        keeps = "remat" if self.remat else "keeps all"
        parts = f", {self.accumulate} parts" if self.accumulate > 1 else ""
        mesh = f", {self.mesh}" if self.mesh else ""
        return (
            f"{self.model}, {self.method}, {self.numbers}, stage {self.stage}, {keeps}{parts}{mesh}"
        )


def cases() -> list[Case]:
    """The twelve: methods by stages by what is kept, and then other numbers and another model."""
    made: list[Case] = []
    kinds: tuple[tuple[Method, Precision], ...] = (("full", "mixed"), ("lora", "bfloat16"))
    for method, numbers in kinds:
        for stage in (0, 3):
            for remat in (True, False):
                made.append(Case("qwen3-0.6b", method, numbers, stage, remat, 32, 1024))
    for method in ("full", "lora"):
        made.append(Case("qwen3-0.6b", method, "float32", 3, False, 32, 1024))
    for method, numbers in kinds:
        made.append(Case("llama-3.2-1b", method, numbers, 3, True, 64, 2048))
    return made


def held_out() -> list[Case]:
    """Steps that nobody looked at while the account's method was made."""
    return [
        Case("gemma-3-1b", "full", "mixed", 3, True, 16, 1024),
        Case("qwen3-1.7b", "lora", "bfloat16", 1, False, 16, 1024),
        Case("llama-3.2-3b", "lora", "mixed", 2, True, 32, 2048),
        Case("gemma-2-2b", "full", "mixed", 2, False, 8, 1024),
    ]


def in_parts() -> list[Case]:
    """Steps whose layers are split over `tensor`, whose batch is taken in parts, and both."""

    def case(method: Method, numbers: Precision, stage: Stage, remat: bool, **more: Any) -> Case:
        return Case("qwen3-0.6b", method, numbers, stage, remat, 32, 1024, **more)

    return [
        case("full", "mixed", 3, True, mesh="fsdp=2,tensor=4"),
        case("full", "mixed", 1, False, mesh="data=4,tensor=2"),
        case("lora", "bfloat16", 3, False, mesh="fsdp=4,tensor=2"),
        case("full", "mixed", 2, True, accumulate=4),
        case("lora", "bfloat16", 3, False, accumulate=2),
        case("full", "mixed", 3, True, accumulate=2, mesh="data=2,fsdp=2,tensor=2"),
    ]


def seen_by_one(case: Case) -> Planned:
    """The step as one device sees it, whose shapes do not depend on the stage."""
    from experiments.common.plan import plan

    return plan(case, _mesh((1, 1, 1)))


def predicted(
    case: Case,
    sizes: tuple[int, int, int],
    optimiser: Optimiser = "adam",
    compiler: str = "tpu",
    planned: Planned | None = None,
) -> Account:
    """The account of a case's step on one device of a mesh.

    **Arguments:** `sizes`, of `data`, `fsdp` and `tensor`; `planned`, what `seen_by_one` gives,
    where it is at hand.

    **Raises:** `ValueError` for rows that do not divide over devices and parts.
    """
    import jax

    from experiments.common.scale import Scale
    from jpeft.memory import account
    from sharding import Zero

    shared = sizes[0] * sizes[1]
    if case.rows % (shared * case.accumulate):
        raise ValueError(
            f"{case.rows} rows cannot be shared evenly by {shared} devices"
            + (f", in {case.accumulate} parts each" if case.accumulate > 1 else "")
        )
    planned = planned or seen_by_one(case)
    zero, axes = Zero(_mesh(sizes), case.stage), planned.step.axes
    update = planned.step.optimiser
    if optimiser != "adam":
        update = Scale(precision=case.numbers).optimiser(_other(optimiser), 0)
    state = jax.eval_shape(update.init, planned.trainable)
    trained, frozen = planned.trainable, planned.frozen
    # Each is scattered as it is made, from stage 1 on: its device's part is all that is read. Where
    # parts of a batch are summed, stage 1 sums whole ones.
    summed = zero.gradients if case.accumulate > 1 else zero.reduced
    divide = {
        "trained": _parts(trained, zero.parameters(trained, axes)),
        "frozen": _parts(frozen, zero.parameters(frozen, axes)),
        "gradients": _parts(trained, summed(trained, axes)),
        "optimiser": _parts(state, zero.optimiser(state, trained, axes)),
    }
    split = {
        "trained": _axes(trained, zero.used(trained, axes)),
        "frozen": _axes(frozen, zero.used(frozen, axes)),
    }
    return account(
        planned.step.loss,
        update,
        trained,
        frozen,
        planned.batch(case.rows // shared),
        jax.eval_shape(lambda: jax.random.key(0)),
        accumulate=case.accumulate,
        divide=divide,
        split=split,
        compiler=compiler,
    )


def _mesh(sizes: tuple[int, int, int]) -> Any:
    """One whose devices nobody has."""
    from jax.sharding import AbstractMesh

    from sharding import AXES

    return AbstractMesh(sizes, AXES)


def _other(optimiser: Optimiser) -> Any:
    import optax

    return {"sgd": optax.sgd, "adafactor": optax.adafactor}[optimiser](1e-3)


def _parts(tree: Any, shardings: Any) -> Any:
    """Over how many devices each array is split."""
    import jax

    return jax.tree.map(lambda x, s: math.prod(_split(x, s)), tree, shardings)


def _axes(tree: Any, shardings: Any) -> Any:
    """Over how many devices each axis of each array is split."""
    import jax

    return jax.tree.map(_split, tree, shardings)


def _split(x: Any, sharding: Any) -> tuple[int, ...]:
    return tuple(n // m for n, m in zip(x.shape, sharding.shard_shape(x.shape), strict=True))


def compiled(case: Case, mesh: Any) -> Measured:
    """What the program of a case's step, compiled for a mesh, says."""
    from experiments.common.plan import plan
    from jpeft.memory import measured
    from sharding.aot import not_cached

    step, *arguments = plan(case, mesh).arguments(case.rows)
    with not_cached():
        return measured(step.lower(*arguments).compile())


def compared(case: Case, account: Account, found: Measured) -> dict[str, Any]:
    """A row of the check: `error` is the prediction's, of the peak."""
    of = found.peak or found.total
    return {
        "case": dataclasses.asdict(case) | {"sizes": None},
        "title": case.title,
        "predicted": account.kinds(),
        "predicted_total": account.total,
        "measured": dataclasses.asdict(found),
        "measured_peak": of,
        "measured_total": found.total,
        "error": account.total / of - 1,
        "error_of_total": account.total / found.total - 1,
    }
