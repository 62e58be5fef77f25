"""What is measured of one decoder: accuracy by demonstrations, their order, labels and wording,
and of LoRA on the same examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.console import Console

import jpeft
from experiments.common import shots
from experiments.common.decoders import Loaded, load, recipes
from experiments.common.family import named
from experiments.common.few_shot import FewShot
from experiments.common.label_scores import Scorer, lengths
from experiments.common.methods import Sizes
from experiments.common.metrics import majority
from experiments.common.readers import Row
from experiments.common.report import scored
from experiments.common.scale import compute_dtype
from experiments.common.shots import Prompt
from experiments.common.tasks import Dataset
from experiments.common.wordings import WORDINGS, Wording

if TYPE_CHECKING:
    from experiments.in_context import Config

NOTHING = "N/A"


@dataclasses.dataclass(frozen=True)
class Asked:
    """The texts that are asked about, and those that may be shown before them.

    **Attributes:** `room`, the tokens left for demonstrations beside the longest text; `pool`,
    training texts with the most tokens of their demonstration over all wordings, short ones first;
    `left_out`, texts that are too long to be asked about.
    """

    queries: list[Row]
    pool: list[tuple[Row, int]]
    room: int
    left_out: int
    classes: int

    def short(self, tokens: int) -> list[Row]:
        """The texts whose demonstrations have up to so many tokens."""
        return [row for row, n in self.pool if n <= tokens]

    def demonstrations(self, k: int, seed: int) -> list[Row] | None:
        """`k` of those texts of which any `k` fit; None where there are not enough."""
        return shots.drawn(self.short(self.room // max(k, 1)), k, self.classes, seed)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder under one task.

    **Attributes:** `params`, the decoder's; `scorer`, what reads prompts; `calibrate`, whether
    every label's score is taken less the one that it has for a text that says nothing.
    """

    loaded: Loaded
    params: Any
    scorer: Scorer
    asked: Asked
    calibrate: bool = False

    def accuracy(
        self, wording: Wording, shown: Sequence[Row] = (), params: Any = None
    ) -> tuple[float, float]:
        """The share of the texts whose right label is the likeliest, and the tokens read of one.

        **Arguments:** `params`, in place of the decoder's own.
        """
        params, codec = self.params if params is None else params, self.loaded.codec

        def prompts(rows: Sequence[Row]) -> list[Prompt]:
            return [
                shots.after(shots.query(r, wording, codec), shown, wording, codec) for r in rows
            ]

        likely, tokens = self.scorer(params, prompts(self.asked.queries))
        if self.calibrate:
            nothing = [Row((NOTHING,) * len(self.asked.queries[0].texts), 0)]
            likely = likely - self.scorer(params, prompts(nothing))[0]
        right = np.array([row.label for row in self.asked.queries])
        return float(np.mean(np.argmax(likely, axis=1) == right)), tokens


def measure(config: Config, name: str, data: Dataset, console: Console) -> dict[str, Any]:
    """A model's part of the result, with `data` and `majority`.

    **Raises:** `ModelError`, `CheckpointError`; `ValueError` for a model with an encoder, and
    where no number of demonstrations fits.
    """
    dtype = compute_dtype(config.precision)
    loaded = load(name, None, console, dtype=dtype, remat=False, key=jax.random.key(0))
    if loaded.two_sided:
        raise ValueError(f"--models {name} has an encoder: decoders are what is compared here")
    about = loaded.model.config
    made_for: int = getattr(about, "max_position_embeddings", None) or about.n_positions
    context = min(config.context or made_for, made_for)
    asked = choose(config, loaded, data, context)
    fitting = [k for k in sorted({*config.shots}) if asked.demonstrations(k, 0) is not None]
    if not fitting:
        asked_for = " ".join(str(k) for k in config.shots)
        raise ValueError(
            f"--shots {asked_for}: none fits in the {asked.room} tokens that {name} has beside a "
            f"text, of {context}"
        )
    apply_params = jpeft.functional(loaded.model).params
    widths = lengths(context)
    scorer = Scorer(loaded.model, config.batch, widths, loaded.codec.pad, config.normalise)
    model = Model(loaded, apply_params, scorer, asked, config.calibrate)
    family, size, step = ("tiny", "tiny", None)
    if loaded.directory is not None:
        family, size, step = named(loaded.directory, getattr(about, "model_type", "gpt2"))
    console.print(
        f"{family} {size}: {len(asked.queries)} texts of {config.task}, {asked.left_out} too long; "
        f"{context} tokens, {asked.room} of them for demonstrations"
    )
    found = prompted(config, model, fitting, console)
    peft = trained(config, model, fitting, widths, console)
    tokens = found.pop("tokens")
    wording = WORDINGS[config.task][config.wording]
    tokens["peft"] = model.accuracy(wording)[1]
    labels = np.array([row.label for row in asked.queries])
    return {
        "data": data.source,
        "majority": majority(("accuracy",), labels, asked.classes)["accuracy"],
        "model": {
            "family": family,
            "size": size,
            "step": step,
            "parameters": sum(x.size for x in jax.tree.leaves(apply_params)),
            "context": context,
            "queries": len(asked.queries),
            "left_out": asked.left_out,
            "not_fitting": sorted({*config.shots} - {*fitting}),
            **found,
            "peft": peft,
            "tokens_per_prediction": tokens,
        },
    }


