"""LoRA trained on a few examples, each a text in a template with the word of its label."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import jpeft
from experiments.common.language import LanguageTrainer
from experiments.common.loop import DivergedError
from experiments.common.methods import Recipe, Sizes
from experiments.common.shots import Prompt
from experiments.common.training import Schedule
from jpeft.models.loss import IGNORED


@dataclasses.dataclass(frozen=True)
class FewShot:
    """A decoder that is trained afresh on every set of examples, by one compiled step.

    **Arguments:** `recipe`, of LoRA, at its rate or at `lr`; `rows`, of a step; `width`, the
    tokens of a row; `pad`, a token.
    """

    model: dataclasses.InitVar[Any]
    recipe: dataclasses.InitVar[Recipe]
    sizes: dataclasses.InitVar[Sizes]
    lr: dataclasses.InitVar[float | None]
    steps: int
    rows: int
    width: int
    pad: int
    trainer: LanguageTrainer = dataclasses.field(init=False)

    def __post_init__(self, model: Any, recipe: Recipe, sizes: Sizes, lr: float | None) -> None:
        apply, params = jpeft.functional(model)
        rate = recipe.rate if lr is None else lr
        schedule = Schedule(rate, self.steps, weight_decay=recipe.decay)
        trainer = LanguageTrainer(apply, params, recipe.transform(sizes), schedule, dropout=False)
        object.__setattr__(self, "trainer", trainer)

    def __call__(self, examples: Sequence[tuple[Prompt, int]], seed: int) -> Any:
        """The parameters with what was trained, as a `Scorer` reads them.

        Every step takes `rows` of the examples, all as often as each other give or take one.

        **Arguments:** `examples`, prompts with the number of the right label; `seed`, of LoRA's
        start and the examples' order.

        **Raises:** `DivergedError`.
        """
        t = self.trainer
        key = jax.random.key(seed)
        start = t.transform.init(key, t.params, uses=t.uses())
        state = t.step.init(start)
        rng = np.random.default_rng(seed)
        need = self.steps * self.rows
        order = np.concatenate(
            [rng.permutation(len(examples)) for _ in range(-(-need // len(examples)))]
        )
        told: list[Any] = []
        for i in range(self.steps):
            chosen = [examples[j] for j in order[i * self.rows : (i + 1) * self.rows]]
            own = jax.random.fold_in(key, i)
            state, metrics = t.step(state, t.frozen, self._batch(chosen), own)
            told.append(metrics)
        wrong = [i for i, m in enumerate(told, 1) if m["skipped"] or not np.isfinite(m["loss"])]
        if wrong:
            raise DivergedError(
                f"the loss or its gradient is no number at step {wrong[0]}: try a lower --lr"
            )
        return t.rewritten(t.frozen, state.trainable)

    def _batch(self, examples: Sequence[tuple[Prompt, int]]) -> dict[str, np.ndarray]:
        ids = np.full((self.rows, self.width), self.pad, np.int32)
        labels = np.full((self.rows, self.width), IGNORED, np.int32)
        mask = np.zeros((self.rows, self.width), np.int32)
        for i, (prompt, label) in enumerate(examples):
            word = prompt.labels[label]
            n = len(prompt.ids) + len(word)
            ids[i, :n], mask[i, :n] = (*prompt.ids, *word), 1
            labels[i, len(prompt.ids) : n] = word
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
