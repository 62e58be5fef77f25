"""Claims on prompt tuning and multi-layer prompts, against full fine-tuning, by a model's size."""

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
    undecided,
)
from experiments.common.claims_intervals import of_difference, of_mean

SECTION = "Prompts"
CLOSE = 0.01  # a point
PER_DOUBLING = Scale(100, " points a doubling of the parameters", 2)
COMMAND = (
    "python -m experiments.by_size --kind methods --task {task} --data DIR --seeds 3 "
    "--models MODELS/encoder/*/model --out docs/results/by_size/{task}_methods"
)
LENGTHS = (
    "python -m experiments.prompt_tuning --task {task} --data DIR --seeds 3 --lengths 1 5 20 100 "
    "--out docs/results/prompt_tuning/{task}"
)
LESTER, LIU = "Lester et al. 2021", "Liu et al. 2022 (P-tuning v2)"


def claims() -> tuple[Claim, ...]:
    """All of them."""
    return (
        _claim(
            "2a",
            "Prompt tuning stays below full fine-tuning on a small model.",
            f"{LESTER}, figure 1",
            "T5-Small to T5-XL stay below full fine-tuning on SuperGLUE, the more so the smaller",
            judge_smallest,
            ("full", "prompt"),
        ),
        _claim(
            "2b",
            "The gap between prompt tuning and full fine-tuning shrinks as models grow.",
            f"{LESTER}, figure 1",
            "closed at T5-XXL (11B parameters): SuperGLUE 90.5",
            judge_gap,
            ("full", "prompt"),
        ),
        _claim(
            "2c",
            "A tuned prompt is above the same frozen model without a tuned one.",
            f"{LESTER}, figure 1",
            "a tuned T5-Small is level with a prompted GPT-3 XL, over 16 times as large",
            functools.partial(judge_above, high="prompt", low="fixed_prompt"),
            ("prompt", "fixed_prompt"),
        ),
        Claim(
            "2d",
            SECTION,
            "A prompt of 20 virtual tokens is above a prompt of one.",
            f"{LESTER}, figure 3a",
            "more than one token is needed for a good score at every size but XXL",
            ("by_size", "prompt_tuning"),
            functools.partial(judge_lengths, short=1, long=20, line=0.0, sign=1),
            LENGTHS,
            accepts=lambda r: len(lengths_of(r, 1, 20)) > 0,
            wanted=("sst2",),
        ),
        Claim(
            "2e",
            SECTION,
            "More than 20 virtual tokens add little: 100 add less than a point.",
            f"{LESTER}, figure 3a",
            "beyond 20 tokens only marginal gains",
            ("by_size", "prompt_tuning"),
            functools.partial(judge_lengths, short=20, long=100, line=-CLOSE, sign=-1),
            LENGTHS,
            accepts=lambda r: len(lengths_of(r, 20, 100)) > 0,
            wanted=("sst2",),
        ),
        _claim(
            "2f",
            "Prompts in every layer are above a prompt of the input alone.",
            f"{LIU}, figure 1; Li and Liang 2021, section 7.2",
            "input-only prompts fall behind at 330M to 2B parameters, multi-layer ones do not",
            functools.partial(judge_above, high="prefix", low="prompt"),
            ("prefix", "prompt"),
        ),
        _claim(
            "2g",
            "Prompts in every layer close the gap: at most a point below full fine-tuning.",
            f"{LIU}, figure 1; Li and Liang 2021, table 1",
            "level with full fine-tuning from 330M to 10B parameters; E2E, GPT-2 medium: "
            "BLEU 69.7 against 68.2",
            functools.partial(judge_above, high="prefix", low="full", line=-CLOSE),
            ("prefix", "full"),
        ),
    )


def _claim(
    id: str, sentence: str, source: str, figure: str, judge: Any, needs: tuple[str, ...]
) -> Claim:
    return Claim(
        id, SECTION, sentence, source, figure, ("by_size",), judge, COMMAND,
        accepts=lambda r: r.get("kind") == "methods" and bool(with_scores(r, needs)),
        wanted=("sst2",),
    )  # fmt: skip


def named(result: Mapping[str, Any], name: str) -> str:
    """The score that a name stands for: `prompt` for that of the longest prompt of all models."""
    models = by.last_of_each(result["models"])
    if name != "prompt" or any("prompt" in m["scores"] for m in models):
        return name
    shared = set.intersection(*({*m["scores"]} for m in models)) if models else set[str]()
    lengths = [int(n.removeprefix("prompt_")) for n in shared if n.startswith("prompt_")]
    return f"prompt_{max(lengths)}" if lengths else name