def choose(config: Config, loaded: Loaded, data: Dataset, context: int) -> Asked:
    """Texts to ask about, of up to half the context, and texts to show.

    **Raises:** `ValueError` where no text is short enough.
    """
    wordings, codec = WORDINGS[config.task], loaded.codec

    def some(rows: Sequence[Row], count: int) -> list[Row]:
        numbers = np.random.default_rng(0).permutation(len(rows))[:count]
        return [rows[i] for i in numbers]

    def size(row: Row) -> int:
        asked = (shots.tokens_of(shots.query(row, w, codec)) for w in wordings)
        return len(codec.first) + max(asked)

    sized = [(row, size(row)) for row in some(data.validation, config.queries)]
    queries = [(row, n) for row, n in sized if n <= context // 2]
    if not queries:
        shortest = min(n for _, n in sized)
        raise ValueError(
            f"no text of {config.task} can be asked about: the shortest has {shortest} tokens, and "
            f"half of the context's {context} is the most"
        )
    pool = [
        (row, max(len(shots.demonstration(row, w, codec)) for w in wordings))
        for row in some(data.train, config.pool)
    ]
    return Asked(
        [row for row, _ in queries],
        sorted(pool, key=lambda x: x[1]),
        context - max(n for _, n in queries),
        len(sized) - len(queries),
        len(data.task.labels),
    )


def prompted(config: Config, model: Model, fitting: list[int], console: Console) -> dict[str, Any]:
    """Accuracy by in-context learning: `k_shot`, `orders`, `wordings`, `random_labels`, `tokens`.

    Without demonstrations all sets are the same one: there is one value.
    """
    wordings, asked = WORDINGS[config.task], model.asked
    wording, most = wordings[config.wording], fitting[-1]

    def sets(k: int) -> list[list[Row]]:
        drawn = (asked.demonstrations(k, seed) for seed in range(config.sets if k else 1))
        return [rows for rows in drawn if rows is not None]

    k_shot: dict[str, Any] = {}
    tokens: dict[str, float] = {}
    for k in fitting:
        each = [model.accuracy(wording, rows) for rows in sets(k)]
        k_shot[str(k)] = scored([a for a, _ in each])
        tokens[str(k)] = float(np.mean([n for _, n in each]))
        console.print(f"{k} demonstrations: {k_shot[str(k)]['mean']:.4f}")
    first = sets(most)[0]
    random = [shots.with_random_labels(rows, asked.classes, i) for i, rows in enumerate(sets(most))]
    ordered = shots.orders(first, config.orders, 0)
    return {
        "k_shot": k_shot,
        "orders": {"k": most, "values": [model.accuracy(wording, rows)[0] for rows in ordered]},
        "wordings": {"k": most, "values": [model.accuracy(w, first)[0] for w in wordings]},
        "random_labels": {
            "k": most,
            "values": [model.accuracy(wording, rows)[0] for rows in random] if most else [],
        },
        "tokens": tokens,
    }


def trained(
    config: Config, model: Model, fitting: list[int], widths: Sequence[int], console: Console
) -> dict[str, Any]:
    """LoRA's accuracy by the number of examples: the demonstrations of each k, or more texts."""
    loaded, asked = model.loaded, model.asked
    codec, wording = loaded.codec, WORDINGS[config.task][config.wording]
    whole = widths[-1] - len(codec.first)
    allowed = asked.short(whole)
    longest = max((n for _, n in asked.pool if n <= whole), default=whole)
    width = next(n for n in widths if n >= len(codec.first) + longest)
    recipe, sizes = recipes(loaded.model)["lora"], Sizes(config.rank, config.alpha, ())
    tune = FewShot(
        loaded.model, recipe, sizes, config.lr, config.steps, config.rows, width, codec.pad
    )

    def example(row: Row) -> tuple[Prompt, int]:
        prompt = shots.query(row, wording, codec)
        return Prompt((*codec.first, *prompt.ids), prompt.labels), int(row.label)

    out: dict[str, Any] = {}
    for k in sorted({k for k in (*fitting, *config.peft) if k}):
        values: list[float] = []
        for seed in range(config.sets):
            rows = asked.demonstrations(k, seed) if k in fitting else None
            rows = rows or shots.drawn(allowed, k, asked.classes, seed)
            if rows is None:
                raise ValueError(f"--peft {k}: there are not so many training texts in --pool")
            params = tune([example(row) for row in rows], seed)
            values.append(model.accuracy(wording, params=params)[0])
        out[str(k)] = scored(values)
        console.print(f"LoRA on {k} examples: {out[str(k)]['mean']:.4f}")
    return out
