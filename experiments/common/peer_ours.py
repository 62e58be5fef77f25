"""This library's side: a jitted step, forward pass and generation of one row."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jpeft
from experiments.common import runtime
from experiments.common.decoders import LAYOUTS
from experiments.common.methods import HEAD, KEYS_AND_VALUES, LINEAR, PROJECTIONS
from experiments.common.models import machine_layout
from experiments.common.peer_cases import ALPHA, BOTTLENECK, ENCODERS, PREFIX, RANK
from experiments.common.peer_memory import host_peak_mib
from experiments.common.peer_model import LABELS, batch_of, room
from experiments.common.peers import rate_of
from experiments.common.training import compiler_options
from jpeft.hf import load_model, load_sequence_classifier
from jpeft.hf.files import read_config
from jpeft.uses import Uses


def transform_of(method: str, model: Any, encoder: bool) -> jpeft.Transform:
    """The method on a model, with a classifier's head trained too."""
    if method == "full":
        return jpeft.Train(r".*")
    if encoder:
        some, every, kv = r"(query|value)/kernel$", LINEAR, KEYS_AND_VALUES + "bias$"
        out, norms = PROJECTIONS, r"LayerNorm/"
    else:
        at = LAYOUTS[type(model)]
        some, every, kv, out, norms = at.lora, at.linear, at.kv_bias, at.out, at.norms
    if method == "adapter":
        made: jpeft.Transform = jpeft.houlsby(BOTTLENECK, out, norms)
    elif method == "prefix":
        made = jpeft.PrefixTuning(PREFIX, kv)
    else:
        made = jpeft.LoRA(RANK, ALPHA, some if method == "lora" else every)
    return jpeft.chain(HEAD, made) if encoder else made


