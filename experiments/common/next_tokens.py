"""Training on rows of text and their perplexity, for decoders with `labels=`; a longer Llama."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Int

import jpeft
from experiments.common.language import LanguageTrainer, language_uses
from experiments.common.loop import InterruptedRunError, Log, Progress, train
from experiments.common.pipeline import Batch, Share
from jpeft.models.llama import Llama

Apply = Callable[..., Any]


def extended(model: Llama, length: int, group: int | None = None) -> Apply:
    """`apply` of a Llama for texts of `length` tokens; `group`, of shifted attention."""
    config = model.config.extended(length)
    build = functools.partial(Llama, config, dtype=model.dtype, shifted=group)
    return jpeft.functional(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))).apply


def losses(apply: Apply, params: Any, ids: Int[Array, "b t"]) -> Any:
    """The sum of the losses of next tokens and their count."""
    return apply(params, ids, labels=ids)


def perplexities(
    total: Apply, params: Any, rows: np.ndarray, lengths: Sequence[int]
) -> dict[str, float]:
    """By context: the same rows `(n, t)`, cut into pieces that are read each by itself.

    **Arguments:** `total(params, ids)`, `losses` of one model, compiled.
    """
    out: dict[str, float] = {}
    for n in lengths:
        parts = [total(params, row.reshape(-1, n)) for row in rows]
        out[str(n)] = math.exp(sum(float(a) for a, _ in parts) / sum(int(b) for _, b in parts))
    return out


@dataclasses.dataclass(frozen=True)
class NextTokens(LanguageTrainer):
    """A trainer of next tokens, whose memory is the step's temporaries alone.

    **Attributes:** `plain`, the model where `apply` reads no row of 8 tokens: how parameters are
    used does not depend on the attention, but a shifted one needs whole groups.
    """

    plain: Apply | None = None

    def probe(self) -> Any:
        """How the model reads its parameters, looked up in it."""
        return language_uses(self.plain or self.apply, self.params, two_sided=False)

    def step_memory(self, batch: Batch) -> dict[str, float]:
        """MiB of one compiled training step: `temporaries`."""
        return {"temporaries": super().step_memory(batch)["temporaries"]}


def train_on(
    trainer: NextTokens, rows: np.ndarray, log: Log, share: Share | None = None
) -> tuple[Any, Progress]:
    """`train` on rows `(steps, b, t)`, of which this process may have its share, without
    checkpoints.

    **Arguments:** `share`, that of batches; without it `rows` are whole.
    """
    batches = (share.placed(batch_of(x)) if share else batch_of(x) for x in rows)
    try:
        return train(trainer, batches, None, log=log)
    except InterruptedRunError:
        # Its message tells of a checkpoint: there is none.
        raise KeyboardInterrupt from None


def batch_of(ids: np.ndarray) -> Batch:
    """A batch of rows `(b, t)` without padding; every token is a label."""
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
