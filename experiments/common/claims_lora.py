"""Claims on LoRA: its rank against the weights it updates, and LoRA+'s rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common import claims_scores as scores
from experiments.common.claims import POINTS, TIMES, Claim, Results, Verdict, decide, undecided
from experiments.common.claims_intervals import of_mean

RANK, PLUS = "LoRA: rank and weights", "LoRA+"
HU, HAYOU = "Hu et al. 2022, table 6", "Hayou et al. 2024"
CLOSE = 0.01  # a point
RATIO = 16.0  # of the rates of B and A, the paper's
RANK_COMMAND = (
    "python -m experiments.lora_rank --task {task} --data DIR --seeds 3 --ranks 1 2 4 8 64 "
    "--out docs/results/lora_rank/{task}"
)
PLUS_COMMAND = (
    "python -m experiments.lora_plus --task {task} --data DIR --seeds 3 --ratios 1 4 16 "
    "--out docs/results/lora_plus/{task}"
)


def claims() -> tuple[Claim, ...]:
    """All of them."""
    return (
        Claim(
            "4a",
            RANK,
            "A small rank is enough: on q and v the lowest is at most a point below the highest.",
            HU,
            "GPT-3 175B, MultiNLI, ranks 1 and 64: 91.3 and 91.4; WikiSQL: 73.4 and 73.5",
            ("lora_rank",),
            judge_rank,
            RANK_COMMAND,
            accepts=lambda r: "q,v" in r["scores"],
            wanted=("mnli", "sst2"),
        ),
        Claim(
            "4b",
            RANK,
            "Updating q and v is above updating q alone, at the same ranks.",
            HU,
            "GPT-3 175B, q,v against q, ranks 1 to 64: MultiNLI 91.3 to 91.6 against 90.7 to 91.1; "
            "WikiSQL 73.3 to 73.8 against 68.8 to 70.5",
            ("lora_rank",),
            judge_weights,
            RANK_COMMAND,
            accepts=lambda r: "q" in r["scores"] and "q,v" in r["scores"],
            wanted=("mnli", "sst2"),
        ),
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
    )


# -- rank ------------------------------------------------------------------------------------------


def judge_rank(results: Results) -> Verdict:
    """The lowest rank less the highest, on q and v."""
    (result,) = results
    ranks, ours = _ranks(result, "q,v"), _table(result, ["q,v"])
    low, high = ranks[0], ranks[-1]
    if low == high:
        return undecided(ours, "there is one rank alone")
    each = scores.less(_of(result, "q,v", low), _of(result, "q,v", high))
    found = of_mean(list(each.values()), "seeds, paired")
    return decide(found, -CLOSE, POINTS, what=f"q,v, rank {low} less rank {high}", ours=ours)


def judge_weights(results: Results) -> Verdict:
    """q and v less q alone, mean over the ranks of both."""
    (result,) = results
    shared = [r for r in _ranks(result, "q,v") if r in _ranks(result, "q")]
    ours = _table(result, ["q", "q,v"])
    each = scores.mean_of([scores.less(_of(result, "q,v", r), _of(result, "q", r)) for r in shared])
    found = of_mean(list(each.values()), "seeds, paired")
    return decide(found, 0.0, POINTS, what="q,v less q, mean over ranks", ours=ours)


def _ranks(result: Mapping[str, Any], weights: str) -> list[int]:
    return sorted(int(r) for r in result["scores"][weights])


def _of(result: Mapping[str, Any], weights: str, rank: int) -> scores.Seeds:
    return scores.of_run(result, f"{weights.replace(',', '')}_r{rank}")


def _table(result: Mapping[str, Any], kinds: Sequence[str]) -> str:
    rows = (
        f"{w}: " + ", ".join(f"r {r} {scores.shown(_of(result, w, r))}" for r in _ranks(result, w))
        for w in kinds
    )
    return "; ".join(rows)


# -- LoRA+ -----------------------------------------------------------------------------------------


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


def steps_to(curve: Sequence[float], loss: float, window: int) -> int:
    """Steps until a curve is at a loss; all of its steps and a window more where it never is."""
    reached = next((i for i, x in enumerate(curve) if x <= loss), len(curve))
    return (reached + 1) * window


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