class Ours:
    """A model with a method, its optimiser and a batch.

    **Arguments:** `job`, a row of the comparison as JSON has it.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        runtime.cache_programs(pathlib.Path(job["cache"]))
        runtime.one_at_a_time()  # as the commands do
        # Once through compiler and kernels, as the other side: their code is no part of a step.
        jax.jit(jax.grad(lambda w: jnp.tanh(w @ w).sum()))(jnp.ones((8, 8))).block_until_ready()

    def load(self) -> None:
        """The model from its files, the method's start, and the optimiser's."""
        job = self.job
        model, kind = self._model()
        self.encoder = kind in ENCODERS
        vocabulary = model.config.vocab_size
        # Its shapes alone: where everything is trained its own arrays are not needed again.
        self.module: Any = nnx.eval_shape(lambda: model)
        # The prefix stands before the first token, as peft has it, in keys and values alone.
        beside = self.encoder and job["method"] == "prefix"
        self.options: dict[str, Any] = {"idle": (0, PREFIX)} if beside else {}
        self.apply, params = jpeft.functional(model)
        self.batch = self._inputs(batch_of(kind, vocabulary, job["batch"], job["length"]))
        self.transform = transform_of(job["method"], model, self.encoder)
        uses = self.uses = jpeft.uses(self.apply, params, *self._arguments(self.batch))
        made = jax.jit(lambda key, params: self.transform.init(key, params, uses=uses))
        state = made(jax.random.key(0), params)
        if job["method"] == "prefix":
            state = jax.tree_util.tree_map_with_path(_zero_prefix, state)
        if job["method"] == "full" and job["precision"] == "bf16":
            state = jpeft.cast(state, jnp.bfloat16)
        self.base = jpeft.frozen(self.transform, params, state)
        if "unroll" in self.layout:  # straight-line layers: see `machine_layout`
            arrays = dict(self.base.arrays)
            self.base = dataclasses.replace(self.base, arrays={})
            del model, params
            self.base = dataclasses.replace(self.base, arrays=_by_layer(arrays, uses))
            state = _by_layer(state, uses) if job["method"] == "full" else state
        optimiser = optax.adamw(1e-4, weight_decay=0.01)

        def step(state: Any, moments: Any, frozen: Any, batch: Any) -> Any:
            value, grads = jax.value_and_grad(self._loss)(state, frozen, batch)
            updates, moments = optimiser.update(grads, moments, state)
            return optax.apply_updates(state, updates), moments, value

        options = compiler_options(barriers="unroll" in self.layout)
        self.jitted = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
        self.loss_alone = jax.jit(self._loss, compiler_options=options)
        self.held = (state, optimiser.init(state))
        self.program: Any = None
        if job["generation"] is not None:
            made = batch_of(
                kind, vocabulary, job["generation"]["rows"], job["generation"]["prompt"]
            )
            self.prompt = self._inputs({k: made[k] for k in ("input_ids", "attention_mask")})

    def _model(self) -> tuple[Any, str]:
        job, folder = self.job, pathlib.Path(self.job["directory"])
        kind = str(read_config(folder)["model_type"])
        dtype = jnp.dtype("float32" if job["precision"] == "fp32" else "bfloat16")
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
        self.layout = machine_layout(kind in ENCODERS, long=True, full=job["method"] == "full")
        options |= self.layout
        if job["remat"]:
            options["remat"] = True
        if kind in ENCODERS:
            if job["method"] == "qlora":
                options["quantize"] = jpeft.Quantize(LINEAR)
            key = jax.random.key(0)
            return load_sequence_classifier(folder, LABELS, key=key, **options)[0], kind
        if job["device"] == "gpu" and dtype == jnp.bfloat16:
            options["implementation"] = "cudnn"
        if job["method"] == "qlora":
            from jpeft.hf.models import read_kind

            options["quantize"] = jpeft.Quantize(LAYOUTS[read_kind(folder)[0].model].linear)
        return load_model(folder, **options)[0], kind

    def _inputs(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        made: dict[str, Any] = {k: jnp.asarray(v) for k, v in batch.items()}
        if not self.encoder and self.job["method"] != "prefix":
            # Without padding a decoder needs no mask; transformers finds that out for itself.
            del made["attention_mask"]
        length = room(self.job["method"])
        if not length:
            return made
        return jpeft.virtual_tokens(made, length=length)

    def _arguments(self, batch: dict[str, Any]) -> list[Any]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        return [batch[k] for k in names if k in batch]

    def _loss(self, state: Any, frozen: Any, batch: Any) -> Any:
        params = self.base.params(frozen)
        rewritten = self.transform.rewrite(params, state)
        if self.job["device"] == "cpu":
            rewritten = jpeft.cpu_products(rewritten, params, uses=self.uses)
        forward, inputs = jpeft.lift(self.apply), self._arguments(batch)
        if self.encoder:
            logits = forward(rewritten, *inputs, **self.options)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
            return each.mean()
        total, count = forward(rewritten, *inputs, labels=batch["labels"])
        return total / count

    def step(self) -> float:
        """One training step; its loss."""
        *held, value = self._compiled()(*self.held, self.base.arrays, self.batch)
        self.held = tuple(held)
        return float(value)

    def evaluate(self) -> float:
        """The loss without gradients."""
        return float(self.loss_alone(self.held[0], self.base.arrays, self.batch))

    def generate(self) -> int:
        """Greedy tokens after the prompts; how many are new."""
        params, new = self.base.params(self.base.arrays), self.job["generation"]["new"]
        ids, mask = self.prompt["input_ids"], self.prompt.get("attention_mask")
        cache = self.module.empty_cache(ids.shape[0], ids.shape[1] + new)
        out = jpeft.generate(
            self.apply,
            self.transform.rewrite(params, self.held[0]),
            ids,
            mask,
            cache=cache,
            new_tokens=new,
            decode_params=self.transform.decoding().rewrite(params, self.held[0]),
        )
        return int(np.asarray(out.lengths).sum())

    def memory(self, base: float) -> dict[str, float | None]:
        """`peak_mib` of a step: above `base`, or the most of a device's so far, loading counted;
        `program_mib`, arguments and temporaries that the compiled step states.
        """
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            for _ in range(2):
                self.step()
            stats = jax.local_devices()[0].memory_stats() or {}
            peak: float | None = stats["peak_bytes_in_use"] / 2**20
        else:
            peak = host_peak_mib(self.step, base)
        found: Any = self._compiled().memory_analysis()
        program = (found.argument_size_in_bytes + found.temp_size_in_bytes) / 2**20
        return {"peak_mib": peak, "program_mib": program}

    def rate(self, m: int, k: int, n: int) -> float:
        """Flops a second of a product of random matrices, `(m, k)` by `(k, n)`."""
        return matrix_rate(
            m, k, n, jnp.bfloat16 if self.job["precision"] == "bf16" else jnp.float32
        )

    def profile(self, steps: int = 3) -> dict[str, float]:
        """Milliseconds of a step by kind of operation."""
        from experiments.common.trace import traced

        return traced(self.step, self._compiled().as_text(), steps)

    def _compiled(self) -> Any:
        if self.program is None:
            self.program = self.jitted.lower(*self.held, self.base.arrays, self.batch).compile()
            # What it was traced from stays in memory else, and is not needed again.
            jax.clear_caches()
        return self.program


def _by_layer(arrays: dict[str, Any], uses: Uses) -> dict[str, Any]:
    """`jpeft.by_layer` of one array after another, each stack given up before the next one's layers
    take its place; `arrays` is emptied.
    """
    made: dict[str, Any] = {}
    for path in list(arrays):
        made |= jpeft.by_layer({path: arrays.pop(path)}, uses)
    return made


def _zero_prefix(path: Any, x: Any) -> Any:
    # Both sides start from the same prefix; the head has its own start.
    return x if "classifier" in jax.tree_util.keystr(path) else jnp.zeros_like(x)


def matrix_rate(m: int, k: int, n: int, dtype: Any = jnp.bfloat16) -> float:
    """Flops a second of a product of random matrices, `(m, k)` by `(k, n)`."""
    # Random: a chip runs faster on numbers that are all alike.
    x, y = (jax.random.normal(jax.random.key(0), s, dtype) for s in ((m, k), (k, n)))
    product = jax.jit(jnp.matmul)
    return rate_of(lambda: product(x, y).block_until_ready(), 2.0 * m * k * n)
