"""Claims on LoRA: its rank against the weights that it updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common import claims_scores as scores
from experiments.common.claims import POINTS, Claim, Results, Verdict, decide, undecided
from experiments.common.claims_intervals import of_mean

RANK = "LoRA: rank and weights"
HU = "Hu et al. 2022, table 6"
CLOSE = 0.01  # a point
FEW = 0.05  # of the answers
RANK_COMMAND = (
    "python -m experiments.lora_rank --task {task} --data DIR --seeds 3 --ranks 1 2 4 8 64 "
    "--out docs/results/lora_rank/{task}"
)
DECODER_COMMAND = (
    "python -m experiments.lora_rank_decoder --task {task} --data DIR "
    "--model MODELS/decoder/64m/model --seeds 3 --ranks 1 2 4 8 64 "
    "--weights q q,v q,k,v,o --length 128 --generate 500 "
    "--out docs/results/lora_rank_decoder/{task}"
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
            "4c",
            RANK,
            "So it is for a decoder that writes SQL.",
            HU,
            "GPT-3 175B, WikiSQL, q and v, ranks 1 and 64: 73.4 and 73.5",
            ("lora_rank_decoder",),
            judge_rank_of_answers,
            DECODER_COMMAND,
            accepts=lambda r: "q,v" in r["scores"],
            wanted=("wikisql",),
        ),
        Claim(
            "4d",
            RANK,
            "There too updating q and v is above updating q alone.",
            HU,
            "GPT-3 175B, WikiSQL, q,v against q, ranks 1 to 64: 73.3 to 73.8 against 68.8 to 70.5",
            ("lora_rank_decoder",),
            judge_weights_of_answers,
            DECODER_COMMAND,
            accepts=lambda r: "q" in r["scores"] and "q,v" in r["scores"],
            wanted=("wikisql",),
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


# -- of answers that a decoder writes --------------------------------------------------------------


def judge_rank_of_answers(results: Results) -> Verdict:
    """As `judge_rank`, of the share of answers that are right."""
    (result,) = results
    ranks, ours, metric = _ranks(result, "q,v"), _losses(result), result["metric"]
    if len(ranks) < 2:
        return undecided(ours, "there is one rank alone")
    low, high = (result["scores"]["q,v"][str(r)].get(metric) for r in (ranks[0], ranks[-1]))
    if metric == "loss" or _hardly(result):
        return undecided(ours, f"under {FEW:.0%} of the answers are right: there is no score yet")
    each = scores.less(scores.listed(low), scores.listed(high))
    what = f"q,v, rank {ranks[0]} less rank {ranks[-1]}"
    return decide(
        of_mean(list(each.values()), "seeds, paired"), -CLOSE, POINTS, what=what, ours=ours
    )


def judge_weights_of_answers(results: Results) -> Verdict:
    """As `judge_weights`, of the share of answers that are right."""
    (result,) = results
    ours, metric = _losses(result), result["metric"]
    if metric == "loss" or _hardly(result):
        return undecided(ours, f"under {FEW:.0%} of the answers are right: there is no score yet")
    both, q = (result["scores"][w] for w in ("q,v", "q"))
    each = scores.mean_of(
        [
            scores.less(scores.listed(both[r][metric]), scores.listed(q[r][metric]))
            for r in both
            if r in q
        ]
    )
    found = of_mean(list(each.values()), "seeds, paired")
    return decide(found, 0.0, POINTS, what="q,v less q, mean over ranks", ours=ours)


def _hardly(result: Mapping[str, Any]) -> bool:
    """Whether hardly any answer is right, whatever is trained: equal scores then say nothing."""
    each = (by[result["metric"]]["mean"] for of in result["scores"].values() for by in of.values())
    return max(each) < FEW


def _losses(result: Mapping[str, Any]) -> str:
    metric = result["metric"]

    def shown(by: Mapping[str, Any]) -> str:
        right = "" if metric == "loss" else f" ({scores.shown(scores.listed(by[metric]))}%)"
        return f"{by['loss']['mean']:.3f}{right}"

    told = "held-out nats a token" + ("" if metric == "loss" else f" (and {metric})")
    rows = (
        f"{w}: " + ", ".join(f"r {r} {shown(by)}" for r, by in of.items())
        for w, of in result["scores"].items()
    )
    return f"{told}: " + "; ".join(rows)
