"""What experiments train with: the schedule, the loss, and a compiled step of one transform."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import jpeft
from experiments.common.numbers import Optimiser
from experiments.common.pipeline import Batch, Shapes, Share, in_order, share_of
from experiments.common.scale import Scale, all_axes
from experiments.common.tokens import Example
from jpeft._cpu_features import multiplies_bf16
from jpeft.paths import flatten
from sharding import Axes, State, Step, make_step

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How to train: AdamW, warm-up and linear decay to zero, clipping by the global norm.

    **Attributes:** `ratio`, None, or LoRA+'s: how much faster B matrices learn.
    """

    learning_rate: float
    steps: int
    warmup: float = 0.06
    weight_decay: float = 0.01
    clip: float = 1.0
    ratio: float | None = None
    name: Optimiser = "adamw"

    def __post_init__(self) -> None:
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"--lr {self.learning_rate}: a finite number, not below 0")
        if self.ratio is not None and self.name != "adamw":
            raise ValueError(f"--lora-plus is of AdamW: leave out --optimiser {self.name}")

    def optimiser(self, clip: bool = True) -> optax.GradientTransformation:
        """The optax chain; without `clip`, for a step that clips and keeps the state on the host.

        **Raises:** `ValueError` for 8-bit moments there, which the TPU compiler cannot move.
        """
        if not clip and self.name == "adamw8bit":
            raise ValueError(
                "--offload cannot move 8-bit moments (--optimiser adamw8bit): use one of the two"
            )
        warm = max(1, round(self.steps * self.warmup))
        decay = max(1, self.steps - warm)
        rate = optax.join_schedules(
            [
                optax.linear_schedule(0, self.learning_rate, warm),
                optax.linear_schedule(self.learning_rate, 0, decay),
            ],
            [warm],
        )
        if self.name == "adamw8bit":
            adam = jpeft.adamw8bit(rate, weight_decay=self.weight_decay)
        elif self.ratio is None:
            adam = optax.adamw(rate, weight_decay=self.weight_decay)
        else:
            adam = jpeft.lora_plus(rate, ratio=self.ratio, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), adam) if clip else adam


