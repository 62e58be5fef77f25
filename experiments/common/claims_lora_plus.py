"""Claims on LoRA+: a higher rate of B, its ratio to A's, and the width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from experiments.common import claims_models as by
from experiments.common import claims_scores as scores
from experiments.common.claims import POINTS, TIMES, Claim, Results, Verdict, decide, undecided
from experiments.common.claims_intervals import of_mean
from experiments.common.loss_curves import steps_to

PLUS, HAYOU = "LoRA+", "Hayou et al. 2024"
RATIO = 16.0  # of the rates of B and A, the paper's
PLUS_COMMAND = (
    "python -m experiments.lora_plus --task {task} --data DIR --seeds 3 --ratios 1 4 16 "
    "--out docs/results/lora_plus/{task}"
)


def claims() -> tuple[Claim, ...]:
    """All of them."""
    return (
        Claim(
            "5a",
            PLUS,
            "With B learning 16 times as fast, plain LoRA's last loss is reached in fewer steps.",
            HAYOU,
            "up to 2 times faster",
            ("lora_plus",),
            judge_steps,
            PLUS_COMMAND,
            wanted=("sst2",),
        ),
        Claim(
            "5b",
            PLUS,
            "With B learning 16 times as fast the score is higher.",
            HAYOU,
            "1 to 2 points higher",
            ("lora_plus",),
            judge_score,
            PLUS_COMMAND,
            wanted=("sst2",),
        ),
        Claim(
            "5f",
            PLUS,
            "The wider the model, the larger the ratio of the lowest loss.",
            HAYOU,
            "in theory in proportion to the width",
            ("by_size",),
            judge_width,
            "python -m experiments.by_size --kind lora_plus --task {task} --data DIR --seeds 3 "
            "--models MODELS/encoder/*/model --ratios 1 4 16 64 "
            "--out docs/results/by_size/{task}_lora_plus",
            accepts=lambda r: r.get("kind") == "lora_plus",
            wanted=("sst2",),
        ),
    )


def faster(result: Mapping[str, Any]) -> str | None:
    """The ratio to hold against plain LoRA: the paper's, or the one nearest to it above 1."""
    ratios = [r for r in result["rows"] if float(r) > 1]
    return min(ratios, key=lambda r: abs(math.log(float(r) / RATIO))) if ratios else None


def judge_steps(results: Results) -> Verdict:
    """Steps of plain LoRA over steps to its last loss, by seed."""
    (result,) = results
    ratio, rows = faster(result), result["rows"]
    ours = "steps to plain LoRA's last loss: " + ", ".join(
        f"ratio {r} {_steps(row['steps_to_plain_loss'])}" for r, row in rows.items()
    )
    if ratio is None or "1" not in rows:
        return undecided(ours, "it takes ratio 1 and a larger one")
    # Each seed's losses, in windows.
    plain, fast = (rows[r].get("curves") for r in ("1", ratio))
    if plain is None or fast is None:
        return undecided(ours, "the file holds losses as their mean over seeds alone: no interval")
    window = int(result["config"]["window"])
    gains = [
        math.log(steps_to(a, a[-1], window) / steps_to(b, a[-1], window))
        for a, b in zip(plain, fast, strict=False)
    ]
    found = of_mean(gains, "seeds, paired")
    shown = None if found is None else found.map(math.exp)
    return decide(shown, 1.0, TIMES, what=f"ratio {ratio}, fewer steps by", ours=ours)


def _steps(steps: int | None) -> str:
    return "never" if steps is None else f"{steps:,}"


def judge_score(results: Results) -> Verdict:
    """The ratio's score less plain LoRA's."""
    (result,) = results
    ratio, rows = faster(result), result["rows"]
    ours = ", ".join(f"ratio {r} {scores.shown(scores.of_run(result, f'ratio_{r}'))}" for r in rows)
    if ratio is None or "1" not in rows:
        return undecided(ours, "it takes ratio 1 and a larger one")
    each = scores.less(*(scores.of_run(result, f"ratio_{r}") for r in (ratio, "1")))
    found = of_mean(list(each.values()), "seeds, paired")
    return decide(found, 0.0, POINTS, what=f"ratio {ratio} less ratio 1", ours=ours)


def judge_width(results: Results) -> Verdict:
    """The slope of the logarithm of the best ratio over that of the width, by seed."""
    (result,) = results
    models = by.last_of_each(result["models"])
    best = [[min(x, key=lambda r: x[r]) for x in _last_losses(m)] for m in models]
    ours = "; ".join(
        f"{by.name_of(m)}, width {m['width']}: ratio {', '.join(ratios)} (by seed)"
        for m, ratios in zip(models, best, strict=True)
    )
    weights = by.weights_of_slope([math.log2(m["width"]) for m in models])
    if weights is None:
        return undecided(ours, "there are fewer than two widths")
    logs = [[math.log2(float(r)) for r in ratios] for ratios in best]
    slopes = [
        sum(w * x for w, x in zip(weights, seed, strict=True)) for seed in zip(*logs, strict=True)
    ]
    found = of_mean(slopes, "seeds")
    shown = None if found is None else found.map(lambda x: 2.0**x)
    return decide(shown, 1.0, TIMES, what="ratio when the width doubles, times", ours=ours)


def _last_losses(model: Mapping[str, Any]) -> list[dict[str, float]]:
    """Each seed's last loss by ratio."""
    by_ratio = {ratio: found["curves"] for ratio, found in model["ratios"].items()}
    seeds = range(min(map(len, by_ratio.values())))
    return [{ratio: curves[i][-1] for ratio, curves in by_ratio.items()} for i in seeds]
