"""The training loop that experiments share: a compiled step, evaluation, checkpoints, Ctrl-C."""

from __future__ import annotations

import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, PRNGKeyArray

import jpeft
from experiments.common.pipeline import Batch, Batches, Shapes, in_order
from experiments.common.tokens import Example
from jpeft.files import names

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
Log = Callable[[dict[str, Any]], None]


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


class InterruptedRunError(Exception):
    """Ctrl-C was pressed; a checkpoint stands in the folder."""


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

    def optimiser(self) -> optax.GradientTransformation:
        """The optax chain."""
        warm = max(1, round(self.steps * self.warmup))
        decay = max(1, self.steps - warm)
        rate = optax.join_schedules(
            [
                optax.linear_schedule(0, self.learning_rate, warm),
                optax.linear_schedule(self.learning_rate, 0, decay),
            ],
            [warm],
        )
        if self.ratio is None:
            adam = optax.adamw(rate, weight_decay=self.weight_decay)
        else:
            adam = jpeft.lora_plus(rate, ratio=self.ratio, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), adam)


def loss_of(
    outputs: Float[Array, "b c"], labels: Float[Array, " b"], valid: Float[Array, " b"]
) -> Float[Array, ""]:
    """Cross-entropy, or for one output the squared error, over the valid rows."""
    if outputs.shape[-1] == 1:
        each = (outputs[:, 0] - labels) ** 2
    else:
        each = optax.softmax_cross_entropy_with_integer_labels(outputs, labels.astype(jnp.int32))
    return jnp.sum(each * valid) / jnp.maximum(jnp.sum(valid), 1)


def compiler_options() -> dict[str, Any] | None:
    """What the compiler is told: on a CPU, not to interleave independent products."""
    if jax.default_backend() != "cpu":
        return None
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False}


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One model, transform and schedule, compiled.

    **Attributes:** `apply`, `params`, `transform`, as the library has them; `dropout`, whether the
    model's and the method's dropout are on in training; `room`, what a batch becomes for a method
    that has virtual tokens.
    """

    apply: Callable[..., Any]
    params: Any
    transform: jpeft.Transform
    schedule: Schedule
    seed: int = 0
    dropout: bool = True
    room: Callable[[Mapping[str, Any]], dict[str, Any]] = dict

    def __post_init__(self) -> None:
        options = compiler_options()
        step = jax.jit(self._step, donate_argnums=(1, 2), compiler_options=options)
        object.__setattr__(self, "step", step)
        object.__setattr__(self, "outputs", jax.jit(self._outputs, compiler_options=options))

    def init(self) -> tuple[Any, Any]:
        """The trained arrays and the optimiser's state, at the start."""
        state = self.transform.init(jax.random.key(self.seed), self.params, uses=self.uses())
        return state, self.schedule.optimiser().init(state)

    def uses(self) -> Any:
        """How the model reads its parameters."""
        return jpeft.uses(self.apply, self.params, *[jnp.zeros((1, 8), jnp.int32)] * 3)

    def loss(self, rewritten: Any, batch: Any, key: Any) -> Any:
        """The loss of a batch; `key` is None where the model's dropout is off."""
        return loss_of(self.forward(rewritten, batch, key), batch["labels"], batch["valid"])

    def key(self, step: int) -> PRNGKeyArray:
        """The key of a step. The compiled step is given it: it is one program for all seeds."""
        return jax.random.fold_in(jax.random.key(self.seed), step)

    def _step(self, params: Any, state: Any, moments: Any, batch: Any, key: Any) -> Any:
        def loss(state: Any) -> Any:
            own, models = jax.random.split(key)
            rewritten = self.transform.rewrite(params, state, key=own)
            return self.loss(rewritten, batch, models if self.dropout else None)

        value, grads = jax.value_and_grad(loss)(state)
        updates, moments = self.schedule.optimiser().update(grads, moments, state)
        return optax.apply_updates(state, updates), moments, value

    def _outputs(self, params: Any, state: Any, batch: Any) -> Any:
        return self.forward(self.transform.rewrite(params, state), batch, None)

    def forward(self, rewritten: Any, batch: Any, key: Any) -> Any:
        """The model's outputs on a batch; `key` switches its dropout on."""
        batch = self.room(batch)
        pooling = {k: batch[k] for k in ("pooling_mask",) if k in batch}
        inputs = [batch[k] for k in INPUTS]
        return jpeft.lift(self.apply)(rewritten, *inputs, key=key, **pooling)

    def step_memory(self, batch: Batch) -> dict[str, float]:
        """MiB of one compiled training step on a batch: `arguments` and `temporaries`."""
        state, moments = self.init()
        args = (self.params, state, moments, batch, self.key(0))
        memory = self.step.lower(*args).compile().memory_analysis()  # type: ignore[attr-defined]
        return {
            "arguments": memory.argument_size_in_bytes / 2**20,
            "temporaries": memory.temp_size_in_bytes / 2**20,
        }

    def predict(
        self, state: Any, examples: Sequence[Example], shapes: Shapes, pad: int
    ) -> np.ndarray:
        """The model's outputs for every example, in their order: `(n, classes)`."""
        out: list[tuple[np.ndarray, np.ndarray]] = []
        for numbers, batch in in_order(examples, shapes, pad):
            values = self.outputs(self.params, state, batch)  # type: ignore[attr-defined]
            out.append((numbers, np.asarray(values)[: len(numbers)]))
        order = np.argsort(np.concatenate([n for n, _ in out]))
        return np.concatenate([v for _, v in out])[order]