def loss_of(
    outputs: Float[Array, "b c"], labels: Float[Array, " b"], valid: Float[Array, " b"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy, or for one output the squared error: the sum over the valid rows, and their
    number.
    """
    if outputs.shape[-1] == 1:
        each = (outputs[:, 0] - labels) ** 2
    else:
        each = optax.softmax_cross_entropy_with_integer_labels(outputs, labels.astype(jnp.int32))
    return jnp.sum(each * valid), jnp.sum(valid)


def compiler_options(barriers: bool = False) -> dict[str, Any] | None:
    """What the compiler is told: on a CPU, not to interleave independent products; and on one that
    multiplies bf16, which is new enough not to slow its clock for them, to use 512 bits at once.

    **Arguments:** `barriers`, leave them in the program to its end. What `remat` makes again for
    the backward pass the compiler for CPUs else takes from the forward pass, and keeps till then,
    where both are pieces of the same code.
    """
    if jax.default_backend() != "cpu":
        return None
    made: dict[str, Any] = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    if multiplies_bf16():
        made["xla_cpu_prefer_vector_width"] = 512
    return made | ({"xla_disable_hlo_passes": "cse_barrier_expander"} if barriers else {})


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a `Trainer` compiles, and holds none of its arrays.

    **Attributes:** `uses`, how the model reads its parameters; `base`, which of them stay as they
    are, by shape; `first(key, params)`, what is trained at the start; `step` and `outputs`, see
    `Trainer`.
    """

    uses: Any
    base: jpeft.Frozen
    first: Callable[[PRNGKeyArray, Any], Any]
    step: Step
    outputs: Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One model, transform and schedule, compiled.

    **Arguments:** `apply`, `params`, `transform`, as the library has them; `dropout`, whether the
    model's and the method's dropout are on in training; `room`, what a batch becomes for a method
    that has virtual tokens; `scale`, devices and numbers; `axes`, names of the axes of `params`;
    `products`, whether on a CPU it multiplies by `jpeft.cpu_products`; `straight`, whether the
    model's layers are straight-line code; `options`, what else the model is called with; `like`,
    the `programs` of a trainer that differs in the numbers of `params` and in `seed` alone, which
    are used in place of new ones, unless numbers are rounded at random.

    **Attributes:** `params`, with a shape in place of each array that nothing reads, since a copy
    of it is trained; `frozen`, the arrays that are read, by path, where the stage has them, in what
    the model computes in; `step`, the training step; `outputs(frozen, state, batch)`, the model's;
    `programs`, these and what they are made from.
    """

    apply: Callable[..., Any]
    params: Any
    transform: jpeft.Transform
    schedule: Schedule
    seed: int = 0
    dropout: bool = True
    room: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    scale: Scale = Scale()
    axes: Axes | None = None
    products: bool = True
    straight: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    like: dataclasses.InitVar[Programs | None] = None
    frozen: dict[str, Any] = dataclasses.field(init=False)
    step: Step = dataclasses.field(init=False)
    outputs: Callable[[Any, Any, Any], Any] = dataclasses.field(init=False)
    programs: Programs = dataclasses.field(init=False)
    _base: jpeft.Frozen = dataclasses.field(init=False)
    _start: Any = dataclasses.field(init=False)
    _uses: Any = dataclasses.field(init=False)
    _first: Any = dataclasses.field(init=False)

    def __post_init__(self, like: Programs | None) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if self.scale.precision == "stochastic":
            like = None  # the seed of what is rounded at random is a part of the program
        put("_uses", self.probe() if like is None else like.uses)
        put("_first", self._starting() if like is None else like.first)
        zero = self.scale.zero()
        leaves = jax.tree.leaves(self.params)
        # One made anew of another's parameters, to look at a trained state, has no start.
        whole = not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
        start = self.first(self.params) if whole else None
        if start is None:
            shapes = jax.eval_shape(self.first, self.params)
        else:  # its shapes are known: the method is not traced a second time
            shapes = jax.eval_shape(lambda: start)
        narrowed = self.scale.narrowed(self.params)
        if like is None:
            base = jpeft.frozen(self.transform, narrowed, shapes)
        else:
            leaves = flatten(narrowed)
            base = dataclasses.replace(like.base, arrays={p: leaves[p] for p in like.base.arrays})
        axes, arrays = self.axes, base.arrays
        if zero is not None:
            axes = axes and all_axes(self.transform, self.params, shapes, axes)
            arrays = jax.device_put(arrays, zero.parameters(arrays, axes))
        put("_start", start)
        put("_base", base)
        put("frozen", arrays)
        put("params", base.params(arrays))
        put("programs", self._compiled(zero, axes) if like is None else like)
        put("step", self.programs.step)
        put("outputs", self.programs.outputs)

    def _compiled(self, zero: Any, axes: Axes | None) -> Programs:
        # What is compiled outlives this trainer, where another one is like it: no array goes along.
        bare = copy.copy(self)
        base = dataclasses.replace(self._base, arrays=dict.fromkeys(self._base.arrays))
        for name in ("params", "frozen", "start", "_start"):
            object.__setattr__(bare, name, None)
        object.__setattr__(bare, "_base", base)
        # A norm over all gradients would keep an update from being made layer by layer.
        clip = self.schedule.clip if self.scale.offload else None
        optimiser = self.scale.optimiser(self.schedule.optimiser(clip is None), self.seed)
        options = compiler_options(barriers=self.straight)
        step = make_step(
            bare._loss,
            optimiser,
            zero=zero,
            axes=axes,
            clip=clip,
            accumulate=self.scale.accumulate,
            dtype=self.scale.kept,
            compiler_options=options,
        )
        where = None if zero is None else zero.replicated
        outputs = jax.jit(bare._outputs, compiler_options=options, out_shardings=where)
        return Programs(self._uses, base, self._first, step, outputs)

    def _starting(self) -> Callable[[PRNGKeyArray, Any], Any]:
        transform, uses = self.transform, self._uses

        @jax.jit  # one program, and not one for every array
        def made(key: PRNGKeyArray, params: Any) -> Any:
            # Copies of parameters that were loaded in bf16 are trained in fp32 all the same.
            return jpeft.cast(transform.init(key, params, uses=uses), jnp.float32)

        return made

    def first(self, params: Any) -> Any:
        """What is trained, at the start."""
        return self._first(jax.random.key(self.seed), params)

    def init(self) -> State:
        """The state at the start: what is trained, and the optimiser's."""
        return self.step.init(self._start)

    def uses(self) -> Any:
        """How the model reads its parameters."""
        return self._uses

    def probe(self) -> Any:
        """The same, looked up in the model."""
        return jpeft.uses(self.apply, self.params, *[jnp.zeros((1, 8), jnp.int32)] * 3)

    def loss(self, rewritten: Any, batch: Any, key: Any) -> Any:
        """The sum of a batch's losses, and how many it is over, so that parts of a batch weigh by
        their valid rows; `key` is None where the model's dropout is off.
        """
        return loss_of(self.forward(rewritten, batch, key), batch["labels"], batch["valid"])

    def key(self, step: int) -> PRNGKeyArray:
        """The key of a step. The compiled step is given it: it is one program for all seeds."""
        return jax.random.fold_in(jax.random.key(self.seed), step)

    def rewritten(self, frozen: Any, state: Any, key: Any = None, task: Any = None) -> Any:
        """The parameters as the model is to read them.

        **Arguments:** `task`, each example's number in a stack of states, none of them -1: what the
        model had in place of a trained copy is not kept.
        """
        params = self._base.params(frozen)
        if task is not None:
            shape = jax.ShapeDtypeStruct
            params = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, shape) else x, params
            )
        out = self.transform.rewrite(params, state, key=key, task=task)
        suits = self.products and jax.default_backend() == "cpu"
        return jpeft.cpu_products(out, params, uses=self._uses) if suits else out

    def _loss(self, state: Any, frozen: Any, batch: Any, key: Any) -> Any:
        own, models = jax.random.split(key)
        rewritten = self.rewritten(frozen, state, own)
        return self.loss(rewritten, batch, models if self.dropout else None)

    def _outputs(self, frozen: Any, state: Any, batch: Any) -> Any:
        return self.forward(self.rewritten(frozen, state), batch, None)

    def forward(self, rewritten: Any, batch: Any, key: Any) -> Any:
        """The model's outputs on a batch; `key` switches its dropout on."""
        batch = self.room(batch)
        more = {k: batch[k] for k in ("pooling_mask",) if k in batch} | dict(self.options)
        inputs = [batch[k] for k in INPUTS]
        return jpeft.lift(self.apply)(rewritten, *inputs, key=key, **more)

    def share(self, rows: int) -> Share:
        """What this process makes of batches of so many rows. **Raises:** see `share_of`."""
        return share_of(self.step.zero, rows)

    def step_memory(self, batch: Batch) -> dict[str, float]:
        """MiB of one compiled training step on a batch: `arguments` and `temporaries`."""
        lowered = self.step.lower(self.init(), self.frozen, batch, self.key(0))
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        return {
            "arguments": memory.argument_size_in_bytes / 2**20,
            "temporaries": memory.temp_size_in_bytes / 2**20,
        }

    def predict(
        self, state: Any, examples: Sequence[Example], shapes: Shapes, pad: int
    ) -> np.ndarray:
        """The model's outputs for every example, in their order: `(n, classes)`."""
        out: list[tuple[np.ndarray, np.ndarray]] = []
        for numbers, batch in in_order(examples, shapes, pad, self.share(shapes.batch)):
            values = self.outputs(self.frozen, state, batch)
            out.append((numbers, np.asarray(values)[: len(numbers)]))
        order = np.argsort(np.concatenate([n for n, _ in out]))
        return np.concatenate([v for _, v in out])[order]
