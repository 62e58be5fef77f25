"""Claims on in-context learning against parameter-efficient fine-tuning on the same examples."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from experiments.common import claims_models as by
from experiments.common import claims_scores as scores
from experiments.common.claims import (
    POINTS,
    Claim,
    Results,
    Scale,
    Verdict,
    decide,
    exact,
    undecided,
)
from experiments.common.claims_intervals import of_deviation, of_mean

SECTION = "In-context learning"
SPREAD = 0.02  # deviation of accuracies: two thirds of prompts within 2 points, one in three beyond
LITTLE = 0.05  # Min et al.'s drop is 0 to 5 points
PAIRED = "sets of examples, paired"
PLAIN = Scale(100, " points", 1, signed=False)
COMMAND = (
    "python -m experiments.in_context --task {task} --data DIR --models MODELS/decoder/*/model "
    "--out docs/results/in_context/{task}"
)


def claims() -> tuple[Claim, ...]:
    """All of them."""
    zhao = "Zhao et al. 2021"
    return (
        _claim(
            "7a",
            "Fine-tuning few parameters on k examples is above the same examples in the context.",
            "Liu et al. 2022 (T-Few), table 1",
            "held-out tasks: T-Few 72.4, GPT-3 175B in context 66.6",
            judge_peft,
        ),
        _claim(
            "7b",
            "The order of the examples alone moves the accuracy: its deviation is above 2 points.",
            f"{zhao}, section 3; Lu et al. 2022, figure 1",
            "SST-2, GPT-3: from near chance (54%) to near the state of the art (93%) by order",
            functools.partial(judge_spread, kind="orders"),
        ),
        _claim(
            "7c",
            "The wording of the prompt alone moves the accuracy: its deviation is above 2 points.",
            f"{zhao}, section 3",
            "accuracy varies with the prompt's format as it does with its examples",
            functools.partial(judge_spread, kind="wordings"),
        ),
        _claim(
            "7d",
            "A prediction in context costs more than one of a tuned model.",
            "Liu et al. 2022 (T-Few), table 1",
            "flops an example: T-Few 1.1e12, GPT-3 175B in context 1.4e15",
            judge_cost,
        ),
        _claim(
            "7e",
            "Random labels of the examples hurt little: by less than 5 points.",
            "Min et al. 2022, section 4",
            "0 to 5 points, over 12 models",
            judge_labels,
        ),
    )


def _claim(id: str, sentence: str, source: str, figure: str, judge: Any) -> Claim:
    return Claim(
        id, SECTION, sentence, source, figure, ("in_context",), judge, COMMAND, wanted=("sst2",)
    )


def most(model: Mapping[str, Any]) -> str:
    """The largest number of examples in the context."""
    return max(model["k_shot"], key=int)


def judge_peft(results: Results) -> Verdict:
    """Tuned less in context at the most examples of both, mean over models."""
    (result,) = results
    parts: list[str] = []
    each: list[scores.Seeds] = []
    for model in result["models"]:
        shared = [k for k in model["peft"] if k in model["k_shot"]]
        if not shared:
            continue
        k = max(shared, key=int)
        tuned, shot = (scores.listed(model[side][k]) for side in ("peft", "k_shot"))
        each.append(scores.less(tuned, shot))
        parts.append(
            f"{by.name_of(model)}, k {k}: {scores.shown(tuned)} against {scores.shown(shot)}"
        )
    ours = f"tuned against in context: {'; '.join(parts)} ({result['task']})"
    found = of_mean(list(scores.mean_of(each).values()), PAIRED)
    return decide(found, 0.0, POINTS, what="tuned less in context, mean over models", ours=ours)


def judge_spread(results: Results, kind: str) -> Verdict:
    """The deviation of accuracies over orders or wordings, pooled over models.

    Of models that are above the largest class: one that answers it always is moved by nothing.
    """
    (result,) = results
    sets = [(m, m[kind]["values"]) for m in result["models"] if m[kind]["values"]]
    parts = (
        f"{by.name_of(m)}: {100 * min(x):.1f} to {100 * max(x):.1f} over {len(x)} {kind}"
        f"{'' if answers(m, result) else ', not above the largest class'}"
        for m, x in sets
    )
    ours = f"{'; '.join(parts)} ({result['task']}, largest class {100 * result['majority']:.1f})"
    able = [x for m, x in sets if answers(m, result)]
    if sets and not able:
        return undecided(ours, "no model is above the largest class for certain")
    found = of_deviation(able, kind)
    lack = f"there are fewer than two {kind}"
    what = f"deviation over {kind}, pooled over models"
    return decide(found, SPREAD, PLAIN, what=what, ours=ours, lack=lack)


def answers(model: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether a model is above the largest class for certain, with the most examples."""
    true = scores.listed(model["k_shot"][most(model)])
    gain = of_mean([x - result["majority"] for x in true.values()])
    return gain is not None and gain.low > 0


def judge_cost(results: Results) -> Verdict:
    """Tokens that a prediction reads, in context over tuned; of every model."""
    (result,) = results
    parts: list[str] = []
    times: list[float] = []
    for model in result["models"]:
        counts = model["tokens_per_prediction"]
        k = max((k for k in counts if k != "peft"), key=int)
        times.append(counts[k] / counts["peft"])
        parts.append(
            f"{by.name_of(model)}: {counts[k]:,.0f} tokens with {k} examples, "
            f"{counts['peft']:,.0f} tuned, {times[-1]:.1f} times"
        )
    reason = f"the model reads at least {min(times):.1f} times as many tokens a prediction"
    return exact(min(times) > 1, "; ".join(parts), reason)


def judge_labels(results: Results) -> Verdict:
    """The drop from true to random labels at the most examples, mean over models.

    Of models that are above the largest class with true labels: others have nothing to lose.
    """
    (result,) = results
    drops: list[scores.Seeds] = []
    parts: list[str] = []
    for model in result["models"]:
        k, random = most(model), scores.listed(model["random_labels"])
        true = scores.listed(model["k_shot"][k])
        if not random:
            continue
        above = answers(model, result)
        if above:
            drops.append(scores.less(random, true))
        parts.append(
            f"{by.name_of(model)}, k {k}: true {scores.shown(true)}, random "
            f"{scores.shown(random)}{'' if above else ', not above the largest class'}"
        )
    ours = f"{'; '.join(parts)} ({result['task']}, largest class {100 * result['majority']:.1f})"
    if not drops:
        return undecided(ours, "no model is above the largest class for certain with true labels")
    found = of_mean(list(scores.mean_of(drops).values()), PAIRED)
    return decide(found, -LITTLE, POINTS, what="random less true labels", ours=ours)
