"""The training step of a named model and a method, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

import jpeft
from experiments.common.bases import in_format
from experiments.common.decoders import LAYOUTS, recipes
from experiments.common.named import config_of
from experiments.common.scale import TABLES, Scale, all_axes, compute_dtype, remat_of
from experiments.common.training import Schedule
from jpeft.models.causal import Implementation
from jpeft.models.llama import Llama, LlamaConfig
from jpeft.paths import flatten
from jpeft.uses import Uses
from sharding import Step, Zero, axes_by_pattern, batch_shards, make_step
from sharding.aot import placed
from sharding.costs import traced_flops


@dataclasses.dataclass(frozen=True)
class Planned:
    """A step with the shapes of what it is given.

    **Attributes:** `parameters`, how many the model has; `trained`, how many are trained; `dense`,
    the shapes of the model's own parameters, and `uses`, what they are for; `first(key, params)`,
    what is trained at the start; `frozen_of(params, trainable)`, the arrays that stay.
    """

    config: LlamaConfig
    step: Step
    trainable: Any
    frozen: Any
    sequence: int
    room: int
    parameters: int
    trained: int
    dense: Any
    uses: Uses
    first: Callable[[Any, Any], Any]
    frozen_of: Callable[[Any, Any], Any]
    _plain: Any
    _twice: bool

    def arguments(self, rows: int) -> tuple[Step, Any, Any, Any, Any]:
        """The step and what it is called with, for `sharding.aot.compile_for`.

        **Raises:** `ValueError` for rows that the devices cannot share.
        """
        zero = self.step.zero
        assert zero is not None
        frozen = placed(self.frozen, zero.parameters(self.frozen, self.step.axes))
        batch = self.batch(rows)
        batch = placed(batch, zero.batch(batch))
        key = placed(_key(), zero.replicated)
        return self.step, self.step.abstract(self.trainable), frozen, batch, key

    def batch(self, rows: int) -> dict[str, Any]:
        """The shapes of a batch."""
        tokens = jax.ShapeDtypeStruct((rows, self.sequence), jnp.int32)
        return dict.fromkeys(("input_ids", "attention_mask", "labels"), tokens)

    def model_flops(self, rows: int) -> float:
        """Flops of a step's products that computing nothing twice would leave."""

        def mean(*args: Any) -> Any:
            total, count = self._plain(*args)
            return total / count

        args = (self.trainable, self.frozen, self.batch(rows), _key())
        once = traced_flops(jax.make_jaxpr(jax.grad(mean))(*args))
        if not self._twice:
            return once
        # The loss makes its logits a second time in the backward pass, whatever the layers do.
        tokens = rows * (self.sequence + self.room)
        return once - 2.0 * tokens * self.config.hidden_size * self.config.vocab_size


def plan(options: Any, mesh: Mesh, attention: Implementation = None) -> Planned:
    """The step of a command's options (`experiments.aot.Config`) on a mesh.

    **Arguments:** `attention`, which implementation of it.

    **Raises:** `ModelError` for an unknown model; `ValueError`.
    """
    config = config_of(options.model)
    zero = Zero(mesh, options.stage)
    scale = Scale(precision=options.numbers, offload=options.offload)
    dtype = compute_dtype(options.numbers)

    def made(remat: Any, attention: Implementation) -> Any:
        shape: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "remat": remat}
        shape["implementation"] = attention
        return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **shape))

    model = made(remat_of(options.remat, options.keep), attention)
    apply, dense = jpeft.functional(model)
    recipe = recipes(model)[options.method]
    transform = recipe.transform(options.sizes)
    uses = jpeft.uses(apply, dense, jnp.zeros((1, 8), jnp.int32))
    size = _size(dense)
    stored = (LAYOUTS[Llama].linear, options.quantize, uses)
    params = jax.eval_shape(lambda p: in_format(p, *stored), dense)

    def first(key: Any, params: Any) -> Any:
        trainable = transform.init(key, params, uses=uses)
        return trainable if scale.kept is None else jpeft.cast(trainable, scale.kept)

    trainable = jax.eval_shape(first, jax.random.key(0), params)
    base = jpeft.frozen(transform, params, trainable)
    axes = all_axes(transform, params, trainable, axes_by_pattern(TABLES[Llama]))
    room = jpeft.room(transform)
    virtual = jpeft.first_virtual_id(transform, config.vocab_size)
    chunk = options.chunk * batch_shards(mesh)

    def loss_of(apply: Any) -> Any:
        def loss(trainable: Any, frozen: Any, batch: Any, key: Any) -> Any:
            if room:
                batch = jpeft.virtual_tokens(batch, length=room, first=virtual)
            own, models = jax.random.split(key)
            rewritten = transform.rewrite(base.params(frozen), trainable, key=own)
            ids, mask, labels = (batch.get(k) for k in ("input_ids", "attention_mask", "labels"))
            return jpeft.lift(apply)(rewritten, ids, mask, key=models, labels=labels, chunk=chunk)

        return loss

    # A frozen head that nothing rewrites makes them once (`jpeft.models.loss`).
    shapes = jax.eval_shape(transform.rewrite, params, trainable)
    head = "model/embed_tokens/embedding" if config.tie_word_embeddings else "lm_head/kernel"
    twice = head not in base.arrays or jpeft.is_leaf(flatten(shapes)[head])

    schedule = Schedule(recipe.rate, 1000, weight_decay=recipe.decay, name=options.optimiser)
    step = make_step(
        loss_of(apply),
        scale.optimiser(schedule.optimiser(not options.offload), 0),
        zero=zero,
        axes=axes,
        clip=schedule.clip if options.offload else None,
        accumulate=options.accumulate,
    )
    return Planned(
        config,
        step,
        trainable,
        base.arrays,
        options.sequence,
        room,
        size,
        _size(trainable),
        dense,
        uses,
        first,
        lambda params, trainable: jpeft.frozen(transform, params, trainable).arrays,
        loss_of(jpeft.functional(made(False, None)).apply),
        twice,
    )


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