@dataclasses.dataclass
class Progress:
    """What a loop has done: steps; seconds and tokens of the `timed` ones (those that do not
    compile); losses.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    timed: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """The mean time of a training step."""
        return self.seconds / self.timed if self.timed else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, padding not counted, over the time of training steps."""
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    trainer: Trainer,
    batches: Batches,
    folder: pathlib.Path | None,
    *,
    log: Log,
    resume: bool = False,
    save_every: int = 200,
) -> tuple[Any, Progress]:
    """Train to the schedule's end; the trained state, and what was done.

    **Arguments:** `folder`, where checkpoints are kept (None: nowhere); `resume`, start from the
    last one there; `log` is called with every step's `step`, `loss` and `tokens_per_second`.

    **Raises:** `InterruptedRunError` after Ctrl-C, when the running step is done and saved;
    `DivergedError`.
    """
    iterator = iter(batches)
    state, moments = trainer.init()
    progress = Progress()
    with _manager(folder) as manager:
        if resume and manager is not None and manager.latest_step() is not None:
            state, moments, data = _restore(manager, state, moments)
            iterator.set_state(data["data"])
            kept = ("step", "tokens", "seconds", "timed", "losses")
            progress = Progress(**{k: data[k] for k in kept})
        compiled: set[Any] = set()
        with _stop_on_interrupt() as stopped:
            while progress.step < trainer.schedule.steps:
                batch = next(iterator)
                start = time.perf_counter()
                state, moments, loss = trainer.step(  # type: ignore[attr-defined]
                    trainer.params, state, moments, batch, trainer.key(progress.step)
                )
                value = float(loss)
                _record(progress, batch, value, time.perf_counter() - start, compiled)
                log(
                    {
                        "step": progress.step,
                        "loss": value,
                        "tokens_per_second": progress.tokens_per_second,
                    }
                )
                last = progress.step == trainer.schedule.steps
                if manager and (last or stopped() or progress.step % save_every == 0):
                    _save(manager, progress, state, moments, iterator.get_state())
                if stopped() and not last:
                    raise InterruptedRunError
    return state, progress


def _record(
    progress: Progress, batch: Batch, loss: float, seconds: float, compiled: set[Any]
) -> None:
    progress.step += 1
    if not np.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} at step {progress.step}: try a lower --lr, or --dtype float32"
        )
    progress.losses.append(loss)
    shapes = tuple(x.shape for x in batch.values())
    if shapes in compiled:
        progress.seconds += seconds
        progress.timed += 1
        progress.tokens += int(batch["attention_mask"].sum())
    compiled.add(shapes)  # the first step of each shape compiles, and is no measure


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C lets the running step end; a second one stops at once."""
    pressed: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    try:
        old = signal.signal(signal.SIGINT, handler)
    except ValueError:  # not in the main thread: there Ctrl-C is not ours
        yield lambda: False
        return
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, old)


@contextmanager
def _manager(folder: pathlib.Path | None) -> Iterator[Any]:
    if folder is None:
        yield None
        return
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    manager = ocp.CheckpointManager(folder.resolve() / "checkpoint", options=options)
    try:
        yield manager
    finally:
        manager.close()


def _save(manager: Any, progress: Progress, state: Any, moments: Any, data: Any) -> None:
    about = {
        "step": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "timed": progress.timed,
        "losses": progress.losses,
        "data": data,
    }
    arrays = ocp.args.StandardSave(names((state, moments)))  # type: ignore[call-arg]
    args = ocp.args.Composite(arrays=arrays, about=ocp.args.JsonSave(about))  # type: ignore
    if manager.latest_step() != progress.step:
        manager.save(progress.step, args=args)


def _restore(manager: Any, state: Any, moments: Any) -> tuple[Any, Any, dict[str, Any]]:
    abstract = jax.eval_shape(lambda: names((state, moments)))
    args = ocp.args.Composite(
        arrays=ocp.args.StandardRestore(abstract),  # type: ignore[call-arg]
        about=ocp.args.JsonRestore(),  # type: ignore[call-arg]
    )
    found = manager.restore(manager.latest_step(), args=args)
    leaves = [found["arrays"][n] for n in abstract]
    state, moments = jax.tree.unflatten(jax.tree.structure((state, moments)), leaves)
    return state, moments, found["about"]