def with_scores(result: Mapping[str, Any], names: tuple[str, ...]) -> list[by.Model]:
    """The models, from small to large, that have all of these scores."""
    wanted = [named(result, n) for n in names]
    models = by.last_of_each(result["models"])
    return [m for m in models if all(n in m["scores"] for n in wanted)]


def differences(model: by.Model, high: str, low: str) -> scores.Seeds:
    """One method's scores less another's, by seed; one that has no seeds stands against each."""
    a, b = (scores.listed(model["scores"][n]) for n in (high, low))
    return scores.less(a, dict.fromkeys(a, b[0]) if len(b) == 1 else b)


def told(result: Mapping[str, Any], models: list[by.Model], *names: str) -> str:
    """Each model's scores, in words."""
    parts: list[str] = []
    for m in models:
        each = ", ".join(f"{n} {scores.shown(scores.listed(m['scores'][n]))}" for n in names)
        parts.append(f"{by.name_of(m)}: {each}")
    return f"{'; '.join(parts)} ({result['task']}, {result['metric']})"


def judge_smallest(results: Results) -> Verdict:
    """Full fine-tuning less prompt tuning, of the smallest model."""
    (result,) = results
    model, prompt = with_scores(result, ("full", "prompt"))[0], named(result, "prompt")
    sides = [scores.listed(model["scores"][n]) for n in ("full", prompt)]
    what = f"{by.name_of(model)}, full less {prompt}"
    ours = told(result, [model], "full", prompt)
    return decide(of_difference(*sides), 0.0, POINTS, what=what, ours=ours)


def judge_gap(results: Results) -> Verdict:
    """The slope of prompt tuning less full fine-tuning over the logarithm of the parameters."""
    (result,) = results
    models, prompt = with_scores(result, ("full", "prompt")), named(result, "prompt")
    ours = told(result, models, "full", prompt)
    weights = by.weights_of_slope(by.doublings(models), by.families(models))
    if weights is None:
        return undecided(ours, "there are fewer than two sizes of one family: no slope")
    gaps = [differences(m, prompt, "full") for m in models]
    shared = sorted(set(gaps[0]).intersection(*gaps[1:]))
    slopes = [sum(w * g[s] for w, g in zip(weights, gaps, strict=True)) for s in shared]
    return decide(of_mean(slopes), 0.0, PER_DOUBLING, what=f"{prompt} less full", ours=ours)


def judge_above(results: Results, high: str, low: str, line: float = 0.0) -> Verdict:
    """One method less another, mean over models."""
    (result,) = results
    models = with_scores(result, (high, low))
    high, low = named(result, high), named(result, low)
    each = scores.mean_of([differences(m, high, low) for m in models])
    what = f"{high} less {low}" + (", mean over models" if len(models) > 1 else "")
    ours = told(result, models, high, low)
    return decide(of_mean(list(each.values()), "seeds, paired"), line, POINTS, what=what, ours=ours)


def lengths_of(
    result: Mapping[str, Any], short: int, long: int
) -> list[tuple[str, scores.Seeds, scores.Seeds]]:
    """Of each model the scores of a short and of a long prompt, in either experiment's form."""
    if "models" in result:
        if result.get("kind") != "methods":
            return []
        names = (f"prompt_{short}", f"prompt_{long}")
        return [
            (by.name_of(m), *(scores.listed(m["scores"][n]) for n in names))  # type: ignore[misc]
            for m in with_scores(result, names)
        ]
    # A sweep over lengths and starts: the first start that it was run with from drawn words.
    starts = [s for s in ("vocabulary", "uniform") if s in result["scores"]]
    names = (f"{starts[0]}_{short}", f"{starts[0]}_{long}") if starts else ("", "")
    if any(n not in result["runs"] for n in names):
        return []
    a, b = (scores.of_run(result, n) for n in names)
    return [(f"start {starts[0]}", a, b)]


def judge_lengths(results: Results, short: int, long: int, line: float, sign: int) -> Verdict:
    """The longer prompt less the shorter one, mean over models; `sign` -1 asks for little of it."""
    (result,) = results
    found = lengths_of(result, short, long)
    each = scores.mean_of([scores.less(b, a) for _, a, b in found])
    signed = [sign * x for x in each.values()]
    names = (long, short) if sign > 0 else (short, long)
    ours = "; ".join(
        f"{name}: {short} tokens {scores.shown(a)}, {long} tokens {scores.shown(b)}"
        for name, a, b in found
    )
    what = f"{names[0]} tokens less {names[1]}"
    return decide(of_mean(signed, "seeds, paired"), line, POINTS, what=what, ours=ours)
